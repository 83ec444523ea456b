"""What happens to each kind of request: every line of the README's table, over the dialects that have the kind."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.e2e.world import World, world
from tests.test_docs import section

QUESTION = "What is the capital of Spain?"
TAUGHT = ("What is the capital of France?", "Paris")
SYSTEM = "Answer as JSON."
JSON_TAUGHT = ("What is the capital of Italy?", '{"city": "Rome"}')
OTHER_JSON = ("What is the capital of Greece?", '{"town": "Athens"}')
PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}

AUGMENTED, PLAIN = "augmented", "routed without examples"
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOLS = {
    "chat": [{"type": "function", "function": FUNCTION}],
    "responses": [{"type": "function", **FUNCTION}],
    "messages": [{"name": "f", "input_schema": {"type": "object"}}],
}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
FORMATS = {
    "chat": lambda f: {"response_format": f},
    "responses": lambda f: {"text": {"format": {**f.pop("json_schema", {}), **f}}},
    "messages": lambda f: {"output_config": {"format": {**f.pop("json_schema", {}), **f}}},
}
MEDIA = {
    ("images", "chat"): {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    ("images", "responses"): {"type": "input_image", "image_url": "data:image/png;base64,AA=="},
    ("images", "messages"): {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}},
    ("audio", "chat"): {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
    ("audio", "responses"): {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
    ("files", "chat"): {"type": "file", "file": {"file_id": "file-1"}},
    ("files", "responses"): {"type": "input_file", "file_id": "file-1"},
    ("files", "messages"): {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}},
}
LONG = [("user" if i % 2 == 0 else "assistant", f"turn {i}: " + "words and more words " * 10) for i in range(60)]
CODE = "Why does this fail?\n```python\ndef f(x):\n\treturn x +\n```\n"


class Kind(NamedTuple):
    line: str  # of the table
    outcome: str  # AUGMENTED, PLAIN, or the reason of a bypass
    dialect: str
    turns: tuple[Any, ...] = (("user", QUESTION),)  # (role, content), or a whole message
    fields: dict[str, Any] = {}  # noqa: RUF012 - of a tuple


def each(line: str, outcome: str, *turns: Any, only: str = "chat responses messages", **fields: Any) -> list[Kind]:
    return [Kind(line, outcome, d, turns or (("user", QUESTION),), fields) for d in only.split()]


def loop(dialect: str, *after: Any) -> tuple[Any, ...]:
    """A tool was called and has answered."""
    called: dict[str, list[Any]] = {
        "chat": [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "sunny"},
        ],
        "responses": [
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "sunny"},
        ],
        "messages": [
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "sunny"}]},
        ],
    }
    return (("user", "weather?"), *called[dialect], *after)


# ruff: noqa: E501, RUF001 - a line of the table, a line here; other languages
KINDS: list[Kind] = [
    *(Kind("tool definitions", PLAIN, d, fields={"tools": TOOLS[d]}) for d in PATHS),
    *(Kind("tool definitions", AUGMENTED, d, fields={"tools": TOOLS[d], "tool_choice": "none"}) for d in ("chat", "responses")),
    Kind("tool definitions", AUGMENTED, "messages", fields={"tools": TOOLS["messages"], "tool_choice": {"type": "none"}}),
    Kind("tool definitions", PLAIN, "chat", fields={"functions": [FUNCTION]}),
    Kind("tool definitions", PLAIN, "chat", fields={"web_search_options": {"search_context_size": "low"}}),
    *(Kind("tool loop", "tool_loop", d, loop(d), {"tools": TOOLS[d]}) for d in PATHS),
    *(Kind("tool loop", AUGMENTED, d, loop(d, ("assistant", "Sunny."), ("user", QUESTION))) for d in PATHS),
    *(Kind("forced tool choice", PLAIN, d, fields={"tools": TOOLS[d], "tool_choice": "required"}) for d in ("chat", "responses")),
    Kind("forced tool choice", PLAIN, "messages", fields={"tools": TOOLS["messages"], "tool_choice": {"type": "any"}}),
    Kind("forced tool choice", PLAIN, "chat", fields={"functions": [FUNCTION], "function_call": {"name": "f"}}),
    *(Kind("JSON", AUGMENTED, d, (("system", SYSTEM), ("user", QUESTION)), FORMATS[d]({"type": "json_object"})) for d in ("chat", "responses")),
    *(
        Kind("JSON schema", AUGMENTED, d, (("system", SYSTEM), ("user", QUESTION)), FORMATS[d]({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}))
        for d in PATHS
    ),
    *(Kind("JSON schema", PLAIN, d, fields=FORMATS[d]({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}})) for d in PATHS),
    *each("`logprobs`", PLAIN, only="chat", logprobs=True, top_logprobs=2),
    *each("`logprobs`", PLAIN, only="responses", include=["message.output_text.logprobs"], top_logprobs=2),
    *each("`n`", "n", only="chat", n=2),
    *each("`n`", AUGMENTED, only="chat", n=1),
    *each("`stop`", AUGMENTED, only="chat", stop=["\n\n"]),
    *each("`stop`", AUGMENTED, only="messages", stop_sequences=["\n\n"]),
    *each("`stop`", PLAIN, only="chat", stop="ari"),
    *each("`stop`", PLAIN, only="messages", stop_sequences=["x", "Par"]),
    *each("`seed`", AUGMENTED, only="chat", seed=36893488147419103232),
    *(Kind(line, "multimodal", d, (("user", [{"type": "input_text" if d == "responses" else "text", "text": QUESTION}, part]),)) for (line, d), part in MEDIA.items()),
    *each("audio", "multimodal", only="chat", modalities=["text", "audio"], audio={"voice": "alloy", "format": "wav"}),
    *each("long threads", AUGMENTED, *LONG, ("user", QUESTION)),
    *each("`developer` role", AUGMENTED, ("developer", "Be brief."), ("user", QUESTION), only="chat responses"),
    *each("reasoning content", AUGMENTED, ("user", "hi"), {"role": "assistant", "content": "hello", "reasoning_content": "hm"}, ("user", QUESTION), only="chat", reasoning_effort="low"),
    *each("reasoning content", AUGMENTED, ("user", "hi"), {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"}, ("assistant", "hello"), ("user", QUESTION), only="responses", reasoning={"effort": "low"}),
    *each(
        "reasoning content",
        AUGMENTED,
        ("user", "hi"),
        ("assistant", [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "hello"}]),
        ("user", QUESTION),
        only="messages",
        thinking={"type": "enabled", "budget_tokens": 1024},
    ),
    *each("prefill", "prefill", ("user", QUESTION), ("assistant", "The capital is")),
    *each("empty system prompt", AUGMENTED, ("system", ""), ("user", QUESTION), only="chat responses"),
    *each("empty system prompt", AUGMENTED, only="messages", system=""),
    *each("other languages", AUGMENTED, ("user", "¿Cuál es la capital de España, “Madrid”? 首都はどこ？ \U0001f600")),
    *each("code", AUGMENTED, ("user", CODE)),
    *each("a 200 KB prompt", "too_long", ("user", "many words " * 20_000 + QUESTION)),
    *each("`stream_options`", AUGMENTED, only="chat", stream=True, stream_options={"include_usage": True}),
    *each("`store`", AUGMENTED, only="chat responses", store=True),
    *each("`metadata`", AUGMENTED, metadata={"user_id": "u", "trace": "1"}),
    *each("`service_tier`", AUGMENTED, service_tier="auto"),
    *each("unknown fields", AUGMENTED, top_k=5, made_up={"a": [1, 2.50, None]}),
]  # fmt: skip


@pytest.fixture
async def w(tmp_path: Path) -> AsyncIterator[World]:
    """The student answers whatever is routed. The cache knows one exchange in text and two in JSON."""
    async with world(tmp_path, routing={"policy": "student"}) as made:
        await made.teach(*TAUGHT)
        for question, answer in (JSON_TAUGHT, OTHER_JSON):
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
            await made.teach("", answer, messages=messages)
        made.large.requests.clear()
        yield made


def document(kind: Kind) -> dict[str, Any]:
    messages = [t if isinstance(t, dict) else {"role": t[0], "content": t[1]} for t in kind.turns]
    given = {"model": "auto", "max_tokens": 20, **kind.fields}
    if kind.dialect == "responses":
        del given["max_tokens"]
        return {**given, "input": messages}
    if kind.dialect == "messages" and messages[0].get("role") == "system":
        return {**given, "system": messages[0]["content"], "messages": messages[1:]}
    return {**given, "messages": messages}


def name(kind: Kind) -> str:
    return f"{kind.line.replace(' ', '-')}-{kind.outcome.replace(' ', '-')}-{kind.dialect}"


@pytest.mark.parametrize("kind", KINDS, ids=name)
async def test_kind(w: World, kind: Kind) -> None:
    given = document(kind)
    answered = await w.post(PATHS[kind.dialect], given)
    assert answered.status == 200, answered.body
    if kind.outcome not in (AUGMENTED, PLAIN):
        assert (answered.header("decision"), answered.header("reason")) == ("bypass", kind.outcome)
        assert (answered.header("backend"), answered.header("examples")) == ("large", "0")
        [sent] = w.large.requests
        assert sent.json == {**given, "model": "large-model"}
        return
    assert (answered.header("decision"), answered.header("reason"), answered.header("backend")) == (
        "routed", None, "small",
    )  # fmt: skip
    [sent] = w.small.requests
    shown = int(answered.header("examples") or 0)
    key = "input" if kind.dialect == "responses" else "messages"
    rest = [m for m in sent.json[key] if m.get("content") not in (*TAUGHT, *JSON_TAUGHT, *OTHER_JSON)]
    assert {**sent.json, key: rest} == {**given, "model": "small-model"}  # all of the client's is there, as it was
    assert len(sent.json[key]) - len(given[key]) == 2 * shown
    assert (shown > 0) is (kind.outcome == AUGMENTED)
    texts = {m["content"] for m in sent.json[key] if isinstance(m.get("content"), str)}
    if kind.line.startswith("JSON"):
        assert not texts & set(TAUGHT)
        assert (OTHER_JSON[1] in texts) is (kind.line == "JSON" and kind.outcome == AUGMENTED)
    elif kind.outcome == AUGMENTED:
        assert TAUGHT[0] in texts
        assert not texts & {*JSON_TAUGHT, *OTHER_JSON}  # JSON that was asked for elsewhere is no model for plain text


async def test_a_200_kb_prompt_that_fits_is_augmented(tmp_path: Path) -> None:
    wide = {"context_window_tokens": 200_000}
    async with world(tmp_path, small=wide, large=wide, routing={"policy": "student"}) as w:
        await w.teach(*TAUGHT)
        answered = await w.ask("many words " * 20_000 + QUESTION)
        assert (answered.status, answered.header("backend"), answered.header("examples")) == (200, "small", "1")


@pytest.mark.parametrize(
    ("store", "headers", "ours", "recorded"),
    [
        (True, {}, None, True),
        (None, {}, None, True),
        (False, {}, None, False),
        (False, {"x-iccache-store": "yes"}, None, True),
        (False, {}, {"store": "yes"}, True),
        (False, {"x-iccache-store": "yes", "Cache-Control": "no-store"}, None, False),
        (True, {"x-iccache-store": "no"}, None, False),
    ],
)
async def test_store(
    w: World, store: bool | None, headers: dict[str, str], ours: dict[str, str] | None, recorded: bool
) -> None:
    fields: dict[str, Any] = {"store": store} | ({"iccache": ours} if ours else {})
    answered = await w.ask(QUESTION, headers=headers, **fields)
    assert w.small.requests[0].json["store"] is store
    feedback = await w.feedback(answered.id, score=1.0)
    assert feedback.status == (204 if recorded else 404)


def test_the_table_has_a_line_for_every_kind() -> None:
    lines = re.findall(r"^\| ([^|]+) \| ([^|]+) \|", section("What happens to each kind of request"), re.MULTILINE)[1:]
    told = {line.strip(): outcome for line, outcome in lines}
    assert set(told) == {kind.line for kind in KINDS}
    for kind in KINDS:
        if kind.outcome not in (AUGMENTED, PLAIN):
            assert f"`{kind.outcome}`" in told[kind.line], kind.line
        else:
            assert kind.outcome.split()[0] in told[kind.line] or "without examples" in told[kind.line], kind.line


def test_bodies_are_json() -> None:
    for kind in KINDS:
        json.dumps(document(kind))
