"""The official Anthropic client for Python, on /v1/messages."""

from __future__ import annotations

from typing import Any

import anthropic
from cases import KEY, MODEL, ROOT_URL, case, left, main, mark, named, raised, script

client = anthropic.Anthropic(base_url=ROOT_URL, api_key=KEY, max_retries=0)
TOOL: Any = {
    "name": "add",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
}
SUM: Any = [{"role": "user", "content": "What is 17 plus 25?"}]


def ask(text: str = "one two three", /, **more: Any) -> Any:
    return client.messages.create(
        model=MODEL, max_tokens=100, messages=[{"role": "user", "content": text}], **more
    )  # fmt: skip


@case
def chat() -> Any:
    answer = ask(system="Be brief.")
    return [answer.content[0].text, answer.stop_reason, answer.usage.output_tokens]


@case
def chat_stream() -> Any:
    with client.messages.stream(model=MODEL, max_tokens=100, messages=SUM) as stream:
        return ["".join(stream.text_stream), stream.get_final_message().stop_reason]


@case
def chat_stream_events() -> Any:
    return [event.type for event in ask("Grüße, 世界 🙂", stream=True)]


@case
def multi_turn() -> Any:
    messages: Any = [*SUM, {"role": "assistant", "content": "42"}, {"role": "user", "content": "And in Italian?"}]
    return client.messages.create(model=MODEL, max_tokens=100, messages=messages).content[0].text


@case
def tools() -> Any:
    answer = client.messages.create(model=MODEL, max_tokens=100, messages=SUM, tools=[TOOL])
    return [answer.stop_reason, answer.content[0].name, answer.content[0].input]


@case
def tools_stream() -> Any:
    with client.messages.stream(model=MODEL, max_tokens=100, messages=SUM, tools=[TOOL]) as stream:
        return stream.get_final_message().content[0].input


@case
def tool_loop() -> Any:
    first = client.messages.create(model=MODEL, max_tokens=100, messages=SUM, tools=[TOOL])
    result = {"type": "tool_result", "tool_use_id": first.content[0].id, "content": "42"}
    messages: Any = [
        *SUM,
        {"role": "assistant", "content": [b.model_dump(exclude_none=True) for b in first.content]},
        {"role": "user", "content": [result]},
    ]
    return client.messages.create(model=MODEL, max_tokens=100, messages=messages, tools=[TOOL]).stop_reason


@case
def count_tokens() -> Any:
    return client.messages.count_tokens(model=MODEL, messages=SUM).input_tokens


@case
def error_bad_request() -> Any:
    call = lambda: client.messages.create(model=MODEL, max_tokens=9, messages=[])  # noqa: E731
    return named(raised(anthropic.BadRequestError, call))


@case
def error_authentication() -> Any:
    wrong = client.with_options(api_key="wrong-key")
    call = lambda: wrong.messages.create(model=MODEL, max_tokens=9, messages=SUM)  # noqa: E731
    exc = raised(anthropic.AuthenticationError, call)
    return [named(exc), exc.body["error"]["type"]]


@case
def error_not_found() -> Any:
    call = lambda: client.messages.create(model="no-such-model", max_tokens=9, messages=SUM)  # noqa: E731
    exc = raised(anthropic.NotFoundError, call)
    return [named(exc), exc.body["error"]["type"]]


@case
def error_rate_limit() -> Any:
    headers = script(status=429, headers={"Retry-After": "7"})
    exc = raised(anthropic.RateLimitError, lambda: ask(extra_headers=headers))
    return [named(exc), exc.response.headers["retry-after"]]


@case
def error_server() -> Any:
    return [
        named(raised(anthropic.InternalServerError, lambda s=s: ask(extra_headers=script(status=s))))
        for s in (500, 529)
    ]  # fmt: skip


@case
def error_timeout() -> Any:
    call = lambda: ask(timeout=0.3, extra_headers=script(before_head_s=5))  # noqa: E731
    return named(raised(anthropic.APITimeoutError, call))


@case
def error_connection() -> Any:
    """The upstream hangs up. Through a proxy it is the proxy that answers: 502."""
    kinds = (anthropic.APIConnectionError, anthropic.InternalServerError)
    return named(raised(kinds, lambda: ask(extra_headers=script(fault="reset_before_head"))))


@case
def error_midway() -> Any:
    """The upstream hangs up in the middle of a stream. Through the proxy that is an error event."""
    stream = ask(stream=True, extra_headers=script(fault="reset_midway"))
    return type(raised(Exception, lambda: list(stream))).__name__


@case
def retries() -> Any:
    headers = script(until=2, status=529, headers={"retry-after-ms": "20"})
    answer = client.with_options(max_retries=2).messages.create(
        model=MODEL, max_tokens=9, messages=SUM, extra_headers=headers
    )
    return answer.content[0].text


@case
def abort() -> Any:
    marked = mark()
    stream = ask(stream=True, extra_headers=marked | script(between_s=0.02, repeat=1000))
    next(iter(stream))
    stream.close()
    return left(marked)


if __name__ == "__main__":
    main()
