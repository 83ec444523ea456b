"""Once more, where nobody answered: a budget, a pause, a bound on time. At this one layer, and for few requests."""

from __future__ import annotations

import asyncio
import email.utils
import math
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC
from typing import TypeVar

T = TypeVar("T")

ATTEMPTS = 2  # the first and one more
BURST = 5  # retries that may follow each other at once
JITTER_S = 0.25  # the pause is drawn from 0 to this, so that those who failed together do not come back together
LONGEST_WAIT_S = 2.0  # that an upstream may ask for; longer, and its answer is the client's
WITHIN_S = 5.0  # from the first attempt to the second: who has waited longer does not wait again
LONGEST_REST_S = 3600.0  # that a backend is left alone because it asked to be


class RetryBudget:
    """A token bucket that requests fill: never more than `share` retries per request, nor more than `burst` at once.

    A new process may spend `burst` in advance and earns nothing until they are paid for. So of n requests at most
    max(burst, share * n) are retried, and in any window of n at most burst + share * n.
    """

    def __init__(self, share: float, burst: int = BURST) -> None:
        """`share` in [0, 1]; 0: no retries at all."""
        self.share = share
        self._burst = float(burst)
        self._tokens = float(burst) if share else 0.0
        self._owed = float(burst)

    def earn(self) -> None:
        """A request has come."""
        paid = min(self.share, self._owed)
        self._owed -= paid
        self._tokens = min(self._burst, self._tokens + self.share - paid)

    def spend(self) -> bool:
        """Whether one more retry may be made; then it counts as made."""
        if self._tokens < 1 - 1e-9:
            return False
        self._tokens -= 1
        return True


class Retries:
    """When a request that nobody answered goes out once more."""

    def __init__(
        self,
        share: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.budget = RetryBudget(share)
        self.clock = clock
        self.sleep = sleep
        self.draw = draw  # in [0, 1)

    async def run(self, once: Callable[[], Awaitable[T]], pause: Callable[[T], float | None]) -> tuple[T, bool]:
        """The last result of `once`, which runs once or twice, and whether it was the budget that refused another try.

        `pause(result)`: None where the result stands; else it is a failure, and how long to wait at least, in s.
        """
        self.budget.earn()
        began = self.clock()
        for attempt in range(1, ATTEMPTS + 1):
            found = await once()
            asked = pause(found)
            if asked is None or asked > LONGEST_WAIT_S or attempt == ATTEMPTS:
                break
            wait = asked + JITTER_S * self.draw()
            if not self.budget.share or self.clock() - began + wait > WITHIN_S:
                break
            if not self.budget.spend():
                return found, True
            await self.sleep(wait)
        return found, False


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """How long an upstream asks to be left alone, in s; None where it does not say. `now` in Unix seconds.

    `Retry-After-ms` (OpenAI's) counts before `Retry-After`, which is in seconds or a date.
    """
    milliseconds = _number(headers.get("Retry-After-Ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("Retry-After")
    seconds = _number(text)
    if seconds is not None or text is None:
        return seconds
    try:
        until = email.utils.parsedate_to_datetime(text)
        return max(0.0, (until if until.tzinfo else until.replace(tzinfo=UTC)).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return max(0.0, value) if math.isfinite(value) else None
