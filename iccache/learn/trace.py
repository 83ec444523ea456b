"""Outcomes traced to the examples that were shown: what spoils answers is held, with what was made from it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import closing

from iccache.examples.tracing import held_for
from iccache.learn.access import Access
from iccache.types import Hold

log = logging.getLogger(__name__)

TRACE_EVERY_S = 60.0
OUTCOMES = 2000  # newest scored answers of a tenant that are looked at


class Tracing:
    """Now and then reads what became of answers, in a thread and on a connection of its own."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self.looked = 0.0
        self.seen = -1  # the change up to which outcomes were looked at

    async def look(self, now: float, cursor: int) -> list[str]:
        """Hold what is suspect; returns what was not held before. `cursor`: of the store's changes, so that nothing is
        read when nothing has happened."""
        if cursor == self.seen or abs(now - self.looked) < TRACE_EVERY_S:
            return []
        self.looked, self.seen = now, cursor
        found = await asyncio.to_thread(self._suspects)
        if not found:
            return []
        held = await self.access.write(lambda store: store.hold(found, Hold.SUSPECT))
        if held:
            log.warning("answers got worse since these examples are shown; they are held: %s", ", ".join(held))
        return held

    def _suspects(self) -> list[str]:
        with closing(self.access.store.reader()) as store:
            return [
                id
                for tenant in store.judged_tenants()
                for id in held_for(store.judged(tenant, OUTCOMES), store.standings(tenant))
            ]
