"""What ranking reads of an example's text, worked out once: an example that is recalled often is asked often."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection
from functools import lru_cache
from sys import intern
from typing import NamedTuple

from iccache.types import Example, ExampleStats

USUAL_QUALITY = 0.75  # of a teacher's answer of which nothing is known
BETTER = 0.2  # what of a quality above the usual counts: an answer that is known to be good is no nearer for that
WORDS_FROM = 2000  # characters of a text that are compared word by word
_WORD = re.compile(r"\w+")


class Traits(NamedTuple):
    """Follows from one example alone."""

    words: tuple[str, ...]  # the different ones of its request, each as one object for all: a tenth of what a set takes
    answer: int  # equal where answers are, but for case and space
    application: int  # its system prompt, as `application` names it
    request_length: float  # log(1 + characters)
    answer_length: float  # log(1 + characters)
    asked: str  # its request without the space around it: the very same text where there is none
    answered: str  # its answer, likewise
    record: tuple[float, ...]  # credit, credited quality, own quality as it counts or 0.5, if known, log(1 + uses)


def traits(example: Example) -> Traits:
    """Kept with the example, and gone with it."""
    kept = example.__dict__
    known: Traits | None = kept.get("traits")
    if known is None:
        known = kept["traits"] = Traits(
            tuple(map(intern, words(example.request))),
            hash(plain(example.answer)),
            application(example.system),
            math.log1p(len(example.request)),
            math.log1p(len(example.answer)),
            example.request.strip(),
            example.answer.strip(),
            _record(example.stats),
        )
    return known


def _record(stats: ExampleStats) -> tuple[float, ...]:
    own = stats.own_quality
    return (
        stats.credit,
        stats.credited_quality,
        0.5 if own is None else _counted(own),
        float(own is not None),
        math.log1p(stats.uses),
    )


def _counted(own_quality: float) -> float:
    """In [0, 1]: of what is above the usual, BETTER."""
    better = own_quality - USUAL_QUALITY
    return own_quality if better <= 0 else USUAL_QUALITY + BETTER * better


def plain(answer: str) -> str:
    """An answer as it is compared with others."""
    return " ".join(answer[:WORDS_FROM].lower().split())


def words(text: str) -> frozenset[str]:
    """The different words of a text."""
    return frozenset(_WORD.findall(text[:WORDS_FROM].lower()))


def overlap(a: frozenset[str], b: Collection[str]) -> float:
    """Jaccard's index, in [0, 1]. `b` has every word once."""
    common = len(a.intersection(b))
    return common / (len(a) + len(b) - common) if common else 0.0


@lru_cache(maxsize=256)
def application(system: str) -> int:
    """A number that names the system prompt, whatever its spacing; 0 where there is none."""
    text = " ".join(system.split())
    if not text:
        return 0
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") | 1
