"""One upstream over HTTP: raw bytes there and back, four clocks, and every failure in our own words."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from io import BytesIO
from types import SimpleNamespace

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from iccache import config
from iccache.backends.headers import for_upstream
from iccache.errors import BackendError, BackendTimeout, RequestError
from iccache.types import Reason

Body = bytes | AsyncIterable[bytes] | None

STALE_WITHIN_S = 2.0  # a reused connection that breaks later than this had a server at work on the request
_LARGE_BYTES = 1 << 20  # beyond this, bytes are written piece by piece
_HEADER_BYTES = 1 << 16
_VERSION = re.compile(r"/v\d+[a-z0-9]*(/|$)")
_DOT_SEGMENT = re.compile(r"(?:^|/)(?:\.|%2e){1,2}(?:/|$)", re.IGNORECASE)
_NOT_OF_A_URL = re.compile(r"[^\x21-\x7e]")  # a space or a line break would end the request line
_MESSAGES = "/v1/messages"
_QUIET = ("User-Agent", "Content-Type", "Accept")  # only what the client sent


def make_session(*, reuse: bool = True) -> aiohttp.ClientSession:
    """A session for backends: no limit of its own, no cookies, no proxy from the environment, nothing decoded."""
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


class Upstream:
    """An answer that has begun: its head and first bytes are here."""

    def __init__(
        self, backend: config.Backend, response: aiohttp.ClientResponse, first: bytes, deadline: float
    ) -> None:
        self.status = response.status
        self.headers: CIMultiDict[str] = CIMultiDict(response.headers)
        self._backend = backend
        self._response = response
        self._first = first
        self._deadline = deadline

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes, once. Raises BackendError or BackendTimeout where it breaks."""
        chunk, self._first = self._first, b""
        while chunk:
            yield chunk
            chunk = await self._next()

    def close(self) -> None:
        """Whatever has not come yet is not wanted: the connection closes, which stops the upstream."""
        self._response.close()

    async def _next(self) -> bytes:
        now = asyncio.get_running_loop().time()
        idle = self._backend.idle_timeout_s
        if now >= self._deadline:
            raise _too_long(self._backend)
        try:
            async with asyncio.timeout_at(min(now + idle, self._deadline)):
                return await self._response.content.readany()
        except TimeoutError as exc:
            if now + idle >= self._deadline:
                raise _too_long(self._backend) from exc
            raise BackendTimeout(
                f"{self._backend.name} was silent for {idle:g} s in the middle of its answer", Reason.SLOW
            ) from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise BackendError(f"{self._backend.name} broke off its answer: {_why(exc)}", Reason.RESET) from exc


class BackendClient:
    """Sends requests to one backend. `key` goes there with every request; the client's own keys never do."""

    def __init__(self, backend: config.Backend, key: str | None, session: aiohttp.ClientSession) -> None:
        self.backend = backend
        self._base, self._basic = _without_credentials(URL(backend.base_url))
        self._key = key
        self._session = session

    def send(
        self, method: str, path: str, *, query: str = "", headers: Mapping[str, str], body: Body = None
    ) -> AbstractAsyncContextManager[Upstream]:
        """An answer, from its first byte on. `path` as clients write it, /v1/...; `query` without its question mark.

        Entering raises BackendError or BackendTimeout until the head and the first byte of the body (or its end) are
        here, so that another backend may still be asked. Leaving early closes the connection. A request whose reused
        connection proved closed goes once more on a fresh one; a body that can be read only once starts on one.
        """
        return self._send(method, self.url(path, query), self._headers(path, headers, body), body)

    async def converse(
        self, path: str, query: str, headers: Mapping[str, str], protocols: Sequence[str], largest_bytes: int
    ) -> aiohttp.ClientWebSocketResponse:
        """A WebSocket to this backend. Raises aiohttp's and the system's own errors where it does not come about."""
        sent = self._headers(path, headers, None)
        for name in [name for name in sent if name.lower().startswith("sec-websocket-")]:
            del sent[name]
        async with asyncio.timeout(self.backend.connect_timeout_s):
            return await self._session.ws_connect(
                self.url(path, query),
                headers=sent,
                protocols=protocols,
                max_msg_size=largest_bytes,
                autoping=False,
                autoclose=False,
            )

    def url(self, path: str, query: str = "") -> URL:
        """Where `path` is on this backend: its version is dropped where the base URL already has one."""
        if not path.startswith("/") or _DOT_SEGMENT.search(path) or _NOT_OF_A_URL.search(path + query):
            raise RequestError(400, "The path cannot be used.")
        base = self._base.raw_path.rstrip("/")
        if _VERSION.search(base):
            path = re.sub(r"^/v1(?=/|$)", "", path)
        query = "&".join(q for q in (self._base.raw_query_string, query) if q)
        return URL(f"{self._base.origin()}{base}{path}{'?' + query if query else ''}", encoded=True)

    def _headers(self, path: str, headers: Mapping[str, str], body: Body) -> CIMultiDict[str]:
        sent = for_upstream(headers)
        if self._key is not None:
            sent["Authorization"] = f"Bearer {self._key}"
            if path.startswith(_MESSAGES):
                sent["x-api-key"] = self._key
        elif self._basic is not None:
            sent["Authorization"] = self._basic
        given = {name.lower(): value for name, value in headers.items()}
        if _only_once(body) and "content-length" in given and "content-encoding" not in given:
            sent["Content-Length"] = given["content-length"]
        return sent

    @asynccontextmanager
    async def _send(self, method: str, url: URL, headers: CIMultiDict[str], body: Body) -> AsyncIterator[Upstream]:
        deadline = asyncio.get_running_loop().time() + self.backend.timeout_s
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(make_session(reuse=False)) if _only_once(body) else self._session
            try:
                upstream = await self._begin(session, method, url, headers, body, deadline)
            except BackendError as exc:
                if not exc.stale:
                    raise
                fresh = await stack.enter_async_context(make_session(reuse=False))
                upstream = await self._begin(fresh, method, url, headers, body, deadline)
            stack.callback(upstream.close)
            yield upstream

    async def _begin(
        self,
        session: aiohttp.ClientSession,
        method: str,
        url: URL,
        headers: CIMultiDict[str],
        body: Body,
        deadline: float,
    ) -> Upstream:
        """The answer with its first bytes."""
        trip = _Trip(self.backend, deadline)
        response: aiohttp.ClientResponse | None = None
        try:
            async with asyncio.timeout_at(trip.until) as trip.clock:
                response = await session.request(
                    method,
                    url,
                    headers=headers,
                    data=trip.payload(body),
                    allow_redirects=False,
                    skip_auto_headers=_QUIET,
                    timeout=trip.connecting,
                    trace_request_ctx=trip,
                )
                return Upstream(self.backend, response, await response.content.readany(), deadline)
        except BaseException as exc:
            if response is not None:
                response.close()
            if trip.upload_failed is not None:
                raise trip.upload_failed from None
            translated = trip.translate(exc, headed=response is not None)
            if translated is None:
                raise
            raise translated from exc


