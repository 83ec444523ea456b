"""What no client library sends: each is refused clearly or served correctly, and never hangs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from iccache import config
from iccache.api.serve import serving
from iccache.assemble import Proxy
from tests.differential.wire import Script, Upstream, answer
from tests.e2e.world import settings

BODY = b'{"model":"large","messages":[{"role":"user","content":"hi"}]}'
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
PIECES = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
HIDDEN = b"GET /v1/hidden HTTP/1.1\r\nHost: a\r\n\r\n"  # a second request, if somebody reads the first one otherwise
SLOW_S = 0.5


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as made:
        made.script = Script(200, [("Content-Type", "application/json")], [b"{}"])
        yield made


@pytest.fixture
async def port(tmp_path: Path, upstream: Upstream) -> AsyncIterator[int]:
    """A proxy that waits no longer than SLOW_S, for a head or for a body."""
    data = settings(upstream.base_url, upstream.base_url, tmp_path / "ic.db", server={"body_timeout_s": SLOW_S})
    proxy = Proxy(config.parse(data), {})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with serving(proxy, listener, keepalive_s=SLOW_S, lingering_s=SLOW_S, last_word_s=1):
            yield listener.getsockname()[1]


async def heard(port: int, *sent: bytes, pause_s: float = 0, within_s: float = 10) -> bytes:
    """Everything that comes until the proxy closes the connection, which it has to."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(within_s):
            for piece in sent:
                with contextlib.suppress(ConnectionError):
                    writer.write(piece)
                    await writer.drain()
                await asyncio.sleep(pause_s)
            with contextlib.suppress(ConnectionError):
                return await reader.read()
            return b""
    finally:
        writer.transport.abort()


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answers)]


SMUGGLED = {
    "Content-Length, then Transfer-Encoding": POST + LENGTH + CHUNKED + b"\r\n" + PIECES + HIDDEN,
    "Transfer-Encoding, then Content-Length": POST + CHUNKED + b"Content-Length: 4\r\n\r\n" + PIECES + HIDDEN,
    "two lengths": POST + LENGTH + b"Content-Length: 5\r\n\r\n" + BODY + HIDDEN,
    "the same length twice": POST + LENGTH + LENGTH + b"\r\n" + BODY + HIDDEN,
    "a list of lengths": POST + LENGTH[:-2] + b", %d\r\n\r\n" % len(BODY) + BODY + HIDDEN,
    "a length with a plus": POST + b"Content-Length: +61\r\n\r\n" + BODY + HIDDEN,
    "a length with a minus": POST + b"Content-Length: -61\r\n\r\n" + BODY + HIDDEN,
    "an unknown coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + PIECES + HIDDEN,
    "a coding after chunked": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + PIECES + HIDDEN,
    "chunked twice": POST + CHUNKED + CHUNKED + b"\r\n" + PIECES + HIDDEN,
    "a tab before chunked": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + PIECES + HIDDEN,
    "LF alone": (POST + LENGTH + b"\r\n").replace(b"\r\n", b"\n") + BODY + HIDDEN,
    "a space before the colon": POST + LENGTH.replace(b":", b" :") + b"\r\n" + BODY + HIDDEN,
    "a folded header": POST + b"X-A: b\r\n c\r\n" + LENGTH + b"\r\n" + BODY + HIDDEN,
    "LF in a chunk's extension": POST + CHUNKED + b"\r\n" + PIECES.replace(b"\r", b";a\nb\r", 1) + HIDDEN,
    "LF after a chunk's size": POST + CHUNKED + b"\r\n" + PIECES.replace(b"\r\n", b"\n") + HIDDEN,
    "a chunk's size with a plus": POST + CHUNKED + b"\r\n+" + PIECES + HIDDEN,
    "a chunk's size that overflows": POST + CHUNKED + b"\r\n1%016x\r\n" % len(BODY) + BODY + HIDDEN,
    "NUL in a value": POST + b"X-A: b\0c\r\n" + LENGTH + b"\r\n" + BODY + HIDDEN,
    "NUL in a name": POST + b"X\0A: b\r\n" + LENGTH + b"\r\n" + BODY + HIDDEN,
    "CR in a value": POST + b"X-A: b\rX-B: c\r\n" + LENGTH + b"\r\n" + BODY + HIDDEN,
    "two hosts": POST + b"Host: b\r\n" + LENGTH + b"\r\n" + BODY + HIDDEN,
    "no host": POST.replace(b"Host: a\r\n", b"") + LENGTH + b"\r\n" + BODY,
    "a header of 20 KB": POST + b"X-A: " + b"b" * 20_000 + b"\r\n" + LENGTH + b"\r\n" + BODY,
    "a thousand headers": POST + b"".join(b"X-%d: b\r\n" % i for i in range(1000)) + LENGTH + b"\r\n" + BODY,
    "a URL of 100 KB": b"GET /v1/" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "a method that is none": b"G@T /v1/files HTTP/1.1\r\nHost: a\r\n\r\n",
    "a version that is none": b"GET /v1/files HTTP/3.7\r\nHost: a\r\n\r\n",
    "noise": bytes(range(256)) + b"\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + b"x" * 100 + b"\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no coding at all": POST + CHUNKED + b"\r\n" + BODY + HIDDEN,
}


@pytest.mark.parametrize("name", SMUGGLED)
async def test_what_two_parsers_could_read_in_two_ways_is_refused(port: int, upstream: Upstream, name: str) -> None:
    assert statuses(await heard(port, SMUGGLED[name])) == [400]
    assert upstream.requests == []


