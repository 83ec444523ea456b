"""Live traffic goes first: replay asks nothing while the proxy's load is above `replay.pause_above_load`."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable

import aiohttp

from iccache import config
from iccache.errors import IccacheError

TIMEOUT_S = 2.0
BELIEVED_FOR_S = 1.0
POLL_S = 2.0
LOAD = re.compile(rb"^iccache_load(?:\{[^}\n]*\})?[ ]([^ \n]+)", re.MULTILINE)


class Overloaded(IccacheError):
    """The proxy stayed busy for as long as replay may wait."""


Read = Callable[[], Awaitable[float | None]]


class LoadGate:
    """Lets callers pass while the load is low enough; together they wait `max_wait_s` at most."""

    def __init__(
        self,
        read: Read,
        limit: float,
        max_wait_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`read` gives the load, 1 being full, or None when no proxy is running, which is no limit."""
        self.read = read
        self.limit = limit
        self.waited_s = 0.0
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._sleep = sleep
        self._open_until = 0.0
        self._turn = asyncio.Lock()

    def give_up(self) -> None:
        """Let nobody wait any longer."""
        self._max_wait_s = 0.0

    async def wait(self) -> None:
        """Return when the load allows another call. Raises Overloaded."""
        async with self._turn:
            while self._clock() >= self._open_until:
                load = await self.read()
                if load is None or load <= self.limit:
                    self._open_until = self._clock() + BELIEVED_FOR_S
                    return
                if self.waited_s >= self._max_wait_s:
                    raise Overloaded(f"the load is {load:g}, above replay.pause_above_load = {self.limit:g}")
                pause = min(POLL_S, self._max_wait_s - self.waited_s)
                await self._sleep(pause)
                self.waited_s += pause


def load_of_proxy(server: config.Server, session: aiohttp.ClientSession) -> Read:
    """Asks the proxy's /metrics."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(server.host, server.host)
    url = f"http://{host}:{server.port}/metrics"

    async def read() -> float | None:
        if not server.port:
            return None
        try:
            async with session.get(url, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as response:
                return parse(await response.read()) if response.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    return read


def parse(metrics: bytes) -> float | None:
    """The highest `iccache_load` in a page of metrics; None where there is none."""
    found = []
    for text in LOAD.findall(metrics):
        try:
            found.append(float(text))
        except ValueError:
            continue
    return max(found, default=None)
