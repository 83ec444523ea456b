"""Reading a request's body, bounded in size and time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web

from iccache.api.app import PROXY
from iccache.errors import RequestError


async def read_body(request: web.Request) -> bytes:
    """The whole body. Raises RequestError: 413 above `max_body_bytes`, and what `pieces` raises."""
    most = request.app[PROXY].settings.server.max_body_bytes
    if request.content.is_eof() and request.content.exception() is None:  # it came with the head, as most do
        whole = request.content.read_nowait()
        if len(whole) <= most:
            return whole
        raise RequestError(413, f"the body is larger than {most} bytes", code="request_too_large")
    body = bytearray()
    async for piece in pieces(request):
        body += piece
        if len(body) > most:
            raise RequestError(413, f"the body is larger than {most} bytes", code="request_too_large")
    return bytes(body)


async def pieces(request: web.Request) -> AsyncIterator[bytes]:
    """The body as it comes. Raises RequestError: 408 when it stops coming, 400 when it is not encoded as it says."""
    while True:
        try:
            async with asyncio.timeout(request.app[PROXY].settings.server.body_timeout_s):
                piece = await request.content.readany()
        except TimeoutError:
            raise RequestError(408, "the request's body did not come in time", code="request_timeout") from None
        except web.RequestPayloadError as exc:
            raise RequestError(400, "the body is not encoded as its headers say") from exc
        if not piece:
            return
        yield piece
