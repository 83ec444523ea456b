from __future__ import annotations

import json
import time
from typing import Any

import pytest

from iccache.dialects.chat import Chat
from iccache.dialects.dialect import DIALECTS
from iccache.quality.checks import Failure, Shares, failure
from iccache.types import Answer, DecisionKind, Exchange

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"$ref": "#/$defs/age"}},
    "required": ["name", "age"],
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}


def exchange(**changes: Any) -> Exchange:
    plain: dict[str, Any] = {
        "request_id": "r", "tenant": "t", "subject": None, "session": None, "at": 0.0, "dialect": "chat",
        "model": "auto", "stream": False, "backend": "small", "decision": DecisionKind.ROUTED, "reason": None,
        "status": 200, "complete": True,
    }  # fmt: skip
    return Exchange(**plain | changes)


def found(answer: Answer, dialect: str = "/v1/chat/completions", **body: Any) -> Failure | None:
    asked = {"model": "auto", "max_tokens": 100} if "messages" in dialect else {"model": "auto"}
    told = {"input": "Who?"} if "responses" in dialect else {"messages": [{"role": "user", "content": "Who?"}]}
    ask = DIALECTS[dialect].read(json.dumps(asked | told | body).encode())
    return failure(exchange(), ask, answer)


def said(text: str, **changes: Any) -> Answer:
    return Answer(text, complete=True, **{"finish_reason": "stop"} | changes)


def test_a_good_answer_says_nothing() -> None:
    assert found(said("Me.")) is None


def test_an_empty_answer_fails() -> None:
    assert found(said(" \n")) is Failure.EMPTY
    assert found(said("", has_tool_calls=True)) is None
    assert found(said("", finish_reason="content_filter")) is None, "a filter's doing, not the model's"


def test_an_answer_that_is_cut_fails_unless_the_client_set_the_limit() -> None:
    cut = said("It was the best of", finish_reason="length")
    assert found(cut) is Failure.CUT
    assert found(cut, max_tokens=5) is None


def test_what_did_not_come_whole_is_not_judged() -> None:
    ask = Chat().read(b'{"model": "auto", "messages": [{"role": "user", "content": "Who?"}]}')
    assert failure(exchange(complete=False), ask, said("")) is None


FORMATS = {
    "/v1/chat/completions": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    },
    "/v1/responses": {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}},
    "/v1/messages": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
}


@pytest.mark.parametrize("dialect", FORMATS)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "Ada", "age": 36}', None),
        ('{"name": "Ada", "age": 36, "more": 1}', None),
        ('{"name": "Ada"}', Failure.SCHEMA),
        ('{"name": "Ada", "age": -1}', Failure.SCHEMA),
        ('["Ada", 36]', Failure.SCHEMA),
        ("Ada is 36.", Failure.NOT_JSON),
        ('```json\n{"name": "Ada", "age": 36}\n```', Failure.NOT_JSON),
    ],
)
def test_a_schema_is_met_or_not(dialect: str, text: str, expected: Failure | None) -> None:
    assert found(said(text), dialect, **FORMATS[dialect]) is expected


def test_json_without_a_schema_is_an_object() -> None:
    wanted = {"response_format": {"type": "json_object"}}
    assert found(said('{"a": 1}'), **wanted) is None
    assert found(said("[1]"), **wanted) is Failure.NOT_JSON


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": "(a+)+$"},
        {"$ref": "#"},
        {"$ref": "http://127.0.0.1:1/never"},
        {"$ref": "#/nowhere"},
        {"type": 7, "properties": "x"},
        {
            "allOf": [{"$ref": "#/$defs/d0"}],
            "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)},
        },
    ],
)
def test_no_schema_takes_long_or_breaks_anything(schema: dict[str, Any]) -> None:
    wanted = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    before = time.process_time()
    assert found(said(json.dumps({"a": "a" * 40 + "!"})), **wanted) is None
    assert found(said(json.dumps("a" * 40 + "!")), **wanted) is None
    assert time.process_time() - before < 20, "CPU time, generously: without bounds it would not end"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(('{"a": 1}',), None), (("",), None), (("{a: 1",), Failure.TOOL), (("[1]",), Failure.TOOL)],
)
def test_a_tool_call_parses_or_not(arguments: tuple[str, ...], expected: Failure | None) -> None:
    assert found(said("", has_tool_calls=True, finish_reason="tool_calls", tool_arguments=arguments)) is expected


def test_arguments_are_read_from_answers_and_streams() -> None:
    whole = {
        "choices": [
            {
                "message": {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
                "finish_reason": "tool_calls",
            }
        ]
    }
    reader = DIALECTS["/v1/chat/completions"].reader(stream=False)
    reader.feed(json.dumps(whole).encode())
    assert reader.answer().tool_arguments == ('{"a": 1}',)

    reader = DIALECTS["/v1/chat/completions"].reader(stream=True)
    for index, piece in ((0, '{"a"'), (1, "{"), (0, ": 1}"), (1, "oops")):
        delta = {"choices": [{"delta": {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}}]}
        reader.feed(b"data: " + json.dumps(delta).encode() + b"\n\n")
    assert reader.answer().tool_arguments == ('{"a": 1}', "{oops")

    reader = DIALECTS["/v1/messages"].reader(stream=True)
    for piece in ('{"a"', ": 1}"):
        event = {
            "type": "content_block_delta",
            "index": 1,
            "delta": {"type": "input_json_delta", "partial_json": piece},
        }
        reader.feed(b"event: content_block_delta\ndata: " + json.dumps(event).encode() + b"\n\n")
    assert reader.answer().tool_arguments == ('{"a": 1}',)

    reader = DIALECTS["/v1/responses"].reader(stream=False)
    reader.feed(json.dumps({"status": "completed", "output": [{"type": "function_call", "arguments": "{}"}]}).encode())
    assert reader.answer().tool_arguments == ("{}",)


def test_failures_are_told_as_often_as_they_happen() -> None:
    """Two failures in a hundred hardly ever; a backend that always fails nearly always."""
    draws = iter([i * 0.618 % 1 for i in range(100_000)])
    shares = Shares(lambda: next(draws))
    told = sum(shares.tell("rare", i % 50 == 0) for i in range(10_000))
    assert told <= 20, "of 200 failures"
    assert sum(shares.tell("broken", True) for _ in range(60)) >= 30
    assert not any(shares.tell("good", False) for _ in range(100))
