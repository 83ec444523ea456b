"""OpenAI chat JSONL: `{"messages": [...]}` on each line, the last message being the answer.

A line is read as the request that it once was, by what reads requests.
"""

from __future__ import annotations

import gzip
import io
import itertools
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import orjson

from iccache.dialects.chat import Chat
from iccache.errors import IccacheError, RequestError
from iccache.examples.admission import Refusal
from iccache.types import Example, Reason

GZIP = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
SKIPPED_AT_ONCE = 1 << 20  # bytes of a line that is too long
TEXTUAL = {"text", "refusal", "thinking", "reasoning"}  # types of content parts of an answer
SUBJECT_KEYS = ("safety_identifier", "user", "metadata")

# why a line is bad: what stands in --json, and what is said; a closed list
REASONS = MappingProxyType(
    {
        "json": "is not JSON",
        "messages": 'is not an object with "messages", a list of two objects at least',
        "no_answer": "the last message is not the assistant's",
        Reason.TOOL_LOOP.value: "a tool's result comes before the answer",
        Reason.MULTIMODAL.value: "images, audio or files",
        Reason.PREFILL.value: "the assistant's message is not an answer to the user's",
        Reason.UNREADABLE.value: "messages of a shape that is not known here",
        Refusal.TOOL_CALLS.value: "the answer calls tools",
        Refusal.EMPTY.value: "nothing is asked, or nothing answered",
        Refusal.TOO_LONG.value: "too long",
        Refusal.INSTRUCTIONS.value: "written to steer a model rather than to be an example",
        Refusal.CONTROL_TOKENS.value: "holds markers that a chat template takes for a change of turns",
    }
)


class Line(NamedTuple):
    number: int  # from 1
    text: bytes | None  # None: longer than may be
    end: int  # where the next one begins, in bytes of the uncompressed file


class Pair(NamedTuple):
    """What one line says."""

    system: str
    task: str  # what is asked, understandable on its own
    answer: str
    subject: str | None


class Bad(NamedTuple):
    """A line that cannot become an example."""

    reason: str  # one of REASONS


class Source:
    """A file of lines, gzip or not, in constant memory."""

    def __init__(self, path: Path, raw: BinaryIO, most_bytes: int) -> None:
        self._raw = raw
        self._most_bytes = most_bytes
        is_gzip = raw.read(2) == GZIP
        raw.seek(0)
        self._stream = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if is_gzip else raw
        self.size = path.stat().st_size

    @property
    def position(self) -> int:
        """How much of `size` has been read."""
        return self._raw.tell()

    def lines(self, number: int = 0, at: int = 0) -> Iterator[Line]:
        """Those after line `number`, which ends at byte `at`. Without those that hold nothing."""
        self._stream.seek(at)
        for n in itertools.count(number + 1):
            text = self._stream.readline(self._most_bytes + 1)
            if not text:
                return
            whole = len(text) <= self._most_bytes
            if not whole:
                self._skip(text)
            if text.strip():
                yield Line(n, text if whole else None, self._stream.tell())

    def _skip(self, text: bytes) -> None:
        while text and not text.endswith(b"\n"):
            text = self._stream.readline(SKIPPED_AT_ONCE)


@contextmanager
def opened(path: Path, most_bytes: int) -> Generator[Source]:
    """`most_bytes`: of one line. Raises IccacheError, here and in the block, when the file cannot be read."""
    try:
        with path.open("rb") as raw:
            yield Source(path, raw, most_bytes)
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise IccacheError(f"{path}: is damaged or was cut off: {exc}") from exc
    except OSError as exc:
        raise IccacheError(f"{path}: cannot be read: {exc.strerror or exc}") from exc


def read(line: Line) -> Pair | Bad:
    if line.text is None:
        return Bad(Refusal.TOO_LONG.value)
    try:
        said = orjson.loads(line.text.removeprefix(BOM))
    except orjson.JSONDecodeError:
        return Bad("json")
    messages = said.get("messages") if isinstance(said, dict) else None
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(m, dict) for m in messages):
        return Bad("messages")
    if messages[-1].get("role") != "assistant":
        return Bad("no_answer")
    if _has_media(messages[-1]):
        return Bad(Reason.MULTIMODAL.value)
    return _pair(said, messages)


def _has_media(answer: dict[str, Any]) -> bool:
    content = answer.get("content")
    parts = content if isinstance(content, list) else []
    kinds = {part.get("type") if isinstance(part, dict) else None for part in parts}
    return bool(answer.get("audio")) or not kinds <= TEXTUAL


def _pair(said: dict[str, Any], messages: list[Any]) -> Pair | Bad:
    subject = {key: said[key] for key in SUBJECT_KEYS if key in said}
    try:
        ask = Chat().read(orjson.dumps({"model": "any", "messages": messages[:-1], **subject}))
    except RequestError:
        return Bad(Reason.UNREADABLE.value)
    if ask.bypass is not None:
        return Bad(ask.bypass.value)
    reader = Chat().reader(stream=False)
    reader.feed(orjson.dumps({"choices": [{"message": messages[-1], "finish_reason": "stop"}]}))
    answer = reader.answer()
    if answer.has_tool_calls:
        return Bad(Refusal.TOOL_CALLS.value)
    return Pair(ask.system, ask.task, answer.text, ask.subject)


def write(example: Example) -> bytes:
    """The line that an example is. It says nothing of whose it was."""
    messages = [
        {"role": "user", "content": example.request},
        {"role": "assistant", "content": example.answer},
    ]
    if example.system:
        messages.insert(0, {"role": "system", "content": example.system})
    return orjson.dumps({"messages": messages}, option=orjson.OPT_APPEND_NEWLINE)
