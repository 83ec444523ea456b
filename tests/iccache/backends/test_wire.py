"""Answers as they come over the wire, cut and framed in every way, and which connections are used again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from iccache.backends.client import BackendClient, Session, make_session
from iccache.backends.wire import HEAD_BYTES
from iccache.config import Backend
from iccache.errors import BackendError
from iccache.types import Reason
from tests.iccache.backends.sinks import Bucket, body_of

OK = b"HTTP/1.1 200 OK\r\n"
LENGTH = OK + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n"


class Raw:
    """Answers every request with the same bytes."""

    def __init__(self, answer: bytes, *, close: bool = False, step: int = 0) -> None:
        self.answer, self.close, self.step = answer, close, step
        self.connections = 0
        self.heads: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                self.heads.append(await reader.readuntil(b"\r\n\r\n"))
                await reader.readexactly(2)
                for at in range(0, len(self.answer), self.step or len(self.answer)):
                    writer.write(self.answer[at : at + (self.step or len(self.answer))])
                    await writer.drain()
                    if self.step:
                        await asyncio.sleep(0)
                if self.close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def asking(raw: Raw) -> AsyncIterator[tuple[BackendClient, Session]]:
    server = await asyncio.start_server(raw, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with make_session() as session:
        yield (
            BackendClient(Backend(name="b", base_url=f"http://127.0.0.1:{port}/v1", model="m"), None, session),
            session,
        )
    server.close()


async def read(client: BackendClient, *, poured: bool = False) -> tuple[int, bytes]:
    async with client.send("POST", "/v1/chat/completions", headers={}, body=b"{}") as answer:
        return answer.status, await body_of(answer, poured=poured)


@pytest.mark.parametrize("poured", [False, True])
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(
    ("answer", "close", "kept"),
    [
        (LENGTH, False, True),
        (CHUNKED + b"\r\n", False, True),
        (CHUNKED + b"X-Trailer: of the body\r\n\r\n", False, True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + LENGTH, False, True),
        (OK + b"Content-Length: 5\r\nConnection: close\r\n\r\nhello", False, False),
        (OK + b"\r\nhello", True, False),  # it ends where the connection does
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", False, False),
        (LENGTH + LENGTH, False, False),  # more than was asked for
        (LENGTH + b"junk", False, False),
    ],
)
async def test_framing(answer: bytes, close: bool, kept: bool, step: int, poured: bool) -> None:
    raw = Raw(answer, close=close, step=step)
    async with asking(raw) as (client, session):
        for _ in range(3):
            assert await read(client, poured=poured) == (200, b"hello")
            await asyncio.sleep(0.01)
        assert session.in_use == 0
    assert len(raw.heads) == 3
    if step == 0:  # where it comes byte by byte, what is too much comes when the answer has been read
        assert raw.connections == (1 if kept else 3)


async def test_trailers_are_no_headers() -> None:
    async with (
        asking(Raw(CHUNKED + b"X-Trailer: of the body\r\n\r\n")) as (client, _),
        client.send("POST", "/v1/x", headers={}, body=b"{}") as answer,
    ):
        assert "X-Trailer" not in answer.headers
        assert [chunk async for chunk in answer.chunks()]


@pytest.mark.parametrize("poured", [False, True])
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nnot a size\r\n",
        OK + b"X-Long: " + b"x" * (HEAD_BYTES + 1),
        OK + b"Content-Length: 7\r\n\r\n",  # and then the end
        OK + b"Content-Length: 7\r\n\r\nhello",  # in the middle
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nno size\r\n",
        b"\r\n\r\n\r\n",
    ],
)
async def test_what_is_no_answer(answer: bytes, poured: bool) -> None:
    async with asking(Raw(answer, close=True)) as (client, session):
        with pytest.raises(BackendError) as caught:
            await read(client, poured=poured)
        assert caught.value.reason is Reason.RESET
        assert session.in_use == 0


async def test_no_header_ends_the_request_early() -> None:
    raw = Raw(LENGTH)
    async with asking(raw) as (client, _):
        for value in ("a\r\nEvil: 1", "a\nEvil: 1", "a\rb", "a\0b"):
            with pytest.raises(Exception, match="header"):
                client.send("POST", "/v1/x", headers={"X-A": value}, body=b"{}")
    assert raw.heads == []


async def test_many_headers_and_a_large_one_come_whole() -> None:
    lines = b"".join(b"X-%d: %b\r\n" % (i, b"v" * 300) for i in range(200))
    async with (
        asking(Raw(OK + lines + b"Content-Length: 5\r\n\r\nhello")) as (client, _),
        client.send("POST", "/v1/x", headers={}, body=b"{}") as answer,
    ):
        assert answer.headers["X-199"] == "v" * 300
        assert len(answer.headers) == 201


@pytest.mark.parametrize("room", [1, 3])
async def test_a_sink_that_is_full_holds_up_the_sender(room: int) -> None:
    """What it does not take stays in the socket, and nothing is lost."""
    raw = Raw(OK + b"Content-Length: 4000000\r\n\r\n" + bytes(range(250)) * 16_000)
    bucket = Bucket(room, slow_s=0.001)
    async with asking(raw) as (client, session):
        async with client.send("POST", "/v1/x", headers={}, body=b"{}") as answer:
            pouring = asyncio.create_task(answer.pour(bucket))
            await asyncio.sleep(0)
            while not pouring.done():
                before = len(bucket.pieces)
                if bucket.full:
                    assert len(bucket.pieces) <= bucket.full * room + room, "it was given more than it had room for"
                await asyncio.wait([pouring], timeout=0.001)
                assert pouring.done() or len(bucket.pieces) >= before
            await pouring
        assert b"".join(bucket.pieces) == bytes(range(250)) * 16_000
        assert session.in_use == 0
    assert bucket.full >= 5


# ---- names


async def test_a_name_that_nobody_finds_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up cannot be broken off, and there are few threads for them."""
    looked_up: list[str] = []
    answer: asyncio.Future[list[object]] = asyncio.get_running_loop().create_future()

    async def getaddrinfo(host: str, *_: object, **__: object) -> list[object]:
        looked_up.append(host)
        return await answer

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    lost = Backend(name="lost", base_url="http://lost.test/v1", model="m", connect_timeout_s=0.2)
    async with asking(Raw(LENGTH)) as (client, session):
        waiting = BackendClient(lost, None, session)
        asked = [waiting.begin("POST", "/v1/x", headers={}, body=b"{}") for _ in range(20)]
        failures = await asyncio.gather(*asked, return_exceptions=True)
        assert {str(f) for f in failures} == {"lost took no connection within 0.2 s"}
        async with client.send("POST", "/v1/x", headers={}, body=b"{}") as found:
            assert found.status == 200
        assert looked_up == ["lost.test"]
        answer.set_exception(OSError("no such name"))
        with pytest.raises(BackendError, match="cannot be reached"):
            await waiting.begin("POST", "/v1/x", headers={}, body=b"{}")
        with pytest.raises(BackendError, match="cannot be reached"):
            await waiting.begin("POST", "/v1/x", headers={}, body=b"{}")
        assert looked_up == ["lost.test"] * 2, "it is looked up anew each time that somebody asks"


async def test_an_address_of_the_sixth_version_is_reached() -> None:
    try:
        server = await asyncio.start_server(Raw(LENGTH), "::1", 0)
    except OSError:
        pytest.skip("no IPv6 here")
    port = server.sockets[0].getsockname()[1]
    async with make_session() as session:
        client = BackendClient(Backend(name="b", base_url=f"http://[::1]:{port}/v1", model="m"), None, session)
        async with client.send("POST", "/v1/x", headers={}, body=b"{}") as found:
            assert found.status == 200
    server.close()
