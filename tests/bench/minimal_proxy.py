"""The least that an aiohttp proxy can do: read a request, send it on, send the answer back. The yardstick.

python -m tests.bench.minimal_proxy PORT UPSTREAM
"""

from __future__ import annotations

import asyncio
import sys

import aiohttp
import uvloop
from aiohttp import web

NOT_ON = {"host", "content-length", "transfer-encoding", "connection", "accept-encoding"}


def make_app(upstream: str) -> web.Application:
    async def session(app: web.Application):  # type: ignore[no-untyped-def]
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False, timeout=timeout) as made:
            app["session"] = made
            yield

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name: value for name, value in request.headers.items() if name.lower() not in NOT_ON}
        sent = request.app["session"].request(
            request.method, upstream + request.path_qs, data=body or None, headers=headers
        )
        async with sent as given:
            kind = {"Content-Type": given.headers.get("Content-Type", "application/json")}
            if given.content_length is not None:
                return web.Response(status=given.status, body=await given.read(), headers=kind)
            answer = web.StreamResponse(status=given.status, headers=kind)
            await answer.prepare(request)
            async for piece in given.content.iter_any():
                await answer.write(piece)
            await answer.write_eof()
            return answer

    app = web.Application(client_max_size=64 << 20)
    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{path:.*}", handle)
    return app


async def main(port: int, upstream: str) -> None:
    runner = web.AppRunner(make_app(upstream), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2].rstrip("/")))
