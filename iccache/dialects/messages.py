"""Anthropic's messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from iccache.config import Placement
from iccache.dialects import body as bodies
from iccache.dialects import compose, conversation, errors
from iccache.dialects.answer import Draft, StreamReader, WholeReader, count, dicts, mapping
from iccache.dialects.conversation import UNKNOWN, Parts, Role, Turn
from iccache.dialects.splice import Document
from iccache.errors import RequestError
from iccache.types import Ask, Reason, Shot, Usage

_MEDIA = frozenset({"image", "document", "container_upload", "search_result"})
_PARTS = Parts(
    text=frozenset({"text"}),
    silent=frozenset(
        {
            "thinking",
            "redacted_thinking",
            "tool_use",
            "tool_result",
            "server_tool_use",
            "web_search_tool_result",
            "web_fetch_tool_result",
            "code_execution_tool_result",
            "mcp_tool_use",
            "mcp_tool_result",
        }
    ),
    media=_MEDIA,
)
_INPUT_KINDS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


class Messages:
    name = "messages"
    path = "/v1/messages"

    def read(self, body: bytes) -> Ask:
        asked = bodies.parse(body)
        turns = [_turn(message) for message in bodies.required_list(asked, "messages")]
        top = _system(asked.get("system"))
        return Ask(
            dialect=self.name,
            body=body,
            model=asked["model"],
            stream=asked.get("stream") is True,
            task=conversation.task(turns),
            system=conversation.system(turns, top.text),
            prompt=conversation.prompt(turns, top.text),
            before=conversation.before(turns, top.text),
            long_before_chars=conversation.long_before_chars(turns, top.text),
            turns=conversation.length(turns),
            max_output_tokens=bodies.tokens(asked, ("max_tokens",)),
            subject=bodies.subject(asked),
            has_tools=_has_tools(asked),
            plain=bodies.calls_tools(asked, _has_tools(asked)),
            form=bodies.form(asked.get("output_format") or mapping(asked.get("output_config")).get("format")),
            stop=bodies.stops(asked.get("stop_sequences")),
            bypass=_obstacle(asked, top, turns),
            controls=bodies.controls(asked),
        )

    def compose(self, ask: Ask, *, model: str | None, shots: Sequence[Shot], placement: Placement = "start") -> bytes:
        document = compose.begin(ask, model)
        if shots:
            document = document or Document(ask.body)
            turns = [turn for shot in shots for turn in _pair(shot)]
            document.insert("messages", compose.place(document, "messages", placement, _turn), turns)
        return document.bytes() if document else ask.body

    def reader(self, stream: bool) -> StreamReader | WholeReader:
        return StreamReader(_Grammar()) if stream else WholeReader(_Grammar())

    def error(self, error: RequestError) -> bytes:
        return errors.anthropic(error)

    def error_event(self, error: RequestError) -> bytes:
        return errors.event(errors.anthropic(error), "error")


class _Grammar:
    def whole(self, body: dict[str, Any], draft: Draft) -> None:
        draft.report(body.get("usage"))
        if not isinstance(body.get("content"), list):
            return
        for block in dicts(body["content"]):
            self._block(block, draft)
        draft.finish(body.get("stop_reason"))
        draft.ended = True

    def event(self, name: str, data: dict[str, Any], draft: Draft) -> None:
        kind = data.get("type", name)
        if kind == "message_start":
            draft.report(mapping(data.get("message")).get("usage"))
        elif kind == "content_block_start":
            self._block(mapping(data.get("content_block")), draft)
        elif kind == "content_block_delta":
            delta = mapping(data.get("delta"))
            if delta.get("type") == "text_delta":
                draft.add(delta.get("text"))
            elif delta.get("type") == "input_json_delta":
                draft.call(str(data.get("index")), delta.get("partial_json"))
        elif kind == "message_delta":
            draft.report(data.get("usage"))
            draft.finish(mapping(data.get("delta")).get("stop_reason"))
        elif kind == "message_stop":
            draft.ended = True

    def usage(self, reported: dict[str, Any]) -> Usage | None:
        """Input that came from the provider's prompt cache is counted apart there, and is input all the same."""
        given = [count(reported.get(kind)) for kind in _INPUT_KINDS]
        made = count(reported.get("output_tokens"))
        if given[0] is None or made is None:
            return None
        return Usage(sum(n or 0 for n in given), made, cached=given[-1] or 0)

    def _block(self, block: dict[str, Any], draft: Draft) -> None:
        if block.get("type") == "text":
            draft.add(block.get("text"))
        elif block.get("type") in ("tool_use", "server_tool_use", "mcp_tool_use"):
            draft.has_tool_calls = True


def _system(value: object) -> Turn:
    """The top-level system prompt: a string, text blocks, or none."""
    return conversation.turn("system", value, _PARTS)


def _turn(message: object) -> Turn:
    """A message that carries tool results is the tools' turn, whatever its harness writes after them."""
    if not isinstance(message, dict):
        return UNKNOWN
    said = conversation.turn(message.get("role"), message.get("content"), _PARTS)
    results = [part for part in dicts(message.get("content")) if part.get("type") == "tool_result"]
    if said.role is not Role.USER or not results:
        return said
    media = any(part.get("type") in _MEDIA for result in results for part in dicts(result.get("content")))
    return Turn(Role.TOOL, said.text, said.media or media)


def _has_tools(asked: dict[str, Any]) -> bool:
    return bool(asked.get("tools") or asked.get("mcp_servers"))


def _obstacle(asked: dict[str, Any], top: Turn, turns: Sequence[Turn]) -> Reason | None:
    if asked.get("container"):
        return Reason.STATEFUL
    return conversation.obstacle([top, *turns])


def _pair(shot: Shot) -> tuple[bytes, bytes]:
    return compose.message("user", shot.request), compose.message("assistant", shot.answer)
