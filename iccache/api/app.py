"""Where handlers find the proxy, a request its id, and whether its answer has begun."""

from __future__ import annotations

from aiohttp import web

from iccache.assemble import Proxy

PROXY: web.AppKey[Proxy] = web.AppKey("proxy", Proxy)

BEGUN: web.RequestKey[bool] = web.RequestKey("begun", bool)

REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
