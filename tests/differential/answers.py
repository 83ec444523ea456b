"""Generated answers of an upstream: what providers send, what engines send, and what nobody should."""

from __future__ import annotations

import gzip
import json
import zlib
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from tests.differential.bodies import ANY, TEXT, Writer
from tests.differential.wire import Framing, Headers, Script

STATUSES = (400, 401, 402, 403, 404, 408, 409, 413, 418, 422, 429, 451, 499, 500, 501, 502, 503, 504, 520, 529, 599)
FRAMING: st.SearchStrategy[Framing] = st.sampled_from(["length", "chunked", "close"])
JSON_TYPES = st.sampled_from(
    [
        "application/json",
        "application/json; charset=utf-8",
        "Application/JSON",
        "application/vnd.api+json",
        "text/plain",
    ]
)
ODD_TYPES = st.sampled_from(
    [
        "",
        "text/html",
        "application/octet-stream",
        "application/x-ndjson",
        "audio/mpeg",
        "garbage",
        "text/plain; charset=x",
    ]
)
EVENTS = st.sampled_from(
    ["text/event-stream", "text/event-stream; charset=utf-8", "text/event-stream;charset=UTF-8", "Text/Event-Stream"]
)
EXTRA = st.lists(
    st.sampled_from(
        [
            ("openai-processing-ms", "12"), ("x-ratelimit-remaining-tokens", "0"), ("Retry-After", "0"),
            ("x-should-retry", "false"), ("OpenAI-Version", "2020-10-01"), ("x-request-id", "up-1"),
            ("request-id", "req_011"), ("Server", "llama"), ("Set-Cookie", "a=b"), ("Date", "x"), ("X-Two", "1"),
            ("X-Two", "2"), ("Cache-Control", "no-store"), ("ETag", '"a"'), ("Vary", "Accept"),
            ("x-iccache-cost-usd", "9"),
            ("Connection", "x-hop"), ("x-hop", "1"), ("X-Empty", ""), ("Keep-Alive", "timeout=5"), ("x-unicode", "ü"),
            ("Content-Language", "de"), ("x-long", "v" * 3000), ("strict-transport-security", "max-age=1"),
        ]
    ),
    max_size=4,
    unique=True,
)  # fmt: skip


@st.composite
def scripts(draw: st.DrawFn, path: str) -> Script:
    kind = draw(
        st.sampled_from(["json", "json", "events", "events", "events", "packed", "odd", "empty", "moved", "error"])
    )
    headers: Headers = list(draw(EXTRA))
    framing = draw(FRAMING)
    if kind == "events":
        headers.append(("Content-Type", draw(EVENTS)))
        pieces = cut(draw, draw(streams(path)))
        return Script(200, headers, pieces, "chunked" if framing == "length" else framing, lockstep=True)
    if kind == "empty":
        status = draw(st.sampled_from([200, 200, 202, 204, 304, 404, 500]))
        typed = [("Content-Type", draw(JSON_TYPES | EVENTS))] if draw(st.booleans()) else []
        return Script(status, headers + typed, [], framing)
    if kind == "moved":
        status = draw(st.sampled_from([300, 304, 305, 306, 399]))
        headers.append(("Location", draw(st.sampled_from(["/v1/elsewhere", "http://127.0.0.1:9/x", "ftp://x"]))))
        return Script(status, headers, [b"moved"] if draw(st.booleans()) else [], framing)
    body = draw(wholes(path)) if kind != "odd" else draw(st.binary(max_size=200))
    status = 200
    if kind == "error":
        status = draw(st.sampled_from(STATUSES))
        body = draw(st.one_of(errors(), st.binary(max_size=50), st.just(b"<html>nginx</html>")))
    elif kind == "packed":
        coding = draw(st.sampled_from(["gzip", "deflate"]))
        body = gzip.compress(body, mtime=0) if coding == "gzip" else zlib.compress(body)
        headers.append(("Content-Encoding", coding))
    given = draw(JSON_TYPES if kind in ("json", "packed") else st.one_of(JSON_TYPES, ODD_TYPES))
    if given:
        headers.append(("Content-Type", given))
    return Script(status, headers, cut(draw, body), framing)


