"""The scripted upstream, with what clients ask of a real one: keys, unknown models, tools, JSON of a schema.

    python -m tests.clients.upstream --port 9001

It calls the tool that is forced, else the first one, once; the arguments are the numbers and the quoted words of the
last user message. `GET /fake/requests` tells what came, and of each request whether its client left before the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from aiohttp import web

from tests import fakes
from tests.fakes import Script, ScriptedUpstream

KEYS = frozenset({"client-key", "upstream-key"})  # of the clients themselves, and of iccache
MODEL = "gpt-4o-mini"
MODELS = (MODEL, "small-model", "large-model")
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
SPEAK = {f"/v1{path}": speak for path, speak in fakes._DIALECTS.items()}
QUOTED = re.compile(r"'([^'\s]+)'")
REQUIRED = {CHAT: "messages", RESPONSES: "input", MESSAGES: "messages"}
DRESS: dict[Any, dict[str, Any]] = {
    "response": {
        "background": False,
        "completed_at": 0,
        "frequency_penalty": 0.0,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "presence_penalty": 0.0,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": False,
        "text": {"format": {"type": "text"}},
        "top_logprobs": 0,
        "truncation": "disabled",
    },
    "output_text": {"logprobs": []},
    "function": {"description": None, "parameters": None, "strict": None},
    "message": {"container": None, "stop_details": None},
    "text": {"citations": None},
    "tool_use": {"caller": {"type": "direct"}},
}
USAGE = {
    "cache_creation": None,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
    "inference_geo": None,
    "output_tokens_details": None,
    "server_tool_use": None,
    "service_tier": "standard",
}


class Upstream(ScriptedUpstream):
    def _script(self, request: web.Request, body: bytes) -> Script:
        """`x-fake-script` is obeyed until the client's retries reach `x-fake-until`."""
        retries = int(request.headers.get("x-stainless-retry-count", 0))
        if "x-fake-script" in request.headers and retries < int(request.headers.get("x-fake-until", 1_000)):
            return super()._script(request, body)
        return scripted(request, body)

    async def _told(self, request: web.Request) -> web.Response:
        return web.json_response([{"headers": dict(r.headers), "left": r.left.is_set()} for r in self.requests])


def scripted(request: web.Request, body: bytes) -> Script:
    path = request.path
    key = request.headers.get("Authorization", "").removeprefix("Bearer ") or request.headers.get("x-api-key")
    if key not in KEYS:
        message = "Incorrect API key provided: wro**key."  # LiteLLM goes by these words
        return refusal(path, 401, "invalid_request_error", "authentication_error", "invalid_api_key", message)
    if request.method == "GET" and path.startswith("/v1/models/"):
        return said({"id": path.rpartition("/")[2], "object": "model", "created": 0, "owned_by": "fake"})
    try:
        asked = json.loads(body)
    except ValueError:
        return Script()
    if path == MESSAGES + "/count_tokens":
        return said({"input_tokens": 7})
    if path == "/v1/completions" and asked.get("stream"):
        return streamed_completion(asked)
    if path == RESPONSES + "/compact" and "model" not in asked:
        return refusal(path, 400, "invalid_request_error", "invalid_request_error", "missing_required_parameter")
    if path not in REQUIRED:
        return Script()
    if not asked.get(REQUIRED[path]) or "model" not in asked:
        return refusal(path, 400, "invalid_request_error", "invalid_request_error", None)
    if asked.get("model") not in MODELS:
        return refusal(path, 404, "invalid_request_error", "not_found_error", "model_not_found")
    tool = called(path, asked)
    if tool is not None:
        return Script(body=dressed(CALLS[path](asked, *tool)))
    schema = wanted(asked)
    script = Script() if schema is None else Script(answer=json.dumps(fill(schema, schema, asked)))
    return script if path == CHAT else Script(body=dressed(b"".join(SPEAK[path](asked, script)[1])))


def said(body: dict[str, Any]) -> Script:
    return Script(body=written(body))


