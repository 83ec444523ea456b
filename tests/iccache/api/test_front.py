"""What the front takes it reads as aiohttp would; what it does not take goes there with every byte, in order."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from hypothesis import given
from hypothesis import strategies as st

from iccache import config
from iccache.api import front
from iccache.api.front import read_head
from iccache.api.serve import serving
from iccache.assemble import Proxy
from tests.differential.wire import Script, Upstream, answer
from tests.e2e.world import settings

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n"
BODY = b'{"model":"large","messages":[{"role":"user","content":"hi"}]}'
WHOLE = HEAD.replace(b"5", b"%d" % len(BODY)) + b"\r\n" + BODY


@pytest.mark.parametrize(
    "head",
    [
        HEAD,
        HEAD.replace(b"/v1/chat/completions", b"/messages?beta=true"),
        HEAD + b"Connection: Keep-Alive\r\nAuthorization:Bearer a\r\nX-Text: \xc3\xbc \xff\t.\t\r\n",
    ],
)
def test_a_plain_request_is_taken(head: bytes) -> None:
    read = read_head(head + b"\r\nhello and more")
    assert read is not None
    assert (read[0].length, (head + b"\r\nhello")[read[1] :]) == (5, b"hello")


@pytest.mark.parametrize(
    "head",
    [
        HEAD.replace(b"POST", b"PUT"),
        HEAD.replace(b"1.1", b"1.0"),
        HEAD.replace(b"/v1/chat/completions", b"/v1/embeddings"),
        HEAD.replace(b"/v1/chat/completions", b"/v1/chat/completions/"),
        HEAD.replace(b"/v1/chat/completions", b"/v1/chat/completions?a=%2e"),
        HEAD.replace(b"/v1/chat/completions", b"http://b/v1/chat/completions"),
        HEAD.replace(b"Content-Length: 5\r\n", b""),
        HEAD.replace(b": 5", b": +5"),
        HEAD.replace(b": 5", b": 5, 5"),
        HEAD.replace(b": 5", b": 99999999"),
        HEAD.replace(b"Host: a\r\n", b""),
        *(
            HEAD + odd + b"\r\n"
            for odd in (
                b"content-length: 5", b"Transfer-Encoding: chunked", b"transfer-encoding : chunked", b"HOST: b",
                b"Content-Encoding: gzip", b"Expect: 100-continue", b"Connection: close", b"Upgrade: websocket",
                b"Connection: keep-alive, upgrade", b"X-A: a\r\n b", b"X-A: a\0", b"X-A: a\rb", b"X-A: a\nb", b": a",
                b"X A: a", b"X-A", b"TE: trailers", b"X-A: " + b"a" * 8000,
            )
        ),
        HEAD.replace(b"\r\n", b"\n"),
        b"\r\n" + HEAD,
    ],
)  # fmt: skip
def test_whatever_is_not_plain_is_not_taken(head: bytes) -> None:
    assert read_head(head + b"\r\nhello") is None


NAMES = st.sampled_from(
    [b"Content-Length", b"content-length", b"Transfer-Encoding", b"Host", b"Connection", b"Expect", b"X-A", b"x-a",
     b"Cookie", b"TE", b"Trailer", b"Content-Type", b"Authorization", b"X\xe9", b"X A", b""]
) | st.binary(max_size=6)  # fmt: skip
VALUES = st.sampled_from(
    [b"5", b"05", b"0", b"5 ", b"+5", b"5,5", b"0x5", b"", b"chunked", b"keep-alive", b"close", b"a", b"\xc3\xbc",
     b"a\tb", b"\x7f", b"application/json"]
) | st.binary(max_size=8)  # fmt: skip
ENDS = st.sampled_from([b"\r\n"] * 12 + [b"\n", b"\r", b"\r\n "])
GLUE = st.sampled_from([b": "] * 12 + [b":", b" : ", b":\t ", b""])


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    """Heads that nearly are, or are, what is taken."""
    path = draw(st.sampled_from([b"/v1/chat/completions", b"/messages", b"/v1/responses?a=b&c", b"/v1/x", b"/%76"]))
    lines = [b"Host: a", b"Content-Length: 5"] if draw(st.integers(0, 4)) else []
    lines += [draw(NAMES) + draw(GLUE) + draw(VALUES) for _ in range(draw(st.integers(0, 4)))]
    lines = draw(st.permutations(lines))
    start = b"POST " + path + draw(st.sampled_from([b" HTTP/1.1"] * 6 + [b" HTTP/1.0", b"  HTTP/1.1", b""]))
    return b"".join([line + draw(ENDS) for line in [start, *lines]]) + b"\r\n"


class Ignored:
    """What a parser asks of its protocol."""

    def pause_reading(self) -> None: ...

    def resume_reading(self, resume_parser: bool = True) -> None: ...


async def as_aiohttp_reads(data: bytes) -> Any:
    """Its first message and the body's bytes, or None where it refuses."""
    parser = HttpRequestParser(Ignored(), asyncio.get_running_loop(), 2**16)  # type: ignore[arg-type]
    try:
        messages, _, _ = parser.feed_data(data)
    except HttpProcessingError:
        return None
    if not messages:
        return None
    message, body = messages[0]
    return message, await body.read() if body.is_eof() else None


