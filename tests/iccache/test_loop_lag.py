"""What holds the loop up is seen, and nothing else is."""

from __future__ import annotations

import asyncio
import time

from iccache.loop_lag import TICK_S, LoopLag


async def test_what_blocks_is_measured() -> None:
    seen: list[float] = []
    lag = LoopLag(seen.append)
    lag.start()
    await asyncio.sleep(3 * TICK_S)
    time.sleep(0.3)  # noqa: ASYNC251 - that is the point
    await asyncio.sleep(2 * TICK_S)
    lag.stop()
    assert max(seen) > 0.3 - TICK_S - 0.005  # the timer may have been due up to a tick later
    assert min(seen) >= 0.0


async def test_it_ends() -> None:
    seen: list[float] = []
    lag = LoopLag(seen.append)
    lag.start()
    lag.stop()
    await asyncio.sleep(3 * TICK_S)
    assert seen == []
