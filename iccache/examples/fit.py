"""Whether an example has the form that a request asks for: what is shown is imitated, its form most of all."""

from __future__ import annotations

import orjson

from iccache.examples.utility import same_system
from iccache.types import Ask, Example


def fits(example: Example, ask: Ask) -> bool:
    """Whether showing `example` for `ask` shows nothing that the answer must not be like.

    Where JSON is asked for, only JSON with the keys of the schema, asked for under the same system prompt; where it is
    not, no JSON from elsewhere; and nothing that holds a stop sequence, at which the imitation would end.
    """
    if any(stop in example.answer for stop in ask.stop):
        return False
    if ask.form is None:
        return not _looks_like_json(example.answer) or same_system(example.system, ask.system)
    same = same_system(example.system, ask.system)
    keys = _keys(example.answer)
    if not same or keys is None:
        return False
    return ask.form.required <= keys and (ask.form.known is None or keys <= ask.form.known)


def _looks_like_json(text: str) -> bool:
    return text.lstrip()[:1] in ("{", "[") and _parsed(text) is not None


def _keys(text: str) -> frozenset[str] | None:
    """The keys of the JSON object that `text` is; None where it is none."""
    found = _parsed(text) if text.lstrip()[:1] == "{" else None
    return frozenset(found) if isinstance(found, dict) else None


def _parsed(text: str) -> object:
    try:
        found: object = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return found
