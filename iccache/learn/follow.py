"""The store's changes, applied: index, router, floor, utility model and exported quality follow them.

What this process knows, it has read back from the store, as every other process does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from iccache.errors import StoreError
from iccache.examples.store import ExampleStore
from iccache.examples.utility import NAMES, UtilityModel
from iccache.learn.access import Access, InForce
from iccache.learn.counting import Counting
from iccache.quality.kinds import kind_of_record, meant
from iccache.types import Change, ChangeKind

log = logging.getLogger(__name__)

ROUTER_STATE = "router"
UTILITY_STATE = "utility"
FLOOR_STATE = "floor"
FOLLOW_EVERY_S = 0.2
FOLLOW_AGAIN_S = 1.0  # after a failure
SNAPSHOT_EVERY = 100  # learned outcomes
CHANGES_AT_ONCE = 1000
RELEARN_AFTER_S = 60.0  # after an erasure: others may follow
RELEARN_EVERY_S = 1800.0  # at most; what was erased is out of the statistics within the hour


class Outcome(NamedTuple):
    """A quality that became known, with what is needed to learn from it."""

    tenant: str
    kind: str  # of request
    at: float  # when it came
    backend: str
    examples: int  # that were shown for it
    features: NDArray[np.float64] | None
    old: float | None
    new: float | None
    meant: float = 1.0  # share of the policy in the choice of the backend


class Learned(NamedTuple):
    """States of all that learns, as of one change."""

    router: bytes
    utility: bytes
    floor: bytes


class News(NamedTuple):
    """What the store's changes say."""

    cursor: int  # of the last change it includes
    outcomes: Sequence[Outcome]
    anew: bool = False  # changes were missed: the index was loaded again
    begin: Learned | None = None  # forget what was learned: what to go on from


