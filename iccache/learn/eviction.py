"""The cache within its capacity while the proxy runs: solved in a thread of its own, written in small transactions.

Every CHECK_EVERY_S the examples are weighed. Above `cache.capacity_bytes`, the high-water mark, they are evicted down
to LOW_WATER of it, so that the next ones do not bring the same work again; where `cache.ttl_days` is set, what is too
old goes every EXPIRE_EVERY_S. Nobody waits for it: requests, writes and the following of changes go on meanwhile.
Several workers may come to it at once: what one has deleted, the others no longer find.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import closing

from iccache.errors import StoreError
from iccache.examples import eviction
from iccache.examples.store import ExampleStore
from iccache.learn.access import Access, InForce
from iccache.metrics import Metrics

log = logging.getLogger(__name__)

CHECK_EVERY_S = 30.0
EXPIRE_EVERY_S = 600.0
LOW_WATER = 0.95


class Evictor:
    """Looked at now and then; at most one eviction is under way."""

    def __init__(
        self,
        in_force: InForce,
        access: Access,
        metrics: Metrics,
        wall: Callable[[], float],
        news: Callable[[], None],
    ) -> None:
        self.in_force = in_force
        self.access = access
        self.metrics = metrics
        self.wall = wall
        self.news = news
        self.checked = self.expired = 0.0
        self.task: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Begin what is due. Returns at once."""
        now = self.wall()
        if abs(now - self.checked) < CHECK_EVERY_S or (self.task is not None and not self.task.done()):
            return
        self.checked = now
        self.task = asyncio.create_task(self._guarded(), name="evict")

    async def _guarded(self) -> None:
        try:
            await self.evict()
        except StoreError as exc:
            log.warning("nothing could be evicted: %s", exc)
        except Exception:
            log.exception("eviction failed")

    async def evict(self) -> int:
        """Evict what is due by now; how many went. Raises StoreError."""
        due = await asyncio.to_thread(self._due)
        if due is None:
            return 0
        gone = 0
        for cause, ids in (("expired", due.expired), ("space", due.evicted)):
            for batch in eviction.batches(ids):
                count = await self.access.write(_delete(batch))
                self.metrics.evicted.labels(cause).inc(count)
                gone += count
                self.news()
        return gone

    def _due(self) -> eviction.Eviction | None:
        """In a thread of its own, on a connection of its own: what has to go, or None where nothing is due."""
        settings, now = self.in_force.directory.settings.cache, self.wall()
        with closing(self.access.store.reader()) as store:
            text, embeddings = store.example_bytes()
            full = text + 2 * embeddings > settings.capacity_bytes
            stale = bool(settings.ttl_days) and abs(now - self.expired) >= EXPIRE_EVERY_S
            if not full and not stale:
                return None
            self.expired = now
            room = int(LOW_WATER * settings.capacity_bytes) if full else settings.capacity_bytes
            return eviction.plan(store.weighed(), settings, now, capacity_bytes=room)

    async def stop(self) -> None:
        """Let go of what is under way: what is not evicted now is evicted later."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)


def _delete(ids: Sequence[str]) -> Callable[[ExampleStore], int]:
    return lambda store: store.delete_examples(ids, keep_exchanges=True)
