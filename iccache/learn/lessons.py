"""What is learned where nobody waits, taken over: the prior of the ways, the shared sets and the threshold of utility
that replay keeps in the store, and the evidence of the scored exchanges, gone through again at the start and now and
then, so that what was erased from the store is forgotten here too.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable

from iccache.examples import shared
from iccache.examples.selector import THRESHOLD_STATE, restored_threshold
from iccache.examples.shared import SETS_STATE
from iccache.examples.store import ExampleStore
from iccache.examples.ways import CAPACITY, PRIOR_STATE, Prior, Ways
from iccache.learn.access import Access
from iccache.types import Exchange

log = logging.getLogger(__name__)

AGAIN_EVERY_S = 1800.0
SCORED_AT_MOST = 8 * CAPACITY  # of all tenants
AT_ONCE = 32  # exchanges a turn: their requests may have to be embedded


class Lessons:
    """Called at every turn of the follower; does a little of what is due."""

    def __init__(self, access: Access, wall: Callable[[], float]) -> None:
        self.access = access
        self.wall = wall
        self.takers: dict[str, Callable[[bytes, ExampleStore], None]] = {
            PRIOR_STATE: self._take_prior,
            SETS_STATE: self._take_sets,
            THRESHOLD_STATE: self._take_threshold,
        }
        self.kept: dict[str, bytes] = {}
        self.remembered_at = float("-inf")
        self._waiting: deque[Exchange] = deque()
        self._new: Ways | None = None

    async def look(self) -> None:
        """Take over what replay has left in the store since."""
        await self.access.select.thread.run(self._look)

    async def remember(self) -> None:
        """Go on with the scored exchanges, where that is due."""
        due = abs(self.wall() - self.remembered_at) >= AGAIN_EVERY_S
        if due or self._new is not None:
            await self.access.select.thread.run(self._remember)

    def _look(self) -> None:
        store = self.access.store
        for name, take in self.takers.items():
            kept = store.load_state(name)
            blob = None if kept is None else kept[1]
            if blob is None or blob == self.kept.get(name):
                continue
            self.kept[name] = blob
            try:
                take(blob, store)
            except ValueError as exc:
                log.warning("what replay has learned (%s) cannot be used: %s", name, exc)

    def _take_prior(self, blob: bytes, store: ExampleStore) -> None:
        self.access.select.use_prior(Prior.restored(blob))

    def _take_sets(self, blob: bytes, store: ExampleStore) -> None:
        self.access.select.shared.load(shared.unpack(blob), store)

    def _take_threshold(self, blob: bytes, store: ExampleStore) -> None:
        self.access.select.use_threshold(restored_threshold(blob))

    def _remember(self) -> None:
        select = self.access.select
        if self._new is None:
            self.remembered_at = self.wall()
            count: Counter[str] = Counter()
            newest = []
            for exchange in self.access.store.latest_scored(SCORED_AT_MOST):
                count[exchange.tenant] += 1
                if count[exchange.tenant] <= CAPACITY:
                    newest.append(exchange)
            self._waiting = deque(reversed(newest))
            self._new = Ways(select.ways.prior)
        for _ in range(min(AT_ONCE, len(self._waiting))):
            select.learn(self._waiting.popleft(), self._new)
        if not self._waiting:
            select.ways.take_over(self._new)
            self._new = None
