"""One upstream over HTTP: raw bytes there and back, four clocks, and every failure in our own words."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Mapping, Sequence
from types import SimpleNamespace, TracebackType
from typing import Any, Protocol, Self

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from iccache import config
from iccache.backends.headers import for_upstream, readable
from iccache.backends.wire import Broken, Connection, Origin, Pool, Sink
from iccache.errors import BackendError, BackendTimeout, RequestError
from iccache.types import Reason

Body = bytes | AsyncIterable[bytes] | None

EARLY_S = 0.002  # a timer may ring so much before its time
STALE_WITHIN_S = 2.0  # a reused connection that breaks later than this had a server at work on the request
_HEADER_BYTES = 1 << 16
_VERSION = re.compile(r"/v\d+[a-z0-9]*(/|$)")
_DOT_SEGMENT = re.compile(r"(?:^|/)(?:\.|%2e){1,2}(?:/|$)", re.IGNORECASE)
_NOT_OF_A_URL = re.compile(r"[^\x21-\x7e]")  # a space or a line break would end the request line
_MESSAGES = "/v1/messages"
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})  # without a body they say so
_QUIET = ("User-Agent", "Content-Type", "Accept")  # only what the client sent


class Session:
    """What all backends of a process share: the pool, and aiohttp for what is rare."""

    def __init__(self, *, reuse: bool = True) -> None:
        self.pool = Pool(reuse=reuse)
        self.http = _http(reuse=True)  # WebSockets
        self.fresh = _http(reuse=False)  # a connection for each request: uploads in pieces

    @property
    def in_use(self) -> int:
        """Connections with an answer under way, WebSockets and uploads apart."""
        return self.pool.in_use

    async def close(self) -> None:
        self.pool.close()
        await self.http.close()
        await self.fresh.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


def make_session(*, reuse: bool = True) -> Session:
    """A session for backends: no limit of its own, no cookies, no proxy from the environment, nothing decoded.

    `reuse` False: no connection is used twice.
    """
    return Session(reuse=reuse)


def _http(*, reuse: bool) -> aiohttp.ClientSession:
    if reuse:
        connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=30)
    else:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
        trust_env=False,
        auto_decompress=False,
        max_line_size=_HEADER_BYTES,
        max_field_size=_HEADER_BYTES,
        trace_configs=[_tracing()],
    )


class Source(Protocol):
    """Where an answer's bytes come from."""

    async def read(self, until: float) -> bytes:
        """What has come; b"" at the end. Raises TimeoutError at `until` on the loop's clock, and what breaks."""
        ...

    async def pour(self, sink: Sink, idle_s: float, deadline: float) -> None:
        """The rest into `sink`, as `Connection.pour` does."""
        ...

    def close(self) -> None:
        """Whatever has not come yet is not wanted."""
        ...


class Upstream:
    """An answer that has begun: its head and first bytes are here."""

    def __init__(
        self,
        backend: config.Backend,
        status: int,
        headers: CIMultiDict[str],
        source: Source,
        first: bytes,
        deadline: float,
    ) -> None:
        self.status = status
        self.headers = headers
        self._backend = backend
        self._source = source
        self._first = first
        self._deadline = deadline

    async def chunks(
        self, broken: Callable[[], object] = lambda: None, ended: Callable[[], object] = lambda: None
    ) -> AsyncIterator[bytes]:
        """The body as it comes, once; `ended` is called when it is here whole. Raises BackendError or BackendTimeout
        where it breaks, `broken` called before."""
        chunk, self._first = self._first, b""
        now = asyncio.get_running_loop().time
        idle, deadline, read = self._backend.idle_timeout_s, self._deadline, self._source.read
        while chunk:
            yield chunk
            until = now() + idle
            try:
                if until - idle >= deadline:
                    raise TimeoutError
                chunk = await read(until if until < deadline else deadline)
            except (TimeoutError, Broken, aiohttp.ClientError, OSError) as exc:
                broken()
                raise self._translated(exc, late=until >= deadline) from exc
        ended()

    async def pour(
        self, sink: Sink, broken: Callable[[], object] = lambda: None, ended: Callable[[], object] = lambda: None
    ) -> None:
        """`chunks`, handed to `sink` as they come. Instead of those, or of what is left of them."""
        first, self._first = self._first, b""
        if first and not sink.write(first):
            await sink.drained()
        try:
            await self._source.pour(sink, self._backend.idle_timeout_s, self._deadline)
        except (TimeoutError, Broken, aiohttp.ClientError, OSError) as exc:
            broken()
            late = asyncio.get_running_loop().time() >= self._deadline - EARLY_S
            raise self._translated(exc, late=late) from exc
        ended()

    def close(self) -> None:
        """Whatever has not come yet is not wanted: the connection closes, which stops the upstream."""
        self._source.close()

    def _translated(self, exc: Exception, *, late: bool) -> BackendError:
        name, idle = self._backend.name, self._backend.idle_timeout_s
        if not isinstance(exc, TimeoutError):
            return BackendError(f"{name} broke off its answer: {_why(exc)}", Reason.RESET)
        if late:
            return _too_long(self._backend)
        return BackendTimeout(f"{name} was silent for {idle:g} s in the middle of its answer", Reason.SLOW)


