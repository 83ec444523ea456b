"""Streams on the wire: nothing is held back, nothing piles up, and who leaves is noticed on the other side."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from iccache.api.front import Link
from tests.differential.pair import Pair, pair
from tests.differential.test_differential import PATHS, steady
from tests.differential.wire import FLOOD, Received, Script, Upstream, answer, ask
from tests.e2e.world import World, world

JSON = [("Content-Type", "application/json")]
EVENTS = [("Content-Type", "text/event-stream")]
CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"hello"},"finish_reason":null}]}\n\n'
END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
GONE_WITHIN_S = 1.0
CLIENTS = 25


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as made:
        yield made


@pytest.fixture
async def w(tmp_path: Path, upstream: Upstream) -> AsyncIterator[World]:
    there = {"base_url": upstream.base_url}
    async with world(tmp_path, small=there, large=there, routing={"retry_share": 0}) as made:
        yield made


def port(w: World) -> int:
    return int(w.url.rpartition(":")[2])


def chat(stream: bool = True, **more: Any) -> bytes:
    body = {"model": "large", "messages": [{"role": "user", "content": "hi"}], "stream": stream} | more
    return json.dumps(body).encode()


def post(body: bytes, path: str = "/v1/chat/completions", kind: str = "application/json") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


# ---- what arrives, and when


@pytest.mark.parametrize("first", [CHUNK, b": keep-alive\n\n", b"da", b"\r\n"])
async def test_the_first_piece_arrives_while_the_upstream_is_silent(w: World, upstream: Upstream, first: bytes) -> None:
    upstream.script = Script(200, EVENTS, [first], "chunked", hang=True)
    reader, writer = await asyncio.open_connection("127.0.0.1", port(w))
    writer.write(post(chat()))
    async with asyncio.timeout(5):
        await reader.readuntil(b"\r\n\r\n")
        wanted = b"%x\r\n%b" % (len(first), first)
        assert await reader.readexactly(len(wanted)) == wanted
    writer.close()


async def test_the_end_of_a_stream_inside_the_text_is_text(w: World, upstream: Upstream) -> None:
    text = 'a\n\ndata: [DONE]\n\n\u2028\r\ndata: {"error": 1}\n\n'
    events = [b"data: %b\n\n" % json.dumps({"choices": [{"index": 0, "delta": {"content": t}}]}).encode() for t in text]
    upstream.script = Script(200, EVENTS, [*events, END], "chunked", lockstep=True)
    answered = await ask(port(w), "POST", "/v1/chat/completions", JSON, chat(), upstream)
    assert answered.body == b"".join(events) + END
    exchange = await w.recorded(answered.one("x-request-id") or "")
    assert (exchange.answer, exchange.complete) == (text, True)


async def test_three_hundred_streams_at_once(w: World, upstream: Upstream) -> None:
    def script(received: Received) -> Script:
        number = json.loads(received.body)["seed"]
        return Script(200, EVENTS, [b'data: {"n":%d,"i":%d}\n\n' % (number, i) for i in range(40)] + [END], "chunked")

    upstream.script = script
    bodies = [chat(seed=i) for i in range(300)]
    answers = await asyncio.gather(*(ask(port(w), "POST", "/v1/chat/completions", JSON, b) for b in bodies))
    for i, answered in enumerate(answers):
        assert answered.body == b"".join(b'data: {"n":%d,"i":%d}\n\n' % (i, k) for k in range(40)) + END
    assert len({a.one("x-request-id") for a in answers}) == 300
    await settled(w)


# ---- broken upstreams


@pytest.fixture(scope="module")
def p() -> Iterator[Pair]:
    with pair() as made:
        yield made


@pytest.mark.parametrize("path", [*PATHS, "/v1/completions"])
def test_a_stream_that_breaks_ends_in_an_error_event(p: Pair, path: str) -> None:
    whole = (b"event: x\n" + CHUNK) * 3 + END

    @settings(steady, max_examples=25)
    @given(st.integers(1, len(whole) - 1), st.integers(1, 200), st.sampled_from(["fin", "rst"]))
    def breaks(at: int, size: int, how: Any) -> None:
        pieces = [whole[i : min(i + size, at)] for i in range(0, at, size)]
        p.upstream.script = Script(200, EVENTS, pieces, "chunked", lockstep=True, cut=how)
        body = {"model": "large", "messages": [], "input": [], "max_tokens": 9, "stream": True}
        answered, _ = p.run(p.through("POST", path, JSON, json.dumps(body).encode()))
        assert answered.status == 200 and answered.whole
        assert answered.body.startswith(whole[:at])
        _check_error_event(path, answered.body[at:])
        p.run(p.settled())

    breaks()


def _check_error_event(path: str, event: bytes) -> None:
    assert b"[DONE]" not in event and event.startswith(b"\n\n") and event.endswith(b"\n\n")
    lines = event.strip().split(b"\n")
    error = json.loads(lines[-1].removeprefix(b"data: "))
    assert error["error"]["message"]
    if path == "/v1/messages":
        assert lines[0] == b"event: error" and error["type"] == "error" and error["error"]["type"]
    elif path == "/v1/responses":
        assert lines[0] == b"event: error" and error["type"] == "error" and error["message"]
    else:
        assert len(lines) == 1 and set(error["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/files/f/content"])
def test_an_answer_that_breaks_is_never_taken_for_whole(p: Pair, path: str, how: Any) -> None:
    for framing in ("length", "chunked"):
        p.upstream.script = Script(200, JSON, [b'{"choices"', b": ["], framing, lockstep=False, cut=how)
        method, body = ("GET", None) if "files" in path else ("POST", chat(stream=False))
        answered, _ = p.run(p.through(method, path, JSON, body))
        assert answered.status == 502 or not answered.whole


# ---- clients that leave


async def settled(w: World) -> None:
    """Nothing is left of what was asked: no request, no slot, no connection in use, no record under way."""

    async def left() -> tuple[int, ...]:
        return (
            w.proxy.open_requests,
            sum(m.in_flight for m in w.proxy.fleet.members.values()),
            len(w.proxy.learner.recorder.open),
            len(w.proxy.learner.background.tasks),
            w.proxy.session.in_use,
        )

    assert await w.until(left, lambda found: not any(found)) == (0, 0, 0, 0, 0)


POINTS = {  # what the upstream does, what the client sends, how much of an answer it waits for
    "before the head": (Script(hang=True, headless=True), post(chat()), 0),
    "before the first byte": (Script(200, EVENTS, [], "chunked", hang=True), post(chat()), 0),
    "in the middle of a stream": (Script(200, EVENTS, [CHUNK, CHUNK], "chunked", hang=True), post(chat()), len(CHUNK)),
    "in the middle of an answer": (Script(200, JSON, [b'{"cho'], hang=True), post(chat(stream=False)), 0),
    "in the middle of a download": (Script(200, [], [b"x" * 99], hang=True), post(b"{}", "/v1/files"), 50),
    "while it uploads": (Script(), post(b"x" * 5000, "/v1/files", "audio/wav")[:-1000], 0),
}


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("point", POINTS)
async def test_a_client_that_leaves_stops_the_upstream(w: World, upstream: Upstream, point: str, how: str) -> None:
    script, sent, wait_for = POINTS[point]
    upstream.script = script
    tasks = len(asyncio.all_tasks())

    async def come() -> asyncio.StreamWriter:
        reader, writer = await asyncio.open_connection("127.0.0.1", port(w))
        writer.write(sent)
        if wait_for:
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(wait_for)
        return writer

    clients = await asyncio.gather(*(come() for _ in range(CLIENTS)))
    await w.until(_as_async(lambda: upstream.open), lambda count: count == CLIENTS)
    await asyncio.sleep(0.05)  # so that what the upstream sends is on its way
    left_at = time.monotonic()
    for writer in clients:
        if how == "reset":
            sock: socket.socket = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        else:
            writer.close()
    await w.until(_as_async(lambda: upstream.open), lambda count: count == 0, seconds=GONE_WITHIN_S + 4)
    assert time.monotonic() - left_at < GONE_WITHIN_S
    await settled(w)
    await w.until(_as_async(lambda: len(asyncio.all_tasks())), lambda count: count <= tasks)
    assert await w.examples() == 0


def _as_async(look: Callable[[], Any]) -> Callable[[], Awaitable[Any]]:
    async def found() -> Any:
        return look()

    return found


# ---- clients that are slow


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/audio/speech"])
async def test_a_slow_reader_slows_the_upstream_down(w: World, upstream: Upstream, path: str) -> None:
    """What the kernel takes for two connections, and little more, is sent while nobody reads; then all of it comes."""
    total = 48 << 20
    upstream.script = Script(200, EVENTS, [CHUNK], "chunked", flood=total)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port(w)))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 16)
        writer.write(post(chat(), path))
        await reader.readexactly(100)
        await asyncio.sleep(0.5)
        before = upstream.sent
        await asyncio.sleep(0.5)
        assert upstream.sent == before
        assert upstream.sent < 16 << 20
        assert 0 < max(_buffered()) < 1 << 20
        async with asyncio.timeout(30):
            rest, piece = 0, b"more"
            while piece and not piece.endswith(b"0\r\n\r\n"):
                piece = await reader.read(1 << 20)
                rest += len(piece)
        assert rest > total
        writer.close()
    assert upstream.sent == len(CHUNK) + len(range(0, total, len(FLOOD))) * len(FLOOD)
    await settled(w)


def _buffered() -> list[int]:
    """Bytes that the proxy holds for each of its clients, outside of the kernel."""
    coroutines: list[Any] = [task.get_coro() for task in asyncio.all_tasks()]
    handlers = [c.cr_frame.f_locals.get("self") for c in coroutines if getattr(c, "cr_frame", None) is not None]
    taken = [h._transport for h in handlers if isinstance(h, Link)]
    others = [h.transport for h in handlers if isinstance(h, web.RequestHandler)]
    return [transport.get_write_buffer_size() for transport in (*taken, *others) if transport]


async def test_slow_readers_do_not_slow_others(w: World, upstream: Upstream) -> None:
    async with AsyncExitStack() as stack:
        upstream.script = Script(200, EVENTS, [CHUNK], "chunked", flood=16 << 20)
        for _ in range(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", port(w), limit=1 << 16)
            stack.callback(writer.transport.abort)
            writer.write(post(chat()))
            await reader.readexactly(100)
        upstream.script = Script(200, JSON, [b"{}"])
        for _ in range(20):
            async with asyncio.timeout(5):
                assert (await ask(port(w), "POST", "/v1/chat/completions", JSON, chat(stream=False))).body == b"{}"
    await settled(w)


async def test_one_connection_serves_many_requests_in_turn(w: World, upstream: Upstream) -> None:
    upstream.script = lambda received: Script(200, JSON, [received.body])
    reader, writer = await asyncio.open_connection("127.0.0.1", port(w))
    for i in range(20):
        body = chat(stream=False, model="large-model", seed=i)
        writer.write(post(body))
        assert (await answer(reader, "POST")).body == body
    writer.close()
