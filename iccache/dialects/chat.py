"""OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from iccache.config import Placement
from iccache.dialects import body as bodies
from iccache.dialects import compose, conversation, errors
from iccache.dialects.answer import Draft, StreamReader, WholeReader, count, dicts, mapping
from iccache.dialects.conversation import UNKNOWN, Parts, Turn
from iccache.dialects.splice import Document
from iccache.errors import RequestError
from iccache.types import Ask, Reason, Shot, Usage

_PARTS = Parts(
    text=frozenset({"text"}),
    silent=frozenset({"refusal", "thinking", "reasoning"}),
    media=frozenset({"image_url", "input_audio", "file", "audio_url", "video_url", "image"}),
)


class Chat:
    name = "chat"
    path = "/v1/chat/completions"

    def read(self, body: bytes) -> Ask:
        asked = bodies.parse(body)
        turns = [_turn(message) for message in bodies.required_list(asked, "messages")]
        has_tools = _has_tools(asked)
        return Ask(
            dialect=self.name,
            body=body,
            model=asked["model"],
            stream=asked.get("stream") is True,
            task=conversation.task(turns),
            system=conversation.system(turns),
            prompt=conversation.prompt(turns),
            before=conversation.before(turns),
            long_before_chars=conversation.long_before_chars(turns),
            turns=conversation.length(turns),
            max_output_tokens=bodies.tokens(asked, ("max_completion_tokens", "max_tokens")),
            subject=bodies.subject(asked),
            has_tools=has_tools,
            plain=(has_tools and bodies.calls_tools(asked, has_tools)) or bool(asked.get("logprobs")),
            form=bodies.form(asked.get("response_format")),
            stop=bodies.stops(asked.get("stop")),
            bypass=_obstacle(asked, turns),
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
        return errors.openai(error)

    def error_event(self, error: RequestError) -> bytes:
        return errors.event(errors.openai(error))


class _Grammar:
    """Of several choices, the one with index 0 is the answer."""

    def __init__(self) -> None:
        self._finished = False

    def whole(self, body: dict[str, Any], draft: Draft) -> None:
        draft.report(body.get("usage"))
        for choice in dicts(body.get("choices")):
            if not choice.get("index"):
                break
        else:
            return
        self._say(mapping(choice.get("message")), draft)
        draft.finish(choice.get("finish_reason"))
        draft.ended = True

    def event(self, name: str, data: dict[str, Any], draft: Draft) -> None:
        if name == "[DONE]":
            draft.ended = self._finished
            return
        draft.report(data.get("usage"))
        for choice in dicts(data.get("choices")):
            if choice.get("index"):
                continue
            self._say(mapping(choice.get("delta")), draft)
            draft.finish(choice.get("finish_reason"))
            self._finished = self._finished or bool(choice.get("finish_reason"))

    def usage(self, reported: dict[str, Any]) -> Usage | None:
        given, made = count(reported.get("prompt_tokens")), count(reported.get("completion_tokens"))
        cached = count(mapping(reported.get("prompt_tokens_details")).get("cached_tokens")) or 0
        return None if given is None or made is None else Usage(given, made, cached=cached)

    def _say(self, message: dict[str, Any], draft: Draft) -> None:
        content, calls = message.get("content"), message.get("tool_calls")
        if isinstance(content, str):
            draft.add(content)
        else:
            for part in dicts(content):
                if part.get("type") == "text":
                    draft.add(part.get("text"))
        if calls or message.get("function_call"):
            draft.has_tool_calls = True
        for i, called in enumerate(dicts(calls) if calls else ()):
            place = called.get("index")
            draft.call(place if isinstance(place, int) else i, mapping(called.get("function")).get("arguments"))


def _turn(message: object) -> Turn:
    if not isinstance(message, dict):
        return UNKNOWN
    said = conversation.turn(message.get("role"), message.get("content"), _PARTS)
    return said._replace(media=True) if message.get("audio") else said


def _has_tools(asked: dict[str, Any]) -> bool:
    return bool(asked.get("tools") or asked.get("functions") or asked.get("web_search_options"))


def _obstacle(asked: dict[str, Any], turns: Sequence[Turn]) -> Reason | None:
    n = asked.get("n")
    if isinstance(n, int) and n > 1:
        return Reason.N
    modalities = asked.get("modalities")
    if isinstance(modalities, list) and any(m != "text" for m in modalities):
        return Reason.MULTIMODAL
    return conversation.obstacle(turns)


def _pair(shot: Shot) -> tuple[bytes, bytes]:
    return compose.message("user", shot.request), compose.message("assistant", shot.answer)
