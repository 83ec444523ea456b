"""The garbage collector's full rounds, put where nobody waits for them.

A full round looks at every object that is not frozen, and the event loop waits meanwhile: 20 to 60 ms once ten thousand
examples are at hand. Automatic ones are turned off. Instead there is one whenever no request has come for a while, and
one an hour where requests never cease; what is left after it stays frozen, so that the next one does not look again.
The rounds over younger objects go on as ever and take a few milliseconds. There is little to find: a thousand requests
leave some ten objects that only the collector frees.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

YOUNG = 3_000  # objects more than were freed, and the youngest are looked at
MIDDLE_AGED = 3  # rounds over the youngest, and what outlived them is looked at
NEVER = 1_000_000_000
LOOK_EVERY_S = 1.0
AT_LATEST_S = 3600.0
FEW = 2  # requests between two looks: a probe of its health is no reason to wait


class Collector:
    """Belongs to the process: `start` and `stop` in the loop that serves, once."""

    def __init__(self, begun: Callable[[], int], open: Callable[[], int], *, at_latest_s: float = AT_LATEST_S) -> None:
        """`begun` is asked how many requests there were so far, `open` how many are not answered yet."""
        self.begun = begun
        self.open = open
        self.at_latest_s = at_latest_s
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """A full round at once. What is there by now stays, and is never looked at again."""
        self._before = gc.get_threshold()
        gc.set_threshold(YOUNG, MIDDLE_AGED, NEVER)
        self._collect()
        self._wait()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            gc.set_threshold(*self._before)
            gc.unfreeze()

    def _wait(self) -> None:
        self._seen = self.begun()
        self._timer = asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)

    def _look(self) -> None:
        idle = not self.open() and self.begun() - self._seen < FEW
        worthwhile = _rounds() != self._rounds  # else nothing has grown old since
        if worthwhile and (idle or time.monotonic() - self._at > self.at_latest_s):
            self._collect()
        self._wait()

    def _collect(self) -> None:
        gc.collect()
        gc.freeze()
        self._at, self._rounds = time.monotonic(), _rounds()


def _rounds() -> int:
    """Over the middle-aged so far."""
    return int(gc.get_stats()[1]["collections"])
