"""WebSockets under /v1 (`/v1/realtime`): forwarded message by message, both ways. Not looked into, not recorded."""

from __future__ import annotations

import asyncio

import aiohttp
from aiohttp import WSMsgType, hdrs, web

from iccache.api.app import PROXY, REQUEST_ID
from iccache.errors import BackendError, RequestError
from iccache.types import Reason

KEY_PROTOCOL = "openai-insecure-api-key."  # how a browser hands in a key: it is for us
LARGEST_MESSAGE_BYTES = 32 * 1024 * 1024


def wanted(request: web.Request) -> bool:
    """Whether the client asks for a WebSocket, and rightly so; else the upgrade is ignored, as HTTP has it."""
    headers = request.headers
    return (
        headers.get(hdrs.UPGRADE, "").lower() == "websocket"
        and headers.get(hdrs.SEC_WEBSOCKET_VERSION) == "13"
        and hdrs.SEC_WEBSOCKET_KEY in headers
    )


async def forward(request: web.Request, backend: str, path: str, query: str) -> web.StreamResponse:
    """A conversation with `backend`, until either side ends it.

    Raises BackendError where the backend cannot be reached, RequestError with its status where it refuses.
    """
    proxy = request.app[PROXY]
    client = proxy.fleet.members[backend].client
    offered = [p.strip() for p in request.headers.get(hdrs.SEC_WEBSOCKET_PROTOCOL, "").split(",")]
    protocols = [p for p in offered if p and not p.startswith(KEY_PROTOCOL)]
    try:
        upstream = await client.converse(path, query, request.headers, protocols, LARGEST_MESSAGE_BYTES)
    except aiohttp.WSServerHandshakeError as exc:
        raise RequestError(
            exc.status if exc.status >= 400 else 502,
            f"{backend} refuses the conversation: {exc.message}",
            type="upstream_error",
            code="upstream_refused",
        ) from exc
    except (aiohttp.ClientError, OSError, TimeoutError) as exc:
        told = f"{backend} does not take the conversation up: {type(exc).__name__}"
        raise BackendError(told, Reason.CONNECT) from exc
    async with upstream:
        ours = web.WebSocketResponse(
            protocols=protocols, max_msg_size=LARGEST_MESSAGE_BYTES, autoping=False, autoclose=False
        )
        ours.headers["x-request-id"] = request[REQUEST_ID]
        ours.headers["x-iccache-backend"] = backend
        ours.headers["x-iccache-decision"] = "bypass"
        ours.headers["x-iccache-reason"] = Reason.ENDPOINT.value
        await ours.prepare(request)
        pumps = [asyncio.create_task(_pump(ours, upstream)), asyncio.create_task(_pump(upstream, ours))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
    return ours


Side = web.WebSocketResponse | aiohttp.ClientWebSocketResponse


async def _pump(source: Side, sink: Side) -> None:
    """Every message of one side to the other, until it closes or breaks."""
    while True:
        message = await source.receive()
        match message.type:
            case WSMsgType.TEXT:
                await sink.send_str(message.data)
            case WSMsgType.BINARY:
                await sink.send_bytes(message.data)
            case WSMsgType.PING:
                await sink.ping(message.data)
            case WSMsgType.PONG:
                await sink.pong(message.data)
            case WSMsgType.CLOSE:
                await sink.close(code=message.data or 1000, message=(message.extra or "").encode())
                return
            case _:
                await sink.close(code=1011)
                return