class Follower:
    """Where this process stands in the store's history, and what it has learned up to there."""

    def __init__(self, in_force: InForce, access: Access, utility: UtilityModel, counting: Counting) -> None:
        self.in_force = in_force
        self.access = access
        self.utility = utility
        self.counting = counting
        self.unlearned = self._learned()
        self.cursor = 0
        self.indexed = 0  # the change up to which the index follows; what is read again is only learned from
        self.clean_as_of = 0  # erasures that what was learned does not know of any more
        self.relearned = -RELEARN_EVERY_S
        self.learned_since_snapshot = 0
        self.kicked = asyncio.Event()
        self.following = asyncio.Lock()

    async def load(self) -> None:
        """What other lives of this store have learned."""
        kept = await self.access.read(self._kept)
        self.clean_as_of = (await self.access.read(lambda store: store.erasures()))[0]
        if kept is not None:
            try:
                self._go_on_from(kept[1])
                self.cursor = kept[0]
            except ValueError as exc:
                log.warning("the kept statistics cannot be used, learning from the whole history again: %s", exc)
        self.cursor = await self.access.read(self._first_needed)
        self.counting.held(self.in_force.floor.held())

    def _first_needed(self, store: ExampleStore) -> int:
        """Where to begin: a million imported examples that are in the index already need not be gone through."""
        first = store.next_change(ChangeKind.QUALITY, self.cursor)
        nothing_until = store.last_change() if first is None else first - 1
        return max(self.cursor, min(nothing_until, self.access.select.retriever.loaded_at))

    def _kept(self, store: ExampleStore) -> tuple[int, Learned] | None:
        """What is kept, if it is of one change. A store that knows no floor yet gives an empty one."""
        router, utility, floor = (store.load_state(n) for n in (ROUTER_STATE, UTILITY_STATE, FLOOR_STATE))
        if router is None or utility is None or router[0] != utility[0]:
            return None
        found = floor[1] if floor is not None and floor[0] == router[0] else self.unlearned.floor
        return router[0], Learned(router[1], utility[1], found)

    def _learned(self) -> Learned:
        return Learned(self.in_force.router.state(), self.utility.state(), self.in_force.floor.state())

    def _go_on_from(self, learned: Learned) -> None:
        """Raises ValueError for what does not fit."""
        self.in_force.router.restore(learned.router)
        self.utility.restore(learned.utility)
        self.in_force.floor.restore(learned.floor)

    async def follow(self, upkeep: Callable[[], Awaitable[None]]) -> None:
        """Apply the store's changes as they come, and do the `upkeep` after each turn, until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):  # not wait_for: in Python 3.11 it may swallow being cancelled
                async with asyncio.timeout(FOLLOW_EVERY_S):
                    await self.kicked.wait()
            self.kicked.clear()
            try:
                await self.catch_up()
                await upkeep()
            except StoreError as exc:
                log.warning("the store cannot be followed: %s", exc)
                await asyncio.sleep(FOLLOW_AGAIN_S)
            except Exception:  # whatever it is: a process that no longer follows would be wrong from then on
                log.exception("the store's changes could not be applied")
                await asyncio.sleep(FOLLOW_AGAIN_S)

    async def catch_up(self) -> None:
        """Everything up to the newest change is applied when it returns."""
        async with self.following:
            while True:
                news = await self.access.select.thread.run(lambda: self._read_changes(self.cursor))
                if news.anew:
                    self.access.select.changed()
                if news.begin is not None:
                    self._restore(news.begin)
                for outcome in news.outcomes:
                    self._learn(outcome)
                if news.outcomes:
                    self.access.select.learned()
                if news.cursor == self.cursor:
                    self.access.select.current()
                    break
                self.cursor = news.cursor
            if self.learned_since_snapshot >= SNAPSHOT_EVERY:
                await self.snapshot()

    async def forget_erased(self, now: float) -> bool:
        """Learn anew from what is left, where something was erased since: within the hour, and not at every erasure."""
        count, at = await self.access.read(lambda store: store.erasures())
        if count == self.clean_as_of or now - at < RELEARN_AFTER_S or abs(now - self.relearned) < RELEARN_EVERY_S:
            return False
        async with self.following:
            oldest = await self.access.read(lambda store: store.oldest_change())
            self._restore(self.unlearned)
            self.access.select.ways.forget()
            self.cursor, self.clean_as_of, self.relearned = oldest - 1, count, now
        await self.catch_up()
        await self.snapshot()
        return True

    async def snapshot(self) -> None:
        """Keep the statistics of all that learns, so that a new process need not read the whole history."""
        cursor, clean_as_of, states = self.cursor, self.clean_as_of, self._learned()
        self.learned_since_snapshot = 0

        def write(store: ExampleStore) -> None:
            if store.erasures()[0] != clean_as_of:
                return  # it knows of what was erased meanwhile
            for name, state in zip((ROUTER_STATE, UTILITY_STATE, FLOOR_STATE), states, strict=True):
                store.save_state(name, cursor, state)

        try:
            await self.access.write(write)
        except StoreError as exc:
            log.warning("the statistics could not be kept: %s", exc)

    def _read_changes(self, cursor: int) -> News:
        """In the thread that owns the index: bring it up to date, and look up what became known."""
        store = self.access.store
        changes = store.changes(cursor, CHANGES_AT_ONCE)
        if cursor < store.oldest_change() - 1:  # looked at last: what came before may be of another content
            return self._rebuild(cursor)
        if not changes:
            return News(cursor, [])
        new = [c for c in changes if c.kind is ChangeKind.EXAMPLE and c.seq > self.indexed]
        self.access.select.apply(new, store)
        self.indexed = max(self.indexed, changes[-1].seq)
        outcomes = [o for c in changes if c.kind is ChangeKind.QUALITY and (o := self._outcome(store, c))]
        return News(changes[-1].seq, outcomes)

    def _outcome(self, store: ExampleStore, change: Change) -> Outcome | None:
        exchange = store.exchange(change.key)
        if exchange is None:
            return None
        self.access.select.learn(exchange)
        return Outcome(
            tenant=exchange.tenant,
            kind=kind_of_record(exchange),
            at=exchange.at,
            backend=exchange.backend,
            examples=len(exchange.shown),
            features=exchange.features,
            old=change.old,
            new=change.new,
            meant=meant(exchange),
        )

    def _rebuild(self, cursor: int) -> News:
        """Changes are missing: they were trimmed before this process saw them, or a backup took the store's place."""
        store = self.access.store
        newest, restored, oldest = store.last_change(), store.restored_at(), store.oldest_change()
        kept = self._kept(store)
        self.access.select.retriever.load()
        self.indexed = newest
        if cursor >= restored:
            return News(newest, [], anew=True)
        log.warning("the store was restored from a backup: beginning anew with what it holds")
        if kept is None or kept[0] < restored:
            return News(oldest - 1, [], anew=True, begin=self.unlearned)
        return News(max(kept[0], oldest - 1), [], anew=True, begin=kept[1])

    def _restore(self, learned: Learned) -> None:
        try:
            self._go_on_from(learned)
        except ValueError as exc:
            log.warning("the restored statistics cannot be used, going on with those there are: %s", exc)
        self.access.select.changed()
        self.learned_since_snapshot = 0

    def _learn(self, outcome: Outcome) -> None:
        """Router, floor, utility model and the exported quality take in one outcome. A replaced one is taken back."""
        if outcome.new is None:
            return
        self.counting.quality(outcome.backend, outcome.new)
        if outcome.examples:
            old = [] if outcome.old is None else [outcome.old]
            rows = np.zeros((1 + len(old), len(NAMES)))
            self.utility.partial_fit(
                rows, [outcome.new, *old], sample_weight=[1.0, *(-1.0 for _ in old)], student=outcome.backend
            )
        if outcome.features is None:
            return
        try:
            self.in_force.router.learn(outcome.backend, outcome.features, outcome.new, outcome.old)
            self.in_force.floor.learn(
                outcome.tenant,
                outcome.kind,
                outcome.backend,
                outcome.new,
                outcome.old,
                at=outcome.at,
                weight=outcome.meant,
            )
        except ValueError as exc:
            log.warning("an outcome of %s cannot be learned from: %s", outcome.backend, exc)
            return
        self.counting.held(self.in_force.floor.held())
        self.learned_since_snapshot += 1
