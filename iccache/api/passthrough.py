"""Every other path under /v1: forwarded as it is, both ways, in constant memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import orjson
from aiohttp import hdrs, web

from iccache import config
from iccache.api import websocket
from iccache.api.app import PROXY, REQUEST_ID
from iccache.api.body import pieces, read_body
from iccache.api.metering import Meter, estimated, usage_of, usage_of_part
from iccache.assemble import Proxy
from iccache.backends.fleet import Post, Reply, is_failure
from iccache.backends.headers import forwardable
from iccache.dialects import body as bodies
from iccache.dialects.dialect import DIALECTS
from iccache.dialects.packed import unpacker
from iccache.dialects.splice import Document
from iccache.errors import BackendError
from iccache.pipeline import broken_stream
from iccache.plan import read_controls
from iccache.price import as_usd, cost
from iccache.types import Ask, Controls, DecisionKind, Reason, Usage

METERED_BYTES = 4_000_000  # a JSON answer up to this size is read whole, for what it says of its cost
CHAT = DIALECTS["/v1/chat/completions"]
REPEATABLE = frozenset({"/v1/completions", "/v1/embeddings", "/v1/moderations"})  # asked twice, nothing exists twice


@dataclass(frozen=True, slots=True)
class Parcel:
    """A request that is not looked into further than for its model."""

    body: bytes | None  # None: not read, it is streamed, or there is none
    model: str | None = None
    controls: Controls = field(default_factory=Controls)
    ours: bool = False  # it has the member that is for us


async def forward(request: web.Request) -> web.StreamResponse:
    """To the backend that is pinned or that `model` names, else the session's, else the teacher."""
    if request.method == hdrs.METH_TRACE:
        raise web.HTTPMethodNotAllowed(request.method, ())  # what comes back would hold the backend's key
    proxy = request.app[PROXY]
    arrived = proxy.clock()
    tenant = proxy.gate.tenant(request.headers)
    proxy.gate.admit(tenant, proxy.learner.spent_today(tenant))
    if websocket.wanted(request):
        return await _conversation(request, proxy, tenant)
    parcel = await _opened(request)
    controls = read_controls(request.headers, parcel.controls)
    order = await _order(proxy, tenant, controls, parcel, again=parcel.body is not None or not request.can_read_body)
    post = _post(request, proxy, tenant, parcel)
    sent = proxy.clock()
    async with proxy.fleet.send(post, order) as reply:
        if reply.body is None and not post.repeatable and _says_it_is_small(reply):
            reply.body = b"".join([chunk async for chunk in reply.chunks])
        return await _forwarded(request, proxy, tenant, parcel, reply, order, arrived, sent)


def _post(request: web.Request, proxy: Proxy, tenant: str, parcel: Parcel) -> Post:
    path = _path(request)
    repeatable = request.method in ("GET", "HEAD") or (parcel.body is not None and path in REPEATABLE)

    def lost(backend: config.Backend, came: bytes) -> None:
        usage = usage_of_part(came, path, parcel.body, proxy.tokenizers[backend.tokenizer].count)
        proxy.learner.count_lost(tenant, backend, usage)

    return Post(
        request.method,
        path,
        request.rel_url.raw_query_string,
        request.headers,
        lambda b: _body(request, proxy, parcel, b),
        repeatable=repeatable,
        whole=lambda reply: repeatable and request.method != hdrs.METH_HEAD and _is_metered(reply, path),
        lost=lost,
        any_length=True,
    )


async def _conversation(request: web.Request, proxy: Proxy, tenant: str) -> web.StreamResponse:
    """A WebSocket. Its model is in the query, as /v1/realtime has it."""
    parcel = Parcel(None, request.query.get("model"))
    order = await _order(proxy, tenant, read_controls(request.headers, parcel.controls), parcel, again=False)
    backend = proxy.directory.names[order[0]]
    query = request.rel_url.raw_query_string
    if parcel.model not in (None, backend.model) and _is_ours(proxy, parcel.model or ""):
        query = request.rel_url.update_query(model=backend.model).raw_query_string
    return await websocket.forward(request, backend.name, _path(request), query)


