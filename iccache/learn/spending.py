"""What each tenant has spent today, in US dollars since midnight UTC."""

from __future__ import annotations

from collections.abc import Callable

from iccache.learn.access import Access, InForce

DAY_S = 86400


class Spending:
    """This process's own sums; what the store knows of other processes' is read now and then."""

    def __init__(self, in_force: InForce, access: Access, wall: Callable[[], float]) -> None:
        self.in_force = in_force
        self.access = access
        self.wall = wall
        self._spent: dict[str, float] = {}
        self._day = 0  # of Unix time

    def today(self, tenant: str) -> float:
        self._new_day()
        return self._spent.get(tenant, 0.0)

    def add(self, tenant: str, usd: float) -> None:
        self._new_day()
        self._spent[tenant] = self._spent.get(tenant, 0.0) + usd

    async def reload(self) -> None:
        self._new_day()
        now = self.wall()
        for tenant in self.in_force.directory.settings.tenants:
            stored = await self.access.read(lambda s, name=tenant.name: s.spent_today(name, now))  # type: ignore[misc]
            self._spent[tenant.name] = max(stored, self._spent.get(tenant.name, 0.0))  # not all that costs is recorded

    def _new_day(self) -> None:
        today = int(self.wall() // DAY_S)
        if today != self._day:
            self._spent, self._day = {}, today
