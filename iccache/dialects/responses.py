"""OpenAI's responses, as far as they are stateless."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from iccache.config import Placement
from iccache.dialects import body as bodies
from iccache.dialects import compose, conversation, errors
from iccache.dialects.answer import Draft, StreamReader, WholeReader, count, dicts, mapping
from iccache.dialects.conversation import UNKNOWN, Parts, Role, Turn
from iccache.dialects.splice import Document, array
from iccache.errors import RequestError
from iccache.types import Ask, Reason, Shot, Usage

_MEDIA = frozenset({"input_image", "input_file", "input_audio", "input_video", "computer_screenshot"})
_PARTS = Parts(
    text=frozenset({"input_text", "output_text", "text"}),
    silent=frozenset({"refusal", "reasoning_text", "summary_text"}),
    media=_MEDIA,
)
_STATE = ("previous_response_id", "conversation", "background", "prompt")  # what lives upstream
_STATE_ITEMS = ("item_reference", "compaction")
_TOOL_SUFFIXES = ("_call", "_call_output", "_approval_request", "_approval_response", "_list_tools")


class Responses:
    name = "responses"
    path = "/v1/responses"

    def read(self, body: bytes) -> Ask:
        asked = bodies.parse(body)
        items = _items(asked)
        turns = [turn for turn in map(_turn, items) if turn is not None]
        given = asked.get("instructions")
        instructions = given if isinstance(given, str) else ""
        return Ask(
            dialect=self.name,
            body=body,
            model=asked["model"],
            stream=asked.get("stream") is True,
            task=conversation.task(turns),
            system=conversation.system(turns, instructions),
            prompt=conversation.prompt(turns, instructions),
            before=conversation.before(turns, instructions),
            long_before_chars=conversation.long_before_chars(turns, instructions),
            turns=conversation.length(turns),
            max_output_tokens=bodies.tokens(asked, ("max_output_tokens",)),
            subject=bodies.subject(asked),
            has_tools=bool(asked.get("tools")),
            plain=bodies.calls_tools(asked, bool(asked.get("tools"))) or _wants_logprobs(asked),
            form=bodies.form(mapping(asked.get("text")).get("format")),
            bypass=_obstacle(asked, items, turns),
            controls=bodies.controls(asked),
        )

    def compose(self, ask: Ask, *, model: str | None, shots: Sequence[Shot], placement: Placement = "start") -> bytes:
        document = compose.begin(ask, model)
        if shots:
            document = document or Document(ask.body)
            _show(document, shots, placement)
        return document.bytes() if document else ask.body

    def reader(self, stream: bool) -> StreamReader | WholeReader:
        return StreamReader(_Grammar()) if stream else WholeReader(_Grammar())

    def error(self, error: RequestError) -> bytes:
        return errors.openai(error)

    def error_event(self, error: RequestError) -> bytes:
        """The event of the API, with an `error` object beside it: the official client raises on that one only."""
        fields = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
        flat = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        return errors.event(orjson.dumps({**flat, "sequence_number": 0, "error": fields}), "error")


class _Grammar:
    def whole(self, body: dict[str, Any], draft: Draft) -> None:
        draft.report(body.get("usage"))
        if isinstance(body.get("output"), list):
            self._say(body, draft)
            self._end(body, draft)

    def event(self, name: str, data: dict[str, Any], draft: Draft) -> None:
        kind = data.get("type", name)
        response = mapping(data.get("response"))
        if kind == "response.output_text.delta":
            draft.add(data.get("delta"))
        elif kind == "response.output_item.added":
            self._notice(mapping(data.get("item")), draft)
        elif kind in ("response.completed", "response.incomplete", "response.failed"):
            draft.report(response.get("usage"))
            if dicts(response.get("output")):
                draft.restart()
                self._say(response, draft)
            self._end({"status": kind.partition(".")[2], **response}, draft)

    def usage(self, reported: dict[str, Any]) -> Usage | None:
        given, made = count(reported.get("input_tokens")), count(reported.get("output_tokens"))
        cached = count(mapping(reported.get("input_tokens_details")).get("cached_tokens")) or 0
        return None if given is None or made is None else Usage(given, made, cached=cached)

    def _say(self, response: dict[str, Any], draft: Draft) -> None:
        for i, item in enumerate(dicts(response.get("output"))):
            self._notice(item, draft)
            if item.get("type") == "function_call":
                draft.call(i, item.get("arguments"))
            for part in dicts(item.get("content")):
                if part.get("type") == "output_text":
                    draft.add(part.get("text"))

    def _notice(self, item: dict[str, Any], draft: Draft) -> None:
        if str(item.get("type")).endswith("_call"):
            draft.has_tool_calls = True

    def _end(self, response: dict[str, Any], draft: Draft) -> None:
        """An answer that is incomplete ended as it should if it says why: it was cut at the length asked for."""
        status = response.get("status")
        draft.finish(mapping(response.get("incomplete_details")).get("reason") or status)
        draft.ended = status in ("completed", "incomplete")
        draft.failed = draft.failed or status == "failed"


def _items(asked: dict[str, Any]) -> list[Any]:
    given = asked.get("input")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if given is None and any(asked.get(key) for key in _STATE):
        return []
    if not isinstance(given, list):
        bodies.refuse("input", "input is required, as a string or a list.", missing="input" not in asked)
    return given


def _turn(item: object) -> Turn | None:
    """None where the item says nothing: reasoning."""
    if not isinstance(item, dict):
        return UNKNOWN
    kind = item.get("type", "message")
    if kind == "message":
        return conversation.turn(item.get("role"), item.get("content"), _PARTS)
    if kind == "reasoning":
        return None
    if not isinstance(kind, str) or not kind.endswith(_TOOL_SUFFIXES):
        return UNKNOWN
    output = item.get("output")
    media = any(part.get("type") in _MEDIA for part in [mapping(output), *dicts(output)])
    return Turn(Role.TOOL, media=media)


def _wants_logprobs(asked: dict[str, Any]) -> bool:
    include = asked.get("include")
    return bool(asked.get("top_logprobs")) or (isinstance(include, list) and "message.output_text.logprobs" in include)


def _obstacle(asked: dict[str, Any], items: Sequence[Any], turns: Sequence[Turn]) -> Reason | None:
    if any(asked.get(key) for key in _STATE):
        return Reason.STATEFUL
    if any(isinstance(item, dict) and item.get("type") in _STATE_ITEMS for item in items):
        return Reason.STATEFUL
    return conversation.obstacle(turns)


def _show(document: Document, shots: Sequence[Shot], placement: Placement) -> None:
    """Examples among the messages. Text input becomes the list that it is short for."""
    turns = [turn for shot in shots for turn in _pair(shot)]
    span = document.value("input")
    if span is None:
        return
    text = document.source[span.start : span.end]
    if text.startswith(b'"'):
        document.replace("input", array([*turns, b'{"role":"user","content":' + text + b"}"]))
    else:
        document.insert("input", compose.place(document, "input", placement, _turn), turns)


def _pair(shot: Shot) -> tuple[bytes, bytes]:
    """The easy input form. llama.cpp takes an assistant's turn only when its type is named."""
    return (
        compose.message("user", shot.request, type="message"),
        compose.message("assistant", shot.answer, type="message"),
    )
