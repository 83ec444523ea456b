"""Which headers cross, both ways."""

from __future__ import annotations

from multidict import CIMultiDict

from iccache.backends.headers import for_upstream, forwardable, readable

HOP = {
    "Connection": "keep-alive, X-Named , close",
    "Keep-Alive": "timeout=5",
    "Proxy-Authorization": "secret",
    "TE": "trailers",
    "Trailer": "x",
    "Transfer-Encoding": "chunked",
    "Upgrade": "h2c",
    "X-Named": "by Connection",
}


def test_up() -> None:
    given = HOP | {
        "Host": "us",
        "Content-Length": "1",
        "Content-Encoding": "gzip",
        "Accept-Encoding": "br",
        "AUTHORIZATION": "Bearer tenant",
        "X-Api-Key": "tenant",
        "api-key": "tenant",
        "Cookie": "tenant",
        "X-ICCACHE-Backend": "small",
        "x-iccache-anything": "1",
        "X-Forwarded-For": "10.0.0.1",
        "Forwarded": "for=10.0.0.1",
        "Content-Type": "application/json",
        "User-Agent": "OpenAI/Python",
        "X-Stainless-Lang": "python",
        "anthropic-version": "2023-06-01",
        "OpenAI-Organization": "org",
    }
    assert dict(for_upstream(given)) == {
        "Content-Type": "application/json",
        "User-Agent": "OpenAI/Python",
        "X-Stainless-Lang": "python",
        "anthropic-version": "2023-06-01",
        "OpenAI-Organization": "org",
        "Accept-Encoding": "identity",
    }


def test_down() -> None:
    given = CIMultiDict(
        HOP
        | {
            "Content-Length": "5",
            "Date": "today",
            "Server": "theirs",
            "Set-Cookie": "__cf_bm=1",
            "Alt-Svc": 'h3=":443"',
            "X-Request-Id": "req_theirs",
            "x-iccache-backend": "another proxy's",
            "Content-Type": "application/json",
            "Content-Encoding": "gzip",
            "Retry-After": "3",
            "x-ratelimit-remaining-tokens": "7",
            "openai-processing-ms": "9",
            "request-id": "anthropic's",
        }
    )
    given.add("Vary", "a")
    given.add("Vary", "b")
    assert list(forwardable(given).items()) == [
        ("Content-Type", "application/json"),
        ("Content-Encoding", "gzip"),
        ("Retry-After", "3"),
        ("x-ratelimit-remaining-tokens", "7"),
        ("openai-processing-ms", "9"),
        ("request-id", "anthropic's"),
        ("Vary", "a"),
        ("Vary", "b"),
        ("x-iccache-upstream-request-id", "req_theirs"),
    ]


def test_what_cannot_be_written_again_is_dropped() -> None:
    given = {"X-Bytes": b"\xff\xfe".decode("utf-8", "surrogateescape"), "X-Text": "\u00e9", "x-request-id": "\udcff"}
    assert dict(forwardable(given)) == {"X-Text": "\u00e9"}
    assert set(for_upstream(given)) == {"X-Text", "x-request-id", "Accept-Encoding"} - {"x-request-id"}


def test_what_no_server_would_write_is_not_read() -> None:
    given = [("X-A", "1"), ("X-Bell", "a\x07b"), ("X-A", "2"), ("X-Tab", "a\tb"), ("X-Del", "\x7f"), ("X-N\x00", "x")]
    assert list(readable(given).items()) == [("X-A", "1"), ("X-A", "2"), ("X-Tab", "a\tb")]
