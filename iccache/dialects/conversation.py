"""What a conversation asks now, and whether it can be shown examples: the same for all dialects."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from iccache.types import Reason

STANDS_ALONE_CHARS = 60  # a message as long as this says what it is about; of Chinese, Japanese, Korean a third
SAYS_SOMETHING_CHARS = 20  # an earlier question as long as this needs none before it
EARLIER_QUESTIONS = 3  # at most
QUESTION_CHARS = 240  # of one earlier question: its beginning
ANSWER_CHARS = 120  # of the answer before the message: its end


class Role(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"  # a tool's call or result that stands as a message of its own
    UNKNOWN = "unknown"  # valid JSON of a shape that is not known here


class Turn(NamedTuple):
    role: Role
    text: str = ""
    media: bool = False  # an image, audio or a file is part of it


UNKNOWN = Turn(Role.UNKNOWN)
_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
    "function": Role.TOOL,
}


class Parts(NamedTuple):
    """Which types of content parts hold text, which hold none that matters, and which are not text."""

    text: frozenset[str]
    silent: frozenset[str]
    media: frozenset[str]


def turn(role: object, content: object, parts: Parts) -> Turn:
    """One message. Its text is the content string, or its text parts, each on a line of its own."""
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        return UNKNOWN
    if content is None or isinstance(content, str):
        return Turn(known, content or "")
    if not isinstance(content, list):
        return UNKNOWN
    texts: list[str] = []
    media = False
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            return UNKNOWN
        if kind in parts.text and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in parts.media:
            media = True
        elif kind not in parts.silent:
            return UNKNOWN
    return Turn(known, "\n".join(texts), media)


def opening(roles: Iterator[Any]) -> int:
    """How many system and developer messages open the conversation."""
    count = 0
    for role in roles:
        if not isinstance(role, str) or _ROLES.get(role) is not Role.SYSTEM:
            break
        count += 1
    return count


def system(turns: Sequence[Turn], first: str = "") -> str:
    return "\n\n".join([text for text in (first, *[t.text for t in turns if t.role is Role.SYSTEM]) if text])


def prompt(turns: Sequence[Turn], first: str = "") -> str:
    """All text there is, as it is counted."""
    return "\n".join([text for text in (first, *[t.text for t in turns]) if text])


def before(turns: Sequence[Turn], first: str = "") -> str:
    """The text before the last question, as `prompt` has it; "" where nothing was said before but the system prompt."""
    earlier = turns[: last_question(turns)]
    return prompt(earlier, first) if _anything_said(earlier) else ""


def long_before_chars(turns: Sequence[Turn], first: str = "") -> int:
    """Characters of `before` that were there before the question before too."""
    earlier = turns[: last_question(turns)]
    if not (_anything_said(earlier) and prompt(earlier, first)):
        return 0
    return len(prompt(earlier[: last_question(earlier)], first))


def last_question(turns: Sequence[Turn | None]) -> int:
    """Where the last question begins: the user's messages in a row of which the last one is the user's last of all."""
    last = len(turns) - 1
    while last >= 0 and not _is(turns[last], Role.USER):
        last -= 1
    if last < 0:
        return len(turns)
    while last and _is(turns[last - 1], Role.USER):
        last -= 1
    return last


def _is(turn: Turn | None, role: Role) -> bool:
    return turn is not None and turn.role is role


def length(turns: Sequence[Turn]) -> int:
    """Messages, the system prompt apart."""
    return len([1 for t in turns if t.role is not Role.SYSTEM])


def _anything_said(turns: Sequence[Turn]) -> bool:
    """Whether there is a message beside the system prompt."""
    return length(turns) > 0


def obstacle(turns: Sequence[Turn]) -> Reason | None:
    """Why the conversation cannot be shown examples."""
    said = [t for t in turns if t.role is not Role.SYSTEM]
    if UNKNOWN.role in [t.role for t in said]:
        return Reason.UNREADABLE
    if said and said[-1].role is Role.TOOL:
        return Reason.TOOL_LOOP
    if said and said[-1].role is Role.ASSISTANT:
        return Reason.PREFILL
    if True in [t.media for t in turns]:
        return Reason.MULTIMODAL
    if not said or not said[-1].text.strip():
        return Reason.EMPTY
    return None


def task(turns: Sequence[Turn]) -> str:
    """What the last user message asks, understandable on its own, as one would say it in one message.

    A long message, or the first of a conversation, is taken exactly as it is. A short one ("and in Italian?") gets
    before it what it may refer to: the question before, those before that as long as they are very short themselves,
    and the end of the last answer. `tests/bench/multi_turn.py` measures what this is worth.
    """
    last = len(turns) - 1
    while last >= 0 and turns[last].role is not Role.USER:
        last -= 1
    if last < 0:
        return ""
    asked = turns[last].text
    if not asked.strip() or _length(asked, STANDS_ALONE_CHARS) >= STANDS_ALONE_CHARS:
        return asked
    context = _context(turns[:last])
    return f"{context}\n\nNow: {asked}" if context else asked


def _context(earlier: Sequence[Turn]) -> str:
    """The latest questions, as far as they are needed, and how the last answer ended. Of long texts no more is gone
    through than is wanted."""
    questions: list[str] = []
    for text in (turn.text for turn in reversed(earlier) if turn.role is Role.USER and _says_something(turn)):
        questions.insert(0, text)
        enough = _length(text, SAYS_SOMETHING_CHARS) >= SAYS_SOMETHING_CHARS
        if enough or len(questions) == EARLIER_QUESTIONS:
            break
    lines = [
        ("Then I asked: " if i else "Earlier I asked: ") + _head(q, QUESTION_CHARS) for i, q in enumerate(questions)
    ]
    answers = (turn.text for turn in reversed(earlier) if turn.role is Role.ASSISTANT and _says_something(turn))
    answer = next(answers, "")
    return "\n".join([*lines, *(["You answered: " + _tail(answer, ANSWER_CHARS)] if answer else [])])


def _says_something(turn: Turn) -> bool:
    return turn.text != "" and not turn.text.isspace()


def _length(text: str, enough: int) -> int:
    """Characters, where one of a wide script counts as three; of a text beyond `enough`, at least that."""
    said = " ".join(text[: 4 * enough].split())[:enough]
    if len(said) < enough and len(text) > 4 * enough:  # it is mostly white space
        said = " ".join(text.split())[:enough]
    return len(said) if said.isascii() else sum(3 if unicodedata.east_asian_width(c) in "WF" else 1 for c in said)


def _head(text: str, chars: int) -> str:
    """The beginning of `text`, every white space one space."""
    said = " ".join(text[: 4 * chars].split())
    if len(said) <= chars and len(text) > 4 * chars:  # it is mostly white space
        said = " ".join(text.split())
    return said if len(said) <= chars else said[: chars - 1] + "…"


def _tail(text: str, chars: int) -> str:
    """Its end, likewise."""
    said = " ".join(text[-4 * chars :].split())
    if len(said) <= chars and len(text) > 4 * chars:
        said = " ".join(text.split())
    return said if len(said) <= chars else "…" + said[1 - chars :]
