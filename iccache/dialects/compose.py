"""The client's body, made ready for one backend: only what has to change changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import orjson

from iccache.config import Placement
from iccache.dialects.body import CONTROLS
from iccache.dialects.conversation import Turn, last_question, opening
from iccache.dialects.splice import Document, elements
from iccache.types import Ask

_ESCAPED_ASCII = b"\\u00"  # how a key may be written without its letters


def begin(ask: Ask, model: str | None) -> Document | None:
    """The body with the backend's model and without our own member; None when neither changes anything."""
    renamed = model is not None and model != ask.model
    if not renamed and CONTROLS.encode() not in ask.body and _ESCAPED_ASCII not in ask.body:
        return None
    document = Document(ask.body)
    document.remove(CONTROLS)
    if renamed:
        document.replace("model", orjson.dumps(model))
    return document


def place(document: Document, key: str, placement: Placement, read: Callable[[object], Turn | None]) -> int:
    """Before which element of the list `key` examples go; `read` understands one element.

    "start": behind the system and developer messages that open it. "end": before the last question, that is before the
    user messages in a row that end the conversation, so that all that was said before them stays as it was.
    """
    span = document.value(key)
    if span is None:
        return 0
    if placement == "start":
        return opening(_roles(document.source, span.start))
    return last_question(
        [read(orjson.loads(document.source[e.start : e.end])) for e in elements(document.source, span.start)]
    )


def message(role: str, text: str, **more: str) -> bytes:
    return orjson.dumps({**more, "role": role, "content": text})


def _roles(source: bytes, at: int) -> Iterator[Any]:
    for span in elements(source, at):
        element = orjson.loads(source[span.start : span.end])
        yield element.get("role") if isinstance(element, dict) else None
