"""LangChain's ChatOpenAI and OpenAIEmbeddings; its own suite of standard tests is in langchain_standard.py."""

from __future__ import annotations

from typing import Any

import openai
from cases import BASE_URL, KEY, MODEL, case, left, main, mark, named, raised, script
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

SUM = "What is 17 plus 25?"


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class City(BaseModel):
    """A city."""

    city: str
    population: int


def model(**more: Any) -> ChatOpenAI:
    return ChatOpenAI(**{"model": MODEL, "base_url": BASE_URL, "api_key": KEY, "max_retries": 0, **more})


@case
def chat() -> Any:
    answer = model().invoke([SystemMessage("Be brief."), HumanMessage(SUM)])
    return [answer.content, answer.response_metadata["finish_reason"], answer.usage_metadata["output_tokens"]]


@case
def chat_stream() -> Any:
    return "".join(str(chunk.content) for chunk in model().stream("one two three"))


@case
def chat_stream_usage() -> Any:
    *_, last = model(stream_usage=True).stream("one two three")
    return last.usage_metadata and last.usage_metadata["output_tokens"]


@case
async def chat_async() -> Any:
    return [str(a.content) for a in await model().abatch(["one", "one two", SUM])]


@case
def multi_turn() -> Any:
    return model().invoke([HumanMessage(SUM), AIMessage("42"), HumanMessage("And in Italian?")]).content


@case
def tools() -> Any:
    [call] = model().bind_tools([add]).invoke(SUM).tool_calls
    return [call["name"], call["args"]]


@case
def tool_loop() -> Any:
    bound = model().bind_tools([add])
    first = bound.invoke(SUM)
    result = ToolMessage(str(add.invoke(first.tool_calls[0]["args"])), tool_call_id=first.tool_calls[0]["id"])
    return [result.content, bound.invoke([HumanMessage(SUM), first, result]).content]


@case
def json_schema() -> Any:
    return model().with_structured_output(City).invoke(SUM).model_dump()


@case
def function_calling() -> Any:
    return model().with_structured_output(City, method="function_calling").invoke(SUM).model_dump()


@case
def errors() -> Any:
    kinds = {400: openai.BadRequestError, 429: openai.RateLimitError, 500: openai.InternalServerError}
    return [
        named(raised(kind, lambda s=status: model(default_headers=script(status=s)).invoke(SUM)))
        for status, kind in kinds.items()
    ]


@case
def error_authentication() -> Any:
    return named(raised(openai.AuthenticationError, lambda: model(api_key="wrong-key").invoke(SUM)))


@case
def error_not_found() -> Any:
    return named(raised(openai.NotFoundError, lambda: model(model="no-such-model").invoke(SUM)))


@case
def error_timeout() -> Any:
    slow = model(timeout=0.3, default_headers=script(before_head_s=5))
    return named(raised(openai.APITimeoutError, lambda: slow.invoke(SUM)))


@case
def retries() -> Any:
    headers = script(until=2, status=429, headers={"retry-after-ms": "20"})
    return model(max_retries=2, default_headers=headers).invoke(SUM).content


@case
def abort() -> Any:
    marked = mark()
    stream = model(default_headers=marked | script(between_s=0.02, repeat=1000)).stream(SUM)
    next(stream)
    stream.close()
    return left(marked)


@case
def responses() -> Any:
    answer = model(use_responses_api=True).invoke(SUM)
    return [answer.text, answer.usage_metadata["output_tokens"]]


@case
def responses_stream() -> Any:
    return "".join(chunk.text for chunk in model(use_responses_api=True).stream(SUM))


@case
def completions() -> Any:
    return OpenAI(model=MODEL, base_url=BASE_URL, api_key=KEY, max_retries=0).invoke("one two")


@case
def embeddings() -> Any:
    made = OpenAIEmbeddings(base_url=BASE_URL, api_key=KEY, check_embedding_ctx_length=False)
    return [[round(x, 4) for x in v] for v in made.embed_documents(["one", "two"])]


if __name__ == "__main__":
    main()
