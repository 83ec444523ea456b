"""The way in: a plain POST to one of the three endpoints goes from the socket straight to the pipeline.

A general server spends more on such a request than it takes to forward it. This takes what one pattern over the whole
head describes: HTTP/1.1, no framing but one Content-Length, nothing asked of the connection. The connection of anything
else is handed over to aiohttp, for good and with every byte that came since the last answer: other paths, chunked,
packed, large or slow bodies, upgrades, and all that is not well formed. So no two readers ever judge the same request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from email.utils import formatdate
from http.client import responses
from typing import NamedTuple, cast

from aiohttp.http import SERVER_SOFTWARE
from aiohttp.web import RequestHandler
from multidict import CIMultiDict

from iccache.api.refusal import NOBODY, dialect_of, headers_of, told
from iccache.assemble import Proxy
from iccache.backends.fleet import is_stream
from iccache.dialects.dialect import DIALECTS, Dialect
from iccache.errors import RequestError
from iccache.pipeline import Call, Head

log = logging.getLogger(__name__)

HEAD_BYTES = 8000  # of a head that is taken here
BODY_BYTES = 1 << 20  # of a body; larger ones are not worth a second way in
WAITING_BYTES = 1 << 18  # of further requests while one is answered; more stays in the socket
SWEEP_S = 0.5
PATIENCE_S = 0.5  # for the rest of a request; then it is aiohttp's to wait for

_HEAD = re.compile(
    rb"POST ((?:/v1)?/(?:chat/completions|responses|messages))(?:\?([A-Za-z0-9=&._~-]*+))? HTTP/1\.1\r\n"
    rb"((?:[A-Za-z0-9!#$%&'*+.^_`|~-]++:[\t -~\x80-\xff]*+\r\n){1,128}+)\r\n"
)
_FIELD = re.compile(r"([^:]+):[\t ]*([^\r]*?)[\t ]*\r\n")
_NOT_TAKEN = ("Transfer-Encoding", "Content-Encoding", "Expect", "Upgrade", "Trailer", "TE")
_POST = b"POST /"
_LENGTH = re.compile(r"[0-9]{1,9}")
_NO_BODY = frozenset({204, 304})
_PIECE, _LAST_PIECE = b"%x\r\n%b\r\n", b"0\r\n\r\n"  # of a body in chunks
_DIALECTS: Mapping[bytes, Dialect] = {
    path.encode(): dialect for full, dialect in DIALECTS.items() for path in (full, full.removeprefix("/v1"))
}


class Asked(NamedTuple):
    """A request whose head is here."""

    path: str
    dialect: Dialect
    query: str
    headers: CIMultiDict[str]
    length: int  # bytes of its body


def read_head(data: bytes, most_bytes: int = BODY_BYTES) -> tuple[Asked, int] | None:
    """The request that `data` begins with, and where its body does; None where it is not one to be taken here."""
    found = _HEAD.match(data)
    if found is None or found.end() > HEAD_BYTES:
        return None
    path, query, fields = found.groups()
    headers = CIMultiDict(_FIELD.findall(fields.decode("utf-8", "surrogateescape")))
    for name in _NOT_TAKEN:
        if name in headers:
            return None
    lengths, hosts, wishes = (headers.getall(name, ()) for name in ("Content-Length", "Host", "Connection"))
    if len(lengths) != 1 or len(hosts) != 1 or not _LENGTH.fullmatch(lengths[0]):
        return None
    if any(wish.lower() != "keep-alive" for wish in wishes):
        return None
    length = int(lengths[0])
    if length > most_bytes:
        return None
    return Asked(path.decode(), _DIALECTS[path], (query or b"").decode(), headers, length), found.end()


class Front:
    """All connections that have not been handed over. Makes the protocol of each: a factory for `create_server`."""

    def __init__(self, proxy: Proxy, server: Callable[[], RequestHandler], *, keepalive_s: float = 75.0) -> None:
        """`server` makes aiohttp's reader of a connection, for what is not taken here. In the loop that is to serve."""
        self.keepalive_s = keepalive_s
        self.proxy = proxy
        self.server = server
        self.loop = asyncio.get_running_loop()
        self.links: set[Link] = set()
        self.stopping = False  # what is still under way is cut off
        self._date = (0, "")
        self._sweep = self.loop.call_later(SWEEP_S, self._swept)

    def __call__(self) -> Link:
        return Link(self)

    def date(self) -> str:
        """Now, as a header has it."""
        now = int(time.time())
        if self._date[0] != now:
            self._date = (now, formatdate(now, usegmt=True))
        return self._date[1]

    def _swept(self) -> None:
        """Nobody waits for ever: not for the rest of a request, not for the next one."""
        now = self.loop.time()
        for link in list(self.links):
            link.look_at_the_clock(now)
        self._sweep = self.loop.call_later(SWEEP_S, self._swept)

    async def stop(self, seconds: float) -> None:
        """Close what is idle at once, and what is not after so many seconds."""
        self._sweep.cancel()
        tasks = {link.task for link in self.links if link.task is not None}
        for link in self.links:
            link.close_when_done()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=seconds)
            self.stopping = True
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)


