"""POST /v1/feedback: what became of an answer."""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import web

from iccache.api.app import PROXY
from iccache.api.body import read_body
from iccache.errors import RequestError
from iccache.types import Verdict

FORMS = ("score", "rating", "preferred_over", "demonstration")
RATINGS = {"up": 1.0, "down": 0.0}


async def post(request: web.Request) -> web.Response:
    """204 once it, and the exchange it speaks of, are durable."""
    proxy = request.app[PROXY]
    tenant = proxy.gate.tenant(request.headers)
    verdict = read(await read_body(request))
    await proxy.learner.feedback(tenant, verdict)
    return web.Response(status=204)


async def nothing_else(request: web.Request) -> web.Response:
    """Feedback is given and not asked for; no other method of this path is any backend's business."""
    request.app[PROXY].gate.tenant(request.headers)
    raise web.HTTPMethodNotAllowed(request.method, ("POST",))


def read(body: bytes) -> Verdict:
    """The body, understood. Raises RequestError 400 for anything that is not exactly one verdict."""
    try:
        document = orjson.loads(body)
    except ValueError as exc:
        raise RequestError(400, f"the body is not JSON: {exc}") from exc
    if not isinstance(document, dict):
        raise RequestError(400, "the body is not a JSON object")
    request_id = document.get("request_id")
    if not isinstance(request_id, str) or not request_id:
        raise RequestError(400, "request_id: the x-request-id of the answer is missing", param="request_id")
    unknown = sorted(set(document) - {"request_id", *FORMS})
    if unknown:
        raise RequestError(400, f"unknown key {unknown[0]}; known: {', '.join(FORMS)}", param=unknown[0])
    given = [form for form in FORMS if document.get(form) is not None]
    if len(given) != 1:
        raise RequestError(400, f"exactly one of {', '.join(FORMS)} is wanted, not {len(given)}")
    return _verdict(request_id, given[0], document[given[0]])


def _verdict(request_id: str, form: str, value: Any) -> Verdict:
    if form == "score":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise RequestError(400, f"score is a number from 0 to 1, not {value!r}", param="score")
        return Verdict(request_id, score=float(value))
    if form == "rating":
        if not isinstance(value, str) or value not in RATINGS:
            raise RequestError(400, f'rating is "up" or "down", not {value!r}', param="rating")
        return Verdict(request_id, score=RATINGS[value])
    if not isinstance(value, str) or not value.strip():
        raise RequestError(400, f"{form} is a text", param=form)
    if form == "preferred_over":
        if value == request_id:
            raise RequestError(400, "preferred_over names another request", param=form)
        return Verdict(request_id, preferred_over=value)
    return Verdict(request_id, demonstration=value)
