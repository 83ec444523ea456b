"""Every other path under /v1: forwarded as it is, both ways, in constant memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import orjson
from aiohttp import web

from iccache import config
from iccache.api.app import PROXY, REQUEST_ID
from iccache.api.body import pieces, read_body
from iccache.assemble import Proxy
from iccache.backends.fleet import Post, Reply
from iccache.backends.headers import forwardable
from iccache.dialects import body as bodies
from iccache.dialects.dialect import DIALECTS
from iccache.dialects.splice import Document
from iccache.errors import BackendError
from iccache.pipeline import broken_stream
from iccache.plan import read_controls
from iccache.types import Ask, Controls, DecisionKind, Reason

CHAT = DIALECTS["/v1/chat/completions"]


@dataclass(frozen=True, slots=True)
class Parcel:
    """A request that is not looked into further than for its model."""

    body: bytes | None  # None: not read, it is streamed, or there is none
    model: str | None = None
    controls: Controls = field(default_factory=Controls)
    ours: bool = False  # it has the member that is for us


async def forward(request: web.Request) -> web.StreamResponse:
    """To the backend that is pinned or that `model` names, else the session's, else the teacher."""
    proxy = request.app[PROXY]
    arrived = proxy.clock()
    tenant = proxy.gate.tenant(request.headers)
    proxy.gate.admit(tenant, proxy.learner.spent_today(tenant))
    parcel = await _opened(request)
    controls = read_controls(request.headers, parcel.controls)
    order = await _order(proxy, tenant, controls, parcel, again=parcel.body is not None or not request.can_read_body)
    post = Post(
        request.method,
        _path(request),
        request.query_string,
        request.headers,
        lambda b: _body(request, proxy, parcel, b),
    )
    sent = proxy.clock()
    async with proxy.fleet.send(post, order) as reply:
        return await _forwarded(request, proxy, reply, order, arrived, sent)


async def _forwarded(
    request: web.Request, proxy: Proxy, reply: Reply, order: tuple[str, ...], arrived: float, sent: float
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
    proxy.learner.count_passed(reply.backend.name, decision, reason, reply.status)
    response = web.StreamResponse(status=reply.status, headers=headers)
    await response.prepare(request)
    try:
        async for chunk in reply.chunks:
            await response.write(chunk)
    except BackendError as exc:
        if not headers.get("Content-Type", "").startswith("text/event-stream"):
            raise ConnectionResetError(str(exc)) from exc  # cut off, so that the client sees that something is missing
        await response.write(CHAT.error_event(broken_stream(exc)))
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
    session = await proxy.learner.session_backend(tenant, controls.session)
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


def _is_ours(proxy: Proxy, model: str) -> bool:
    """Whether the name means something here; any other goes upstream as it is."""
    return proxy.directory.named(model) is not None or model in proxy.settings.routing.models


def _path(request: web.Request) -> str:
    raw = request.rel_url.raw_path
    return raw if raw.startswith("/v1/") else "/v1" + raw
