"""LiteLLM as a client: `openai/MODEL` and `anthropic/MODEL`, pointed at the server by `api_base`."""

from __future__ import annotations

import json
from typing import Any

import litellm
from cases import BASE_URL, KEY, MODEL, ROOT_URL, SCHEMA, case, left, main, mark, raised, script

litellm.suppress_debug_info = True
GIVEN: Any = {"model": f"openai/{MODEL}", "api_base": BASE_URL, "api_key": KEY, "num_retries": 0, "max_retries": 0}
SUM: Any = [{"role": "user", "content": "What is 17 plus 25?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


def ask(**more: Any) -> Any:
    return litellm.completion(**{**GIVEN, "messages": SUM, **more})


def failing(kinds: Any, **more: Any) -> Any:
    exc = raised(kinds, lambda: ask(**more))
    return [type(exc).__name__, exc.status_code]


@case
def chat() -> Any:
    answer = ask()
    return [answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage.completion_tokens]


@case
def chat_stream() -> Any:
    return "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True))


@case
def chat_stream_usage() -> Any:
    *_, last = ask(stream=True, stream_options={"include_usage": True})
    return last.usage.completion_tokens


@case
async def chat_async() -> Any:
    answer = await litellm.acompletion(**GIVEN, messages=SUM, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])


@case
def multi_turn() -> Any:
    more = [{"role": "assistant", "content": "42"}, {"role": "user", "content": "And in Italian?"}]
    return ask(messages=[*SUM, *more]).choices[0].message.content


@case
def tools() -> Any:
    [call] = ask(tools=[TOOL]).choices[0].message.tool_calls
    return [call.function.name, json.loads(call.function.arguments)]


@case
def tools_stream() -> Any:
    chunks = list(ask(tools=[TOOL], stream=True))
    return litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls[0].function.arguments


@case
def tool_loop() -> Any:
    first = ask(tools=[TOOL]).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "42"}
    return ask(messages=[*SUM, first.model_dump(), result], tools=[TOOL]).choices[0].message.content


@case
def json_schema() -> Any:
    form = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": SCHEMA}}
    return json.loads(ask(response_format=form).choices[0].message.content)


@case
def error_bad_request() -> Any:
    return failing(litellm.BadRequestError, extra_headers=script(status=400))


@case
def error_authentication() -> Any:
    return failing(litellm.AuthenticationError, api_key="wrong-key")


@case
def error_not_found() -> Any:
    return failing(litellm.NotFoundError, model="openai/no-such-model")


@case
def error_rate_limit() -> Any:
    return failing(litellm.RateLimitError, extra_headers=script(status=429, headers={"Retry-After": "7"}))


@case
def error_server() -> Any:
    return failing(litellm.InternalServerError, extra_headers=script(status=500))


@case
def error_timeout() -> Any:
    return failing(litellm.Timeout, timeout=0.3, extra_headers=script(before_head_s=5))


@case
def error_connection() -> Any:
    """The upstream hangs up. Through a proxy it is the proxy that answers: 502."""
    kinds = (litellm.APIConnectionError, litellm.InternalServerError, litellm.BadGatewayError)
    return failing(kinds, extra_headers=script(fault="reset_before_head"))


@case
def error_midway() -> Any:
    """The upstream hangs up in the middle of a stream. Through the proxy that is an error event."""
    stream = ask(stream=True, extra_headers=script(fault="reset_midway"))
    return type(raised(Exception, lambda: list(stream))).__name__


@case
def abort() -> Any:
    marked = mark()
    stream = ask(stream=True, extra_headers=marked | script(between_s=0.02, repeat=1000))
    next(iter(stream))
    stream.completion_stream.close()
    return left(marked)


@case
def embeddings() -> Any:
    given = GIVEN | {"model": "openai/text-embedding-3-small"}
    return [round(x, 4) for x in litellm.embedding(**given, input=["one"]).data[0]["embedding"]]


@case
def completions() -> Any:
    given = GIVEN | {"model": f"text-completion-openai/{MODEL}"}
    return litellm.text_completion(**given, prompt="one two").choices[0].text


@case
def responses() -> Any:
    answer = litellm.responses(model=GIVEN["model"], api_base=BASE_URL, api_key=KEY, input="one two")
    return answer.output[0].content[0].text


@case
def responses_stream() -> Any:
    stream = litellm.responses(model=GIVEN["model"], api_base=BASE_URL, api_key=KEY, input="one two", stream=True)
    return "".join(event.delta for event in stream if event.type == "response.output_text.delta")


@case
def messages() -> Any:
    answer = ask(model=f"anthropic/{MODEL}", api_base=ROOT_URL)
    return answer.choices[0].message.content


@case
def messages_stream() -> Any:
    stream = ask(model=f"anthropic/{MODEL}", api_base=ROOT_URL, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


if __name__ == "__main__":
    main()
