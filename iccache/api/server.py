"""The rim: routes, bodies, errors and the life of the server. What a request's fate depends on is in `pipeline`."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.typedefs import Handler

from iccache.api import admin, feedback, health, passthrough
from iccache.api.app import BEGUN, PROXY, REQUEST_ID
from iccache.api.body import read_body
from iccache.api.refusal import NOBODY, dialect_of, headers_of, told
from iccache.assemble import Proxy
from iccache.backends.fleet import is_stream
from iccache.dialects.dialect import DIALECTS, Dialect
from iccache.errors import RequestError
from iccache.pipeline import Call, Head

# Clients whose base URL lacks /v1 ask for these at the root.
RESOURCES = (
    "chat", "completions", "embeddings", "responses", "messages", "models", "files", "uploads", "batches", "audio",
    "images", "videos", "moderations", "fine_tuning", "vector_stores", "containers", "conversations", "evals",
    "assistants", "threads", "realtime", "feedback",
)  # fmt: skip


NOT_COUNTED = ("/admin", "/healthz", "/readyz", "/metrics")


def make_app(proxy: Proxy) -> web.Application:
    """The application that serves `proxy`. Starting and stopping the proxy is part of its life."""
    app = web.Application(middlewares=[errors_in_shape], client_max_size=proxy.settings.server.max_body_bytes)
    app[PROXY] = proxy
    for prefix in ("/v1", ""):
        for dialect in DIALECTS.values():
            path = dialect.path.removeprefix("/v1")
            app.router.add_post(prefix + path, answering(dialect), expect_handler=expected)
        app.router.add_post(prefix + "/feedback", feedback.post)
        app.router.add_route("*", prefix + "/feedback", feedback.nothing_else)
        app.router.add_get(prefix + "/models", health.models)
        app.router.add_get(prefix + "/models/{id:.+}", health.model)
    health.add_routes(app)
    admin.add_routes(app)
    app.router.add_route("*", "/v1/{rest:.*}", passthrough.forward, expect_handler=expected)
    for resource in RESOURCES:
        app.router.add_route("*", f"/{{rest:{resource}(?:/.*)?}}", passthrough.forward, expect_handler=expected)
    app.on_response_prepare.append(_begun)
    app.cleanup_ctx.append(_alive)
    return app


async def _alive(app: web.Application) -> AsyncIterator[None]:
    proxy = app[PROXY]
    await proxy.start()
    yield
    await proxy.stop()


def answering(dialect: Dialect) -> Handler:
    """The handler of one dialect's endpoint."""

    async def handle(request: web.Request) -> web.StreamResponse:
        proxy = request.app[PROXY]
        arrived = proxy.clock()
        tenant = proxy.gate.tenant(request.headers)
        proxy.gate.admit(tenant, proxy.learner.spent_today(tenant))
        body = await read_body(request)
        call = Call(
            request_id=request[REQUEST_ID],
            tenant=tenant,
            dialect=dialect,
            query=request.rel_url.raw_query_string,
            headers=request.headers,
            body=body,
            at=proxy.wall(),
            arrived=arrived,
        )
        async with aclosing(proxy.pipeline.answer(call)) as pieces:
            head = await anext(pieces)
            assert isinstance(head, Head)
            return await send(request, head, pieces)

    return handle


async def expected(request: web.Request) -> web.StreamResponse | None:
    """Tell a client that waits with its body to go on; whoever expects anything else is told in our errors' shape."""
    wanted = request.headers.get(hdrs.EXPECT, "")
    if request.version != HttpVersion11:
        return None
    if wanted.lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
        return None
    request[REQUEST_ID] = f"req_{uuid.uuid4().hex}"
    request.app[PROXY].metrics.requests.labels(NOBODY, NOBODY, "417").inc()
    return in_shape(request, RequestError(417, f"nothing is known of what is expected: {wanted!r}"))


async def send(request: web.Request, head: Head, pieces: AsyncIterator[Head | bytes]) -> web.StreamResponse:
    """Forward an answer: the head at once, then every piece as it comes."""
    if is_stream(head.headers):
        response = web.StreamResponse(status=head.status, headers=head.headers)
        await response.prepare(request)
        async for piece in pieces:
            assert isinstance(piece, bytes)
            await response.write(piece)
        await response.write_eof()
        return response
    body = b"".join([piece async for piece in pieces if isinstance(piece, bytes)])
    return web.Response(status=head.status, headers=head.headers, body=body)


@web.middleware
async def errors_in_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every request an id, and every error the shape that its client reads."""
    request[REQUEST_ID] = f"req_{uuid.uuid4().hex}"
    request.app[PROXY].requests += 1
    request.app[PROXY].open_requests += 1
    try:
        response = await handler(request)
    except (asyncio.CancelledError, ConnectionResetError):
        raise
    except Exception as exc:
        error = _told(request, exc)
        if not request.path.startswith(NOT_COUNTED):
            request.app[PROXY].metrics.requests.labels(NOBODY, NOBODY, str(error.status)).inc()
        if BEGUN in request:  # no second head in the middle of an answer: it is cut off
            raise ConnectionResetError(error.message) from exc
        return in_shape(request, error)
    finally:
        request.app[PROXY].open_requests -= 1
    if not response.prepared:
        response.headers.setdefault("x-request-id", request[REQUEST_ID])
    return response


async def _begun(request: web.Request, _response: web.StreamResponse) -> None:
    request[BEGUN] = True


def _told(request: web.Request, exc: Exception) -> RequestError:
    return told(_translated(exc, request) if isinstance(exc, web.HTTPException) else exc, request[REQUEST_ID])


def in_shape(request: web.Request, error: RequestError) -> web.Response:
    """`error` as the dialect of the request's path says it; OpenAI's where it has none."""
    response = web.Response(
        status=error.status,
        body=dialect_of(request.path).error(error),
        content_type="application/json",
        headers=headers_of(error, request[REQUEST_ID]),
    )
    if error.status == 408:
        response.force_close()  # the rest of that body would be read as the next request
    return response


def _translated(exc: web.HTTPException, request: web.Request) -> RequestError:
    if exc.status == 404:
        return RequestError(404, f"there is nothing at {request.method} {request.path}", code="not_found")
    if exc.status == 405:
        return RequestError(405, f"{request.path} does not take {request.method}", code="method_not_allowed")
    if exc.status == 413:
        limit = request.app[PROXY].settings.server.max_body_bytes
        return RequestError(413, f"the body is larger than {limit} bytes", code="request_too_large")
    return RequestError(exc.status, exc.reason or "bad request")