async def _forwarded(
    request: web.Request,
    proxy: Proxy,
    tenant: str,
    parcel: Parcel,
    reply: Reply,
    order: tuple[str, ...],
    arrived: float,
    sent: float,
) -> web.StreamResponse:
    fell_back = reply.backend.name != order[0]
    decision = DecisionKind.FALLBACK if fell_back else DecisionKind.BYPASS
    reason = (reply.fell_back if fell_back else None) or Reason.ENDPOINT
    headers = forwardable(reply.headers)
    headers.update(
        {
            "x-request-id": request[REQUEST_ID],
            "x-iccache-backend": reply.backend.name,
            "x-iccache-decision": decision.value,
            "x-iccache-reason": reason.value,
            "x-iccache-examples": "0",
            "x-iccache-overhead-ms": f"{(sent - arrived) * 1000:.3f}",
        }
    )
    path, tokens = _path(request), proxy.tokenizers[reply.backend.tokenizer].count
    unpack = unpacker(reply.headers)
    if (body := reply.body) is not None:
        usage = Usage(0, 0)
        if reply.status < 400:
            usage = usage_of(body if unpack is None else unpack(body), path, parcel.body, tokens)
        proxy.learner.count_passed(tenant, reply.backend, decision, reply.status, usage)
        headers["x-iccache-cost-usd"] = as_usd(cost(reply.backend, usage))
        return web.Response(status=reply.status, headers=headers, body=body)
    response = web.StreamResponse(status=reply.status, headers=headers)
    meter = Meter()
    if reply.streams:
        response.headers.setdefault("Cache-Control", "no-cache")
        response.headers["X-Accel-Buffering"] = "no"
    elif not is_failure(reply.status):  # of an error, no more than its beginning may have been kept
        response.content_length = _length(reply)
    try:
        await response.prepare(request)
        async for chunk in reply.chunks:
            if reply.streams:
                meter.feed(chunk if unpack is None else unpack(chunk))
            await response.write(chunk)
    except BackendError as exc:
        if not reply.streams:
            raise ConnectionResetError(str(exc)) from exc  # cut off, so that the client sees that something is missing
        await response.write(CHAT.error_event(broken_stream(exc)))
    finally:
        said = meter.usage()
        if said is None:
            said = Usage(0, 0) if reply.status >= 400 else estimated(path, parcel.body, meter.said, tokens)
        proxy.learner.count_passed(tenant, reply.backend, decision, reply.status, said)
    await response.write_eof()
    return response


async def _opened(request: web.Request) -> Parcel:
    """The body where it is JSON, with the model it names and what it asks of us; else unread."""
    if request.content_type != "application/json" or not request.can_read_body:
        return Parcel(None)
    body = await read_body(request)
    try:
        document = orjson.loads(body)
    except ValueError:
        return Parcel(body)  # what is wrong with it is the upstream's to say
    if not isinstance(document, dict):
        return Parcel(body)
    bodies.refuse_wide(document)
    model = document.get("model")
    named = model if isinstance(model, str) else None
    return Parcel(body, named, bodies.controls(document), bodies.CONTROLS in document)


async def _order(proxy: Proxy, tenant: str, controls: Controls, parcel: Parcel, *, again: bool) -> tuple[str, ...]:
    """Whom to ask, first to last; the first alone where the request cannot be sent `again`."""
    directory = proxy.directory
    if controls.backend is not None:
        ask = Ask(CHAT.name, b"", "", False, "", controls=controls)
        pin = directory.pinned(ask, directory.by_price)
    else:
        pin = directory.named(parcel.model) if parcel.model else None
    if pin is not None:
        return (pin.name,)
    named = None if controls.session is None else proxy.learner.name(controls.session)
    session = await proxy.learner.session_backend(tenant, named)
    first = directory.names.get(session or "") or directory.teacher(directory.by_price)
    return directory.with_fallbacks(first, directory.by_price) if again else (first.name,)


def _body(
    request: web.Request, proxy: Proxy, parcel: Parcel, backend: config.Backend
) -> bytes | AsyncIterator[bytes] | None:
    if parcel.body is None:
        return pieces(request) if request.can_read_body else None
    rename = parcel.model not in (None, backend.model) and _is_ours(proxy, parcel.model or "")
    if not rename and not parcel.ours:
        return parcel.body
    document = Document(parcel.body)
    document.remove(bodies.CONTROLS)
    if rename:
        document.replace("model", orjson.dumps(backend.model))
    return document.bytes()


def _is_metered(reply: Reply, path: str) -> bool:
    """Whether the answer is a JSON body that may say what it took, and is small: as it says, or as a model's are."""
    return _says_it_is_small(reply) or (_length(reply) is None and path in REPEATABLE and _is_json(reply))


def _says_it_is_small(reply: Reply) -> bool:
    length = _length(reply)
    return length is not None and length <= METERED_BYTES and _is_json(reply)


def _is_json(reply: Reply) -> bool:
    return reply.headers.get("Content-Type", "").startswith("application/json") and not is_failure(reply.status)


def _length(reply: Reply) -> int | None:
    """How long the body will be, so that whoever downloads it can tell how much is missing."""
    length = reply.headers.get("Content-Length", "") if "Transfer-Encoding" not in reply.headers else ""
    return int(length) if length.isascii() and length.isdecimal() else None


def _is_ours(proxy: Proxy, model: str) -> bool:
    """Whether the name means something here; any other goes upstream as it is."""
    return proxy.directory.named(model) is not None or model in proxy.settings.routing.models


def _path(request: web.Request) -> str:
    raw = request.rel_url.raw_path
    return raw if raw.startswith("/v1/") else "/v1" + raw