def written(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def dressed(body: bytes) -> bytes:
    """An answer, or every event of a stream, with all the members that a strict reader of the two APIs asks for."""
    if body.startswith(b"{"):
        return written(dress(json.loads(body)))
    events = [event.partition(b"data: ") for event in body.split(b"\n\n") if event]
    lines = [
        head + b"data: " + (data if data == b"[DONE]" else written(dress(json.loads(data)))) for head, _, data in events
    ]
    return b"\n\n".join([*lines, b""])


def dress(value: Any) -> Any:
    if isinstance(value, list):
        return [dress(v) for v in value]
    if not isinstance(value, dict):
        return value
    value = {name: dress(v) for name, v in value.items()}
    kind = value.get("object") or (value.get("type") if "sequence_number" not in value else None)
    if kind == "message" and "stop_reason" not in value:
        return value
    if kind == "message":
        value["usage"] = USAGE | value["usage"]
    return {**DRESS.get(kind, {}), **value}


def refusal(path: str, status: int, kind: str, anthropic: str, code: str | None, message: str = "refused") -> Script:
    if path.startswith(MESSAGES):
        return Script(
            status=status,
            body=json.dumps({"type": "error", "error": {"type": anthropic, "message": message}}).encode(),
        )
    error = {"message": message, "type": kind, "param": None, "code": code}
    return Script(status=status, body=json.dumps({"error": error}).encode())


# ---- what is asked


def turns(asked: dict[str, Any]) -> list[dict[str, Any]]:
    given = asked.get("messages", asked.get("input", []))
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def called(path: str, asked: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The tool to call, with its arguments; None where there is none, or its result is here already."""
    tools = [t.get("function", t) for t in asked.get("tools") or () if t.get("type", "function") == "function"]
    choice = asked.get("tool_choice")
    last = turns(asked)[-1]
    results = [p for p in last.get("content") or () if isinstance(p, dict) and p.get("type") == "tool_result"]
    if not tools or choice == "none" or last.get("role") == "tool" or results:
        return None
    if str(last.get("type")).endswith("_call_output"):
        return None
    forced = choice.get("name", choice.get("function", {}).get("name")) if isinstance(choice, dict) else None
    tool = next((t for t in tools if t["name"] == forced), tools[0])
    schema = tool.get("parameters") or tool.get("input_schema") or {"type": "object"}
    return tool["name"], fill(schema, schema, asked)


def wanted(asked: dict[str, Any]) -> dict[str, Any] | None:
    """The schema that the answer has to follow."""
    form = asked.get("response_format") or (asked.get("text") or {}).get("format") or {}
    form = form or asked.get("output_format") or (asked.get("output_config") or {}).get("format") or {}
    if form.get("type") == "json_object":
        names = QUOTED.findall(last_said(asked)) or ["answer"]
        return {"type": "object", "properties": {name: {"type": "string"} for name in names}}
    schema = form.get("json_schema", form).get("schema")
    return schema if isinstance(schema, dict) else None


def fill(schema: dict[str, Any], root: dict[str, Any], asked: dict[str, Any]) -> Any:
    """The plainest value that `schema` allows, of what the last user message says."""
    said = last_said(asked)
    return _fill(schema, root, Said(iter(re.findall(r"\d+", said)), iter(QUOTED.findall(said))))


def last_said(asked: dict[str, Any]) -> str:
    return next((str(t.get("content")) for t in reversed(turns(asked)) if t.get("role") == "user"), "")


class Said(NamedTuple):
    numbers: Iterator[str]
    quoted: Iterator[str]


def _fill(schema: dict[str, Any], root: dict[str, Any], said: Said) -> Any:
    if "$ref" in schema:
        found: Any = root
        for step in schema["$ref"].removeprefix("#/").split("/"):
            found = found[step]
        return _fill(found, root, said)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return _fill(next(s for s in schema[several] if s.get("type") != "null"), root, said)
    kinds = schema.get("type", "object")
    match kinds if isinstance(kinds, str) else next(k for k in kinds if k != "null"):
        case "object":
            return {name: _fill(s, root, said) for name, s in schema.get("properties", {}).items()}
        case "array":
            return [_fill(schema.get("items", {"type": "string"}), root, said)]
        case "integer" | "number":
            return int(next(said.numbers, 1))
        case "boolean":
            return True
        case "null":
            return None
    return next(said.quoted, "a word")


# ---- a tool's call, in each dialect


def streamed(events: list[tuple[str | None, Any]], last: bytes = b"") -> bytes:
    lines = [(f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n" for name, data in events]
    return "".join(lines).encode() + last


def chat_call(asked: dict[str, Any], name: str, arguments: dict[str, Any]) -> bytes:
    text = json.dumps(arguments)
    call = {"id": "call_fake", "type": "function", "function": {"name": name, "arguments": text}}
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
    head = {"id": "chatcmpl-fake", "created": 0, "model": asked["model"]}
    if not asked.get("stream"):
        message = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [call]}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls", "logprobs": None}
        return written({**head, "object": "chat.completion", "choices": [choice], "usage": usage})
    head["object"] = "chat.completion.chunk"
    opened = {**call, "index": 0, "function": {"name": name, "arguments": ""}}
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None}, {"tool_calls": [opened]}]
    for piece in (text[:5], text[5:]):
        deltas.append({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
    chunks = [{**head, "choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    chunks.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    if (asked.get("stream_options") or {}).get("include_usage"):
        chunks.append({**head, "choices": [], "usage": usage})
    return streamed([(None, c) for c in chunks], b"data: [DONE]\n\n")


def responses_call(asked: dict[str, Any], name: str, arguments: dict[str, Any]) -> bytes:
    text = json.dumps(arguments)
    item = {"type": "function_call", "id": "fc_fake", "call_id": "call_fake", "name": name, "status": "completed"}
    whole = {
        "id": "resp_fake",
        "object": "response",
        "created_at": 0,
        "model": asked["model"],
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": asked.get("instructions"),
        "metadata": {},
        "output": [{**item, "arguments": text}],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": asked.get("tool_choice", "auto"),
        "tools": asked["tools"],
        "top_p": 1.0,
        "usage": {
            "input_tokens": 9,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 4,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 13,
        },
    }
    if not asked.get("stream"):
        return written(whole)
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    at = {"item_id": "fc_fake", "output_index": 0}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "arguments": ""}},
        {"type": "response.function_call_arguments.delta", **at, "delta": text},
        {"type": "response.function_call_arguments.done", **at, "name": name, "arguments": text},
        {"type": "response.output_item.done", "output_index": 0, "item": {**item, "arguments": text}},
        {"type": "response.completed", "response": whole},
    ]
    return streamed([(e["type"], {**e, "sequence_number": i}) for i, e in enumerate(events)])


def messages_call(asked: dict[str, Any], name: str, arguments: dict[str, Any]) -> bytes:
    block = {"type": "tool_use", "id": "toolu_fake", "name": name, "input": arguments}
    whole = {
        "id": "msg_fake",
        "type": "message",
        "role": "assistant",
        "model": asked["model"],
        "content": [block],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {"input_tokens": 9, "output_tokens": 4},
    }
    if not asked.get("stream"):
        return written(whole)
    delta = {"type": "input_json_delta", "partial_json": json.dumps(arguments)}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {**whole, "content": [], "stop_reason": None}},
        {"type": "content_block_start", "index": 0, "content_block": {**block, "input": {}}},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 4}},
        {"type": "message_stop"},
    ]
    return streamed([(e["type"], e) for e in events])


CALLS = {CHAT: chat_call, RESPONSES: responses_call, MESSAGES: messages_call}


def streamed_completion(asked: dict[str, Any]) -> Script:
    head = {"id": "cmpl-fake", "object": "text_completion", "created": 0, "model": asked.get("model")}
    words = re.findall(r"\S+\s*", str(asked.get("prompt")))
    choices = [{"index": 0, "text": word, "finish_reason": None, "logprobs": None} for word in words]
    choices.append({"index": 0, "text": "", "finish_reason": "stop", "logprobs": None})
    return Script(body=streamed([(None, {**head, "choices": [c]}) for c in choices], b"data: [DONE]\n\n"))


async def _serve(port: int) -> None:
    async with Upstream(port=port, models=MODELS) as upstream:
        print(upstream.base_url, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What the clients under test talk to in the end.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one and prints it")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(parser.parse_args().port))
