"""What a conversation asks now, and whether it can be shown examples: the same for all dialects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from iccache.types import Reason

CONTEXT_CHARS = 800  # of earlier turns before the last message, at most
CONTEXT_CHARS_LEAST = 200  # when the last message is long, and so says more by itself
TURN_CHARS = 240  # of one earlier turn
TASK_CHARS = 1600  # context and last message together, where the message leaves room


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
    return "\n\n".join(text for text in (first, *(t.text for t in turns if t.role is Role.SYSTEM)) if text)


def prompt(turns: Sequence[Turn], first: str = "") -> str:
    """All text there is, as it is counted."""
    return "\n".join(text for text in (first, *(t.text for t in turns)) if text)


def length(turns: Sequence[Turn]) -> int:
    """Messages, the system prompt apart."""
    return sum(t.role is not Role.SYSTEM for t in turns)


def obstacle(turns: Sequence[Turn]) -> Reason | None:
    """Why the conversation cannot be shown examples."""
    said = [t for t in turns if t.role is not Role.SYSTEM]
    if any(t.role is Role.UNKNOWN for t in turns):
        return Reason.UNREADABLE
    if said and said[-1].role is Role.TOOL:
        return Reason.TOOL_LOOP
    if said and said[-1].role is Role.ASSISTANT:
        return Reason.PREFILL
    if any(t.media for t in turns):
        return Reason.MULTIMODAL
    if not said or not said[-1].text.strip():
        return Reason.EMPTY
    return None


def task(turns: Sequence[Turn]) -> str:
    """What the last user message asks, understandable on its own.

    The first message of a conversation is taken exactly as it is. A later one gets before it what it may refer to:
    the end of the answer before it and the beginnings of the latest user messages, in order, `CONTEXT_CHARS` in all.
    A long message gets less of it, so that the question is what an embedding of limited length sees.
    """
    last = next((i for i in range(len(turns) - 1, -1, -1) if turns[i].role is Role.USER), None)
    if last is None:
        return ""
    asked = turns[last].text
    context = _context(turns[:last], max(CONTEXT_CHARS_LEAST, min(CONTEXT_CHARS, TASK_CHARS - len(asked))))
    return f"Earlier:\n{context}\n\nNow:\n{asked}" if context and asked.strip() else asked


def _context(earlier: Sequence[Turn], room: int) -> str:
    lines: list[str] = []
    answered = False
    for said in reversed(earlier):
        text = " ".join(said.text.split())
        if not text or said.role not in (Role.USER, Role.ASSISTANT) or (answered and said.role is Role.ASSISTANT):
            continue
        if said.role is Role.ASSISTANT:
            answered = True
            line = "Assistant: " + _tail(text, min(TURN_CHARS, room // 2))
        else:
            line = "User: " + _head(text, min(TURN_CHARS, room))
        if len(line) > room:
            break
        room -= len(line) + 1
        lines.append(line)
    return "\n".join(reversed(lines))


def _head(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[: chars - 1] + "…"


def _tail(text: str, chars: int) -> str:
    return text if len(text) <= chars else "…" + text[1 - chars :]
