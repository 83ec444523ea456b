"""How likely the answer of an example is wrong, by what is on file: nobody is asked, and no judge has to be right.

    doubt(e) = sigmoid(BASE + ODD * odd(e) + OUTVOTED * outvoted(e) + REPEATED * repeated(e)), in (0, 1)

    odd(e)       how little its answer looks like the answers to the nearest requests: the mean over the traits of
                 |z|, z = (its value - the median of the neighbours') / spread, at most FARTHEST. The traits are length,
                 words, lines, digits, signs, capitals, how it ends, and how much of it stands in the request already
    outvoted(e)  the share of the neighbours' votes for the answer that most of them give, less that for its own,
                 times how often such a vote foretells the answer of a peer: next to nothing where every request has
                 an answer of its own (`iccache.examples.utility.votes` says what a vote weighs)
    repeated(e)  of the scored answers it was shown for that say the same as it does: the log odds that they failed,
                 less those of all peers' together. A student that fails with another answer says little of the example

Peers are the tenant's examples under the same system prompt, neighbours the NEIGHBOURS of them with the nearest
requests. Fewer than LEAST_PEERS show no form, and have no vote.

ODD and BASE are those of a logistic regression on real data with two kinds of wrong answers, another request's and
those that small models gave; they hardly change with the data set that is left out. Too few of the sets have answers
that repeat to learn OUTVOTED from, and none has traffic: it and REPEATED are set. `python -m tests.bench.doubt`
measures what comes of it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from iccache.examples.credit import GOOD_ENOUGH
from iccache.examples.utility import VOTE_SCALE
from iccache.types import Example, Matrix
from replay.best import normal

NEIGHBOURS = 10
LEAST_PEERS = 20
FARTHEST = 4.0  # of one trait, in spreads
LOCAL = 0.7  # of the spread: the neighbours' own, the rest that of all peers
UNKNOWN = 0.3  # doubt where there is nothing to go by
AT_ONCE = 1000  # examples of one kind that are compared, with their peers

BASE, ODD, OUTVOTED, REPEATED = -2.0, 2.0, 4.0, 1.0
TRIGRAM = 3  # characters
READ_CHARS = 2000  # of each text: what comes later changes little and costs time

Columns = NDArray[np.float64]  # (n, traits)


class Peer(NamedTuple):
    """What is compared of an example."""

    id: str
    request: str
    answer: str


class Said(NamedTuple):
    """A scored answer that an example was shown for."""

    example_id: str
    answer: str
    quality: float


class Evidence(NamedTuple):
    """What speaks against each of some peers, (n,) each."""

    odd: NDArray[np.float64]  # at least 0
    outvoted: NDArray[np.float64]  # in [-1, 1]
    repeated: NDArray[np.float64]  # log odds
    consensus: Sequence[Consensus]

    def doubt(self) -> NDArray[np.float64]:
        """(n,), in (0, 1)."""
        logit = BASE + ODD * self.odd + OUTVOTED * self.outvoted + REPEATED * self.repeated
        doubt: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-logit))
        return doubt


def evidence(peers: Sequence[Peer], vectors: Matrix, said: Iterable[Said] = ()) -> Evidence:
    """`vectors` (n, dim), unit rows: the embeddings of the peers' requests. n is at least LEAST_PEERS."""
    near, weights = _neighbours(vectors)
    answers = [normal(peer.answer) for peer in peers]
    outvoted, consensus = _votes(answers, near, weights)
    return Evidence(
        _odd(np.array([_traits(peer) for peer in peers]), near),
        outvoted,
        _repeated([peer.id for peer in peers], answers, said),
        consensus,
    )


def _neighbours(vectors: Matrix) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """(n, k) rows of the nearest others, and what the vote of each weighs; the weights of a row sum to 1."""
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    k = min(NEIGHBOURS, len(vectors) - 1)
    near = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    found = np.take_along_axis(cosines, near, 1).astype(float)
    weights = np.exp((found - found.max(axis=1, keepdims=True)) / VOTE_SCALE)
    return near, weights / weights.sum(axis=1, keepdims=True)


def _odd(columns: Columns, near: NDArray[np.intp]) -> NDArray[np.float64]:
    values = columns[near]  # (n, k, traits)
    middle = np.median(values, axis=1)
    deviation = 1.4826 * np.median(np.abs(values - middle[:, None]), axis=1)  # a standard deviation, in Gauss's case
    spread = LOCAL * deviation + (1.0 - LOCAL) * columns.std(axis=0)
    z = np.abs(columns - middle) / np.maximum(spread, 1e-9)
    odd: NDArray[np.float64] = np.minimum(z, FARTHEST).mean(axis=1)
    return odd


