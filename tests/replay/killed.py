"""One run that kills itself at a named point: for a process of its own. Imported once by the server that forks them."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iccache import config
from iccache.examples.tokens import make_tokenizer
from replay import assemble, calls
from replay.assemble import Options
from replay.job import Job
from replay.ledger import Ledger
from replay.store import ReplayStore
from tests.replay.world import QUICK, Silent

POINTS = {
    "before reserving": (Ledger, "reserve", "before"),
    "after reserving": (Ledger, "reserve", "after"),
    "before calling": (calls, "_post", "before"),
    "after calling": (calls, "_post", "after"),
    "before confirming": (Ledger, "confirm", "before"),
    "after confirming": (Ledger, "confirm", "after"),
    "before committing": (Job, "_keep", "before"),
    "within the commit": (ReplayStore, "update_example", "after"),
    "after committing": (Job, "_keep", "after"),
    "after claiming": (Ledger, "claim", "after"),
}

make_tokenizer("cl100k_base").count("loaded before the fork")


def run(file: Path, point: str, nth: int) -> None:
    """The run of a configuration file, until `point` is reached for the nth time."""
    owner, name, when = POINTS[point]
    setattr(owner, name, _deadly(getattr(owner, name), when, nth))
    asyncio.run(assemble.run(config.load(file), Options(pace=QUICK), Silent(), environ={}))


def _deadly(inner: Callable[..., Any], when: str, nth: int) -> Callable[..., Any]:
    times = iter(range(1, 1_000_000))

    def die(reached: int) -> None:
        if reached == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(inner)
    def plain(*args: Any, **kwargs: Any) -> Any:
        reached = next(times)
        if when == "before":
            die(reached)
        result = inner(*args, **kwargs)
        if when == "after":
            die(reached)
        return result

    @functools.wraps(inner)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        reached = next(times)
        if when == "before":
            die(reached)
        result = await inner(*args, **kwargs)
        if when == "after":
            die(reached)
        return result

    return awaited if asyncio.iscoroutinefunction(inner) else plain
