"""A conversation over a WebSocket passes through, both ways."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType, web

from tests.e2e.world import World, world


class Talker:
    """An upstream that answers every message with itself, twice as loud, and closes when told to."""

    def __init__(self) -> None:
        self.asked: list[web.Request] = []
        self.closed_with: int | None = None

    async def handle(self, request: web.Request) -> web.WebSocketResponse:
        self.asked.append(request)
        socket = web.WebSocketResponse(protocols=["realtime"])
        await socket.prepare(request)
        async for message in socket:
            if message.type is WSMsgType.BINARY:
                await socket.send_bytes(message.data * 2)
            elif message.data == "bye":
                await socket.close(code=4321, message=b"as you wish")
            else:
                await socket.send_str(message.data.upper())
        self.closed_with = socket.close_code
        return socket


@pytest.fixture
async def talk(tmp_path: Path) -> AsyncIterator[tuple[World, Talker]]:
    talker = Talker()
    app = web.Application()
    app.router.add_get("/v1/realtime", talker.handle)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    large: dict[str, Any] = {
        "base_url": f"http://127.0.0.1:{runner.addresses[0][1]}/v1",
        "key_env": "LARGE_KEY",
    }
    tenants = [{"name": "t", "key_env": "T_KEY"}]
    async with world(tmp_path, {"LARGE_KEY": "sk-up", "T_KEY": "sk-ours"}, large=large, tenants=tenants) as w:
        yield w, talker
    await runner.cleanup()


async def test_a_redirect_is_not_followed(talk: tuple[World, Talker], tmp_path: Path) -> None:
    """It would lead past what the operator configured, with what the client sent."""
    w, talker = talk
    member = w.proxy.fleet.members["large"]
    moved = web.Application()

    async def elsewhere(request: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect(member.config.base_url + "/realtime")

    moved.router.add_get("/v1/realtime", elsewhere)
    runner = web.AppRunner(moved, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    member.client._base = member.client._base.with_port(runner.addresses[0][1])
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await connect(w)
    assert refused.value.status == 502
    assert not talker.asked
    await runner.cleanup()


def connect(w: World, **given: Any) -> Any:
    headers = {"Authorization": "Bearer sk-ours"}
    return w.http.ws_connect(w.url + "/v1/realtime?model=large", **{"headers": headers} | given)


async def test_messages_pass_both_ways(talk: tuple[World, Talker]) -> None:
    w, talker = talk
    async with connect(w, protocols=["realtime", "openai-insecure-api-key.sk-ours"]) as socket:
        assert socket.protocol == "realtime"
        await socket.send_str("hello")
        assert await socket.receive_str() == "HELLO"
        await socket.send_bytes(b"\0\xff")
        assert await socket.receive_bytes() == b"\0\xff\0\xff"
    (asked,) = talker.asked
    assert asked.query_string == "model=large-model"
    assert asked.headers["Authorization"] == "Bearer sk-up"
    assert "sk-ours" not in str(asked.headers)
    await w.until(lambda: _later(talker), lambda code: code == 1000)


async def _later(talker: Talker) -> int | None:
    return talker.closed_with


async def test_the_upstreams_close_reaches_the_client(talk: tuple[World, Talker]) -> None:
    w, _ = talk
    async with connect(w) as socket:
        await socket.send_str("bye")
        message = await socket.receive()
        assert (message.type, message.data, message.extra) == (WSMsgType.CLOSE, 4321, "as you wish")


async def test_without_a_key_there_is_no_conversation(talk: tuple[World, Talker]) -> None:
    w, talker = talk
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await connect(w, headers={})
    assert caught.value.status == 401
    assert not talker.asked


async def test_a_backend_that_is_down_is_a_502(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.large.stop()
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await w.http.ws_connect(w.url + "/v1/realtime?model=large")
        assert caught.value.status == 502


async def test_a_refusal_keeps_its_status(talk: tuple[World, Talker]) -> None:
    w, _ = talk
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await w.http.ws_connect(w.url + "/v1/elsewhere?model=large", headers={"Authorization": "Bearer sk-ours"})
    assert caught.value.status == 404
