"""What answers that were passed through took: as they report, else estimated where text was asked or said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from iccache.dialects import sse
from iccache.dialects.answer import beginning_of, count, dicts, load, mapping
from iccache.types import Usage

ESTIMATED = frozenset({"/v1/completions", "/v1/embeddings"})  # text in, and text or vectors out
MOST_CHARS = 4_000_000  # of a stream's text that is counted

Count = Callable[[str], int]  # tokens of a text, by the backend's tokenizer


class Meter:
    """Listens to a stream for what it says, and says that it took."""

    def __init__(self) -> None:
        self._tap = sse.Tap()
        self._reported: dict[str, Any] = {}
        self._said: list[str] = []
        self._chars = 0

    def feed(self, chunk: bytes) -> None:
        for event in self._tap.feed(chunk):
            if b'"usage"' in event.data or b'"text"' in event.data:
                found = mapping(load(event.data))
                self._reported.update(
                    mapping(found.get("usage")) or mapping(mapping(found.get("response")).get("usage"))
                )
                self._hear(said_in(found))

    def usage(self) -> Usage | None:
        """As reported; None where nothing was."""
        return reported_usage(self._reported)

    @property
    def said(self) -> str:
        """The text of all choices, one after the other."""
        return "".join(self._said)

    def _hear(self, text: str) -> None:
        if text and self._chars <= MOST_CHARS:
            self._said.append(text)
            self._chars += len(text)


def usage_of(body: bytes, path: str, asked: bytes | None, tokens: Count) -> Usage:
    """Tokens that a whole JSON answer to `asked` took."""
    found = mapping(load(body))
    reported = reported_usage(mapping(found.get("usage")))
    return estimated(path, asked, said_in(found), tokens) if reported is None else reported


def usage_of_part(body: bytes, path: str, asked: bytes | None, tokens: Count) -> Usage:
    """Tokens that an answer took of which only the beginning came."""
    return estimated(path, asked, beginning_of(body), tokens)


def estimated(path: str, asked: bytes | None, said: str, tokens: Count) -> Usage:
    """By counting, for the endpoints where there is text to count; else nothing."""
    if path not in ESTIMATED or asked is None:
        return Usage(0, 0)
    document = mapping(load(asked))
    texts: list[str] = []
    numbers = sum(_gathered(document.get(name), texts) for name in ("prompt", "suffix", "input"))
    return Usage(numbers + tokens("\n".join(texts)), tokens(said), estimated=True)


def reported_usage(reported: dict[str, Any]) -> Usage | None:
    taken = count(reported.get("prompt_tokens", reported.get("input_tokens")))
    made = count(reported.get("completion_tokens", reported.get("output_tokens")))
    return None if taken is None and made is None else Usage(taken or 0, made or 0)


def said_in(answer: dict[str, Any]) -> str:
    """The text of a completion, or of one event of it."""
    texts = [choice.get("text") for choice in dicts(answer.get("choices"))]
    return "".join([text for text in texts if isinstance(text, str)])


def _gathered(given: object, texts: list[str]) -> int:
    """A text, tokens as numbers, or several of either: texts go into `texts`, numbers are counted."""
    if isinstance(given, str):
        texts.append(given)
        return 0
    if not isinstance(given, list):
        return 0
    return sum(1 if isinstance(part, int) else _gathered(part, texts) for part in given)
