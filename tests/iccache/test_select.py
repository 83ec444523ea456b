"""Where a request is embedded, looked for and ranked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

from iccache.select import Job, Selected
from tests.e2e.world import world
from tests.iccache.test_rankings import filled, job


def refused(jobs: list[Job]) -> Sequence[Selected]:
    raise AssertionError("this was to be done in the loop")


async def test_a_request_waits_for_a_thread_that_is_busy_and_goes_on_in_the_loop(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await filled(w)
        select, begun, go = w.proxy.select, threading.Event(), threading.Event()
        busy = asyncio.create_task(select.thread.run(lambda: (begun.set(), go.wait(10))))
        assert await asyncio.to_thread(begun.wait, 10)
        select.thread.fn = refused
        asked = asyncio.create_task(select(job(w)))
        await asyncio.sleep(0.05)
        assert not asked.done()
        go.set()
        selected = await asyncio.wait_for(asked, 10)
        await busy
        assert all(matches for matches in selected.considered.values()) and selected.considered
