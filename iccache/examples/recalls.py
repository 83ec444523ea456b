"""What was recalled for a text, remembered as long as nothing in the store has changed since.

A text that comes again needs no embedding, no search, no reading of the store and no other thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from iccache.examples.at_hand import CONFIRMED_FOR_S
from iccache.types import Query, Recalled

KEPT = 250  # texts; each refers to as many examples as are recalled, some 50 kB where no other text refers to them
LONGEST_CHARS = 8_000  # of a text that is remembered
LONGEST_S = 60.0  # that a text is remembered: examples age, and some grow too old to be recalled


class _Found(NamedTuple):
    state: int
    at: float
    recalled: Recalled


class Recalls:
    """By tenant, text and how many were wanted. `put` may be called from another thread than the rest.

    Valid is only what was found in the present `state`: one that began before a change and ended after it is not kept.
    And only for a while after the store was last seen to hold nothing new.
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
            if found is None or found.state != self.state or now - found.at > LONGEST_S:
                return None
            if now - self._confirmed > CONFIRMED_FOR_S:
                return None
            self._known.move_to_end(key)
            return found.recalled

    def put(self, state: int, query: Query, recalled: Recalled) -> None:
        """What was found for `query` by who began in `state`."""
        if len(query.text) > LONGEST_CHARS:
            return
        with self._lock:
            self._known[query.tenant, query.text, query.k] = _Found(state, self._clock(), recalled)
            while len(self._known) > self._kept:
                self._known.popitem(last=False)

    def forget(self) -> None:
        """The store has changed."""
        with self._lock:
            self.state += 1
            self._known.clear()

    def confirm(self) -> None:
        """The store holds nothing that is not known here."""
        self._confirmed = self._clock()
