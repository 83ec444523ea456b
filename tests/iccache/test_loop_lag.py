"""What holds the loop up is seen, and nothing else is."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import pytest

from iccache.loop_lag import SCHEDULED, TICK_S, LoopLag


async def test_what_blocks_is_measured() -> None:
    seen: list[tuple[float, float]] = []
    lag = LoopLag(lambda late, held: seen.append((late, held)))
    lag.start()
    await asyncio.sleep(3 * TICK_S)
    time.sleep(0.3)  # noqa: ASYNC251 - that is the point
    await asyncio.sleep(2 * TICK_S)
    lag.stop()
    assert max(late for late, _ in seen) > 0.3 - TICK_S - 0.005  # the timer may have been due up to a tick later
    assert all(0.0 <= held <= late for late, held in seen)


@pytest.mark.skipif(not os.path.exists(SCHEDULED), reason="the kernel counts no waiting")
def test_waiting_for_a_core_is_not_held_against_the_process() -> None:
    """A loop that works half of the time, on the core of a process that would have it all, at equal rights."""
    core = min(os.sched_getaffinity(0))
    script = f"""
import asyncio, os, time
os.sched_setaffinity(0, [{core}])
from iccache.loop_lag import LoopLag
async def main():
    seen = []
    lag = LoopLag(lambda late, held: seen.append((late, held)))
    lag.start()
    until = time.monotonic() + 3
    while time.monotonic() < until:
        begun = time.thread_time()
        while time.thread_time() - begun < 0.004: pass
        await asyncio.sleep(0.002)
    lag.stop()
    print(sum(late for late, _ in seen), sum(held for _, held in seen))
asyncio.run(main())
"""
    spinning = f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
    rivals = [subprocess.Popen([sys.executable, "-c", spinning]) for _ in range(2)]
    try:
        said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()
    late, held = map(float, said.stdout.split())
    assert late > 0.1
    assert held < 0.5 * late


async def test_it_ends() -> None:
    seen: list[float] = []
    lag = LoopLag(lambda late, _: seen.append(late))
    lag.start()
    lag.stop()
    await asyncio.sleep(3 * TICK_S)
    assert seen == []