class Sending:
    """`async with` around an answer: begun on entering, closed on leaving."""

    def __init__(self, begin: Coroutine[Any, Any, Upstream]) -> None:
        self._begin = begin

    async def __aenter__(self) -> Upstream:
        self._upstream = await self._begin
        return self._upstream

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._upstream.close()


class BackendClient:
    """Sends requests to one backend. `key` goes there with every request; the client's own keys never do."""

    def __init__(self, backend: config.Backend, key: str | None, session: Session) -> None:
        self.backend = backend
        self._base, self._basic = _without_credentials(URL(backend.base_url))
        self._origin = Origin(self._base.host or "", self._base.port or 80, self._base.scheme == "https")
        self._prefix = self._base.raw_path.rstrip("/")
        self._versioned = bool(_VERSION.search(self._prefix))
        port = "" if self._base.is_default_port() else f":{self._base.port}"
        self._host = f"Host: {self._base.host_subcomponent}{port}\r\n"
        self._key = key
        self._session = session
        if self._origin.tls:
            session.pool.expect_tls()

    def send(
        self, method: str, path: str, *, query: str = "", headers: Mapping[str, str], body: Body = None
    ) -> Sending:
        """`begin`, as a context that closes the answer."""
        return Sending(self.begin(method, path, query=query, headers=headers, body=body))

    def begin(
        self, method: str, path: str, *, query: str = "", headers: Mapping[str, str], body: Body = None
    ) -> Coroutine[Any, Any, Upstream]:
        """An answer, from its first byte on. `path` as clients write it, /v1/...; `query` without its question mark.

        Raises BackendError or BackendTimeout until the head and the first byte of the body (or its end) are here, so
        that another backend may still be asked, and for a redirect. Closing it early closes the connection. A request
        whose reused connection proved closed goes once more on a fresh one; a body that can be read only once starts
        on one.
        """
        sent = self._headers(path, headers, body)
        if method == "HEAD" or not (body is None or isinstance(body, bytes)):
            return self._in_pieces(method, self.url(path, query), sent, body)
        return self._whole(self._head(method, self.target(path, query), sent, body), body)

    async def _whole(self, head: bytes, body: bytes | None) -> Upstream:
        deadline = asyncio.get_running_loop().time() + self.backend.timeout_s
        connection = self._session.pool.take(self._origin)
        if connection is not None:
            try:
                return await self._asked(connection, head, body, deadline)
            except BackendError as exc:
                if not exc.stale:
                    raise
        return await self._asked(await self._connected(deadline), head, body, deadline)

    async def converse(
        self, path: str, query: str, headers: Mapping[str, str], protocols: Sequence[str], largest_bytes: int
    ) -> aiohttp.ClientWebSocketResponse:
        """A WebSocket to this backend. Raises aiohttp's and the system's own errors where it does not come about."""
        sent = self._headers(path, headers, None)
        for name in [name for name in sent if name.lower().startswith("sec-websocket-")]:
            del sent[name]
        async with asyncio.timeout(self.backend.connect_timeout_s):
            return await self._session.http.ws_connect(
                self.url(path, query),
                headers=sent,
                protocols=protocols,
                max_msg_size=largest_bytes,
                autoping=False,
                autoclose=False,
            )

    def url(self, path: str, query: str = "") -> URL:
        """Where `path` is on this backend: its version is dropped where the base URL already has one."""
        return URL(f"{self._base.origin()}{self.target(path, query)}", encoded=True)

    def target(self, path: str, query: str = "") -> str:
        """The path and query of `url`. Raises RequestError for a path that leads elsewhere."""
        if not path.startswith("/") or _DOT_SEGMENT.search(path) or _NOT_OF_A_URL.search(path + query):
            raise RequestError(400, "The path cannot be used.")
        if self._versioned and (path.startswith("/v1/") or path == "/v1"):
            path = path[3:]
        if own := self._base.raw_query_string:
            query = f"{own}&{query}" if query else own
        return f"{self._prefix}{path}?{query}" if query else (self._prefix + path or "/")

    def _headers(self, path: str, headers: Mapping[str, str], body: Body) -> CIMultiDict[str]:
        sent = for_upstream(headers)
        if self._key is not None:
            sent["Authorization"] = f"Bearer {self._key}"
            if path.startswith(_MESSAGES):
                sent["x-api-key"] = self._key
        elif self._basic is not None:
            sent["Authorization"] = self._basic
        if _only_once(body):
            given = {name.lower(): value for name, value in headers.items()}
            if "content-length" in given and "content-encoding" not in given:
                sent["Content-Length"] = given["content-length"]
        return sent

    def _head(self, method: str, target: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
        """The request up to its body. Raises RequestError where a header would end before its end."""
        lines = [f"{method} {target} HTTP/1.1\r\n", self._host]
        lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
        if body is not None or method in _WITH_BODY:
            lines.append(f"Content-Length: {len(body or b'')}\r\n")
        head = "".join(lines)
        if head.count("\n") != len(lines) or head.count("\r") != len(lines) or "\0" in head:
            raise RequestError(400, "A header cannot be used.")
        return f"{head}\r\n".encode()

    async def _connected(self, deadline: float) -> Connection:
        name, within = self.backend.name, self.backend.connect_timeout_s
        try:
            async with asyncio.timeout_at(min(deadline, asyncio.get_running_loop().time() + within)):
                return await self._session.pool.connect(self._origin)
        except TimeoutError as exc:
            raise BackendTimeout(f"{name} took no connection within {within:g} s", Reason.CONNECT) from exc
        except (OSError, UnicodeError) as exc:
            raise BackendError(f"{name} cannot be reached: {_why(exc)}", Reason.CONNECT) from exc

    async def _asked(self, connection: Connection, head: bytes, body: bytes | None, deadline: float) -> Upstream:
        """The answer with its first bytes."""
        now = asyncio.get_running_loop().time
        began, reused = now(), connection.asked > 0
        until = min(deadline, began + self.backend.first_token_timeout_s)
        source = _Pooled(self._session.pool, self._origin, connection)
        try:
            connection.ask(head, body)
            await connection.head(until)
            first = await connection.read(until)
        except BaseException as exc:
            source.close()
            if isinstance(exc, TimeoutError):
                raise _no_byte(self.backend, late=until >= deadline) from exc
            if not isinstance(exc, Broken):
                raise
            stale = reused and exc.closed and not connection.received and now() - began <= STALE_WITHIN_S
            what = "closed the connection" if exc.closed and not connection.status else "broke off its answer"
            raise BackendError(f"{self.backend.name} {what}: {exc}", Reason.RESET, stale=stale) from exc
        return self._begun(connection.status, readable(connection.headers), source, first, deadline)

    async def _in_pieces(self, method: str, url: URL, headers: CIMultiDict[str], body: Body) -> Upstream:
        """By aiohttp, on a connection of its own: a body that can be read only once, or an answer without one."""
        deadline = asyncio.get_running_loop().time() + self.backend.timeout_s
        trip = _Trip(self.backend, deadline)
        response: aiohttp.ClientResponse | None = None
        try:
            async with asyncio.timeout_at(trip.until) as trip.clock:
                response = await self._session.fresh.request(
                    method,
                    url,
                    headers=headers,
                    data=trip.payload(body),
                    allow_redirects=False,
                    skip_auto_headers=_QUIET,
                    timeout=trip.connecting,
                    trace_request_ctx=trip,
                )
                first = await response.content.readany()
        except BaseException as exc:
            if response is not None:
                response.close()
            if trip.upload_failed is not None:
                raise trip.upload_failed from None
            translated = trip.translate(exc, headed=response is not None)
            if translated is None:
                raise
            raise translated from exc
        source = _Own(response)
        return self._begun(response.status, readable(response.headers.items()), source, first, deadline)

    def _begun(self, status: int, headers: CIMultiDict[str], source: Source, first: bytes, deadline: float) -> Upstream:
        """Raises BackendError for a redirect: a client that followed it would pass the proxy by, its key in hand."""
        if status in _REDIRECTS:
            source.close()
            where = _told_of(headers.get("Location", ""))
            told = f"{self.backend.name} redirects{where} ({status}); its base_url has to be where it answers itself"
            raise BackendError(told, Reason.REDIRECT, lasting=True)
        return Upstream(self.backend, status, headers, source, first, deadline)


class _Pooled:
    """The rest of an answer on a connection of the pool."""

    def __init__(self, pool: Pool, origin: Origin, connection: Connection) -> None:
        self._pool = pool
        self._origin = origin
        self._connection: Connection | None = connection
        self.read = connection.read
        self.pour = connection.pour

    def close(self) -> None:
        if self._connection is not None:
            self._pool.leave(self._origin, self._connection)
            self._connection = None


class _Own:
    """The rest of an answer on aiohttp's connection."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def read(self, until: float) -> bytes:
        async with asyncio.timeout_at(until):
            return await self._response.content.readany()

    async def pour(self, sink: Sink, idle_s: float, deadline: float) -> None:
        now = asyncio.get_running_loop().time
        while chunk := await self.read(min(now() + idle_s, deadline)):
            if not sink.write(chunk):
                await sink.drained()

    def close(self) -> None:
        self._response.close()


class _Trip:
    """One attempt: what happened to it so far, and its clock."""

    def __init__(self, backend: config.Backend, deadline: float) -> None:
        self.backend = backend
        self.connecting = aiohttp.ClientTimeout(total=None, connect=backend.connect_timeout_s, ceil_threshold=1e9)
        self.clock: asyncio.Timeout | None = None
        self.upload_failed: Exception | None = None
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self.until = min(deadline, self._loop.time() + backend.connect_timeout_s + backend.first_token_timeout_s)

    def wait_on(self) -> None:
        """The wait for the first byte begins now."""
        self.until = min(self._deadline, self._loop.time() + self.backend.first_token_timeout_s)
        if self.clock is not None and not self.clock.expired():
            self.clock.reschedule(self.until)

    def payload(self, body: Body) -> bytes | AsyncIterator[bytes] | None:
        return body if body is None or isinstance(body, bytes) else self._upload(body)

    async def _upload(self, body: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        """The wait for an answer begins when the last piece has gone."""
        try:
            async for piece in body:
                self.wait_on()
                yield piece
        except Exception as exc:
            self.upload_failed = exc
            raise
        self.wait_on()

    def translate(self, exc: BaseException, *, headed: bool) -> BackendError | None:
        """A failure before the first byte, in our words; None when it is none of the backend's."""
        name = self.backend.name
        match exc:
            case aiohttp.ConnectionTimeoutError():
                within = f"within {self.backend.connect_timeout_s:g} s"
                return BackendTimeout(f"{name} took no connection {within}", Reason.CONNECT)
            case TimeoutError():
                return _no_byte(self.backend, late=self.until >= self._deadline)
            case aiohttp.ClientConnectorError() | aiohttp.InvalidURL():
                return BackendError(f"{name} cannot be reached: {_why(exc)}", Reason.CONNECT)
            case aiohttp.ServerDisconnectedError() | aiohttp.ClientOSError() if not headed:
                return BackendError(f"{name} closed the connection: {_why(exc)}", Reason.RESET)
            case aiohttp.ClientError() | OSError():
                return BackendError(f"{name} broke off its answer: {_why(exc)}", Reason.RESET)
        return None


def _tracing() -> aiohttp.TraceConfig:
    """Tells a _Trip when it got its connection, and lets no redirect be followed."""

    async def created(session: aiohttp.ClientSession, context: SimpleNamespace, params: object) -> None:
        if isinstance(context.trace_request_ctx, _Trip):
            context.trace_request_ctx.wait_on()

    async def redirected(session: aiohttp.ClientSession, context: SimpleNamespace, params: object) -> None:
        raise aiohttp.ClientError("it redirects, which is not followed")

    tracing = aiohttp.TraceConfig()
    tracing.on_connection_create_end.append(created)
    tracing.on_request_redirect.append(redirected)
    return tracing


def _only_once(body: Body) -> bool:
    return body is not None and not isinstance(body, bytes)


def _without_credentials(url: URL) -> tuple[URL, str | None]:
    """The URL alone, and the Authorization header that its user and password mean."""
    if url.user is None:
        return url, None
    return url.with_user(None), aiohttp.encode_basic_auth(url.user, url.password or "")


def _told_of(location: str) -> str:
    """Where a redirect leads, without what may be a secret: a user and password, a query."""
    try:
        url = URL(location).with_query(None).with_fragment(None)
    except ValueError:
        return ""
    url = url.with_user(None) if url.absolute else url
    return f" to {url}" if str(url) else ""


def _too_long(backend: config.Backend) -> BackendTimeout:
    return BackendTimeout(f"{backend.name} did not finish its answer within {backend.timeout_s:g} s", Reason.SLOW)


def _no_byte(backend: config.Backend, *, late: bool) -> BackendTimeout:
    """`late`: it is the time for the whole answer that ran out."""
    if late:
        return _too_long(backend)
    return BackendTimeout(f"{backend.name} sent no byte within {backend.first_token_timeout_s:g} s", Reason.SLOW)


def _why(exc: BaseException) -> str:
    """One line about it, without an address."""
    cause = exc.os_error if isinstance(exc, aiohttp.ClientConnectorError) else exc
    if isinstance(cause, OSError) and cause.strerror:
        text = cause.strerror
    else:
        text = str(exc) if isinstance(exc, Broken) else type(exc).__name__
    return (text.splitlines() or [type(exc).__name__])[0]
