"""Which headers cross the proxy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from multidict import CIMultiDict

OURS = "x-iccache-"
UPSTREAM_REQUEST_ID = "x-iccache-upstream-request-id"

# of one connection, not of the message (RFC 9110, 7.6.1)
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_NOT_UP = _HOP_BY_HOP | {
    "host",
    "content-length",  # written anew
    "accept-encoding",  # identity: the bytes are read on their way
    "expect",
    "authorization",  # the client's keys are for us; the backend has its own
    "x-api-key",
    "api-key",
    "cookie",
    "forwarded",  # of the way to us
    "via",
    "x-real-ip",
}
_NONE: frozenset[str] = frozenset()
_DECODED = frozenset({"gzip", "deflate", "br", "zstd"})  # on their way in; in any other coding a body stays
_NOT_UP_PREFIXES = (OURS, "x-forwarded-")
_NOT_DOWN = _HOP_BY_HOP | {
    "content-length",  # whoever answers knows how
    "date",
    "server",
    "set-cookie",  # a provider's session is with us, and would be shared by all clients
    "alt-svc",  # these three speak of the provider's host
    "strict-transport-security",
    "public-key-pins",
    "x-request-id",  # ours; renamed below
}


_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def for_upstream(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """A client's headers, as a backend gets them: without keys, and without what is of one connection."""
    named = _named_by_connection(headers)
    kept = CIMultiDict(
        [
            (name, value)
            for name, value in headers.items()
            if _goes_up(name) and (value.isascii() or _sendable(value)) and not (named and name.lower() in named)
        ]
    )
    coding = kept.get("Content-Encoding")
    if coding is not None and coding.lower() in _DECODED:
        del kept["Content-Encoding"]
    kept["Accept-Encoding"] = "identity"
    return kept


def forwardable(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """A backend's headers, as a client gets them. Its `x-request-id` becomes `x-iccache-upstream-request-id`.

    Dropped: what is of one connection, `Content-Length`, `Date`, `Server`, cookies, what speaks of the backend's host
    (`Alt-Svc`, HSTS), and any `x-iccache-*`, which are ours to set. `Content-Encoding` stays: bytes are never decoded.
    """
    named = _named_by_connection(headers)
    kept = CIMultiDict(
        [
            (name, value)
            for name, value in headers.items()
            if _goes_down(name) and (value.isascii() or _sendable(value)) and not (named and name.lower() in named)
        ]
    )
    for name, value in headers.items():
        if len(name) == 12 and name.lower() == "x-request-id" and _sendable(value):
            kept[UPSTREAM_REQUEST_ID] = value
    return kept


def readable(headers: Iterable[tuple[str, str]]) -> CIMultiDict[str]:
    """An upstream's headers without those that hold control characters, which no server would write again."""
    given = list(headers)
    if _CONTROL.search("".join([name + value for name, value in given])):
        given = [(name, value) for name, value in given if not _CONTROL.search(name + value)]
    return CIMultiDict(given)


@lru_cache(maxsize=1024)
def _goes_up(name: str) -> bool:
    name = name.lower()
    return name not in _NOT_UP and not name.startswith(_NOT_UP_PREFIXES)


@lru_cache(maxsize=1024)
def _goes_down(name: str) -> bool:
    name = name.lower()
    return name not in _NOT_DOWN and not name.startswith(OURS)


def _named_by_connection(headers: Mapping[str, str]) -> frozenset[str]:
    """Headers that a `Connection` header makes ones of the connection."""
    lines = [value for name, value in headers.items() if len(name) == 10 and name.lower() == "connection"]
    return frozenset([token.strip().lower() for line in lines for token in line.split(",")]) if lines else _NONE


def _sendable(value: str) -> bool:
    """Bytes that were no UTF-8 arrive as lone surrogates, which cannot be written again."""
    return not any("\ud800" <= c <= "\udfff" for c in value)
