"""What is due now and then: the size of the store, spending, evictions, examples that another model embedded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from iccache.examples.store import ExampleStore
from iccache.learn.access import Access, InForce
from iccache.learn.eviction import Evictor
from iccache.learn.follow import Follower
from iccache.learn.lessons import Lessons
from iccache.learn.record import Recorder
from iccache.learn.reembed import Reembedding
from iccache.learn.spending import Spending
from iccache.learn.trace import Tracing
from iccache.metrics import Metrics

log = logging.getLogger(__name__)

UPKEEP_EVERY_S = 5.0
SOURCES_EVERY_S = 60.0
DAY_S = 86400.0
EXPIRE_EVERY_S = 3600.0


class Upkeep:
    """Called at every turn of the follower; does what is due."""

    def __init__(
        self,
        in_force: InForce,
        access: Access,
        recorder: Recorder,
        spending: Spending,
        follower: Follower,
        evictor: Evictor,
        lessons: Lessons,
        metrics: Metrics,
        wall: Callable[[], float],
    ) -> None:
        self.in_force = in_force
        self.access = access
        self.recorder = recorder
        self.spending = spending
        self.follower = follower
        self.evictor = evictor
        self.lessons = lessons
        self.metrics = metrics
        self.wall = wall
        self.tracing = Tracing(access)
        self.reembedding = Reembedding(access, metrics, follower.kicked.set)
        self.looked_after = 0.0
        self.expired = 0.0
        self.compared_at = 0.0

    async def __call__(self) -> None:
        now = self.wall()
        if abs(now - self.looked_after) >= UPKEEP_EVERY_S:
            self.looked_after = now
            await self._measure_store()
            await self.spending.reload()
            self.evictor.look()
            await self.lessons.look()
            await self.tracing.look(now, self.follower.cursor)
            await self.follower.forget_erased(now)
            await self._expire(now)
            await self._compare_sources(now)
            if self.follower.learned_since_snapshot:
                await self.follower.snapshot()
        await self.lessons.remember()
        await self.reembedding()

    async def _expire(self, now: float) -> None:
        """Erase what tenants keep for a time, once an hour."""
        if abs(now - self.expired) < EXPIRE_EVERY_S:
            return
        self.expired = now
        for tenant in self.in_force.directory.settings.tenants:
            if tenant.keep_days:
                name, before = tenant.name, now - tenant.keep_days * DAY_S
                while await self.access.write(partial(_expired, tenant=name, before=before)):
                    pass

    async def _measure_store(self) -> None:
        limit = self.in_force.directory.settings.store.max_bytes
        if not limit:
            self.recorder.full = False
            return
        parts = await self.access.read(lambda store: store.size_bytes())
        full = sum(parts.values()) > limit
        if full and not self.recorder.full:
            log.warning("the store is larger than store.max_bytes = %d: nothing is recorded until it shrinks", limit)
        self.recorder.full = full

    async def _compare_sources(self, now: float) -> None:
        """How far each source of feedback is from the users', for the metrics."""
        if abs(now - self.compared_at) < SOURCES_EVERY_S:
            return
        self.compared_at = now
        for found in await self.access.read(lambda store: store.agreements(now - DAY_S)):
            if found.difference is not None:
                self.metrics.feedback_bias.labels(found.source).set(found.difference)


def _expired(store: ExampleStore, tenant: str, before: float) -> int:
    return store.expire(tenant, before)
