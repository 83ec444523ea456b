"""Which backend a session stays with."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict

from iccache.errors import IccacheError
from iccache.learn.access import Access, InForce
from iccache.types import Exchange

log = logging.getLogger(__name__)

SESSIONS_KEPT = 100_000


class Sessions:
    """The latest sessions of this process; others are looked up in the store."""

    def __init__(self, in_force: InForce, access: Access) -> None:
        self.in_force = in_force
        self.access = access
        self._backends: OrderedDict[tuple[str, str], str] = OrderedDict()

    async def backend(self, tenant: str, session: str | None) -> str | None:
        """The backend that last answered in this session."""
        if session is None:
            return None
        known = self._backends.get((tenant, session))
        if known is not None:
            return known
        try:
            async with asyncio.timeout(self.in_force.directory.settings.routing.decision_timeout_ms / 1000):
                return await self.access.read(lambda store: store.session_backend(tenant, session))
        except (IccacheError, TimeoutError) as exc:
            log.warning("the session cannot be looked up: %s", exc)
            return None

    def remember(self, exchange: Exchange) -> None:
        if exchange.session is None or not exchange.complete:
            return
        key = (exchange.tenant, exchange.session)
        self._backends[key] = exchange.backend
        self._backends.move_to_end(key)
        if len(self._backends) > SESSIONS_KEPT:
            self._backends.popitem(last=False)
