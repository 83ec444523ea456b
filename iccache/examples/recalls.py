"""What was recalled for a text, remembered as long as nothing in the store has changed that it depends on.

A text that comes again needs no embedding, no search, no reading of the store and no other thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from iccache.examples.at_hand import CONFIRMED_FOR_S
from iccache.types import Example, Query, Recalled

KEPT = 250  # texts; each refers to as many examples as are recalled, some 50 kB where no other text refers to them
LONGEST_CHARS = 8_000  # of a text that is remembered
LONGEST_S = 60.0  # that a text is remembered: examples age, and some grow too old to be recalled
COMPARED = 64  # examples that were added or replaced at once; more make everything forgotten
ROUNDING = 1e-5  # of a cosine; an example so near to being recalled counts as recalled


class _Found(NamedTuple):
    at: float
    recalled: Recalled
    names: frozenset[str]  # of what was recalled: its ids, and those of the requests it came from
    least: float  # the cosine from which on another example would be recalled as well


class Recalls:
    """By tenant, text and how many were wanted. `put`, `follow` and `drop` may be called from another thread.

    Kept is only what was found in the present `state`: not what began before a change and ended after it. Given out it
    is only for a while after the store was last seen to hold nothing new.
    """

    def __init__(self, clock: Callable[[], float], kept: int = KEPT) -> None:
        self.state = 0  # grows with every change of the store
        self._clock = clock
        self._kept = kept
        self._confirmed = float("-inf")
        self._known: OrderedDict[tuple[str, str, int], _Found] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, tenant: str, text: str, k: int) -> Recalled | None:
        """What would be recalled now, where that is known."""
        key, now = (tenant, text, k), self._clock()
        with self._lock:
            found = self._known.get(key)
            if found is None or now - found.at > LONGEST_S or now - self._confirmed > CONFIRMED_FOR_S:
                return None
            self._known.move_to_end(key)
            return found.recalled

    def put(self, state: int, query: Query, recalled: Recalled) -> None:
        """What was found for `query` by who began in `state`."""
        if len(query.text) > LONGEST_CHARS:
            return
        names = frozenset(name for e, _ in recalled.nearest for name in (e.id, e.request_id))
        found = _Found(self._clock(), recalled, names, _least(query.k, recalled))
        with self._lock:
            if state != self.state:
                return
            self._known[query.tenant, query.text, query.k] = found
            while len(self._known) > self._kept:
                self._known.popitem(last=False)

    def follow(self, changed: Collection[str], usable: Sequence[Example]) -> None:
        """These examples (ids) were added, replaced or deleted; `usable` are those of them that may be recalled now.

        Forgotten is what had one of them, and what would have one of them now; all else would be found again.
        """
        if len(usable) > COMPARED:
            self.forget()
            return
        with self._lock:
            self.state += 1
            self._drop(changed)
            for tenant in {example.tenant for example in usable}:
                self._make_room(tenant, [example for example in usable if example.tenant == tenant])

    def drop(self, names: Collection[str]) -> None:
        """Something else of these examples changed: what is named is their ids, or the requests they came from."""
        with self._lock:
            self.state += 1
            self._drop(names)

    def forget(self) -> None:
        """The store has changed, who knows how."""
        with self._lock:
            self.state += 1
            self._known.clear()

    def confirm(self) -> None:
        """The store holds nothing that is not known here."""
        self._confirmed = self._clock()

    def _drop(self, names: Collection[str]) -> None:
        wanted = frozenset(names)
        for key in [key for key, found in self._known.items() if not wanted.isdisjoint(found.names)]:
            del self._known[key]

    def _make_room(self, tenant: str, new: Sequence[Example]) -> None:
        """Forget the tenant's texts that are as near to one of `new` as to what was recalled for them."""
        known = [(key, found) for key, found in self._known.items() if key[0] == tenant]
        if not known:
            return
        texts = np.stack([found.recalled.embedding for _, found in known])
        nearest = (texts @ np.stack([example.embedding for example in new]).T).max(axis=1) + ROUNDING
        for (key, found), cosine in zip(known, nearest.tolist(), strict=True):
            if cosine >= found.least:
                del self._known[key]


def _least(k: int, recalled: Recalled) -> float:
    if k == 0:
        return float("inf")
    return recalled.nearest[-1][1] if len(recalled.nearest) >= k else float("-inf")