@given(head=heads())
def test_what_is_taken_is_read_as_aiohttp_reads_it(head: bytes) -> None:
    read = read_head(head + b"hello")
    if read is None:
        return
    asked, start = read
    body = (head + b"hello")[start : start + asked.length]
    known = asyncio.run(as_aiohttp_reads((head + b"hello")[: start + asked.length]))
    assert known is not None
    message, whole = known
    assert message.method == "POST" and message.version == (1, 1) and not message.chunked and not message.upgrade
    assert message.path == asked.path + (f"?{asked.query}" if asked.query else "")
    assert sorted(message.headers.items()) == sorted(asked.headers.items())
    assert len(body) < asked.length or whole == body


# ---- on sockets


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as made:
        made.script = Script(200, [("Content-Type", "application/json")], [b"{}"])
        yield made


@pytest.fixture
async def port(tmp_path: Path, upstream: Upstream) -> AsyncIterator[int]:
    data = settings(upstream.base_url, upstream.base_url, tmp_path / "ic.db")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with serving(Proxy(config.parse(data), {}), listener, last_word_s=1):
            yield listener.getsockname()[1]


async def test_answers_come_in_the_order_of_the_requests_also_past_a_hand_over(port: int) -> None:
    """The third goes to aiohttp, which keeps the connection."""
    other = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(WHOLE + WHOLE.replace(b'"large"', b'"LARGE"') + other + WHOLE + other)
    async with asyncio.timeout(10):
        found = [await answer(reader, "POST") for _ in range(5)]
    writer.close()
    assert [one.status for one in found] == [200, 404, 200, 200, 200]
    assert b'"ok"' in found[2].body and b'"ok"' in found[4].body and found[3].body == b"{}"


async def test_a_request_is_taken_however_it_is_cut(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def handed_over(*_: object) -> None:
        raise AssertionError("this is aiohttp's")

    monkeypatch.setattr(front.Link, "_hand_over", handed_over)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(20):
        for step in (1, 40, len(WHOLE) - len(BODY), 2 * len(WHOLE)):
            for i in range(0, 2 * len(WHOLE), step):
                writer.write((WHOLE + WHOLE)[i : i + step])
                await asyncio.sleep(0)
            assert [(await answer(reader, "POST")).status for _ in range(2)] == [200, 200]
    writer.close()


async def test_requests_that_wait_are_left_in_the_socket_and_none_is_lost(port: int, upstream: Upstream) -> None:
    large = json.dumps({"model": "large", "messages": [{"role": "user", "content": "x" * 100_000}]}).encode()
    head = HEAD.replace(b"5", b"%d" % len(large)) + b"\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write((head + large) * 20)
    async with asyncio.timeout(30):
        assert [(await answer(reader, "POST")).status for _ in range(20)] == [200] * 20
    writer.close()
    assert len(upstream.requests) == 20


async def test_an_upstreams_header_cannot_end_our_head(port: int, upstream: Upstream) -> None:
    upstream.script = Script(200, [("Content-Type", "application/json"), ("X-A", "a\rSet-Cookie: b=c")], [b"{}"])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(WHOLE)
    async with asyncio.timeout(10):
        said = await answer(reader, "POST")
    writer.close()
    assert said.status == 502
    assert all(name.lower() != "set-cookie" and "\r" not in value for name, value in said.headers)
