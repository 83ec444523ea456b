"""A scripted upstream: a small real server that speaks the three dialects and misbehaves on demand.

In a test:

    async with ScriptedUpstream() as upstream:           # echoes the last user message
        backend = Backend(base_url=upstream.base_url, ...)
        upstream.queue.append(Script(status=503))        # the next request only
        upstream.by_model["small"] = Script(answer="4")  # requests for that model
        upstream.script = Script(between_s=0.1)          # every other request
        ...
        upstream.requests[0].json["messages"]            # what came, raw bytes and headers too

A request may also bring its own script, as JSON in the header `x-fake-script` (`{"status": 503}`). An answer may be a
function of the messages (`[{"role", "content"}]` in every dialect), so that a test can make it depend on the examples
shown. From the command line, where `GET /fake/requests` tells what came:

    python -m tests.fakes --port 9001 --model small --answer "4"
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import socket
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from aiohttp import web
from multidict import CIMultiDict

Message = dict[str, str]
Fault = Literal[
    "reset_before_head",  # RST instead of an answer
    "close_before_head",  # FIN instead of an answer: what a stale keep-alive connection looks like
    "reset_after_head",  # RST before the first byte of the body
    "reset_midway",  # RST after half of the body
    "truncate",  # FIN after half of the body: too short a body, a stream without its end
    "hang",  # no head, ever
    "hang_after_head",
    "hang_midway",
    "error_event",  # a stream's second half is an error event
    "no_done",  # a stream ends in order, but without its proper last event
]


@dataclass(slots=True)
class Script:
    """What becomes of one request."""

    answer: str | Callable[[list[Message]], str] | None = None  # None: echo the last user message
    status: int = 200  # other than 200: an error body in the dialect's shape
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # sent as it is instead of an answer; also garbage
    usage: bool = True  # report usage (in a chat stream only if the request asked for it)
    finish_reason: str = "stop"  # in the words of chat completions
    before_head_s: float = 0
    before_body_s: float = 0  # between the head and the first byte of the body
    between_s: float = 0  # between the pieces of a stream
    repeat: int = 1  # a stream's pieces of text, this many times over
    fault: Fault | None = None
    says_length: bool = True  # of a body that is no stream; else it comes in chunks


@dataclass(slots=True)
class Received:
    """One request as it came."""

    method: str
    path: str  # with its query
    headers: CIMultiDict[str]
    body: bytes
    at: float  # monotonic
    connection: int  # which connection it came on: equal numbers, same connection
    left_at: float | None = None  # when the client was noticed to be gone before the end
    left: asyncio.Event = field(default_factory=asyncio.Event)  # set with `left_at`
    sent: int = 0  # pieces of the answer

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class ScriptedUpstream:
    """Start and stop it with `async with`, or with `start` and `stop`."""

    def __init__(self, script: Script | None = None, *, port: int = 0, models: Sequence[str] = ("fake",)) -> None:
        self.script = script or Script()
        self.queue: deque[Script] = deque()
        self.by_model: dict[str, Script] = {}
        self.requests: list[Received] = []
        self.models = list(models)
        self.port = port
        self._connections: list[object] = []
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/fake/requests", self._told)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(
            app, handler_cancellation=True, keepalive_timeout=60, shutdown_timeout=0, access_log=None
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def _told(self, request: web.Request) -> web.Response:
        return web.json_response(
            [
                {
                    "method": r.method,
                    "path": r.path,
                    "headers": dict(r.headers),
                    "body": r.body.decode("utf-8", "replace"),
                }
                for r in self.requests
            ]
        )

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        received = Received(
            request.method,
            request.raw_path,
            CIMultiDict(request.headers),
            body,
            time.monotonic(),
            self._number(request),
        )
        self.requests.append(received)
        try:
            return await self._play(request, received, self._script(request, body))
        except (asyncio.CancelledError, ConnectionResetError):
            received.left_at = time.monotonic()
            received.left.set()
            raise

    def _number(self, request: web.Request) -> int:
        if request.protocol not in self._connections:
            self._connections.append(request.protocol)
        return self._connections.index(request.protocol)

    def _script(self, request: web.Request, body: bytes) -> Script:
        if "x-fake-script" in request.headers:
            return Script(**json.loads(request.headers["x-fake-script"]))
        if self.queue:
            return self.queue.popleft()
        return self.by_model.get(_asked(body).get("model", ""), self.script)

    async def _play(self, request: web.Request, received: Received, script: Script) -> web.StreamResponse:
        await asyncio.sleep(script.before_head_s)
        if script.fault == "hang":
            await asyncio.sleep(3600)
        if script.fault in ("reset_before_head", "close_before_head"):
            return _cut(request, rst=script.fault.startswith("reset"))
        kind, pieces = _answer(request.path, _asked(received.body), script, self.models, received)
        response = web.StreamResponse(status=script.status, headers={"Content-Type": kind, **script.headers})
        response.headers.setdefault("x-request-id", f"upstream-{len(self.requests)}")
        if kind != "text/event-stream":
            response.content_length = sum(map(len, pieces)) if script.says_length else None
            pieces = [piece for piece in pieces if piece]
            pieces = [pieces[0][: len(pieces[0]) // 2], pieces[0][len(pieces[0]) // 2 :]] if pieces else []
        await response.prepare(request)
        if script.fault == "hang_after_head":
            await asyncio.sleep(3600)
        if script.fault == "reset_after_head":
            await asyncio.sleep(0.05)  # so that the head is out
            return _cut(request, rst=True)
        await asyncio.sleep(script.before_body_s)
        async for piece in _paced(pieces, script, kind):
            if piece is None:
                await asyncio.sleep(0.05)  # so that what was sent arrives
                return _cut(request, rst=script.fault == "reset_midway")
            await response.write(piece)
            received.sent += 1
        await response.write_eof()
        return response


async def _paced(pieces: list[bytes], script: Script, kind: str) -> AsyncIterator[bytes | None]:
    """The pieces in their time; None where the connection is to be cut."""
    half = len(pieces) // 2
    for i, piece in enumerate(pieces):
        if i == half:
            if script.fault in ("reset_midway", "truncate"):
                yield None
                return
            if script.fault == "hang_midway":
                await asyncio.sleep(3600)
        if i and kind == "text/event-stream":
            await asyncio.sleep(script.between_s)
        yield piece


def _cut(request: web.Request, *, rst: bool) -> web.Response:
    transport = request.transport
    assert transport is not None
    if rst:
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()
    return web.Response()


def _asked(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _answer(
    path: str, asked: dict[str, Any], script: Script, models: Sequence[str], received: Received
) -> tuple[str, list[bytes]]:
    """Content type and pieces of the body."""
    speak = _DIALECTS.get(path.removeprefix("/v1"))
    if script.body is not None:
        streams = bool(asked.get("stream")) and script.status == 200
        return script.headers.get("Content-Type", "text/event-stream" if streams else "application/json"), [script.body]
    if script.status != 200:
        return "application/json", [_error(path, script.status)]
    if speak is not None:
        return speak(asked, script)
    return "application/json", [json.dumps(_other(path, asked, models, received)).encode()]


def _error(path: str, status: int) -> bytes:
    message = f"scripted {status}"
    if path.endswith("/messages"):
        return json.dumps({"type": "error", "error": {"type": "api_error", "message": message}}).encode()
    return json.dumps({"error": {"message": message, "type": "scripted", "param": None, "code": str(status)}}).encode()


def _other(path: str, asked: dict[str, Any], models: Sequence[str], received: Received) -> dict[str, Any]:
    path = path.removeprefix("/v1")
    if path == "/models":
        listed = [{"id": m, "object": "model", "created": 0, "owned_by": "fake"} for m in models]
        return {"object": "list", "data": listed}
    if path == "/embeddings":
        given = asked.get("input")
        texts = given if isinstance(given, list) else [given]
        data = [{"object": "embedding", "index": i, "embedding": _embedded(asked)} for i in range(len(texts))]
        return {"object": "list", "data": data, "model": asked.get("model"), "usage": _chat_usage(1, 0)}
    if path == "/completions":
        text = _echo([{"role": "user", "content": str(asked.get("prompt", ""))}])
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        base = {"id": "cmpl-fake", "object": "text_completion", "created": 0, "model": asked.get("model")}
        return {**base, "choices": [choice], "usage": _chat_usage(_words(text), _words(text))}
    return {"method": received.method, "path": received.path, "bytes": len(received.body)}


def _embedded(asked: dict[str, Any]) -> list[float] | str:
    vector = [0.6, 0.8]
    if asked.get("encoding_format") == "base64":
        return base64.b64encode(struct.pack("<2f", *vector)).decode()
    return vector


# ---- the three dialects


def _chat(asked: dict[str, Any], script: Script) -> tuple[str, list[bytes]]:
    messages = _flat(asked.get("messages", []))
    text = _say(script, messages)
    usage = _chat_usage(_prompt_words(messages), _words(text)) if script.usage else None
    head = {"id": "chatcmpl-fake", "created": 0, "model": asked.get("model")}
    if not asked.get("stream"):
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, "annotations": []}
        choice = {"index": 0, "message": message, "finish_reason": script.finish_reason, "logprobs": None}
        whole = {**head, "object": "chat.completion", "choices": [choice]}
        return "application/json", [json.dumps(whole | ({"usage": usage} if usage else {})).encode()]

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event({**head, "object": "chat.completion.chunk", "choices": [choice], **more})

    pieces = [chunk({"role": "assistant", "content": ""})]
    pieces += [chunk({"content": word}) for word in _split(text)] * script.repeat
    if script.fault == "error_event":
        broken = {"error": {"message": "scripted", "type": "server_error", "param": None, "code": None}}
        return "text/event-stream", [*pieces, _event(broken)]
    pieces.append(chunk({}, script.finish_reason))
    if usage and (asked.get("stream_options") or {}).get("include_usage"):
        pieces.append(_event({**head, "object": "chat.completion.chunk", "choices": [], "usage": usage}))
    return "text/event-stream", pieces if script.fault == "no_done" else [*pieces, b"data: [DONE]\n\n"]


def _responses(asked: dict[str, Any], script: Script) -> tuple[str, list[bytes]]:
    given = asked.get("input", "")
    messages = _flat([{"role": "user", "content": given}] if isinstance(given, str) else given)
    if asked.get("instructions"):
        messages.insert(0, {"role": "system", "content": asked["instructions"]})
    text = _say(script, messages)
    counted = {
        "input_tokens": _prompt_words(messages),
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": _words(text),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": _prompt_words(messages) + _words(text),
    }
    cut = script.finish_reason == "length"
    part = {"type": "output_text", "text": text, "annotations": []}
    item = {"type": "message", "id": "msg_fake", "role": "assistant", "status": "completed", "content": [part]}
    response = {
        "id": "resp_fake",
        "object": "response",
        "created_at": 0,
        "model": asked.get("model"),
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "error": None,
        "instructions": asked.get("instructions"),
        "metadata": {},
        "output": [item],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "usage": counted if script.usage else None,
    }
    if not asked.get("stream"):
        return "application/json", [json.dumps(response).encode()]
    numbers = iter(range(1_000_000))

    def event(kind: str, **fields: Any) -> bytes:
        return _event({"type": kind, "sequence_number": next(numbers), **fields}, kind)

    at = {"item_id": "msg_fake", "output_index": 0, "content_index": 0}
    begun = {**response, "status": "in_progress", "output": [], "usage": None}
    empty = {**item, "status": "in_progress", "content": []}
    pieces = [
        event("response.created", response=begun),
        event("response.output_item.added", output_index=0, item=empty),
        event("response.content_part.added", **at, part={**part, "text": ""}),
    ]
    words = _split(text) * script.repeat
    pieces += [event("response.output_text.delta", **at, delta=word, logprobs=[]) for word in words]
    if script.fault == "error_event":
        return "text/event-stream", [*pieces, event("error", code="server_error", message="scripted", param=None)]
    pieces += [
        event("response.output_text.done", **at, text=text, logprobs=[]),
        event("response.content_part.done", **at, part=part),
        event("response.output_item.done", output_index=0, item=item),
    ]
    if script.fault != "no_done":
        pieces.append(event("response.incomplete" if cut else "response.completed", response=response))
    return "text/event-stream", pieces


def _messages(asked: dict[str, Any], script: Script) -> tuple[str, list[bytes]]:
    messages = _flat(asked.get("messages", []))
    if asked.get("system"):
        messages.insert(0, {"role": "system", "content": _text(asked["system"])})
    text = _say(script, messages)
    given, made = _prompt_words(messages), _words(text)
    stop = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[script.finish_reason]
    whole: dict[str, Any] = {
        "id": "msg_fake",
        "type": "message",
        "role": "assistant",
        "model": asked.get("model"),
        "content": [{"type": "text", "text": text}],
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": {"input_tokens": given, "output_tokens": made} if script.usage else {},
    }
    if not asked.get("stream"):
        return "application/json", [json.dumps(whole).encode()]

    def event(kind: str, **fields: Any) -> bytes:
        return _event({"type": kind, **fields}, kind)

    begun = {**whole, "content": [], "stop_reason": None}
    if script.usage:
        begun["usage"] = {"input_tokens": given, "output_tokens": 1}
    pieces = [
        event("message_start", message=begun),
        event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        event("ping"),
    ]
    for word in _split(text) * script.repeat:
        pieces.append(event("content_block_delta", index=0, delta={"type": "text_delta", "text": word}))
    if script.fault == "error_event":
        broken = {"type": "overloaded_error", "message": "scripted"}
        return "text/event-stream", [*pieces, event("error", error=broken)]
    usage = {"output_tokens": made} if script.usage else {}
    pieces += [
        event("content_block_stop", index=0),
        event("message_delta", delta={"stop_reason": stop, "stop_sequence": None}, usage=usage),
    ]
    return "text/event-stream", pieces if script.fault == "no_done" else [*pieces, event("message_stop")]


_DIALECTS = {"/chat/completions": _chat, "/responses": _responses, "/messages": _messages}


def _event(data: dict[str, Any], name: str | None = None) -> bytes:
    return ((f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n").encode()


def _flat(messages: Any) -> list[Message]:
    """Messages of any dialect as role and text."""
    said = [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    return [{"role": str(m.get("role", "")), "content": _text(m.get("content"))} for m in said]


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
    return content if isinstance(content, str) else ""


def _say(script: Script, messages: list[Message]) -> str:
    if callable(script.answer):
        return script.answer(messages)
    return _echo(messages) if script.answer is None else script.answer


def _echo(messages: list[Message]) -> str:
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")


def _split(text: str) -> list[str]:
    """Pieces that join to `text`, a word each."""
    words = text.split(" ")
    return [word + " " for word in words[:-1]] + words[-1:]


def _words(text: str) -> int:
    return len(text.split())


def _prompt_words(messages: list[Message]) -> int:
    return sum(_words(m["content"]) for m in messages)


def _chat_usage(given: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}


async def _serve(upstream: ScriptedUpstream) -> None:
    async with upstream:
        print(upstream.base_url, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A scripted upstream that speaks chat, responses and messages.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one and prints it")
    parser.add_argument("--model", action="append", default=[], help="listed under /v1/models; repeatable")
    parser.add_argument("--answer", help="said to everything; default: the last user message")
    parser.add_argument("--script", default="{}", help='further fields as JSON, such as {"between_s": 0.1}')
    given = parser.parse_args()
    script = Script(**{"answer": given.answer, **json.loads(given.script)})
    upstream = ScriptedUpstream(script, port=given.port, models=given.model or ["fake"])
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(upstream))


if __name__ == "__main__":
    main()
