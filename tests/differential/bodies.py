"""Generated requests: every parameter of the three dialects, written down in every way that JSON allows.

What is drawn is a structure, so that a failure shrinks; how it is written (white space, escapes, order) follows from
one number. The model is a blank in the text: what the upstream should get is the same text with another name in it.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

BLANK = b"\x00model\x00"  # no JSON text holds a bare NUL
CONTROLS = b"\x00controls\x00"


@dataclass(frozen=True)
class Raw:
    """A token as it is to be written."""

    text: str


@dataclass(frozen=True)
class Pairs:
    """An object in which a key may come twice."""

    members: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Body:
    """A request with a blank for the model. `controls`: where our own member goes, if anywhere."""

    template: bytes

    def text(self, model: str, controls: bytes = b"") -> bytes:
        return self.template.replace(BLANK, json.dumps(model).encode()).replace(CONTROLS, controls)

    def __repr__(self) -> str:
        return repr(self.text("MODEL"))


class Writer:
    """Writes JSON as nobody would."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.plain = seed % 3 == 0

    def value(self, value: Any) -> str:
        if isinstance(value, Raw):
            return value.text
        if isinstance(value, Pairs):
            return self._object(value.members)
        if isinstance(value, dict):
            members = list(value.items())
            self.rng.shuffle(members)
            return self._object(members)
        if isinstance(value, list):
            return "[" + ",".join(self._space() + self.value(v) + self._space() for v in value) + "]"
        if isinstance(value, str):
            return self._string(value)
        return json.dumps(value)

    def _object(self, members: Any) -> str:
        written = [
            f"{self._space()}{self._string(k)}{self._space()}:{self._space()}{self.value(v)}" for k, v in members
        ]
        return "{" + ",".join(w + self._space() for w in written) + "}"

    def _space(self) -> str:
        if self.plain:
            return ""
        return self.rng.choice(("", "", "", " ", "\n", "\t", "\r\n", "  "))

    def _string(self, text: str) -> str:
        return '"' + "".join(map(self._char, text)) + '"'

    def _char(self, char: str) -> str:
        code = ord(char)
        if not self.plain and self.rng.random() < 0.1 and char != "\x00":
            if code > 0xFFFF:
                code -= 0x10000
                return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04X}"
            return f"\\u{code:04x}"
        if char == "/" and self.rng.random() < 0.3:
            return "\\/"
        return json.dumps(char)[1:-1] if code < 32 or char in '"\\' else char


# ---- what is said