def _votes(
    answers: Sequence[str], near: NDArray[np.intp], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], list[Consensus]]:
    """By how much each answer is outvoted, and by which, both times the share of votes that foretell their answer."""
    margins = np.empty(len(answers))
    most = []
    for row, (others, say) in enumerate(zip(near.tolist(), weights.tolist(), strict=True)):
        votes: dict[str, float] = defaultdict(float)
        for other, weight in zip(others, say, strict=True):
            votes[answers[other]] += weight
        most.append(max(votes.items(), key=lambda vote: (vote[1], vote[0])))
        own = votes.pop(answers[row], 0.0)
        margins[row] = max(votes.values(), default=0.0) - own
    foretold = float((margins < 0.0).mean())
    return foretold * margins, [Consensus(answer, foretold * share) for answer, share in most]


def _repeated(ids: Sequence[str], answers: Sequence[str], said: Iterable[Said]) -> NDArray[np.float64]:
    own = dict(zip(ids, answers, strict=True))
    failed, good = Counter[str](), Counter[str]()
    for one in said:
        if own.get(one.example_id) == normal(one.answer):
            (good if one.quality >= GOOD_ENOUGH else failed)[one.example_id] += 1
    usual = (failed.total() + 0.5) / (failed.total() + good.total() + 1.0)
    odds = [(failed[id] + usual) / (good[id] + 1.0 - usual) for id in ids]
    return np.log(odds) - math.log(usual / (1.0 - usual))


def _traits(peer: Peer) -> list[float]:
    answer, request = peer.answer[:READ_CHARS], peer.request[:READ_CHARS]
    length = max(len(answer), 1)
    asked, given = _trigrams(request), _trigrams(answer)
    return [
        math.log1p(len(peer.answer)),
        math.log1p(len(answer.split())),
        math.log(0.05 + len(peer.answer) / max(len(peer.request), 1)),
        math.log1p(answer.count("\n")),
        sum(c.isdigit() for c in answer) / length,
        sum(not c.isalnum() and not c.isspace() for c in answer) / length,
        float(answer[:1].isupper()),
        float(answer[-1:] in ".!?"),
        len(asked & given) / max(len(given), 1),
    ]


def _trigrams(text: str) -> set[str]:
    padded = f" {text.lower()} "
    return {padded[i : i + TRIGRAM] for i in range(len(padded) - TRIGRAM + 1)}


class Consensus(NamedTuple):
    """The answer that most of the neighbours' votes are for, and what they are worth as one vote, in [0, 1]."""

    answer: str
    weight: float


class Doubt(NamedTuple):
    """What is known of an example's answer without asking anybody."""

    wrong: float = UNKNOWN  # the probability that it is, in (0, 1)
    consensus: Consensus | None = None


NOTHING_KNOWN = Doubt()


class Source(Protocol):
    """Where peers are."""

    def kinds(self, ids: Sequence[str]) -> Iterable[tuple[list[str], list[str]]]:
        """For each kind of request (tenant, system prompt, embedding model) that examples `ids` are of: which of them,
        and the newest of its examples that are shown.
        """
        ...

    def examples(self, ids: Sequence[str]) -> list[Example]: ...

    def said(self, ids: Sequence[str]) -> list[Said]:
        """The newest scored answers that each of `ids` was shown for."""
        ...


def doubts(source: Source, ids: Sequence[str]) -> dict[str, Doubt]:
    """By id, those of `ids` that have enough peers."""
    found: dict[str, Doubt] = {}
    for wanted, newest in source.kinds(ids):
        for first in range(0, len(wanted), AT_ONCE):
            some = wanted[first : first + AT_ONCE]
            peers = source.examples(list(dict.fromkeys([*some, *newest])))
            known = among(peers, source.said(some))
            found.update({id: known[id] for id in some if id in known})
    return found


def among(examples: Sequence[Example], said: Iterable[Said] = ()) -> dict[str, Doubt]:
    """By id, of `examples` that are all of one kind; empty where they are too few."""
    if len(examples) < LEAST_PEERS:
        return {}
    against = evidence(
        [Peer(e.id, e.request, e.answer) for e in examples], np.stack([e.embedding for e in examples]), said
    )
    known = zip(examples, against.doubt().tolist(), against.consensus, strict=True)
    return {e.id: Doubt(wrong, consensus) for e, wrong, consensus in known}
