"""Answers that come packed, although identity is asked for: unpacked for those who listen, never for the client."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

MOST_BYTES = 16 * 1024 * 1024  # of what one piece unpacks to
_KNOWN = frozenset({"gzip", "x-gzip", "deflate"})
_GZIP_OR_ZLIB = 47  # zlib's word for: whichever of the two its beginning says


def is_packed(headers: Mapping[str, str]) -> bool:
    """Whether an answer's bytes are not what it says."""
    return headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity")


def unpacker(headers: Mapping[str, str]) -> Callable[[bytes], bytes] | None:
    """What makes the text of an answer's pieces, given in order; None where they are as they are, or in a coding that
    is not known here. From where it is damaged, or too much, nothing more comes."""
    if headers.get("Content-Encoding", "").strip().lower() not in _KNOWN:
        return None
    inflate = zlib.decompressobj(_GZIP_OR_ZLIB)
    broken = False

    def unpacked(piece: bytes) -> bytes:
        nonlocal broken
        if broken:
            return b""
        try:
            text = inflate.decompress(piece, MOST_BYTES)
        except zlib.error:
            broken = True
            return b""
        broken = bool(inflate.unconsumed_tail)
        return text

    return unpacked
