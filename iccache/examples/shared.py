"""Shared sets: a few examples for a whole kind of request, the same for every one of them.

An engine keeps the beginning of the last prompts computed. Examples chosen for each request break that, a set that
stays the
same does not, so eight shared examples can answer sooner than three chosen ones. Sets are built where nobody waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from iccache.types import Change, Example, Matrix, Vector

SETS_STATE = "shared sets"  # under which the store keeps what `pack` gives
SIZE = 8
LABELS_COVER = 0.6  # of the examples: where so few answers make up so many of them, the answers are labels
ITERATIONS = 20
CLUSTERS = 8  # of one tenant's requests without a system prompt, at most
REACH_LEAVES = 0.05  # share of a cluster's examples that are too far from its centre to say how far it reaches
BEYOND = 1.25  # new requests are farther from the centre than those that it is the centre of
LONGEST_TOKENS = 256  # an example longer than this is no general one


def build_set(examples: Sequence[Example], size: int = SIZE) -> list[Example]:
    """At most `size` of `examples` (one tenant, one kind, one embedding model) that stand for all of them, in a fixed
    order.

    Where a few answers make up most of the examples, one medoid for each of the most frequent answers; else the medoids
    of `size` clusters of the requests. Examples known to be bad, or long, stand for nobody.
    The same examples give the same set, in whatever order they come. The most typical comes last, next to the question.
    """
    usable = sorted(
        (e for e in examples if e.tokens <= LONGEST_TOKENS and not _bad(e)), key=lambda e: (e.request, e.answer, e.id)
    )
    if len(usable) < 2:
        return []
    vectors = np.stack([e.embedding for e in usable]).astype(np.float32)
    groups = _by_answer(usable, size) or _by_cluster(vectors, size)
    medoids = [(len(group), _medoid(vectors, group)) for group in groups]
    return _of_many([usable[row] for _, row in sorted(medoids)], size)


def _of_many(examples: Sequence[Example], size: int) -> list[Example]:
    """Without what is beyond half of `size` from one end user: nobody speaks for all."""
    count: Counter[str] = Counter()
    kept = []
    for example in reversed(examples):
        count[example.subject or ""] += 1
        if example.subject is None or count[example.subject] <= max(size // 2, 1):
            kept.append(example)
    return kept[::-1]


def _bad(example: Example) -> bool:
    own = example.stats.own_quality
    return own is not None and own < 0.5


def _by_answer(examples: Sequence[Example], size: int) -> list[NDArray[np.intp]]:
    """Rows by answer, for the most frequent answers; empty where answers are no labels."""
    answers = [" ".join(e.answer.lower().split()) for e in examples]
    common = [(answer, n) for answer, n in Counter(answers).most_common(size) if n > 1]
    if sum(n for _, n in common) < LABELS_COVER * len(examples):
        return []
    rows = {answer: [i for i, a in enumerate(answers) if a == answer] for answer, _ in common}
    return [np.array(rows[answer]) for answer in sorted(rows)]


def _by_cluster(vectors: Matrix, size: int) -> list[NDArray[np.intp]]:
    """Rows by cluster (spherical k-means from rows far apart), empty clusters left out."""
    centres = _spread(vectors, min(size, len(vectors)))
    nearest = np.zeros(len(vectors), np.intp)
    for _ in range(ITERATIONS):
        nearest = (vectors @ centres.T).argmax(axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, vectors)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        moved = np.where(norms > 0, sums / np.maximum(norms, 1e-9), centres)
        if np.allclose(moved, centres):
            break
        centres = moved
    found = [np.flatnonzero(nearest == k) for k in range(len(centres))]
    return [rows for rows in found if len(rows)]


def _spread(vectors: Matrix, count: int) -> Matrix:
    """(count, dim): the most typical row, then in turn the one that is least like all taken before."""
    rows = [int(np.argmax(vectors @ vectors.mean(axis=0)))]
    likest = vectors @ vectors[rows[0]]
    while len(rows) < count:
        rows.append(int(np.argmin(likest)))
        likest = np.maximum(likest, vectors @ vectors[rows[-1]])
    return vectors[rows].copy()


def _medoid(vectors: Matrix, rows: NDArray[np.intp]) -> int:
    """The row nearest to the mean of its group."""
    group = vectors[rows]
    return int(rows[int(np.argmax(group @ group.mean(axis=0)))])


def clusters(examples: Sequence[Example], least: int, most: int = CLUSTERS) -> list[NDArray[np.intp]]:
    """Rows of each kind of request among those that no system prompt tells apart, by what is asked: at most `most`
    clusters of at least `least` examples. The same examples in the same order give the same clusters.
    """
    count = min(most, len(examples) // (2 * least))
    if not count:
        return [np.arange(len(examples))] if len(examples) >= least else []
    vectors = np.stack([e.embedding for e in examples]).astype(np.float32)
    return [rows for rows in _by_cluster(vectors, count) if len(rows) >= least]


def centre_of(examples: Sequence[Example]) -> tuple[Vector, float]:
    """The mean direction (dim,), unit norm, and the least cosine to it of what is still of this kind: BEYOND times as
    far from it as all examples but the REACH_LEAVES farthest.
    """
    vectors = np.stack([e.embedding for e in examples]).astype(np.float32)
    mean = vectors.mean(axis=0)
    centre: Vector = mean / max(float(np.linalg.norm(mean)), 1e-9)
    return centre, 1 - BEYOND * (1 - float(np.quantile(vectors @ centre, REACH_LEAVES)))


class SetOf(msgspec.Struct, frozen=True):
    """One shared set as it is kept: for which kind of request, and which examples in which order."""

    tenant: str
    system: str  # digest of the system prompt, as `application` gives it, in hex; of none: a number of the cluster
    ids: list[str]
    examples: int = 0  # of its kind when it was built; of none: all that the tenant had without a system prompt
    centre: list[float] = []  # (dim,) of requests without a system prompt: those near it are of this kind
    reach: float = 1.0  # their least cosine to it


def pack(sets: Iterable[SetOf]) -> bytes:
    return msgspec.json.encode(list(sets))


def unpack(state: bytes) -> list[SetOf]:
    """Raises ValueError for what `pack` has not written."""
    return msgspec.json.decode(state, type=list[SetOf])


class ExampleReader(Protocol):
    def examples(self, ids: Sequence[str]) -> list[Example]:
        """Those of `ids` that exist, in their order."""
        ...


class SharedSets:
    """The sets in force, with their examples. Belongs to the thread that reads the store."""

    def __init__(self) -> None:
        self._sets: dict[tuple[str, str], tuple[Example, ...]] = {}
        self.revision = 0  # grows whenever one of them may have changed
        self._centred: dict[str, list[tuple[Vector, SetOf]]] = {}  # by tenant, with their centres: what is asked tells

    def load(self, sets: Iterable[SetOf], store: ExampleReader) -> None:
        """Take over new sets. What is no longer in the store, or another tenant's, is left out."""
        self._sets, self._centred = {}, {}
        for one in sets:
            self._sets[one.tenant, one.system] = _usable(store.examples(one.ids), one.tenant)
            if one.centre:
                self._centred.setdefault(one.tenant, []).append((np.array(one.centre, np.float32), one))
        self.revision += 1

    def apply(self, changes: Iterable[Change], store: ExampleReader) -> None:
        """Follow the store: an example that was changed is shown as it is now, one that was deleted no more."""
        changed = {change.key for change in changes}
        for name, examples in self._sets.items():
            if any(e.id in changed for e in examples):
                self._sets[name] = _usable(store.examples([e.id for e in examples]), name[0])
                self.revision += 1

    def of(self, tenant: str, application: int, embedding: Vector) -> tuple[Example, ...]:
        """The set of the kind that a request (dim,) under a system prompt is of, in the order to be shown; empty where
        there is none. Without one (application 0) it is of the kind whose centre it is nearest to, if within its reach.
        """
        if application:
            return self._sets.get((tenant, f"{application:016x}"), ())
        cosines = [
            (float(centre @ embedding), one)
            for centre, one in self._centred.get(tenant, ())
            if centre.shape == embedding.shape
        ]
        if not cosines:
            return ()
        cosine, nearest = max(cosines, key=lambda found: found[0])
        return self._sets[tenant, nearest.system] if cosine >= nearest.reach else ()


def _usable(examples: Iterable[Example], tenant: str) -> tuple[Example, ...]:
    return tuple(e for e in examples if e.tenant == tenant and e.held is None)
