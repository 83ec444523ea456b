"""Examples that another model embedded are embedded anew, in the background and at a pace that requests do not feel."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from iccache.examples.retriever import Retriever
from iccache.examples.store import ExampleStore
from iccache.learn.access import Access
from iccache.metrics import Metrics
from iccache.types import Vector

log = logging.getLogger(__name__)

BATCH_S = 0.02  # that a batch is to take: a request that comes meanwhile waits for the half of it
MOST_AT_ONCE = 256
SHARE_IDLE = 0.5  # of the time, while nobody asks
SHARE_BUSY = 0.1  # while requests come
BUSY_FOR_S = 1.0  # after a request


class Reembedding:
    """A batch at a turn of the follower, where its time has come. The more requests, the longer the pauses."""

    def __init__(
        self,
        access: Access,
        metrics: Metrics,
        news: Callable[[], object],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`news` is called when embeddings were written: the store's changes are to be applied soon."""
        self.access = access
        self.metrics = metrics
        self.news = news
        self.clock = clock
        self.at_once = 1  # texts of the next batch: as many as lately took BATCH_S
        self._not_before = float("-inf")
        self._asked, self._asked_at = 0, float("-inf")  # requests so far, and when they were last more than before

    async def __call__(self) -> None:
        """Look after the index, and embed the next few."""
        select = self.access.select
        due = self.clock() >= self._not_before
        rows, took, left = await select.thread.run(lambda: self._turn(select.retriever, self.at_once if due else 0))
        self.metrics.reembed_pending.set(left)
        if not rows:
            return
        identity = select.retriever.embedder.identity

        def write(store: ExampleStore) -> None:
            with store.transaction():
                for id, vector in rows:
                    store.update_example(id, embedding=vector, embedder=identity)

        await self.access.write(write)
        self._pace(len(rows), took)
        if left <= len(rows):
            log.info("all examples are embedded by %s", identity)
        self.news()

    def _turn(self, retriever: Retriever, limit: int) -> tuple[list[tuple[str, Vector]], float, int]:
        """In the thread that owns the index: a look at its state, some embeddings, the time they took, and how many are
        stale, those included."""
        retriever.look_after()
        left = retriever.count_stale()
        if not limit or not left:
            return [], 0.0, left
        started = self.clock()
        rows = retriever.reembed(limit)
        return rows, self.clock() - started, left

    def _pace(self, texts: int, took: float) -> None:
        """How many and when, from how long `texts` took."""
        now = self.clock()
        fitting = int(BATCH_S * texts / max(took, 1e-6))
        self.at_once = max(1, min(fitting, 2 * self.at_once, MOST_AT_ONCE))
        self._not_before = now + took * (1.0 / self._share(now) - 1.0)

    def _share(self, now: float) -> float:
        """Of the time that may be spent, by whether requests come."""
        asked = self.access.select.asked
        if asked != self._asked:
            self._asked, self._asked_at = asked, now
        return SHARE_BUSY if now - self._asked_at < BUSY_FOR_S else SHARE_IDLE
