"""HTTP/1.1 to an upstream with little between the socket and its reader: kept connections, raw bodies, one clock.

A general client spends more on a request than all the rest of this proxy: objects for cookies, redirects, sessions and
traces that a proxy has no use for. What is here is what is needed: a parser (llhttp, by httptools), a pool, and a
body that waits in the socket while nobody reads it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import aiohappyeyeballs
import httptools

KEPT_S = 15.0  # how long a connection that nobody uses is kept
HELD_BYTES = 1 << 17  # of a body that nobody reads; more stays in the socket, and so with the sender
HEAD_BYTES = 1 << 18  # of a head, and of trailers
NEXT_ADDRESS_S = 0.25  # until the next address of a name is tried beside one that does not answer (RFC 8305)


Address = tuple[int | socket.AddressFamily, int | socket.SocketKind, int, str, tuple[Any, ...]]  # of getaddrinfo


class Origin(NamedTuple):
    """Where connections go."""

    host: str
    port: int
    tls: bool


class Broken(Exception):
    """The connection ended, or what came is no HTTP. Says why in a few words."""

    def __init__(self, why: str, *, closed: bool) -> None:
        super().__init__(why)
        self.closed = closed  # the peer closed it, or it broke


class Sink(Protocol):
    """Where a body goes as it comes. Neither raises: where nobody is left to take it, who pours is cancelled."""

    def write(self, data: bytes) -> bool:
        """Take the next bytes; whether more may come before `drained`."""
        ...

    async def drained(self) -> None:
        """Wait until more may come."""
        ...


class Connection(asyncio.Protocol):
    """One connection, one answer at a time: `ask`, `head`, `read` or `pour` to the end, `leave`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(  # of what upstreams do that is harmless to a reader
            lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )
        self.asked = 0  # requests so far
        self.since = 0.0  # when it was last left, on the loop's clock
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._waiter: asyncio.Future[None] | None = None
        self._until = 0.0
        self._sink: Sink | None = None  # while the body is poured
        self._most = (0.0, 0.0)  # s between two pieces of it; until when it may go on, on the loop's clock
        self._paused = False
        self._error: Broken | None = None
        self._busy = False
        self._clear()

    def _clear(self) -> None:
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self.received = False  # anything at all
        self._chunks: list[bytes] = []
        self._held = 0
        self._head_bytes = 0
        self._headed = False
        self._ended = False
        self._interim = False
        self._ends_with_connection = False
        self._keep = True

    # ---- for whoever asks

    def ask(self, head: bytes, body: bytes | None) -> None:
        """Send a request. What is left of the answer before must have been read."""
        assert self._transport is not None
        self._clear()
        self._busy = True
        self.asked += 1
        if body is None:
            self._transport.write(head)
        elif len(body) < 1 << 16:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)

    async def head(self, until: float) -> None:
        """Wait for the status and the headers. Raises Broken; TimeoutError at `until` on the loop's clock."""
        while not self._headed:
            if self._error is not None:
                raise self._error
            await self._wait(until)

    async def read(self, until: float) -> bytes:
        """What has come of the body since the last call; b"" at its end. Raises as `head` does."""
        while True:
            if self._chunks:
                data = self._taken()
                if self._paused:
                    self._resume()
                return data
            if self._ended:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait(until)

    async def pour(self, sink: Sink, idle_s: float, deadline: float) -> None:
        """Hand over what comes of the body until its end, in the callback in which it comes: no task has to wake up.

        Raises as `read` does; TimeoutError at `deadline`, and where nothing came for `idle_s` though the sink would
        have taken it.
        """
        self._sink, self._most = sink, (idle_s, deadline)
        try:
            while True:
                self._hand_over()
                if self._paused:
                    await sink.drained()
                    self._resume()
                elif self._ended:
                    return
                elif self._error is not None:
                    raise self._error
                else:
                    await self._wait(min(self._loop.time() + idle_s, deadline))
        finally:
            self._sink = None

    def _hand_over(self) -> None:
        """Give the sink what has come."""
        if not self._chunks or self._sink is None:
            return
        idle_s, deadline = self._most
        until = self._loop.time() + idle_s
        self._until = until if until < deadline else deadline
        data = self._taken()
        if not self._sink.write(data):
            self._pause()

    def _taken(self) -> bytes:
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._held = 0
        return data

    @property
    def reusable(self) -> bool:
        """Whether the next request may go here."""
        return (
            self._ended
            and self._keep
            and self._error is None
            and self._transport is not None
            and not self._transport.is_closing()
            and not self._transport.get_write_buffer_size()
        )

    @property
    def alive(self) -> bool:
        """Whether, as far as is known, somebody is at the other end."""
        return self._error is None and self._transport is not None and not self._transport.is_closing()

    def rest(self) -> None:
        """Nobody asks: anything that comes now ends the connection."""
        self._busy = False
        self._chunks.clear()
        self.since = self._loop.time()
        if self._paused:
            self._resume()

    def abort(self) -> None:
        """Close at once, whatever is under way."""
        self._error = self._error or Broken("closed here", closed=True)
        self._stop_clock()
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self, until: float) -> None:
        """Until something has come. The timer is only armed anew where it would ring too late: most never ring."""
        self._until = until
        if self._timer is None or self._timer_at > until:
            self._set_clock(until)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _set_clock(self, until: float) -> None:
        self._stop_clock()
        self._timer_at = until
        self._timer = self._loop.call_at(until, self._ring)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ring(self) -> None:
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        if self._loop.time() < self._until - 0.001:
            self._set_clock(self._until)
        else:
            self._waiter.set_exception(TimeoutError())

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _pause(self) -> None:
        self._paused = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def _resume(self) -> None:
        self._paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if not self._busy:
            self.abort()  # nobody asked
            return
        self.received = True
        if not self._headed:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            if not self._ended and self._error is None:
                self._error = Broken(f"no HTTP: {_first_line(exc)}", closed=False)
            self._keep = False
        if not self._headed and self._head_bytes > HEAD_BYTES:
            self._error = Broken("its head is too large", closed=False)
        if self._sink is not None and not self._paused:
            self._hand_over()
        if self._held > HELD_BYTES and not self._paused:
            self._pause()
        if self._sink is None or self._paused or self._ended or self._error is not None:
            self._wake()

    def eof_received(self) -> bool:
        return False  # close

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        if self._headed and self._ends_with_connection and exc is None:
            self._ended = True
        if self._error is None:
            why = exc.strerror if isinstance(exc, OSError) and exc.strerror else "it was closed"
            self._error = Broken(why, closed=True)
        self._wake()

    # ---- httptools' callbacks

    def on_message_begin(self) -> None:
        if self._ended:
            self._keep = False  # more than one answer to one question

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._headed:  # else it is a trailer, which goes no further
            self.headers.append((name.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape")))

    def on_headers_complete(self) -> None:
        if self._headed:
            return
        status = self._parser.get_status_code()
        if status == 101:
            self._error = Broken("it switched to another protocol, unasked", closed=False)
            return
        self._interim = status < 200
        if self._interim:
            self.headers = []
            return
        self.status = status
        self._headed = True
        names = {name.lower(): value for name, value in self.headers}
        chunked = names.get("transfer-encoding", "").lower().rstrip().endswith("chunked")
        self._ends_with_connection = not chunked and "content-length" not in names

    def on_body(self, body: bytes) -> None:
        if not self._ended:
            self._chunks.append(body)
            self._held += len(body)

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
        elif self._headed and not self._ended:
            self._ended = True
            self._keep = self._keep and self._parser.should_keep_alive()


class Pool:
    """Connections that wait for their next request, the latest first."""

    def __init__(self, *, reuse: bool = True) -> None:
        self.reuse = reuse
        self.in_use = 0
        self._idle: dict[Origin, list[Connection]] = {}
        self._looking: dict[Origin, asyncio.Future[list[Address]]] = {}  # look-ups under way
        self._sweep: asyncio.TimerHandle | None = None
        self._tls: ssl.SSLContext | None = None

    def take(self, origin: Origin) -> Connection | None:
        """One that seems alive, or None."""
        idle = self._idle.get(origin)
        now = asyncio.get_running_loop().time()
        while idle:
            connection = idle.pop()
            if connection.alive and now - connection.since < KEPT_S:
                self.in_use += 1
                return connection
            connection.abort()
        return None

    async def connect(self, origin: Origin) -> Connection:
        """A fresh one. Raises OSError."""
        loop = asyncio.get_running_loop()
        sock = await aiohappyeyeballs.start_connection(
            await self._addresses(origin),
            happy_eyeballs_delay=NEXT_ADDRESS_S,
            interleave=1,
            loop=loop,
        )
        if origin.tls:
            self.expect_tls()
        context = self._tls if origin.tls else None
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(loop), sock=sock, ssl=context, server_hostname=origin.host if context else None
            )
        except BaseException:
            sock.close()
            raise
        self.in_use += 1
        return connection

    async def _addresses(self, origin: Origin) -> list[Address]:
        """Where its name leads. There are few threads for looking up names, and a look-up that hangs cannot be broken
        off: all who want one name share one, and what is an address needs none. Raises OSError."""
        if (address := _address(origin)) is not None:
            return [address]
        looking = self._looking.get(origin)
        if looking is None:
            looking = self._looking[origin] = asyncio.ensure_future(_looked_up(origin))
            looking.add_done_callback(lambda done: self._found(origin, done))
        return await asyncio.shield(looking)

    def _found(self, origin: Origin, done: asyncio.Future[list[Address]]) -> None:
        del self._looking[origin]
        if not done.cancelled():
            done.exception()  # nobody may be waiting for it any more

    def leave(self, origin: Origin, connection: Connection) -> None:
        """Give it back: kept where its answer has come whole, else closed, which stops the upstream."""
        self.in_use -= 1
        if not (self.reuse and connection.reusable):
            connection.abort()
            return
        connection.rest()
        self._idle.setdefault(origin, []).append(connection)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(KEPT_S, self._swept)

    def close(self) -> None:
        """Close those that nobody uses."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        self._abort([c for idle in self._idle.values() for c in idle])
        self._idle.clear()

    def _swept(self) -> None:
        """Close what has waited too long; again later, as long as anything waits."""
        loop = asyncio.get_running_loop()
        oldest = loop.time() - KEPT_S
        for origin, idle in list(self._idle.items()):
            self._abort([c for c in idle if not c.alive or c.since <= oldest])
            self._idle[origin] = [c for c in idle if c.alive]
            if not self._idle[origin]:
                del self._idle[origin]
        self._sweep = loop.call_later(KEPT_S, self._swept) if self._idle else None

    def _abort(self, connections: Sequence[Connection]) -> None:
        for connection in connections:
            connection.abort()

    def expect_tls(self) -> None:
        """Read the certificates now, which takes a while, and not in front of a request."""
        if self._tls is None:
            self._tls = ssl.create_default_context()
            self._tls.set_alpn_protocols(["http/1.1"])


def _address(origin: Origin) -> Address | None:
    """Of a host that is an address, not a name."""
    try:
        ip = ipaddress.ip_address(origin.host)
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv4Address):
        return (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (origin.host, origin.port))
    if ip.scope_id is not None:
        return None  # only a look-up knows the number of its interface
    return (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (origin.host, origin.port, 0, 0))


async def _looked_up(origin: Origin) -> list[Address]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    return [cast(Address, each) for each in found]


def _first_line(exc: BaseException) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]
