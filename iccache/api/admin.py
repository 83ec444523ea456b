"""/admin: JSON behind the command line and the dashboard. A tenant's key never suffices."""

from __future__ import annotations

import ipaddress

from aiohttp import web

from iccache import config
from iccache.api.app import PROXY
from iccache.api.auth import bearer, same_key
from iccache.errors import RequestError
from iccache.explain import example_as_json, exchange_as_json

MOST_AT_ONCE = 1000
LARGEST_NUMBER = 2**63 - 1  # what a store can count to
FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via")


def add_routes(app: web.Application) -> None:
    """Every one of them checks `_allowed` first."""
    app.router.add_get("/admin/exchanges/{id}", exchange)
    app.router.add_get("/admin/examples", examples)
    app.router.add_get("/admin/examples/{id}", example)
    app.router.add_delete("/admin/examples/{id}", delete_example)
    app.router.add_route("*", "/admin{rest:.*}", nothing)


async def exchange(request: web.Request) -> web.Response:
    """What `iccache explain` prints."""
    _allowed(request)
    request_id = request.match_info["id"]
    found = await request.app[PROXY].read(lambda s: (s.exchange(request_id), s.feedback(request_id)))
    if found[0] is None:
        raise RequestError(404, f"no exchange {request_id} is recorded", code="not_found")
    return web.json_response(exchange_as_json(found[0], found[1]))


async def examples(request: web.Request) -> web.Response:
    """Examples, newest first: ?tenant=, subject=, limit=, offset=."""
    _allowed(request)
    query = request.query
    limit, offset = _number(request, "limit", 100), _number(request, "offset", 0)
    tenant, subject = query.get("tenant"), query.get("subject")
    whose = None if subject is None else request.app[PROXY].learner.name(subject)
    rows = await request.app[PROXY].read(
        lambda s: s.list_examples(tenant=tenant, subject=whose, limit=min(limit, MOST_AT_ONCE), offset=offset)
    )
    return web.json_response({"examples": [example_as_json(e) for e in rows]})


async def example(request: web.Request) -> web.Response:
    """One example, whole."""
    _allowed(request)
    key = request.match_info["id"]
    rows = await request.app[PROXY].read(lambda s: s.examples([key]))
    if not rows:
        raise RequestError(404, f"no example {key}", code="not_found")
    return web.json_response(example_as_json(rows[0]))


async def delete_example(request: web.Request) -> web.Response:
    """204 once it is gone from the store and from this process's index."""
    _allowed(request)
    key = request.match_info["id"]
    if not await request.app[PROXY].learner.delete_examples([key]):
        raise RequestError(404, f"no example {key}", code="not_found")
    return web.Response(status=204)


async def nothing(request: web.Request) -> web.Response:
    """Unknown admin paths are asked for the key too, so that they tell nothing."""
    _allowed(request)
    raise web.HTTPNotFound


def _allowed(request: web.Request) -> None:
    key = request.app[PROXY].admin_key
    if key is not None:
        if not same_key(bearer(request.headers), key):
            raise RequestError(401, "the admin key is wanted", type="authentication_error", code="invalid_api_key")
    elif not _from_here(request):
        raise RequestError(403, "without an admin key, /admin answers on loopback only", code="forbidden")


def _from_here(request: web.Request) -> bool:
    """Whether it was this machine that asked: not another one through a proxy that runs here, nor a web page whose
    name was made to point here (the browser still says that name in `Host`)."""
    try:
        near = ipaddress.ip_address(request.remote or "").is_loopback
    except ValueError:
        return False
    return (
        near
        and config.is_loopback(config.host_of(request.host))
        and not any(name in request.headers for name in FORWARDED)
    )


def _number(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdecimal()):
        raise RequestError(400, f"{name} is a whole number, not {text!r}", param=name)
    return min(int(text[:20]), LARGEST_NUMBER)
