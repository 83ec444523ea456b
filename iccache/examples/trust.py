"""What one writer may do to the others: caps on influence, and agreement among the examples recalled. Pure.

A writer is a tenant and a subject. Examples without a subject are the tenant's own, and are trusted; where a tenant
names no subjects, nothing here has an effect but `consistent`. An asker's own examples are never capped.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from iccache import config
from iccache.examples.agreement import words
from iccache.examples.credit import GOOD_ENOUGH
from iccache.types import Example

VOICES = 2  # other writers that have to agree among themselves before an answer is held against them
PROOF = 2.0  # scored answers' worth of credit that speaks for an example, where they were good
UNITED = 0.6  # agreement of the others with each other, at least
APART = 0.2  # agreement with them, at most, of an answer that contradicts them
COMPARED = 10  # nearest examples that are compared
WORDS_COMPARED = 60  # of each answer: where the gist is
NEIGHBOURS = 4  # other writers, at least, whose agreement counts against an answer that none of them was given
HEARD = 10  # writers, the nearest first


Nearest = Sequence[tuple[Example, float]]
Gist = frozenset[int]  # the first words of an answer, each occurrence apart, as numbers: 4 KB


def most_of_one(share: float, examples: int) -> int:
    """How many of `examples` shown may be of one other writer: `share` of them, and one at least."""
    return max(1, int(share * examples + 1e-9))


def crowded(example: Example, shown: Sequence[Example], asker: str | None, most: int) -> bool:
    """Whether `most` of those already `shown` are by the writer of `example`, neither the asker nor the tenant."""
    if example.subject is None or example.subject == asker:
        return False
    return sum(other.subject == example.subject for other in shown) >= most


def consistent(nearest: Nearest, near_from: float) -> list[tuple[Example, float]]:
    """`nearest` without answers that contradict the others given to nearly the same request.

    An answer is left out when at least `VOICES` other writers were given answers to requests of cosine `near_from` to
    its own that agree with each other (`UNITED`) and hardly with it (`APART`), and nothing speaks for it yet. Each
    writer has one voice, its nearest; the tenant's own examples have one each. Where the others do not agree among
    themselves, nothing is known.
    """
    compared = [example for example, _ in nearest[:COMPARED]]
    if len(compared) <= VOICES or near_from >= 1.0:
        return list(nearest)
    matrix = np.concatenate([example.embedding for example in compared]).reshape(len(compared), -1)
    near = (matrix @ matrix.T >= near_from).tolist()
    outvoted = {
        e.id
        for i, e in enumerate(compared)
        if sum(near[i]) > VOICES and not _proven(e) and _outvoted(i, compared, near[i])
    }
    return [(example, similarity) for example, similarity in nearest if example.id not in outvoted]


def corroborated(nearest: Nearest, asker: str | None, share: float) -> list[tuple[Example, float]]:
    """`nearest` without other writers' answers that nobody else was given where the others agree.

    However near the requests are: where more than `share` of the other writers found were given one and the same answer
    (`UNITED`), such requests have answers that repeat, and one that no other writer was given is the exception. Where
    every request has an answer of its own the others never agree, and nothing is left out. Each writer has one voice,
    its nearest under the same system prompt; there have to be `NEIGHBOURS` others. No similarity is compared, so it
    holds for any embedder. What the asker or the tenant wrote, and what something speaks for, stays.
    """
    if share >= 1.0 or all(e.subject is None or e.subject == asker for e, _ in nearest):
        return list(nearest)
    voices: dict[tuple[str, str], Example] = {}
    for example, _ in nearest:
        voices.setdefault((example.system, _voice(example)), example)
    heard = [(system, voice, _gist(e.answer)) for (system, voice), e in voices.items()]
    kept = []
    for example, similarity in nearest:
        foreign = example.subject is not None and example.subject != asker
        others = [g for system, voice, g in heard if system == example.system and voice != _voice(example)][:HEARD]
        if not foreign or len(others) < NEIGHBOURS or _proven(example) or not _alone(example, others, share):
            kept.append((example, similarity))
    return kept


def _alone(example: Example, others: Sequence[Gist], share: float) -> bool:
    """Whether none of the others says what `example` says, and more than `share` of them say one thing."""
    mine = _gist(example.answer)
    if any(_agreement(mine, other) >= UNITED for other in others):
        return False
    most = max(sum(_agreement(a, b) >= UNITED for b in others) for a in others)
    return most > share * len(others)


def _voice(example: Example) -> str:
    """Whose word it is: a writer's, or for an example of the tenant itself its own."""
    return f"#{example.id}" if example.subject is None else f"@{example.subject}"


