"""Which of the answers to one request is kept: by a check where one applies, by agreement, and only else by a judge.

In this order, for an old answer and the new ones of one round:

    check      the form that the answers to such requests have, learned from the example's peers (see `Form`). A new
               answer without it is out; an old answer without it gives way to a new one that has it
    agreement  more than half of all votes for the same text (case, white space and a full stop at the end apart).
               Every sample is a vote, and so is an old answer of the same model: it is one sample more. Another's old
               answer counts as far as it is not doubted, and what the nearest examples agree on as far as they do: see
               doubt.py. Samples and an old one of fewer than LEAST_VOTES decide nothing. (Self-consistency: Wang et
               al., 2022)
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
    share: float  # of the votes that were cast, in (0.5, 1]


class Vote(NamedTuple):
    """Of somebody who was not asked now."""

    answer: str
    weight: float  # in [0, 1]


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


def agreement(new: Sequence[str], others: Sequence[Vote] = (), *, wanted: int = 0) -> Agreed | None:
    """What more than half of the votes are for: those of `new`, one each, and of `others`.

    `wanted`: how many samples there were to be, where not all were asked for or usable: the others count against.
    The text is the first of `new`, or else of `others`, that says so.
    """
    asked = max(len(new), wanted)
    if asked + sum(other.weight == 1.0 for other in others) < LEAST_VOTES:
        return None
    weights: dict[str, float] = {}
    texts: dict[str, str] = {}
    for vote in (*(Vote(answer, 1.0) for answer in new), *others):
        name = normal(vote.answer)
        texts.setdefault(name, vote.answer)
        weights[name] = weights.get(name, 0.0) + vote.weight
    best = max(weights, key=lambda name: weights[name], default="")
    backing, others_weigh = weights.get(best, 0.0), sum(other.weight for other in others)
    if 2.0 * backing <= asked + others_weigh:
        return None
    return Agreed(texts[best], backing / (len(new) + others_weigh))


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
