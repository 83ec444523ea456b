"""OpenAI's Agents SDK: an agent with a tool, over chat completions and over responses, streamed and not."""

from __future__ import annotations

from typing import Any

import openai
from agents import (
    Agent,
    Model,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from cases import BASE_URL, KEY, MODEL, case, main, named, script
from pydantic import BaseModel

set_tracing_disabled(True)
client = openai.AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
CHAT = OpenAIChatCompletionsModel(MODEL, client)
RESPONSES = OpenAIResponsesModel(MODEL, client)
SUM = "What is 17 plus 25?"
sums: list[int] = []


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    sums.append(a + b)
    return a + b


class City(BaseModel):
    city: str
    population: int


def agent(model: Model, **more: Any) -> Agent:
    return Agent("calculator", instructions="Be brief.", model=model, **more)


async def looped(model: Model) -> Any:
    sums.clear()
    done = await Runner.run(agent(model, tools=[add]), SUM)
    return [sums, [item.type for item in done.new_items], done.final_output]


async def streamed(model: Model) -> Any:
    done = Runner.run_streamed(agent(model, tools=[add]), SUM)
    kinds = [event.type async for event in done.stream_events()]
    return [len(kinds), done.final_output]


@case
async def chat() -> Any:
    return (await Runner.run(agent(CHAT), SUM)).final_output


@case
async def tool_loop() -> Any:
    return await looped(CHAT)


@case
async def tool_loop_stream() -> Any:
    return await streamed(CHAT)


@case
async def json_schema() -> Any:
    return (await Runner.run(agent(CHAT, output_type=City), SUM)).final_output.model_dump()


@case
async def multi_turn() -> Any:
    session = SQLiteSession("one conversation")
    await Runner.run(agent(CHAT), "Say good morning in German.", session=session)
    done = await Runner.run(agent(CHAT), "And in Italian?", session=session)
    return [done.final_output, len(await session.get_items())]


@case
async def responses() -> Any:
    return (await Runner.run(agent(RESPONSES), SUM)).final_output


@case
async def responses_tool_loop() -> Any:
    return await looped(RESPONSES)


@case
async def responses_tool_loop_stream() -> Any:
    return await streamed(RESPONSES)


@case
async def handoff() -> Any:
    other = Agent("other", model=CHAT)
    done = await Runner.run(agent(CHAT, handoffs=[other]), "hello")
    return [done.last_agent.name, done.final_output]


@case
async def error_rate_limit() -> Any:
    settings = ModelSettings(extra_headers=script(status=429))
    try:
        await Runner.run(agent(CHAT, model_settings=settings), SUM)
    except openai.RateLimitError as exc:
        return named(exc)
    raise AssertionError("nothing was raised")


if __name__ == "__main__":
    main()
