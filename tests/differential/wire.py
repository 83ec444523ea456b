"""Both ends of a connection, down to the bytes: an upstream and a client that share no code with the proxy.

The upstream answers exactly what it is told, cut where it is told. With `lockstep` it sends the next piece only when
the client has read the one before: whoever holds bytes back in between is found out, and no clock is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, Self

Headers = list[tuple[str, str]]
Framing = Literal["length", "chunked", "close"]
STALL_S = 5.0
WITHIN_S = 30.0


@dataclass(slots=True)
class Script:
    """One answer of the upstream."""

    status: int = 200
    headers: Headers = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    framing: Framing = "length"
    lockstep: bool = False
    cut: Literal["fin", "rst"] | None = None  # the connection breaks after the last piece, before the proper end
    hang: bool = False  # after the last piece nothing comes, and no end either
    headless: bool = False  # with `hang`: not even a head
    flood: int = 0  # after the pieces, so many bytes more

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)


FLOOD = b": " + b"x" * 65531 + b"\n\n\n"


@dataclass(slots=True)
class Received:
    """One request, as it came over the wire."""

    method: str
    target: str
    headers: Headers
    body: bytes


@dataclass(slots=True)
class Answered:
    """One answer, as it came over the wire."""

    status: int
    headers: Headers
    body: bytes
    whole: bool  # it ended as its framing says it should

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def one(self, name: str) -> str | None:
        return next(iter(self.all(name)), None)


class Upstream:
    """Start and stop it with `async with`."""

    def __init__(self) -> None:
        self.script: Script | Callable[[Received], Script] = Script()
        self.requests: list[Received] = []
        self.open = 0  # connections
        self.sent = 0  # bytes of bodies
        self._seen = 0
        self._moved = asyncio.Condition()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 24)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def saw(self, count: int) -> None:
        """The client has read `count` bytes of the body."""
        async with self._moved:
            self._seen = count
            self._moved.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays."""
        line, headers = await _head(reader)
        method, target, _ = line.split(" ", 2)
        given = {name.lower(): value for name, value in headers}
        if given.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if given.get("transfer-encoding") == "chunked":
            body = b"".join([piece async for piece in _chunks(reader)])
        else:
            body = await reader.readexactly(int(given.get("content-length", 0)))
        self.requests.append(Received(method, target, headers, body))
        script = self.script if isinstance(self.script, Script) else self.script(self.requests[-1])
        if script.headless:
            await reader.read()
            return False
        return await self._answer(reader, writer, method, script)

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, script: Script
    ) -> bool:
        bare = method == "HEAD" or script.status in (204, 304)
        headers = list(script.headers)
        if script.framing == "close":
            headers.append(("Connection", "close"))
        elif script.framing == "chunked" and not bare:
            headers.append(("Transfer-Encoding", "chunked"))
        elif script.status != 204:
            missing = 1 if script.cut or script.hang else 0
            headers.append(("Content-Length", str(len(script.body) + missing)))
        head = f"HTTP/1.1 {script.status} Whatever\r\n" + "".join(f"{n}: {v}\r\n" for n, v in headers) + "\r\n"
        writer.write(head.encode("utf-8", "surrogateescape"))
        self._seen = 0
        sent = 0
        for piece in [] if bare else script.pieces:
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if script.framing == "chunked" else piece)
            await writer.drain()
            sent += len(piece)
            self.sent += len(piece)
            if script.lockstep:
                await self._wait(sent)
        for _ in range(0, script.flood, len(FLOOD)):
            writer.write(b"%x\r\n%b\r\n" % (len(FLOOD), FLOOD))
            await writer.drain()
            self.sent += len(FLOOD)
        if script.hang:
            await reader.read()  # until the other side closes
            return False
        if script.cut:
            await asyncio.sleep(0.02)  # so that what was sent arrives
            if script.cut == "rst":
                sock: socket.socket = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if script.framing == "chunked" and not bare:
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return script.framing != "close"

    async def _wait(self, count: int) -> None:
        async with self._moved:
            try:
                async with asyncio.timeout(STALL_S):
                    await self._moved.wait_for(lambda: self._seen >= count)
            except TimeoutError:
                raise ConnectionError("a piece of the answer is held back") from None


async def ask(
    port: int,
    method: str,
    target: str,
    headers: Headers,
    body: bytes | None,
    upstream: Upstream | None = None,
) -> Answered:
    """One request on a connection of its own, and its answer. `upstream` is told how much of the body was read."""
    async with asyncio.timeout(WITHIN_S), connection(port) as (reader, writer):
        length = [] if body is None else [("Content-Length", str(len(body)))]
        sent = [("Host", f"127.0.0.1:{port}"), *headers, *length]
        head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{n}: {v}\r\n" for n, v in sent) + "\r\n"
        writer.write(head.encode("utf-8", "surrogateescape") + (body or b""))
        return await answer(reader, method, upstream)


async def answer(reader: asyncio.StreamReader, method: str, upstream: Upstream | None = None) -> Answered:
    line, headers = await _head(reader)
    while line.split(" ")[1].startswith("1"):
        line, headers = await _head(reader)
    status = int(line.split(" ", 2)[1])
    body = bytearray()
    whole = True
    try:
        async for piece in _body(reader, method, status, {name.lower(): value for name, value in headers}):
            body += piece
            if upstream is not None:
                await upstream.saw(len(body))
    except (asyncio.IncompleteReadError, ConnectionError):
        whole = False
    return Answered(status, headers, bytes(body), whole)


@contextlib.asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _head(reader: asyncio.StreamReader) -> tuple[str, Headers]:
    text = (await reader.readuntil(b"\r\n\r\n")).decode("utf-8", "surrogateescape")
    first, *rest = text[:-4].split("\r\n")
    return first, [(name, value.strip()) for name, _, value in (line.partition(":") for line in rest)]


async def _body(
    reader: asyncio.StreamReader, method: str, status: int, headers: dict[str, str]
) -> AsyncIterator[bytes]:
    if method == "HEAD" or status in (204, 304):
        return
    if headers.get("transfer-encoding") == "chunked":
        async for piece in _chunks(reader):
            yield piece
    elif "content-length" in headers:
        left = int(headers["content-length"])
        while left:
            piece = await reader.read(min(left, 1 << 16))
            if not piece:
                raise asyncio.IncompleteReadError(b"", left)
            left -= len(piece)
            yield piece
    else:
        while piece := await reader.read(1 << 16):
            yield piece


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Pieces of chunks as they come, so that half a chunk is seen too."""
    while True:
        left = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
        if not left:
            await reader.readuntil(b"\r\n")
            return
        while left:
            piece = await reader.read(left)
            if not piece:
                raise asyncio.IncompleteReadError(b"", left)
            left -= len(piece)
            yield piece
        await reader.readexactly(2)


def kept(headers: Iterable[tuple[str, str]], dropped: Callable[[str], bool]) -> list[tuple[str, str]]:
    """What is to be equal on both sides, in an order that means nothing; values of one name keep theirs."""
    return sorted(
        ((name.lower(), value) for name, value in headers if not dropped(name.lower())), key=lambda pair: pair[0]
    )
