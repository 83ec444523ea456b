"""Which of the answers to one request is kept: by a check where one applies, by agreement, and only else by a judge.

In this order, for an old answer and the new ones of one round:

    check      the form that the answers to such requests have, learned from the example's peers (see `Form`). A new
               answer without it is out; an old answer without it gives way to a new one that has it
    agreement  more than half of all votes for the same text (case, white space and a full stop at the end apart).
               Every sample is a vote, and so is an old answer of the same model: it is one sample more. Fewer than
               LEAST_VOTES decide nothing. (Self-consistency: Wang et al., 2022)
    judge      in both orders, so that what it holds for the place cancels out
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

import orjson

LEAST_VOTES = 3
LEAST_PEERS = 20  # fewer examples under one system prompt show no form
COMMON = 0.9  # share of the peers that have what is called their form
LEAST_SEEN = 2  # times that a label is seen before it counts as one
LONGEST_LABEL = 64  # characters


class By(StrEnum):
    """What decided about a round. A closed list."""

    CHECK = "check"
    AGREEMENT = "agreement"
    JUDGE = "judge"
    SAME = "same"  # the teacher said nothing but the old answer again


class Agreed(NamedTuple):
    """The text that more than half of the votes are for."""

    answer: str
    share: float  # of the votes, in (0.5, 1]


class Form(NamedTuple):
    """What the answers under one system prompt have in common: a closed set of labels, or JSON with certain keys."""

    labels: frozenset[str] | None = None
    keys: frozenset[str] | None = None

    def met_by(self, answer: str) -> bool:
        if self.labels is not None:
            return normal(answer) in self.labels
        found = keys_of(answer)
        return found is not None and (self.keys or frozenset()) <= found


def form_of(answers: Iterable[str]) -> Form | None:
    """The form of at least COMMON of `answers`, the answers of an example's peers; None where they show none.

    Labels: short texts of which each was seen LEAST_SEEN times or more, at most one for every five answers.
    """
    peers = list(answers)
    if len(peers) < LEAST_PEERS:
        return None
    objects = [keys for answer in peers if (keys := keys_of(answer)) is not None]
    if len(objects) >= COMMON * len(peers):
        seen = Counter(key for keys in objects for key in keys)
        return Form(keys=frozenset(key for key, times in seen.items() if times >= COMMON * len(objects)))
    counted = Counter(normal(answer) for answer in peers if len(answer) <= LONGEST_LABEL)
    labels = {label: times for label, times in counted.items() if times >= LEAST_SEEN}
    if labels and len(labels) <= len(peers) / 5 and sum(labels.values()) >= COMMON * len(peers):
        return Form(labels=frozenset(labels))
    return None


def agreement(new: Sequence[str], old: str | None = None, *, wanted: int = 0) -> Agreed | None:
    """What more than half of the votes are for: those of `new`, and of `old` where it is one too (not None).

    `wanted`: how many samples there were to be, where not all were asked for or usable: the others count against.
    The text is the first of those that are the same.
    """
    votes = [*new, *([] if old is None else [old])]
    total = max(len(votes), wanted + (old is not None))
    if total < LEAST_VOTES:
        return None
    same = Counter(normal(vote) for vote in votes)
    ((best, count),) = same.most_common(1) or [("", 0)]
    if 2 * count <= total:
        return None
    return Agreed(next(vote for vote in votes if normal(vote) == best), count / total)


def normal(text: str) -> str:
    """Equal for answers that say the same but for case, white space and a full stop at the end."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def keys_of(answer: str) -> frozenset[str] | None:
    """The keys of the JSON object that `answer` is; None where it is none."""
    if answer.lstrip()[:1] != "{":
        return None
    try:
        found = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return None
    return frozenset(found) if isinstance(found, dict) else None
