"""So much work in one turn of the event loop, and the rest in the next ones.

In each turn the loop calls everything that is ready. Where a hundred requests come at once, that is a hundred times
embedding, ranking and routing, and for so long no timer rings, nothing is read, and no chunk of a stream goes on. So
whoever is about to do such work asks here first, and where the turn is full waits for one that has room, in order.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

FULL_AFTER_S = 0.005
STEP = 0.2  # of what a waiter is taken to need, by each turn's experience


class Turns:
    """Belongs to one event loop: that in which it is first asked."""

    def __init__(self, full_after_s: float = FULL_AFTER_S, clock: Callable[[], float] = time.perf_counter) -> None:
        self.full_after_s = full_after_s
        self._clock = clock
        self._ends = 0.0  # when the present turn is full
        self._open = False  # a turn has begun
        self._back: deque[asyncio.Future[None]] = deque()  # those that were woken for a turn that was full already
        self._late: deque[asyncio.Future[None]] = deque()  # and of these, those of the present turn
        self._begun: deque[asyncio.Future[None]] = deque()  # those that have worked before
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._worked = 0  # waiters that have worked in this turn
        self._each_s = full_after_s / 2  # that a waiter works, about

    @property
    def waiting(self) -> int:
        """How many wait for a turn with room."""
        return len(self._late) + len(self._back) + len(self._begun) + len(self._waiting)

    async def room(self, *, begun: bool = False) -> None:
        """Returns at once where there is room in this turn and nobody waits, else in a later one. Who has `begun` what
        it is about to go on with comes before those who have not: somebody has waited for it for longer.
        """
        if not self._open:
            self._begin()
        elif self.waiting or self._clock() >= self._ends:
            await self._woken(self._begun if begun else self._waiting)
            while self._worked and self._clock() >= self._ends:  # those before took longer than was thought
                await self._woken(self._late)
            self._worked += 1

    async def _woken(self, queue: deque[asyncio.Future[None]]) -> None:
        waiter = asyncio.get_running_loop().create_future()
        queue.append(waiter)
        await waiter

    def _begin(self) -> None:
        """From now on until the loop has come round."""
        self._open, self._ends = True, self._clock() + self.full_after_s
        asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        """The loop has come round. As many of those that wait as a turn may have room for are woken, to work in the
        next."""
        self._open = self.waiting > 0
        if not self._open:
            return
        self._ends = self._clock() + self.full_after_s
        self._back.extendleft(reversed(self._late))
        self._late.clear()
        room, woken, self._worked = max(1, int(self.full_after_s / max(self._each_s, 1e-6))), 0, 0
        while self.waiting and woken < room:
            waiter = (self._back or self._begun or self._waiting).popleft()
            if not waiter.done():  # who does not wait any more has no part
                waiter.set_result(None)
                woken += 1
        asyncio.get_running_loop().call_soon(self._over)

    def _over(self) -> None:
        """Those that were woken have had their turn."""
        if self._worked:
            took = self._clock() - self._ends + self.full_after_s
            self._each_s += STEP * (max(took, 0.0) / self._worked - self._each_s)
        asyncio.get_running_loop().call_soon(self._next)
