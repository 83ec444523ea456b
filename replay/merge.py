"""Near-duplicates made one: the better stays, with the statistics of both.

Two examples are merged where tenant, system prompt and embedder are the same, their requests are nearer to each other
than `limit_of(embedder)` and use nearly the same words (`iccache.examples.agreement`) with the same numbers and
negations in the same order, and their answers say the same. The one whose answer is known to be better stays; where
that is not known, the one used more, then the newer. What is held stays as it is. The limit is that of a text and the
same text written a little otherwise (case, another mark at its end, a doubled space); alone it would not do: embedders
hardly see a number. Of 880 real requests, 536 pairs lie above it by the default embedder, and 4 use the same words; 455
and 6 by the hash embedder.

A tenant's newest AMONG examples are compared block by block; admission meets later duplicates by itself. What the one
that goes had earned is added to the other's record, and it counts as a witness of the same answer (`store.confirm`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from iccache.examples.agreement import NEGATIONS, agree, words
from iccache.examples.traits import USUAL_QUALITY
from iccache.examples.utility import same_system
from iccache.types import Example
from replay.store import ReplayStore

LIMITS = {"hash": 0.95}  # by what the embedder's identity begins with
USUAL_LIMIT = 0.97
BLOCK = 512
NEAREST = 8
MERGED_AT_ONCE = 100  # pairs in one transaction
AMONG = 20_000  # newest examples of a tenant that are compared: some ten seconds


class Merged(NamedTuple):
    """Two that say the same."""

    kept: str
    gone: str


def limit_of(embedder: str) -> float:
    """The cosine from which two requests count as one, for the embedder of that identity."""
    return next((limit for name, limit in LIMITS.items() if embedder.startswith(name)), USUAL_LIMIT)


def merge(store: ReplayStore, tenant: str | None = None) -> int:
    """Merge what there is to merge, of one tenant or of all; how many examples went."""
    gone = 0
    for name in store.tenants() if tenant is None else [tenant]:
        pairs = list(duplicates(store, name))
        for start in range(0, len(pairs), MERGED_AT_ONCE):
            with store.transaction():
                gone += sum(store.absorb(pair.kept, pair.gone) for pair in pairs[start : start + MERGED_AT_ONCE])
    return gone


def duplicates(store: ReplayStore, tenant: str) -> Iterator[Merged]:
    """Pairs to merge, no example in two of them but as the one that stays."""
    gone: set[str] = set()
    for embedder, ids, vectors in store.requests_of(tenant, AMONG):
        limit = limit_of(embedder)
        for first, second in _near(vectors, limit):
            a, b = ids[first], ids[second]
            if a in gone or b in gone:
                continue
            found = store.examples([a, b])
            if len(found) == 2 and _same(*found):
                kept, lost = sorted(found, key=_worth, reverse=True)
                gone.add(lost.id)
                yield Merged(kept.id, lost.id)


def _near(vectors: NDArray[np.float32], limit: float) -> Iterator[tuple[int, int]]:
    """Pairs of rows with a cosine of `limit` or more, the nearest first within a block; (n, dim), unit rows."""
    for start in range(0, len(vectors), BLOCK):
        cosine = vectors[start : start + BLOCK] @ vectors.T
        cosine[np.arange(len(cosine)), start + np.arange(len(cosine))] = -1.0
        for row in np.flatnonzero(cosine.max(axis=1, initial=-1.0) >= limit):
            k = min(NEAREST, cosine.shape[1])
            for column in np.argpartition(-cosine[row], k - 1)[:k]:
                if cosine[row, column] >= limit and start + row < column:
                    yield int(start + row), int(column)


def _same(a: Example, b: Example) -> bool:
    return same_system(a.system, b.system) and agree(a.answer, b.answer) and alike(a.request, b.request)


def alike(a: str, b: str) -> bool:
    """Whether two requests ask the same, as far as their words tell."""
    return agree(a, b) and weighty(a) == weighty(b)


def weighty(text: str) -> list[str]:
    """The numbers and negations of a text, in their order."""
    return [word for word in words(text) if word in NEGATIONS or any(c.isdigit() for c in word)]


def _worth(example: Example) -> tuple[float, int, float, str]:
    quality = example.stats.own_quality
    return (USUAL_QUALITY if quality is None else quality, example.stats.uses, example.at, example.id)
