"""The application of the demo: the official OpenAI client, pointed at the proxy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import httpx2
import openai
from openai.types.chat import ChatCompletionMessageParam

from iccache.demo.outcome import Outcome
from iccache.demo.tasks import Item, Task, correct
from iccache.errors import IccacheError

TIMEOUT_S = 300.0


class DemoError(IccacheError):
    """A request of the demo went wrong."""


class Price(NamedTuple):
    """US dollars for a million tokens."""

    input: float
    output: float

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


class Reply(NamedTuple):
    """An answer, read to its end."""

    text: str
    input_tokens: int
    output_tokens: int


class Client:
    """Sends requests one after the other. Belongs to one thread."""

    def __init__(self, base_url: str, prices: Mapping[str, Price]) -> None:
        """`base_url` of the proxy; `prices` by the names of its backends."""
        self.prices = prices
        self.openai = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=TIMEOUT_S)

    def ask(
        self,
        task: Task,
        item: Item,
        *,
        model: str,
        stream: bool,
        headers: Mapping[str, str],
        turns: Sequence[tuple[str, str]] = (),
    ) -> Outcome:
        """One request, scored. `turns`: earlier requests and answers, to be part of the conversation."""
        messages = conversation(task.system, turns, item.prompt)
        started = time.monotonic()
        try:
            reply, got = self._send(task, messages, model, stream, headers)
        except (openai.OpenAIError, httpx2.HTTPError) as exc:
            raise DemoError(f"{task.name}: the proxy did not answer a request to {model}: {exc}") from exc
        latency_s = time.monotonic() - started
        backend = got.get("x-iccache-backend", model)
        cost = got.get("x-iccache-cost-usd")  # a stream's headers are out before it is known
        return Outcome(
            answer=reply.text,
            correct=correct(reply.text, item),
            backend=backend,
            examples=int(got.get("x-iccache-examples", "0")),
            latency_s=latency_s,
            overhead_ms=float(got.get("x-iccache-overhead-ms", "0")),
            input_tokens=reply.input_tokens,
            output_tokens=reply.output_tokens,
            cost_usd=float(cost) if cost else self.prices[backend].cost(reply.input_tokens, reply.output_tokens),
            request_id=got.get("x-request-id", ""),
        )

    def _send(
        self,
        task: Task,
        messages: list[ChatCompletionMessageParam],
        model: str,
        stream: bool,
        headers: Mapping[str, str],
    ) -> tuple[Reply, Mapping[str, str]]:
        create = self.openai.chat.completions.with_raw_response.create
        if not stream:
            whole = create(
                model=model,
                messages=messages,
                max_tokens=task.max_tokens,
                temperature=0,
                extra_headers=dict(headers),
            )
            parsed = whole.parse()
            return _reply(parsed.choices[0].message.content or "", parsed.usage), whole.headers
        raw = create(
            model=model,
            messages=messages,
            max_tokens=task.max_tokens,
            temperature=0,
            extra_headers=dict(headers),
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        with raw.parse() as chunks:
            for chunk in chunks:
                usage = chunk.usage or usage
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
        return _reply(text, usage), raw.headers

    def feedback(self, outcome: Outcome) -> None:
        """Tell the proxy whether an answer was right. Raises DemoError unless it says that this is durable."""
        body = {"request_id": outcome.request_id, "score": 1.0 if outcome.correct else 0.0}
        try:
            self.openai.post("/feedback", body=body, cast_to=httpx2.Response)
        except (openai.OpenAIError, httpx2.HTTPError) as exc:
            raise DemoError(f"the proxy did not take a feedback: {exc}") from exc

    def close(self) -> None:
        self.openai.close()


def conversation(system: str, turns: Sequence[tuple[str, str]], prompt: str) -> list[ChatCompletionMessageParam]:
    """The messages of a request; `turns` between the system prompt and the question."""
    messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": system}]
    for request, answer in turns:
        messages += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": prompt}]


def first_model(base_url: str) -> str:
    """The name of the first model that a server offers. Raises DemoError."""
    try:
        with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=30) as client:
            models = client.models.list().data
    except (openai.OpenAIError, httpx2.HTTPError) as exc:
        raise DemoError(f"{base_url}: does not list its models: {exc}") from exc
    if not models:
        raise DemoError(f"{base_url}: offers no model")
    return models[0].id


def _reply(text: str, usage: Any) -> Reply:
    return Reply(text, usage.prompt_tokens if usage else 0, usage.completion_tokens if usage else 0)
