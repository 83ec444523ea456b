"""The official OpenAI client, at the upstream itself and through the proxy: it sees the same.

What `make clients` does for many clients, in a few seconds for the one that the tests are installed with.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

from iccache import config
from iccache.api.serve import serving
from iccache.assemble import Proxy
from tests.clients.cases import SCHEMA, script
from tests.clients.proxies import KEYS, two
from tests.clients.upstream import MODEL, MODELS, Upstream
from tests.e2e.world import world

Case = Callable[[AsyncOpenAI], Awaitable[Any]]
SUM: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is 17 plus 25?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
CITY: Any = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": SCHEMA}}
ROUTED = {"models": ["auto", MODEL], "policy": "student", "decision_timeout_ms": 10_000}
BACKENDS = {"through": ("small-model", MODEL), "routed": ("small-model", "large-model")}


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream(models=MODELS) as started:
        yield started


@pytest.fixture
async def direct(upstream: Upstream) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=upstream.base_url, api_key="client-key", max_retries=0) as made:
        yield made


@pytest.fixture(params=BACKENDS)
async def through(request: pytest.FixtureRequest, upstream: Upstream, tmp_path: Path) -> AsyncIterator[AsyncOpenAI]:
    """The same client at a proxy that forwards to the model it names, or routes that name to a student."""
    sections: dict[str, Any] = {"store": {"url": f"sqlite:///{tmp_path}/ic.db"}, "embedder": {"backend": "hash"}}
    if request.param == "routed":
        sections["routing"] = ROUTED
    settings = two(upstream.base_url, BACKENDS[request.param], **sections)
    proxy = Proxy(config.parse(settings), KEYS)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        async with (
            serving(proxy, listener, last_word_s=1),
            AsyncOpenAI(base_url=url, api_key="client-key", max_retries=0) as made,
        ):
            if request.param == "routed":  # so that there is an example to show
                await made.chat.completions.create(model="large-model", messages=SUM)
            yield made


# ---- what it asks; what it sees


async def chat(client: AsyncOpenAI) -> Any:
    answer = await client.chat.completions.create(model=MODEL, messages=SUM)
    return answer.choices[0].to_dict()


async def chat_stream(client: AsyncOpenAI) -> Any:
    asked: Any = [{"role": "user", "content": "Grüße, 世界 \u2028 🙂"}]
    more: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = [c async for c in await client.chat.completions.create(model=MODEL, messages=asked, **more)]
    assert chunks[-1].usage is not None
    return [[choice.to_dict() for choice in chunk.choices] for chunk in chunks]


async def multi_turn(client: AsyncOpenAI) -> Any:
    more: Any = [{"role": "assistant", "content": "42"}, {"role": "user", "content": "And in Italian?"}]
    answer = await client.chat.completions.create(model=MODEL, messages=[*SUM, *more])
    return answer.choices[0].message.content


async def tool_loop(client: AsyncOpenAI) -> Any:
    first = (await client.chat.completions.create(model=MODEL, messages=SUM, tools=[TOOL])).choices[0].message
    assert first.tool_calls
    result: Any = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "42"}
    said: Any = [*SUM, first.to_dict(), result]
    last = (await client.chat.completions.create(model=MODEL, messages=said, tools=[TOOL])).choices[0].message
    return [first.to_dict(), last.to_dict()]


async def tools_stream(client: AsyncOpenAI) -> Any:
    stream = await client.chat.completions.create(model=MODEL, messages=SUM, tools=[TOOL], stream=True)
    return [chunk.choices[0].to_dict() async for chunk in stream]


async def json_schema(client: AsyncOpenAI) -> Any:
    answer = await client.chat.completions.create(model=MODEL, messages=SUM, response_format=CITY)
    return answer.choices[0].message.content


async def responses(client: AsyncOpenAI) -> Any:
    answer = await client.responses.create(model=MODEL, instructions="Be brief.", input="one two")
    return [answer.output_text, answer.status]


async def responses_stream(client: AsyncOpenAI) -> Any:
    async with client.responses.stream(model=MODEL, input="one two") as stream:
        return [event.type async for event in stream]


async def the_rest(client: AsyncOpenAI) -> Any:
    embedded = await client.embeddings.create(model="text-embedding-3-small", input=["one", "two"])
    completed = await client.completions.create(model=MODEL, prompt="one two")
    model = await client.models.retrieve(MODEL)
    assert MODEL in [m.id async for m in client.models.list()]
    return [[d.embedding for d in embedded.data], completed.choices[0].text, model.id]


async def retries(client: AsyncOpenAI) -> Any:
    headers = script(until=2, status=503, headers={"retry-after-ms": "20"})
    patient = client.with_options(max_retries=2)
    answer = await patient.chat.completions.create(model=MODEL, messages=SUM, extra_headers=headers)
    return answer.choices[0].message.content


@pytest.mark.parametrize(
    "case",
    [
        chat,
        chat_stream,
        multi_turn,
        tool_loop,
        tools_stream,
        json_schema,
        responses,
        responses_stream,
        the_rest,
        retries,
    ],
)
async def test_it_sees_the_same(direct: AsyncOpenAI, through: AsyncOpenAI, case: Case) -> None:
    assert await case(through) == await case(direct)


# ---- what goes wrong


ERRORS: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    529: openai.InternalServerError,
}


async def test_an_upstreams_errors_are_the_same(direct: AsyncOpenAI, through: AsyncOpenAI) -> None:
    async def failing(client: AsyncOpenAI, status: int) -> Any:
        headers = script(status=status, headers={"Retry-After": "7"})
        with pytest.raises(ERRORS[status]) as caught:
            await client.chat.completions.create(model=MODEL, messages=SUM, extra_headers=headers)
        return caught.value.body, caught.value.response.headers["retry-after"]

    for status in ERRORS:
        assert await failing(through, status) == await failing(direct, status)


async def test_what_iccache_refuses_itself_has_the_same_class_and_code(
    direct: AsyncOpenAI, through: AsyncOpenAI
) -> None:
    for client in (direct, through):
        with pytest.raises(openai.AuthenticationError) as refused:
            await client.with_options(api_key="wrong-key").chat.completions.create(model=MODEL, messages=SUM)
        assert refused.value.code == "invalid_api_key"
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(model="no-such-model", messages=SUM)
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(model=MODEL, messages=[])


async def test_a_timeout_is_the_clients_own(direct: AsyncOpenAI, through: AsyncOpenAI) -> None:
    for client in (direct, through):
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(
                model=MODEL, messages=SUM, timeout=0.2, extra_headers=script(before_head_s=5)
            )


async def test_an_upstream_that_hangs_up_is_a_502(through: AsyncOpenAI) -> None:
    """Directly it is an APIConnectionError; the client tries both again by itself."""
    with pytest.raises(openai.InternalServerError) as caught:
        headers = script(fault="reset_before_head")
        await through.chat.completions.create(model=MODEL, messages=SUM, extra_headers=headers)
    assert caught.value.status_code == 502


async def test_a_client_that_leaves_stops_the_upstream(upstream: Upstream, through: AsyncOpenAI) -> None:
    headers = script(between_s=0.02, repeat=1000)
    stream = await through.chat.completions.create(model=MODEL, messages=SUM, stream=True, extra_headers=headers)
    await anext(aiter(stream))
    await stream.close()
    async with asyncio.timeout(1):
        await upstream.requests[-1].left.wait()


async def test_where_every_name_is_routed_every_name_can_be_looked_up(tmp_path: Path) -> None:
    async with (
        world(tmp_path, routing={"models": ["*"]}) as w,
        AsyncOpenAI(base_url=f"{w.url}/v1", api_key="none") as client,
    ):
        assert (await client.models.retrieve("org/any-model")).id == "org/any-model"
        assert [m.id async for m in client.models.list()] == ["small", "large"]
