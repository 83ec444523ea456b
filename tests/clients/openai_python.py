"""The official OpenAI client for Python: the same script for every major version."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from cases import BASE_URL, KEY, MODEL, SCHEMA, case, left, main, mark, named, raised, script
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
SUM: Any = [{"role": "user", "content": "What is 17 plus 25?"}]


class City(BaseModel):
    city: str
    population: int


def ask(text: str = "one two three", /, **more: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}], **more)


def told(exc: openai.APIStatusError) -> list[Any]:
    return [named(exc), exc.code, exc.response.headers.get("retry-after")]


@case
def chat() -> Any:
    answer = ask()
    return [answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage.completion_tokens]


@case
def chat_stream() -> Any:
    chunks = list(ask("Grüße, 世界 \u2028 🙂", stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    return ["".join(c.choices[0].delta.content or "" for c in chunks), len(chunks), chunks[-1].choices[0].finish_reason]


@case
def chat_stream_usage() -> Any:
    *_, last = ask(stream=True, stream_options={"include_usage": True})
    return [last.choices, last.usage.completion_tokens]


@case
def chat_stream_helper() -> Any:
    with client.chat.completions.stream(model=MODEL, messages=SUM) as stream:
        kinds = [event.type for event in stream]
        return [kinds, stream.get_final_completion().choices[0].message.content]


@case
async def chat_async() -> Any:
    async with AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0) as other:
        asked = [other.chat.completions.create(model=MODEL, messages=SUM) for _ in range(8)]
        return [a.choices[0].message.content for a in await asyncio.gather(*asked)]


@case
def multi_turn() -> Any:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say good morning in German."},
        {"role": "assistant", "content": "Guten Morgen"},
        {"role": "user", "content": "And in Italian?"},
    ]
    return client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content


@case
def tools() -> Any:
    choice = client.chat.completions.create(model=MODEL, messages=SUM, tools=[TOOL]).choices[0]
    [call] = choice.message.tool_calls
    return [choice.finish_reason, call.function.name, call.function.arguments]


@case
def tools_stream() -> Any:
    stream = client.chat.completions.create(model=MODEL, messages=SUM, tools=[TOOL], stream=True)
    deltas = [c.choices[0].delta.tool_calls for c in stream]
    return "".join(d[0].function.arguments for d in deltas if d)


@case
def tool_loop() -> Any:
    first = client.chat.completions.create(model=MODEL, messages=SUM, tools=[TOOL]).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "42"}
    messages: Any = [*SUM, first.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(model=MODEL, messages=messages, tools=[TOOL])
    return answer.choices[0].message.content


@case
def json_schema() -> Any:
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": SCHEMA}}
    return ask("Rome has 2800000 people", response_format=form).choices[0].message.content


@case
def parse() -> Any:
    answer = client.chat.completions.parse(model=MODEL, messages=SUM, response_format=City)
    return answer.choices[0].message.parsed.model_dump()


@case
def parameters() -> Any:
    more: Any = {"seed": 7, "stop": ["x"], "logit_bias": {"5": 1}, "metadata": {"a": "b"}, "service_tier": "auto"}
    return ask(**more, temperature=0.1, user="someone", extra_body={"guided_regex": ".*"}).choices[0].message.content


@case
def raw_response() -> Any:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=SUM)
    assert raw.request_id
    return [raw.status_code, raw.headers["content-type"], raw.parse().choices[0].message.content]


@case
def error_bad_request() -> Any:
    return named(
        raised(openai.BadRequestError, lambda: client.chat.completions.create(model=MODEL, messages=[]))
    )  # refused by whoever reads it first


@case
def error_bad_request_upstream() -> Any:
    return told(raised(openai.BadRequestError, lambda: ask(extra_headers=script(status=400))))


@case
def error_authentication() -> Any:
    wrong = client.with_options(api_key="wrong-key")
    return told(raised(openai.AuthenticationError, lambda: wrong.chat.completions.create(model=MODEL, messages=SUM)))


@case
def error_permission() -> Any:
    return told(raised(openai.PermissionDeniedError, lambda: ask(extra_headers=script(status=403))))


@case
def error_not_found() -> Any:
    call = lambda: client.chat.completions.create(model="no-such-model", messages=SUM)  # noqa: E731
    return told(raised(openai.NotFoundError, call))


@case
def error_rate_limit() -> Any:
    headers = script(status=429, headers={"Retry-After": "7"})
    return told(raised(openai.RateLimitError, lambda: ask(extra_headers=headers)))


@case
def error_server() -> Any:
    return told(raised(openai.InternalServerError, lambda: ask(extra_headers=script(status=500))))


@case
def error_timeout() -> Any:
    return named(raised(openai.APITimeoutError, lambda: ask(timeout=0.3, extra_headers=script(before_head_s=5))))


@case
def error_connection() -> Any:
    """The upstream hangs up. Through a proxy it is the proxy that answers: 502."""
    kinds = (openai.APIConnectionError, openai.InternalServerError)
    return named(raised(kinds, lambda: ask(extra_headers=script(fault="reset_before_head"))))


@case
def error_midway() -> Any:
    """The upstream hangs up in the middle of a stream. Through the proxy that is an error event."""
    stream = ask(stream=True, extra_headers=script(fault="reset_midway"))
    return type(raised(Exception, lambda: list(stream))).__name__


@case
def retries() -> Any:
    headers = script(until=2, status=503, headers={"retry-after-ms": "20"})
    return client.with_options(max_retries=2).chat.completions.create(
        model=MODEL, messages=SUM, extra_headers=headers
    ).choices[0].message.content  # fmt: skip


@case
def abort() -> Any:
    marked = mark()
    stream = ask(stream=True, extra_headers=marked | script(between_s=0.02, repeat=1000))
    next(iter(stream))
    stream.close()
    return left(marked)


@case
def embeddings() -> Any:
    found = client.embeddings.create(model="text-embedding-3-small", input=["one", "two"])
    return [[round(x, 4) for x in d.embedding] for d in found.data]


@case
def models() -> Any:
    assert MODEL in [m.id for m in client.models.list()]
    return client.models.retrieve(MODEL).id


@case
def completions() -> Any:
    return client.completions.create(model=MODEL, prompt="one two").choices[0].text


@case
def completions_stream() -> Any:
    stream = client.completions.create(model=MODEL, prompt="one two", stream=True)
    return "".join(chunk.choices[0].text for chunk in stream)


@case
def responses() -> Any:
    answer = client.responses.create(model=MODEL, instructions="Be brief.", input="one two")
    return [answer.output_text, answer.status, answer.usage.output_tokens]


@case
def responses_stream() -> Any:
    with client.responses.stream(model=MODEL, input="one two") as stream:
        return [[event.type for event in stream], stream.get_final_response().output_text]


@case
def responses_tools() -> Any:
    tool: Any = {"type": "function", **TOOL["function"], "strict": False}
    first = client.responses.create(model=MODEL, input="What is 17 plus 25?", tools=[tool])
    result = {"type": "function_call_output", "call_id": first.output[0].call_id, "output": "42"}
    items: Any = [{"role": "user", "content": "What is 17 plus 25?"}, first.output[0].model_dump(), result]
    answer = client.responses.create(model=MODEL, input=items, tools=[tool])
    return [first.output[0].arguments, answer.output_text]


@case
def responses_parse() -> Any:
    return client.responses.parse(model=MODEL, input="one", text_format=City).output_parsed.model_dump()


@case
def responses_errors() -> Any:
    found = []
    for status, kind in ((400, openai.BadRequestError), (429, openai.RateLimitError), (500, openai.APIStatusError)):
        headers = script(status=status)
        call = lambda headers=headers: client.responses.create(model=MODEL, input="one", extra_headers=headers)  # noqa: E731
        found.append(told(raised(kind, call)))
    return found


if __name__ == "__main__":
    main()