class _Trip:
    """One attempt: what happened to it so far, and its clock."""

    def __init__(self, backend: config.Backend, deadline: float) -> None:
        self.backend = backend
        self.connecting = aiohttp.ClientTimeout(total=None, connect=backend.connect_timeout_s, ceil_threshold=1e9)
        self.clock: asyncio.Timeout | None = None
        self.reused = False
        self.connected_at: float | None = None
        self.upload_failed: Exception | None = None
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self.until = min(deadline, self._loop.time() + backend.connect_timeout_s + backend.first_token_timeout_s)

    def connected(self, *, reused: bool) -> None:
        self.reused = reused
        self.connected_at = self._loop.time()
        self.wait_on()

    def wait_on(self) -> None:
        """The wait for the first byte begins now."""
        self.until = min(self._deadline, self._loop.time() + self.backend.first_token_timeout_s)
        if self.clock is not None and not self.clock.expired():
            self.clock.reschedule(self.until)

    def payload(self, body: Body) -> BytesIO | bytes | AsyncIterator[bytes] | None:
        if isinstance(body, bytes):
            return BytesIO(body) if len(body) > _LARGE_BYTES else body
        return None if body is None else self._upload(body)

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
            case TimeoutError() if self.until >= self._deadline:
                return _too_long(self.backend)
            case TimeoutError():
                within = f"within {self.backend.first_token_timeout_s:g} s"
                return BackendTimeout(f"{name} sent no byte {within}", Reason.SLOW)
            case aiohttp.ClientConnectorError() | aiohttp.InvalidURL():
                return BackendError(f"{name} cannot be reached: {_why(exc)}", Reason.CONNECT)
            case aiohttp.ServerDisconnectedError() | aiohttp.ClientOSError() if not headed:
                return BackendError(f"{name} closed the connection: {_why(exc)}", Reason.RESET, stale=self._stale())
            case aiohttp.ClientError() | OSError():
                return BackendError(f"{name} broke off its answer: {_why(exc)}", Reason.RESET)
        return None

    def _stale(self) -> bool:
        return self.reused and self.connected_at is not None and self._loop.time() - self.connected_at <= STALE_WITHIN_S


def _tracing() -> aiohttp.TraceConfig:
    """Tells a _Trip when it got its connection, and whether that was used before."""

    async def reused(session: aiohttp.ClientSession, context: SimpleNamespace, params: object) -> None:
        if isinstance(context.trace_request_ctx, _Trip):
            context.trace_request_ctx.connected(reused=True)

    async def created(session: aiohttp.ClientSession, context: SimpleNamespace, params: object) -> None:
        if isinstance(context.trace_request_ctx, _Trip):
            context.trace_request_ctx.connected(reused=False)

    tracing = aiohttp.TraceConfig()
    tracing.on_connection_reuseconn.append(reused)
    tracing.on_connection_create_end.append(created)
    return tracing


def _only_once(body: Body) -> bool:
    return body is not None and not isinstance(body, bytes)


def _without_credentials(url: URL) -> tuple[URL, str | None]:
    """The URL alone, and the Authorization header that its user and password mean."""
    if url.user is None:
        return url, None
    return url.with_user(None), aiohttp.encode_basic_auth(url.user, url.password or "")


def _too_long(backend: config.Backend) -> BackendTimeout:
    return BackendTimeout(f"{backend.name} did not finish its answer within {backend.timeout_s:g} s", Reason.SLOW)


def _why(exc: BaseException) -> str:
    """One line about it, without an address."""
    cause = exc.os_error if isinstance(exc, aiohttp.ClientConnectorError) else exc
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else type(exc).__name__
    return text.splitlines()[0]
