"""The official OpenAI client on the far side: what passes is what it understands, and errors are its own classes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from openai import AsyncOpenAI

from iccache.backends.client import BackendClient, make_session
from iccache.backends.headers import forwardable
from iccache.config import Backend
from iccache.dialects.dialect import DIALECTS
from iccache.errors import BackendError, RequestError
from tests.fakes import Script, ScriptedUpstream


def relay(client: BackendClient) -> web.Application:
    """The thinnest proxy there can be."""

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        async with client.send(request.method, request.raw_path, headers=request.headers, body=body) as upstream:
            response = web.StreamResponse(status=upstream.status, headers=forwardable(upstream.headers))
            await response.prepare(request)
            try:
                async for chunk in upstream.chunks():
                    await response.write(chunk)
            except BackendError as exc:
                await response.write(DIALECTS[request.path].error_event(RequestError(502, str(exc))))
            await response.write_eof()
            return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    return app


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as started:
        yield started


@pytest.fixture
async def client(upstream: ScriptedUpstream) -> AsyncIterator[AsyncOpenAI]:
    async with make_session() as session:
        backend = Backend(name="b", base_url=upstream.base_url, model="m")
        async with (
            TestServer(relay(BackendClient(backend, "upstream-key", session)), handler_cancellation=True) as server,
            AsyncOpenAI(base_url=str(server.make_url("/v1")), api_key="tenant-key", max_retries=0) as made,
        ):
            yield made


async def test_chat(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    answer = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "one two"}])
    assert answer.choices[0].message.content == "one two"
    assert answer.usage is not None
    assert upstream.requests[0].headers["Authorization"] == "Bearer upstream-key"


async def test_chat_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "one \u2028 two"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "one \u2028 two"
    assert chunks[-1].usage is not None


async def test_responses(client: AsyncOpenAI) -> None:
    assert (await client.responses.create(model="m", input="one two")).output_text == "one two"
    stream = await client.responses.create(model="m", input="one two", stream=True)
    events = [event async for event in stream]
    assert [e.type for e in events][-1] == "response.completed"


async def test_the_rest(client: AsyncOpenAI) -> None:
    assert [m.id async for m in client.models.list()] == ["fake"]
    assert (await client.embeddings.create(model="m", input="x")).data[0].embedding == pytest.approx([0.6, 0.8])
    assert (await client.completions.create(model="m", prompt="x")).choices[0].text == "x"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (404, openai.NotFoundError),
        (429, openai.RateLimitError),
        (503, openai.InternalServerError),
    ],
)
async def test_upstream_errors(
    client: AsyncOpenAI, upstream: ScriptedUpstream, status: int, kind: type[openai.APIStatusError]
) -> None:
    upstream.script = Script(status=status, headers={"Retry-After": "9"})
    with pytest.raises(kind) as caught:
        await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
    assert f"scripted {status}" in str(caught.value)
    assert caught.value.response.headers["retry-after"] == "9"
    assert caught.value.response.headers["x-iccache-upstream-request-id"] == "upstream-1"


async def test_a_break_midway_is_an_error(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.script = Script(answer="one two three", fault="reset_midway", between_s=0.01)
    with pytest.raises(openai.APIError, match="broke off"):
        async for _ in await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], stream=True
        ):
            pass
    with pytest.raises(openai.APIError, match="broke off"):
        async for _ in await client.responses.create(model="m", input="x", stream=True):
            pass


async def test_a_client_that_leaves_stops_the_upstream(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    upstream.script = Script(between_s=0.02, repeat=1000)
    stream = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], stream=True)
    await anext(aiter(stream))
    await stream.close()
    async with asyncio.timeout(1):
        await upstream.requests[0].left.wait()
