"""Examples that were read lately: reading sixteen from the store costs more than all the rest of a search."""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from iccache.types import Example

CAPACITY_BYTES = 48_000_000  # 10,000 examples of some hundred words
KEPT_S = 300.0  # what the feed does not tell, such as how often an example was shown, may be as old as that
CONFIRMED_FOR_S = 0.8  # a deletion elsewhere counts within a second: who cannot see changes must not remember longer
OVERHEAD_BYTES = 2100  # of an example beside its text and embedding: the objects, what ranking keeps, their place here
PER_WORD_BYTES = 25  # of the different words of its request, kept with it


class _Kept(NamedTuple):
    example: Example
    at: float
    size: int


class AtHand:
    """The latest read, at most `capacity` bytes of them. Follows the store: who applies its changes says so here.

    Nothing is given out unless the store was seen to hold nothing new within `CONFIRMED_FOR_S`. Any thread may use it.
    """

    def __init__(self, capacity: int = CAPACITY_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        """`capacity` in bytes, as far as they can be estimated; 0: nothing is kept."""
        self.capacity = capacity
        self.size = 0
        self._clock = clock
        self._confirmed = float("-inf")
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._of_request: dict[str, str] = {}  # example by the exchange it came from

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, ids: Iterable[str]) -> dict[str, Example]:
        """Those of `ids` that are at hand."""
        now = self._clock()
        if now - self._confirmed > CONFIRMED_FOR_S:
            return {}
        found = {}
        with self._lock:
            for id in ids:
                kept = self._kept.get(id)
                if kept is not None and now - kept.at <= KEPT_S:
                    self._kept.move_to_end(id)
                    found[id] = kept.example
        return found

    def put(self, examples: Iterable[Example]) -> None:
        """Examples just read from the store."""
        if not self.capacity:
            return
        now = self._clock()
        kept = [_Kept(example, now, size_of(example)) for example in examples]
        with self._lock:
            for each in kept:
                self._drop(each.example.id)
                self._kept[each.example.id] = each
                self._of_request[each.example.request_id] = each.example.id
                self.size += each.size
            while self.size > self.capacity:
                self._drop(next(iter(self._kept)))

    def forget(self, ids: Iterable[str]) -> None:
        """They were changed or deleted."""
        with self._lock:
            for id in ids:
                self._drop(id)

    def forget_exchange(self, request_id: str, shown: Iterable[str]) -> None:
        """An exchange was judged: that counts for its own example, and for those it was shown."""
        own = self._of_request.get(request_id)
        self.forget([*shown] if own is None else [*shown, own])

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._of_request.clear()
            self.size = 0

    def confirm(self) -> None:
        """The store holds nothing that was not applied."""
        self._confirmed = self._clock()

    def _drop(self, id: str) -> None:
        kept = self._kept.pop(id, None)
        if kept is not None:
            self._of_request.pop(kept.example.request_id, None)
            self.size -= kept.size


def size_of(example: Example) -> int:
    """Bytes, about."""
    text = sum(map(sys.getsizeof, (example.system, example.request, example.answer)))
    return text + example.embedding.nbytes + OVERHEAD_BYTES + PER_WORD_BYTES * (len(example.request) // 4)
