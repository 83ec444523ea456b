"""Understanding an answer while others forward it. Nothing that an upstream sends makes it raise."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any, Protocol

import orjson

from iccache.dialects import sse
from iccache.types import Answer, Usage

MAX_TEXT_BYTES = 16 * 1024 * 1024  # of one answer: of its text in a stream, of its body without
MAX_TOKENS = 10**9  # that a report of usage is believed; the store's integers and the money made of them are finite
MAX_ARGUMENTS = 64_000  # characters of one call's arguments that are kept
FINISH = {  # in the words of chat completions
    "end_turn": "stop",
    "stop_sequence": "stop",
    "completed": "stop",
    "max_tokens": "length",
    "max_output_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
    "refusal": "content_filter",
}

_SAID = re.compile(rb'"(?:content|text)"\s*:\s*"((?:[^"\\]|\\.)*+)')


class Draft:
    """An answer in the making. A dialect's grammar writes into it."""

    def __init__(self, max_bytes: int) -> None:
        self.finish_reason: str | None = None
        self.has_tool_calls = False
        self.ended = False  # the end that the dialect prescribes was seen
        self.failed = False  # an error was reported, or it was too much to keep
        self.usage: dict[str, Any] = {}
        self._arguments: dict[object, str] = {}  # of calls of tools, by their place
        self._max_chars = max_bytes  # a character is a byte at least: close enough for a bound
        self._text = StringIO()

    def add(self, text: object) -> None:
        if not isinstance(text, str) or self.failed:
            return
        if self._text.tell() + len(text) > self._max_chars:
            self.failed = True
            self.restart()
        else:
            self._text.write(text)

    def call(self, place: object, arguments: object) -> None:
        """A piece of the arguments of the call at `place`, which has to be hashable."""
        self.has_tool_calls = True
        known = self._arguments.get(place, "")
        if (
            isinstance(arguments, str)
            and arguments
            and len(known) + len(arguments) <= MAX_ARGUMENTS
            and len(self._arguments) < 64
        ):
            self._arguments[place] = known + arguments

    def restart(self) -> None:
        """Forget the text: it comes again, whole."""
        self._text = StringIO()

    def finish(self, reason: object) -> None:
        if isinstance(reason, str) and reason:
            self.finish_reason = FINISH.get(reason, reason)

    def report(self, usage: object) -> None:
        """Usage may come in pieces: later numbers replace earlier ones."""
        if isinstance(usage, dict):
            self.usage.update(
                usage if None not in usage.values() else {k: v for k, v in usage.items() if v is not None}
            )

    def answer(self, usage: Usage | None) -> Answer:
        return Answer(
            text=self._text.getvalue(),
            complete=self.ended and not self.failed,
            finish_reason=self.finish_reason,
            has_tool_calls=self.has_tool_calls,
            tool_arguments=tuple(self._arguments.values()),
            usage=usage,
        )


class Grammar(Protocol):
    """How one dialect answers."""

    def whole(self, body: dict[str, Any], draft: Draft) -> None:
        """A JSON body."""

    def event(self, name: str, data: dict[str, Any], draft: Draft) -> None:
        """One event of a stream."""

    def usage(self, reported: dict[str, Any]) -> Usage | None:
        """What was reported, in our words; None when a number is missing."""


class WholeReader:
    """Reads a JSON body."""

    def __init__(self, grammar: Grammar, max_bytes: int = MAX_TEXT_BYTES) -> None:
        self._grammar = grammar
        self._max_bytes = max_bytes
        self._size = 0
        self._chunks: list[bytes] = []

    def feed(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size > self._max_bytes:
            self._chunks = []
        else:
            self._chunks.append(chunk)

    def answer(self) -> Answer:
        draft = Draft(self._max_bytes)
        body = load(self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks))
        if isinstance(body, dict):
            draft.failed = bool(body.get("error"))
            self._grammar.whole(body, draft)
        return draft.answer(self._grammar.usage(draft.usage))


class StreamReader:
    """Reads server-sent events."""

    def __init__(self, grammar: Grammar, max_bytes: int = MAX_TEXT_BYTES) -> None:
        self._grammar = grammar
        self._tap = sse.Tap(max_bytes)
        self._draft = Draft(max_bytes)
        self._done = False  # [DONE]: whatever follows is not the answer

    def feed(self, chunk: bytes) -> None:
        for event in self._tap.feed(chunk):
            self._read(event)
        if self._tap.gave_up:
            self._draft.failed = True

    def answer(self) -> Answer:
        return self._draft.answer(self._grammar.usage(self._draft.usage))

    def _read(self, event: sse.Event) -> None:
        if self._done:
            return
        if event.data.startswith(b"[DONE]"):
            self._done = True
            self._grammar.event("[DONE]", {}, self._draft)
            return
        if not event.data:
            return  # a heartbeat
        data = load(event.data)
        if not isinstance(data, dict) or data.get("error") or "error" in (event.name, data.get("type")):
            self._draft.failed = True
        else:
            self._grammar.event(event.name, data, self._draft)


def beginning_of(body: bytes) -> str:
    """The text in what has come of an answer's JSON, as far as it goes; "" where none is to be seen."""
    said = _SAID.search(body[:MAX_TEXT_BYTES])
    return said[1].decode("utf-8", "replace") if said else ""


def load(data: bytes) -> Any:
    """The JSON in `data`; None when it is none."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return None


def dicts(value: object) -> list[dict[str, Any]]:
    """The objects in `value`, if it is a list."""
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def count(value: object) -> int | None:
    """`value` as a number of tokens; None where it is none, or more than any answer has."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKENS else None