class Link(asyncio.Protocol):
    """One client's connection, one answer at a time."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.task: asyncio.Task[None] | None = None  # the answer under way
        self.since = 0.0  # when the wait for a request, or for the rest of one, began, on the loop's clock
        self._transport: asyncio.Transport | None = None
        self._came: list[bytes] = []  # not yet taken
        self._size = 0
        self._asked: tuple[Asked, int] | None = None  # the head that was read, and where its body begins
        self._reading = True
        self._closing = False
        self._begun = False  # bytes of the answer have gone out
        self._streams = False  # and it is a stream, in chunks
        self._drained: asyncio.Future[None] | None = None  # while the client takes no more

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.since = self.front.loop.time()
        self.front.links.add(self)

    def data_received(self, data: bytes) -> None:
        if not self._size:
            self.since = self.front.loop.time()
        self._came.append(data)
        self._size += len(data)
        if self.task is None:
            self._go_on()
        elif self._size > WAITING_BYTES and self._reading and self._transport is not None:
            self._reading = False
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.front.links.discard(self)
        self._transport = None
        if self._drained is not None and not self._drained.done():
            self._drained.set_exception(ConnectionResetError("the client left"))
        if self.task is not None:
            self.task.cancel()

    def pause_writing(self) -> None:
        self._drained = self.front.loop.create_future()

    def resume_writing(self) -> None:
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)

    # ---- its life

    def look_at_the_clock(self, now: float) -> None:
        if self.task is not None or self._transport is None:
            return
        if self._size:
            if now - self.since > PATIENCE_S:
                self._hand_over(self._all())
        elif now - self.since > self.front.keepalive_s:
            self._transport.close()

    def close_when_done(self) -> None:
        """No further request is taken."""
        self._closing = True
        if self.task is None and self._transport is not None:
            self._transport.close()

    def _go_on(self) -> None:
        """Take the next request, if it is here whole."""
        if self._asked is None:
            data = self._all()
            self._asked = read_head(data, min(BODY_BYTES, self.front.proxy.settings.server.max_body_bytes))
            if self._asked is None:
                if not _is_beginning(data):
                    self._hand_over(data)
                return
        asked, start = self._asked
        end = start + asked.length
        if self._size < end:
            return
        data = self._all()
        self._asked = None
        self._came = [data[end:]] if self._size > end else []
        self._size -= end
        self.task = self.front.loop.create_task(self._serve(asked, data[start:end]))

    def _all(self) -> bytes:
        """What has come and is not taken, in one piece."""
        if len(self._came) > 1:
            self._came = [b"".join(self._came)]
        return self._came[0] if self._came else b""

    def _hand_over(self, data: bytes) -> None:
        """The connection is aiohttp's from here on."""
        transport, self._transport = self._transport, None
        self.front.links.discard(self)
        self._came, self._size, self._asked = [], 0, None
        if transport is None or transport.is_closing():
            return
        handler = self.front.server()
        handler.connection_made(transport)
        transport.set_protocol(handler)
        handler.data_received(data)

    # ---- one request

    async def _serve(self, asked: Asked, body: bytes) -> None:
        """Answer it, whatever happens, and take the next."""
        proxy, request_id = self.front.proxy, f"req_{os.urandom(16).hex()}"
        proxy.requests += 1
        proxy.open_requests += 1
        self._begun = self._streams = False
        try:
            try:
                await self._answer(asked, body, request_id)
            except Exception as exc:
                self._refuse(asked, request_id, exc)
            if self._drained is not None:
                await self._drained
        except ConnectionResetError:
            self._closing = True
        except asyncio.CancelledError:
            self._closing = True
            if self.front.stopping:
                self._last_word(asked, request_id)
            raise
        except BaseException:
            self._closing = True
            raise
        finally:
            proxy.open_requests -= 1
            self.task = None
            self._after()

    async def _answer(self, asked: Asked, body: bytes, request_id: str) -> None:
        proxy = self.front.proxy
        arrived = proxy.clock()
        await proxy.turns.room()
        tenant = proxy.gate.tenant(asked.headers)
        proxy.gate.admit(tenant, proxy.learner.spent_today(tenant))
        call = Call(
            request_id, tenant, asked.dialect, asked.query, asked.headers, body, proxy.wall(), arrived, out=self
        )
        pieces = proxy.pipeline.answer(call)
        try:
            head = await anext(pieces)
            assert isinstance(head, Head)
            if is_stream(head.headers):
                await self._stream(head, pieces)
            else:
                self._whole(head.status, head.headers, b"".join([p async for p in pieces if isinstance(p, bytes)]))
        finally:
            await pieces.aclose()

    async def _stream(self, head: Head, pieces: AsyncGenerator[Head | bytes]) -> None:
        self._send(_rendered(head.status, head.headers, "Transfer-Encoding: chunked", self.front.date()))
        self._streams = True
        async for piece in pieces:
            if piece and isinstance(piece, bytes):
                self._send(_PIECE % (len(piece), piece))
            if self._drained is not None:
                await self._drained
        self._send(_LAST_PIECE)

    def write(self, data: bytes) -> bool:
        """A piece of a stream, straight from the backend's socket. Where the client has left, who sends is about to be
        cancelled."""
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(_PIECE % (len(data), data))
        return self._drained is None

    async def drained(self) -> None:
        if self._drained is not None:
            with contextlib.suppress(ConnectionResetError):
                await self._drained

    def _whole(self, status: int, headers: CIMultiDict[str], body: bytes) -> None:
        if status in _NO_BODY:
            self._send(_rendered(status, headers, None, self.front.date()))
            return
        head = _rendered(status, headers, f"Content-Length: {len(body)}", self.front.date())
        self._send(head + body)

    def _send(self, data: bytes) -> None:
        """Raises ConnectionResetError where nobody is there."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the client left")
        self._begun = True
        self._transport.write(data)

    def _refuse(self, asked: Asked, request_id: str, exc: Exception) -> None:
        """Say what went wrong; in the middle of an answer, where no second head may come, cut it off."""
        if isinstance(exc, ConnectionResetError):
            raise exc
        error = told(exc, request_id)
        self.front.proxy.metrics.requests.labels(NOBODY, NOBODY, str(error.status)).inc()
        if self._begun:
            raise ConnectionResetError(error.message) from exc
        headers = CIMultiDict({"Content-Type": "application/json", **headers_of(error, request_id)})
        self._whole(error.status, headers, dialect_of(asked.path).error(error))

    def _last_word(self, asked: Asked, request_id: str) -> None:
        """To a client whose answer is cut off because this process ends: an error where nothing has gone out, in a
        stream an error event."""
        error = RequestError(
            503, "the proxy is shutting down", type="server_error", code="shutting_down", retry_after_s=1
        )
        with contextlib.suppress(ConnectionResetError):
            if not self._begun:
                self._refuse(asked, request_id, error)
            elif self._streams:
                event = asked.dialect.error_event(error)
                self._send(_PIECE % (len(event), event) + _LAST_PIECE)

    def _after(self) -> None:
        """What comes after an answer: the next request, which may be here already."""
        if self._transport is None:
            return
        if self._closing:
            self._transport.close()
            return
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()
        self.since = self.front.loop.time()
        if self._size:
            self._go_on()


def _is_beginning(data: bytes) -> bool:
    """Whether more of a head has to come before it can be judged."""
    return len(data) <= HEAD_BYTES and data[: len(_POST)] == _POST[: len(data)] and b"\r\n\r\n" not in data


def _rendered(status: int, headers: CIMultiDict[str], framing: str | None, date: str) -> bytes:
    """The head of an answer. Raises RequestError where one of its headers would end it before its end."""
    lines = [f"HTTP/1.1 {status} {responses.get(status, '')}\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
    if "Content-Type" not in headers and status not in _NO_BODY:
        lines.append("Content-Type: application/octet-stream\r\n")
    lines.append(f"{framing}\r\nDate: {date}\r\n" if framing else f"Date: {date}\r\n")
    text = "".join(lines)
    breaks = len(lines) + (framing is not None)
    if text.count("\n") != breaks or text.count("\r") != breaks or "\0" in text:
        raise RequestError(502, "the answer has a header that cannot be passed on", type="upstream_error")
    return f"{text}Server: {SERVER_SOFTWARE}\r\n\r\n".encode()