async def test_it_is_refused_however_it_is_cut(port: int, upstream: Upstream) -> None:
    for name in list(SMUGGLED)[:8]:
        data = SMUGGLED[name]
        cuts = [data[i : i + 7] for i in range(0, len(data), 7)]
        assert statuses(await heard(port, *cuts)) in ([400], []), name  # a reset may overtake the answer
    assert upstream.requests == []


SERVED = {
    "chunked": (POST + CHUNKED + b"\r\n" + PIECES, [200]),
    "a chunk's extension": (POST + CHUNKED + b"\r\n" + PIECES.replace(b"\r", b";a=b\r", 1), [200]),
    "empty lines first": (b"\r\n\r\n" + POST + LENGTH + b"\r\n" + BODY, [200]),
    "three requests at once": ((POST + LENGTH + b"\r\n" + BODY) * 3, [200, 200, 200]),
    "chunked, then another": (POST + CHUNKED + b"\r\n" + PIECES + HIDDEN, [200, 200]),
    "an error, then another": (POST + b"Content-Length: 1\r\n\r\nx" + POST + LENGTH + b"\r\n" + BODY, [400, 200]),
    "a stream, then another": (POST + LENGTH + b"\r\n" + BODY + HIDDEN, [200, 200]),
    "expectation": (POST + LENGTH + b"Expect: 100-continue\r\n\r\n" + BODY, [100, 200]),
    "unknown expectation": (POST + LENGTH + b"Expect: tea\r\n\r\n" + BODY, [417]),
    "HEAD": (b"HEAD /healthz HTTP/1.1\r\nHost: a\r\n\r\n", [200]),
    "HEAD that is passed": (b"HEAD /v1/files HTTP/1.1\r\nHost: a\r\n\r\n", [200]),
    "OPTIONS": (b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: a\r\n\r\n", [200]),
    "OPTIONS of nothing": (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", [404]),
    "TRACE": (b"TRACE /v1/files HTTP/1.1\r\nHost: a\r\n\r\n", [405]),
    "CONNECT": (b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n", [404]),
    "a URL of 7 KB": (b"GET /v1/x?" + b"a" * 7000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", [200]),
    "another host's URL": (b"GET http://evil.example/v1/files HTTP/1.1\r\nHost: a\r\n\r\n", [200]),
    "a hundred headers": (POST + b"".join(b"X-%d: b\r\n" % i for i in range(100)) + LENGTH + b"\r\n" + BODY, [200]),
    "header bytes that are no UTF-8": (POST + b"X-A: \xe9\xff\r\n" + LENGTH + b"\r\n" + BODY, [200]),
    "a type that is none": (POST.replace(b"application/json", b"\xff;;=,") + LENGTH + b"\r\n" + BODY, [200]),
    "no body": (POST + b"\r\n", [400]),
    "a websocket": (HIDDEN[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a\r\n\r\n", [200]),
}


@pytest.mark.parametrize("name", SERVED)
async def test_what_is_unusual_but_right_is_served(port: int, upstream: Upstream, name: str) -> None:
    sent, wanted = SERVED[name]
    assert statuses(await heard(port, sent)) == wanted
    assert {value for one in upstream.requests for key, value in one.headers if key == "Host"} <= {
        f"127.0.0.1:{upstream.port}"
    }


async def test_http_1_0_gets_no_chunks(port: int, upstream: Upstream) -> None:
    events = [b"data: 1\n\n", b"data: [DONE]\n\n"]
    upstream.script = Script(200, [("Content-Type", "text/event-stream")], events, "chunked")
    said = await heard(port, POST.replace(b"1.1", b"1.0") + LENGTH + b"\r\n" + BODY)
    head, _, body = said.partition(b"\r\n\r\n")
    assert b" 200 " in head and b"ransfer-" not in head
    assert body == b"".join(events)


async def test_a_head_that_stops_coming_is_not_waited_for(port: int) -> None:
    starts = (b"", b"P", POST, POST + b"X-A")
    assert await asyncio.gather(*(heard(port, start, within_s=SLOW_S + 3) for start in starts)) == [b""] * 4


async def test_a_head_that_trickles_is_not_waited_for(port: int) -> None:
    pieces = [POST, *(b"X-%d: b\r\n" % i for i in range(40))]
    assert statuses(await heard(port, *pieces, pause_s=0.1, within_s=SLOW_S + 6)) == []


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/v1/files"])
async def test_a_body_that_stops_coming_is_408(port: int, upstream: Upstream, path: bytes) -> None:
    head = POST.replace(b"/v1/chat/completions", path)
    starts = (LENGTH + b"\r\n" + BODY[:-1], CHUNKED + b"\r\n" + PIECES[:-3], CHUNKED + b"\r\n")
    for said in await asyncio.gather(*(heard(port, head + start, within_s=SLOW_S + 4) for start in starts)):
        assert statuses(said) == [408]
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
    assert upstream.requests == []


async def test_hundreds_of_half_requests_keep_nobody_out(port: int, upstream: Upstream) -> None:
    halves = [POST, POST + LENGTH + b"\r\n" + BODY[:-1]]
    waiting = [asyncio.create_task(heard(port, halves[i % 2], within_s=SLOW_S + 8)) for i in range(400)]
    await asyncio.sleep(0.1)
    for _ in range(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(POST + LENGTH + b"\r\n" + BODY)
        async with asyncio.timeout(5):
            assert (await answer(reader, "POST")).status == 200
        writer.close()
    said = await asyncio.gather(*waiting)
    assert [statuses(one) for one in said] == [[], [408]] * 200