def cut(draw: st.DrawFn, body: bytes) -> list[bytes]:
    """Cut at any byte."""
    at = sorted({0, len(body), *draw(st.lists(st.integers(0, max(len(body), 1)), max_size=5))})
    return [body[a:b] for a, b in pairwise(at) if a < b <= len(body)]


def errors() -> st.SearchStrategy[bytes]:
    shape = {"message": TEXT, "type": TEXT, "param": st.none() | TEXT, "code": st.none() | TEXT}
    inner: st.SearchStrategy[Any] = st.fixed_dictionaries(shape) | ANY
    return st.builds(lambda e, s: Writer(s).value({"error": e}).encode(), inner, st.integers(0, 100))


def wholes(path: str) -> st.SearchStrategy[bytes]:
    """JSON bodies: an answer, an error within a 200, or anything at all."""
    usage = st.sampled_from(
        [None, {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}, {}, {"input_tokens": 1}]
    )
    known = st.builds(lambda t, u, s: Writer(s).value(_whole(path, t, u)).encode(), TEXT, usage, st.integers(0, 1000))
    other = st.builds(lambda v, s: Writer(s).value(v).encode(), ANY, st.integers(0, 1000))
    return st.one_of(known, known, other, errors())


def _whole(path: str, text: str, usage: Any) -> dict[str, Any]:
    if path == "/v1/messages":
        content = [{"type": "text", "text": text}]
        return {"id": "msg_1", "type": "message", "content": content, "stop_reason": "end_turn", "usage": usage}
    if path == "/v1/responses":
        message = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}
        return {"id": "resp_1", "status": "completed", "output": [message], "usage": usage}
    message = {"role": "assistant", "content": text, "reasoning_content": "hm", "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice], "usage": usage, "x_vendor": {"a": 1}}


@st.composite
def streams(draw: st.DrawFn, path: str) -> bytes:
    """Server-sent events with everything that the format allows, and an end that may be missing."""
    end = draw(st.sampled_from(["\n", "\n", "\r\n", "\r"]))
    lines: list[str] = []
    for text in draw(st.lists(TEXT, max_size=6)):
        lines += draw(st.sampled_from([[], [], [": keep-alive", ""], [":"], ["id: 7"], ["retry: 10"], [""], ["x"]]))
        lines += _event(path, text, draw(st.integers(0, 9)))
    lines += draw(st.sampled_from(_ENDS[path]))
    stream = end.join(lines) + end
    if draw(st.integers(0, 5)) == 0:
        stream = "\ufeff" + stream
    if draw(st.integers(0, 4)) == 0:
        stream = stream.rstrip("\r\n")
    return stream.encode()


def _event(path: str, text: str, how: int) -> list[str]:
    if path == "/v1/messages":
        name, data = "content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": text}}
        data["type"] = name
    elif path == "/v1/responses":
        name, data = "response.output_text.delta", {"type": "response.output_text.delta", "delta": text}
    else:
        name, data = "", {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    written = Writer(how).value(data) if how < 3 else json.dumps(data, ensure_ascii=how % 2 == 0)
    if how == 4:
        written = json.dumps(data, indent=1)  # several lines of data
    shown = [f"data: {line}" if how != 5 else f"data:{line}" for line in written.replace("\r", "").split("\n")]
    return ([f"event: {name}"] if name else []) + shown + [""]


_STOP = 'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}'
_BROKEN = 'data: {"error":{"message":"overloaded","type":"server_error","param":null,"code":null}}'
_ENDS: dict[str, list[list[str]]] = {
    "/v1/chat/completions": [[_STOP, "", "data: [DONE]", ""], [_STOP, ""], ["data: [DONE]", ""], [_BROKEN, ""], []],
    "/v1/responses": [
        ["event: response.completed", 'data: {"type":"response.completed","response":{"status":"completed"}}', ""],
        ["event: error", 'data: {"type":"error","message":"x"}', ""],
        [],
    ],
    "/v1/messages": [
        ["event: message_stop", 'data: {"type":"message_stop"}', ""],
        ["event: error", 'data: {"type":"error","error":{"type":"overloaded_error"}}', ""],
        ["event: ping", 'data: {"type": "ping"}', ""],
    ],
}
_ENDS["/v1/other"] = _ENDS["/v1/chat/completions"]
