"""Whether anything holds up the event loop: every request waits behind what does.

A timer that should ring every TICK_S is late by as long as something kept the loop from looking at it. The delay is
the machine's too: where more wants to run than there are cores, the process waits its turn, and so does the timer.
Linux counts that waiting for each thread; the delay less that is what this process is to blame for.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress

TICK_S = 0.02
SCHEDULED = "/proc/thread-self/schedstat"  # ns on a core, ns waiting for one, turns


class LoopLag:
    """Measures from `start` to `stop`, in the loop in which it was started."""

    def __init__(
        self, observe: Callable[[float, float], object], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`observe` is given every delay and how much of it something in this process made, in seconds, never below
        0. Where the kernel does not say, all of it.
        """
        self.observe = observe
        self.clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._waited = 0.0
        self._scheduled: int | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        with suppress(OSError):
            self._scheduled = os.open(SCHEDULED, os.O_RDONLY | os.O_CLOEXEC)
        self._wait()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._scheduled is not None:
            os.close(self._scheduled)
            self._scheduled = None

    def _wait(self) -> None:
        self._due = self.clock() + TICK_S
        self._waited = self._waited_s()
        self._timer = self._loop.call_later(TICK_S, self._ring)

    def _ring(self) -> None:
        late = max(0.0, self.clock() - self._due)
        self.observe(late, max(0.0, late - (self._waited_s() - self._waited)))
        self._wait()

    def _waited_s(self) -> float:
        """Seconds that this thread has waited for a core so far."""
        if self._scheduled is None:
            return 0.0
        try:
            return int(os.pread(self._scheduled, 100, 0).split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return self._waited
