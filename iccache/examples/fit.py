"""Whether an example has the form that a request asks for: what is shown is imitated, its form most of all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import orjson

from iccache.examples.traits import overlap, words
from iccache.examples.utility import same_system
from iccache.types import Ask, Example

VARIED = 6  # different system prompts among the recalled, and more than half as many, from which each is one user's
ONE_TEMPLATE = 0.6  # overlap of words from which two system prompts are taken to be one with other names in it
INSTRUCTIONS = 600  # characters up to which a system prompt is taken to be instructions alone, without material
_DATES = re.compile(
    r"\d+|\b(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day|january|february|march|april|may|june|july|august|"
    r"september|october|november|december)\b",
    re.IGNORECASE,
)


def fitting(recalled: Sequence[tuple[Example, float]], ask: Ask) -> list[tuple[Example, float]]:
    """The recalled examples that fit. Where nearly each has a system prompt of its own, an application puts a name or
    the like into it, and a system prompt that differs in a few words is the same.
    """
    prompts = {_instructions(e.system) for e, _ in recalled if 0 < len(e.system) <= INSTRUCTIONS}
    varied = len(prompts) >= VARIED and 2 * len(prompts) > len(recalled)
    return [(e, similarity) for e, similarity in recalled if fits(e, ask, varied)]


def fits(example: Example, ask: Ask, varied: bool = False) -> bool:
    """Whether showing `example` for `ask` shows nothing that the answer must not be like.

    An answer that was given under other instructions shows how to follow those: it is not shown, unless system prompts
    are `varied` and the two are nearly the same. Where JSON is asked
    for, only JSON with the keys of the schema, asked for under the same system prompt; where it is not, no JSON from
    elsewhere; and nothing that holds a stop sequence, at which the imitation would end.
    """
    if any(stop in example.answer for stop in ask.stop) or _told_otherwise(example.system, ask.system, varied):
        return False
    if ask.form is None:
        return not _is_json(example) or same_system(example.system, ask.system)
    same = same_system(example.system, ask.system)
    keys = _keys(example.answer)
    if not same or keys is None:
        return False
    return ask.form.required <= keys and (ask.form.known is None or keys <= ask.form.known)


def _told_otherwise(then: str, now: str, varied: bool) -> bool:
    """Whether an answer under the system prompt `then` followed instructions that are not in force `now`. Numbers and
    dates make no difference; nor does anything where both are so long that they may hold material for one request."""
    if not then.strip() or same_system(then, now) or min(len(then), len(now)) > INSTRUCTIONS:
        return False
    if _instructions(then) == _instructions(now):
        return False
    return not (varied and overlap(words(then), words(now)) >= ONE_TEMPLATE)


@lru_cache(maxsize=1024)
def _instructions(system: str) -> str:
    return " ".join(_DATES.sub("0", system.casefold()).split())


def _is_json(example: Example) -> bool:
    """Whether its answer is JSON. Kept with it, and gone with it."""
    kept = example.__dict__
    known: bool | None = kept.get("json")
    if known is None:
        known = kept["json"] = _looks_like_json(example.answer)
    return known


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
