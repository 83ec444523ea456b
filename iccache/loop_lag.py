"""Whether anything holds up the event loop: every request waits behind what does.

A timer that should ring every TICK_S is late by as long as something kept the loop from looking at it. The delay is
the machine's too: where more wants to run than there are cores, the process waits its turn, and so does the timer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

TICK_S = 0.02


class LoopLag:
    """Measures from `start` to `stop`, in the loop in which it was started."""

    def __init__(self, observe: Callable[[float], object], clock: Callable[[], float] = time.perf_counter) -> None:
        """`observe` is given every delay, in seconds, never below 0."""
        self.observe = observe
        self.clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._wait()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        self._due = self.clock() + TICK_S
        self._timer = self._loop.call_later(TICK_S, self._ring)

    def _ring(self) -> None:
        self.observe(max(0.0, self.clock() - self._due))
        self._wait()