def _proven(example: Example) -> bool:
    """Whether others confirmed it, or answers were good with it."""
    stats = example.stats
    return stats.confirmations > 0 or (stats.credit >= PROOF and stats.credited_quality >= GOOD_ENOUGH * stats.credit)


def _outvoted(i: int, compared: Sequence[Example], near: Sequence[bool]) -> bool:
    own = compared[i]
    voices: dict[str, Example] = {}
    for j, other in enumerate(compared):
        if j != i and near[j] and (other.subject is None or other.subject != own.subject):
            voices.setdefault(_voice(other), other)
    if len(voices) < VOICES:
        return False
    answers = [_gist(e.answer) for e in voices.values()]
    mine = _gist(own.answer)
    if max(_agreement(mine, a) for a in answers) > APART:
        return False
    pairs = [_agreement(a, b) for n, a in enumerate(answers) for b in answers[:n]]
    return min(pairs) >= UNITED


@lru_cache(maxsize=2048)
def _gist(answer: str) -> Gist:
    seen: dict[str, int] = {}
    found = []
    for word in words(answer)[:WORDS_COMPARED]:
        seen[word] = seen.get(word, 0) + 1
        found.append(hash((word, seen[word])))
    return frozenset(found)


def _agreement(a: Gist, b: Gist) -> float:
    """F1 of the words, in [0, 1]."""
    if a is b:
        return 1.0
    return 2.0 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


class Trust:
    """The rules above with their settings, and what was shown so far. Belongs to the thread that selects."""

    def __init__(self, limits: config.Selection, showings: Showings) -> None:
        self.limits = limits
        self.showings = showings

    def sift(self, nearest: Nearest, asker: str | None) -> list[tuple[Example, float]]:
        """What of the recalled may be shown to `asker`."""
        share = self.limits.writer_share_over_time
        foreign = any(e.subject is not None and e.subject != asker for e, _ in nearest)
        if not foreign:  # nobody else wrote any of it: only answers that contradict the others are left out
            return consistent(nearest, self.limits.consensus_similarity)
        kept = [(e, s) for e, s in nearest if share >= 1.0 or not self.showings.excessive(e, asker, share)]
        kept = consistent(kept, self.limits.consensus_similarity)
        return corroborated(kept, asker, self.limits.consensus_share)


class Showings:
    """How often each writer's examples were shown to others of late, so that nobody fills the prompts of a tenant.

    Counts halve every `HALF_LIFE` showings of the tenant. In this process alone, and forgotten with it.
    """

    HALF_LIFE = 1000.0
    SLACK = 200.0  # showings before anybody is much
    TENANTS = 1000  # remembered; the oldest go first

    def __init__(self) -> None:
        self._tenants: dict[str, _Counts] = {}

    def excessive(self, example: Example, asker: str | None, share: float) -> bool:
        """Whether the writer of `example` has had its share: `share` of the tenant's showings to others, or twice the
        fair share where few write."""
        if example.subject is None or example.subject == asker:
            return False
        counts = self._tenants.get(example.tenant)
        if counts is None or not counts.by_writer:
            return False
        return counts.share(example.subject, self.SLACK) > max(share, 2.0 / len(counts.by_writer))

    def add(self, tenant: str, asker: str | None, shown: Sequence[Example]) -> None:
        """Examples were shown to `asker`."""
        foreign = [e.subject for e in shown if e.subject is not None and e.subject != asker]
        if not shown:
            return
        counts = self._tenants.pop(tenant, None) or _Counts()
        self._tenants[tenant] = counts
        counts.add(foreign, len(shown), 0.5 ** (1.0 / self.HALF_LIFE))
        if len(self._tenants) > self.TENANTS:
            del self._tenants[next(iter(self._tenants))]


class _Counts:
    """Decayed counts of one tenant. They grow by a rising weight instead of all shrinking."""

    WRITERS = 10_000  # remembered; then those of least weight go

    def __init__(self) -> None:
        self.weight = 1.0
        self.total = 0.0
        self.by_writer: dict[str, float] = {}

    def add(self, writers: Sequence[str], shown: int, keep: float) -> None:
        self.weight /= keep**shown
        self.total += self.weight * shown
        for writer in writers:
            self.by_writer[writer] = self.by_writer.get(writer, 0.0) + self.weight
        if self.weight > 1e100:
            self._rescale()
        if len(self.by_writer) > self.WRITERS:
            kept = sorted(self.by_writer.items(), key=lambda item: -item[1])[: self.WRITERS // 2]
            self.by_writer = dict(kept)

    def share(self, writer: str, slack: float) -> float:
        return self.by_writer.get(writer, 0.0) / (self.total + slack * self.weight)

    def _rescale(self) -> None:
        self.total /= self.weight
        self.by_writer = {writer: count / self.weight for writer, count in self.by_writer.items()}
        self.weight = 1.0