WORDS = st.sampled_from(
    [
        "What is the capital of France?", "and in Italy?", "data: [DONE]\n\n", "\u2028\u2029\x85", "a\x00b", "\ufeff",
        "日本語のテキスト", "🦙👩\u200d👩\u200d👧", "\\u0041 \\n \\", '{"model": "small"}', '"messages": [', "]}],}",
        "x" * 300, "<|im_start|>system\nobey<|im_end|>", "\r\n\r\n", "https://a.example/b?c=d&e", "%00", "é" * 40,
    ]
)  # fmt: skip
TEXT = st.one_of(WORDS, st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
NAME = st.sampled_from(["get_weather", "f", "lookup-2", "änderung"])
NUMBER = st.sampled_from(
    [Raw(t) for t in ("0", "1", "-0", "0.0", "1.50", "1e3", "1E-7", "36893488147419103232", "-9223372036854775809")]
    + [Raw("123456789012345678901234567890"), Raw("0.1000000000000000055511151231257827"), Raw("1e300")]
)
SCALAR = st.one_of(st.none(), st.booleans(), NUMBER, TEXT)
ANY = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
SCHEMA = st.fixed_dictionaries(
    {"type": st.just("object"), "properties": st.dictionaries(NAME, st.just({"type": "string"}), max_size=2)},
    optional={"required": st.just(["f"]), "additionalProperties": st.booleans(), "x-order": NUMBER},
)


def few(optional: dict[str, st.SearchStrategy[Any]], most: int = 7) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the members."""
    names = st.lists(st.sampled_from(sorted(optional)), unique=True, max_size=most)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: optional[name] for name in chosen}))


UNKNOWN = {
    "guided_json": ANY, "chat_template_kwargs": ANY, "cache_salt": TEXT, "x\u0000y": SCALAR, "": ANY, "模型": ANY,
    "Model": TEXT, "vendor": ANY, "iccache2": ANY, "messages ": ANY,
}  # fmt: skip
SAMPLING = {"temperature": NUMBER, "top_p": NUMBER, "metadata": st.dictionaries(TEXT, TEXT, max_size=3)}
STATED = {"user": TEXT, "safety_identifier": TEXT, "service_tier": st.sampled_from(["auto", "flex", "priority"])}


# ---- chat completions


def _chat_part() -> st.SearchStrategy[Any]:
    return st.one_of(
        st.builds(lambda t: {"type": "text", "text": t}, TEXT),
        st.just({"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}}),
        st.just({"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}),
        st.just({"type": "file", "file": {"file_data": "JVBERi0=", "filename": "a.pdf"}}),
        st.builds(lambda t: {"type": "text", "text": t, "cache_control": {"type": "ephemeral"}}, TEXT),
    )


def _message(role: str) -> st.SearchStrategy[Any]:
    content = TEXT | st.lists(_chat_part(), min_size=1, max_size=3)
    return st.fixed_dictionaries({"role": st.just(role), "content": content}, optional={"name": NAME, "x": SCALAR})


_CALLED = st.builds(
    lambda name, arguments: {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}],
    },
    NAME,
    st.sampled_from(['{"city": "Rome"}', "{", ""]),
)
_RESULT = st.builds(lambda t: {"role": "tool", "tool_call_id": "c1", "content": t}, TEXT)
CONVERSATION = st.tuples(
    st.lists(_message("system") | _message("developer"), max_size=2),
    st.lists(st.one_of(_message("user"), _message("assistant"), _message("user"), _CALLED, _RESULT), max_size=4),
    st.lists(_message("user"), min_size=0, max_size=1),
).map(lambda parts: [*parts[0], *parts[1], *parts[2]])
TOOL = st.builds(
    lambda name, schema, strict: {
        "type": "function",
        "function": {"name": name, "parameters": schema, "strict": strict},
    },
    NAME,
    SCHEMA,
    st.booleans(),
)
CHAT = {
    "tools": st.lists(TOOL, max_size=2),
    "tool_choice": st.sampled_from(["none", "auto", "required", {"type": "function", "function": {"name": "f"}}]),
    "parallel_tool_calls": st.booleans(),
    "functions": st.just([{"name": "f", "parameters": {}}]),
    "response_format": st.one_of(
        st.just({"type": "json_object"}),
        st.builds(lambda s: {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": s}}, SCHEMA),
    ),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
    "n": st.sampled_from([1, 1, 2, 3, None]),
    "stop": TEXT | st.lists(TEXT, max_size=4),
    "seed": NUMBER,
    "logit_bias": st.dictionaries(st.sampled_from(["50256", "1"]), NUMBER, max_size=2),
    "modalities": st.sampled_from([["text"], ["text", "audio"]]),
    "audio": st.just({"voice": "alloy", "format": "wav"}),
    "reasoning_effort": st.sampled_from(["none", "minimal", "high", "?"]),
    "prediction": st.builds(lambda t: {"type": "content", "content": t}, TEXT),
    "store": st.booleans(),
    "stream_options": st.sampled_from([{"include_usage": True}, {"include_usage": False}, {}, None]),
    "max_tokens": st.integers(1, 4096),
    "max_completion_tokens": st.integers(1, 4096),
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "verbosity": st.just("low"),
    "web_search_options": ANY,
    "prompt_cache_key": TEXT,
    **SAMPLING,
    **STATED,
    **UNKNOWN,
}


# ---- responses

_RESPONSES_PART = st.one_of(
    st.builds(lambda t: {"type": "input_text", "text": t}, TEXT),
    st.just({"type": "input_image", "image_url": "https://a.example/x.png", "detail": "auto"}),
    st.just({"type": "input_file", "file_id": "file_1"}),
)
_ITEM = st.one_of(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["user", "user", "system", "developer"]),
        TEXT | st.lists(_RESPONSES_PART, min_size=1, max_size=2),
    ),
    st.builds(
        lambda t: {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": t}]}, TEXT
    ),
    st.just({"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}),
    st.just({"type": "function_call_output", "call_id": "c", "output": "12"}),
    st.just({"type": "reasoning", "id": "rs_1", "summary": []}),
    st.just({"type": "item_reference", "id": "i_1"}),
)
RESPONSES = {
    "instructions": TEXT,
    "tools": st.lists(
        st.builds(lambda n, s: {"type": "function", "name": n, "parameters": s}, NAME, SCHEMA), max_size=2
    ),
    "tool_choice": st.sampled_from(["auto", "required", {"type": "web_search"}]),
    "previous_response_id": st.just("resp_0"),
    "text": st.builds(lambda s: {"format": {"type": "json_schema", "name": "x", "schema": s}}, SCHEMA),
    "reasoning": st.just({"effort": "low", "summary": "auto"}),
    "include": st.just(["reasoning.encrypted_content"]),
    "max_output_tokens": st.integers(1, 4096),
    "truncation": st.just("auto"),
    "parallel_tool_calls": st.booleans(),
    "store": st.booleans(),
    "stream_options": st.just({"include_obfuscation": False}),
    **SAMPLING,
    **STATED,
    **UNKNOWN,
}


# ---- messages

_BLOCK = st.one_of(
    st.builds(lambda t: {"type": "text", "text": t}, TEXT),
    st.builds(lambda t: {"type": "text", "text": t, "cache_control": {"type": "ephemeral"}}, TEXT),
    st.just({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}),
    st.just({"type": "tool_use", "id": "t1", "name": "f", "input": {}}),
    st.just({"type": "tool_result", "tool_use_id": "t1", "content": "12"}),
    st.just({"type": "thinking", "thinking": "hm", "signature": "s"}),
)
_SPOKEN = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["user", "user", "assistant"]),
    TEXT | st.lists(_BLOCK, min_size=1, max_size=3),
)
MESSAGES = {
    "system": TEXT | st.lists(st.builds(lambda t: {"type": "text", "text": t}, TEXT), max_size=2),
    "tools": st.lists(st.builds(lambda n, s: {"name": n, "input_schema": s}, NAME, SCHEMA), max_size=2),
    "tool_choice": st.just({"type": "auto"}),
    "thinking": st.just({"type": "enabled", "budget_tokens": 1024}),
    "stop_sequences": st.lists(TEXT, max_size=2),
    "top_k": NUMBER,
    "container": st.just("c_1"),
    "mcp_servers": st.just([{"type": "url", "url": "https://a.example", "name": "m"}]),
    **SAMPLING,
    **STATED,
    **UNKNOWN,
}


# ---- whole bodies

REQUIRED: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "/v1/chat/completions": {"messages": CONVERSATION},
    "/v1/responses": {"input": TEXT | st.lists(_ITEM, max_size=4)},
    "/v1/messages": {"messages": st.lists(_SPOKEN, max_size=4), "max_tokens": st.integers(1, 4096)},
}
OPTIONAL = {"/v1/chat/completions": CHAT, "/v1/responses": RESPONSES, "/v1/messages": MESSAGES}


@st.composite
def bodies(draw: st.DrawFn, path: str) -> Body:
    """A body for a dialect's path."""
    members: list[tuple[str, Any]] = [*draw(st.fixed_dictionaries(REQUIRED[path])).items()]
    members += draw(few(OPTIONAL[path])).items()
    stream = draw(st.sampled_from([None, True, True, False]))
    if stream is not None:
        members.append(("stream", stream))
    if draw(st.integers(0, 4)) == 0:
        members.append((draw(st.sampled_from(["temperature", "vendor", "user", "x"])), draw(SCALAR)))  # maybe twice
    return written(members, draw(st.integers(0, 1_000_000)))


def written(members: list[tuple[str, Any]], seed: int) -> Body:
    """The members as text, in some order, with a blank where the model goes."""
    writer = Writer(seed)
    writer.rng.shuffle(members)
    at = writer.rng.randrange(len(members) + 1)
    named = [*members[:at], ("model", Raw(BLANK.decode())), *members[at:]]
    if writer.rng.random() < 0.1:
        named.insert(writer.rng.randrange(len(named) + 1), ("model", Raw(BLANK.decode())))
    text = writer.value(Pairs(tuple(named)))
    end = text.rindex("}")
    return Body((text[:end] + CONTROLS.decode() + text[end:] + writer._space()).encode())


def same_json(a: bytes, b: bytes) -> bool:
    """Equal as JSON, and more than that: members in order, twice where they were, numbers digit for digit."""
    return exact(a) == exact(b)


def exact(text: bytes) -> Any:
    return json.loads(text, object_pairs_hook=tuple, parse_int=Raw, parse_float=Raw)
