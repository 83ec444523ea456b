"""Alive, ready, metrics and models."""

from __future__ import annotations

from aiohttp import web

from iccache.api.app import PROXY
from iccache.errors import RequestError


def add_routes(app: web.Application) -> None:
    """Endpoints that need no key and tell no secret."""
    app.router.add_get("/healthz", alive)
    app.router.add_get("/readyz", ready)
    app.router.add_get("/metrics", metrics)


async def alive(request: web.Request) -> web.Response:
    """200 as long as the process answers."""
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """200 when the index is loaded, the store writable and a backend reachable; else 503 saying what is not."""
    problems = await request.app[PROXY].problems()
    if problems:
        return web.json_response({"status": "not ready", "problems": problems}, status=503)
    return web.json_response({"status": "ready"})


async def metrics(request: web.Request) -> web.Response:
    """Prometheus' text format."""
    proxy = request.app[PROXY]
    await proxy.measure()
    return web.Response(
        body=proxy.metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
    )


async def models(request: web.Request) -> web.Response:
    """`auto`, and every backend."""
    proxy = request.app[PROXY]
    proxy.gate.tenant(request.headers)
    return web.json_response({"object": "list", "data": [_model(name, owner) for name, owner in _listed(request)]})


async def model(request: web.Request) -> web.Response:
    """One of them, also by the name of its model upstream; with "*" among the routed names, any."""
    proxy = request.app[PROXY]
    proxy.gate.tenant(request.headers)
    wanted = request.match_info["id"]
    listed = dict(_listed(request))
    backend = proxy.directory.named(wanted)
    if wanted in listed:
        return web.json_response(_model(wanted, listed[wanted]))
    if backend is not None:
        return web.json_response(_model(wanted, backend.name))
    if proxy.directory.is_routed(wanted):
        return web.json_response(_model(wanted, "iccache"))
    known = ", ".join(listed)
    raise RequestError(
        404, f"the model {wanted!r} does not exist; there are: {known}", param="model", code="model_not_found"
    )


def _listed(request: web.Request) -> list[tuple[str, str]]:
    proxy = request.app[PROXY]
    routed = [(name, "iccache") for name in proxy.settings.routing.models if name != "*"]
    return routed + [(b.name, "iccache") for b in proxy.directory.by_price]


def _model(name: str, owner: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": owner}
