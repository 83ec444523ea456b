"""LlamaIndex: OpenAILike, which asks /v1/completions unless told otherwise, OpenAI, and its embeddings."""

from __future__ import annotations

import gc
from typing import Any

import openai
from cases import BASE_URL, KEY, MODEL, case, left, main, mark, named, raised, script
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI, OpenAIResponses
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

SUM = "What is 17 plus 25?"
GIVEN: Any = {"model": MODEL, "api_base": BASE_URL, "api_key": KEY, "max_retries": 0}


class City(BaseModel):
    """A city."""

    city: str
    population: int


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def like(**more: Any) -> OpenAILike:
    return OpenAILike(**{**GIVEN, "is_chat_model": True, "is_function_calling_model": True, **more})


@case
def completions() -> Any:
    """As it is set up out of the box."""
    return OpenAILike(**GIVEN).complete("one two").text


@case
def completions_stream() -> Any:
    return "".join(part.delta for part in OpenAILike(**GIVEN).stream_complete("one two"))


@case
def chat() -> Any:
    return like().chat([ChatMessage(role="system", content="Be brief."), ChatMessage(content=SUM)]).message.content


@case
def chat_stream() -> Any:
    return "".join(part.delta or "" for part in like().stream_chat([ChatMessage(content="one two three")]))


@case
async def chat_async() -> Any:
    return (await like().achat([ChatMessage(content=SUM)])).message.content


@case
def multi_turn() -> Any:
    said = [ChatMessage(content=SUM), ChatMessage(role="assistant", content="42")]
    return like().chat([*said, ChatMessage(content="And in Italian?")]).message.content


@case
def chat_openai() -> Any:
    return OpenAI(**GIVEN).chat([ChatMessage(content=SUM)]).message.content


@case
def chat_openai_stream() -> Any:
    return "".join(part.delta or "" for part in OpenAI(**GIVEN).stream_chat([ChatMessage(content=SUM)]))


@case
def tools() -> Any:
    model = like()
    answer = model.chat_with_tools([FunctionTool.from_defaults(add)], user_msg=SUM)
    [call] = model.get_tool_calls_from_response(answer)
    return [call.tool_name, call.tool_kwargs]


@case
def tool_loop() -> Any:
    return str(OpenAI(**GIVEN).predict_and_call([FunctionTool.from_defaults(add)], user_msg=SUM))


@case
def json_schema() -> Any:
    return OpenAI(**GIVEN).as_structured_llm(City).complete(SUM).raw.model_dump()


@case
def errors() -> Any:
    kinds = {400: openai.BadRequestError, 429: openai.RateLimitError, 500: openai.InternalServerError}
    ask = lambda status: like(default_headers=script(status=status)).complete(SUM)  # noqa: E731
    return [named(raised(kind, lambda s=status: ask(s))) for status, kind in kinds.items()]


@case
def error_authentication() -> Any:
    return named(raised(openai.AuthenticationError, lambda: like(api_key="wrong-key").complete(SUM)))


@case
def error_not_found() -> Any:
    return named(raised(openai.NotFoundError, lambda: like(model="no-such-model").complete(SUM)))


@case
def error_timeout() -> Any:
    slow = like(timeout=0.3, default_headers=script(before_head_s=5))
    return named(raised(openai.APITimeoutError, lambda: slow.complete(SUM)))


@case
def abort() -> Any:
    """It closes the connection only when what is left of the stream is collected."""
    marked = mark()
    stream = like(default_headers=marked | script(between_s=0.02, repeat=1000)).stream_complete(SUM)
    next(stream)
    stream.close()
    del stream
    gc.collect()
    return left(marked)


@case
def responses() -> Any:
    return OpenAIResponses(**GIVEN).chat([ChatMessage(content=SUM)]).message.content


@case
def responses_stream() -> Any:
    return "".join(part.delta or "" for part in OpenAIResponses(**GIVEN).stream_chat([ChatMessage(content=SUM)]))


@case
def embeddings() -> Any:
    made = OpenAIEmbedding(api_base=BASE_URL, api_key=KEY, max_retries=0)
    return [[round(x, 4) for x in v] for v in made.get_text_embedding_batch(["one", "two"])]


if __name__ == "__main__":
    main()
