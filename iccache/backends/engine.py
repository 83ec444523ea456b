"""How busy an engine says it is: the gauges of vLLM, llama.cpp's server and SGLang, read now and then off the path.

What this process has in flight is known without asking. An engine that others use too, other replicas of this proxy
among them, is busier than that, and says so.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from iccache import config
from router.load import LoadTracker

log = logging.getLogger(__name__)

BUSY = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "llamacpp:requests_processing",
    "llamacpp:requests_deferred",
    "sglang:num_running_reqs",
    "sglang:num_queue_reqs",
)
EVERY_S = 1.0
TIMEOUT_S = 1.0
MOST_BYTES = 4_000_000


def busy(page: str) -> float | None:
    """Requests that run or wait, by a page of metrics; None where it does not say. Raises ValueError."""
    lines = [line for line in page.splitlines() if line.startswith(BUSY)]  # of hundreds: parsing them all takes long
    found = [
        sample.value
        for family in text_string_to_metric_families("\n".join([*lines, ""]))
        for sample in family.samples
        if sample.name in BUSY and sample.value >= 0
    ]
    return sum(found) if found else None


class EngineLoad:
    """Tells the load tracker what the engines say. One that does not answer counts by what is in flight from here."""

    def __init__(
        self,
        backends: Sequence[config.Backend],
        load: LoadTracker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.urls = {b.name: b.metrics_url for b in backends if b.metrics_url is not None}
        self.load = load
        self.clock = clock
        self._silent: set[str] = set()

    async def follow(self) -> None:
        """Ask every `EVERY_S`, until cancelled."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
            while True:
                await asyncio.gather(*(self.ask(session, name, url) for name, url in self.urls.items()))
                await asyncio.sleep(EVERY_S)

    async def ask(self, session: aiohttp.ClientSession, name: str, url: str) -> None:
        try:
            found = busy(await _page(session, url))
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as exc:
            found = None
            if name not in self._silent:
                log.warning("%s does not say how busy it is, at %s: %s", name, url, exc or type(exc).__name__)
                self._silent.add(name)
        else:
            self._silent.discard(name)
        self.load.report(name, found, self.clock())


async def _page(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as response:
        response.raise_for_status()
        return (await response.content.read(MOST_BYTES)).decode("utf-8", "replace")
