"""The live proxy keeps its cache within its capacity."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from iccache import config
from iccache.examples.store import ExampleStore, open_store
from iccache.examples.writer import Writer
from iccache.learn.access import Access, InForce
from iccache.learn.eviction import CHECK_EVERY_S, EXPIRE_EVERY_S, LOW_WATER, Evictor
from iccache.metrics import Metrics
from iccache.types import ExampleStats
from tests.factories import AT, make_example

DAY_S = 86_400.0


class Live:
    """An evictor over a store with a writer thread, as the proxy has them, and a clock to turn."""

    def __init__(self, folder: Path) -> None:
        url = f"sqlite:///{folder / 'cache.db'}"
        self.store: ExampleStore = open_store(url)
        self.writer = Writer(lambda: open_store(url))
        self.metrics = Metrics()
        self.now = AT
        self.news = 0

    def evictor(self, **cache: Any) -> Evictor:
        in_force: Any = SimpleNamespace(directory=SimpleNamespace(settings=config.Config(cache=config.Cache(**cache))))
        access = Access(self.writer, None, self.store)  # type: ignore[arg-type] - nothing is selected here
        forced: InForce = in_force
        return Evictor(forced, access, self.metrics, lambda: self.now, self._kick)

    def _kick(self) -> None:
        self.news += 1

    def admit(self, count: int, **given: Any) -> None:
        with self.store.transaction():
            for n in range(count):
                self.store.admit(make_example(f"e{n:04}", **given))

    def bytes(self) -> int:
        text, embeddings = self.store.example_bytes()
        return text + 2 * embeddings

    def evicted(self, cause: str) -> float:
        return float(self.metrics.evicted.labels(cause)._value.get())


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    live = Live(tmp_path)
    yield live
    live.writer.close()


async def test_above_the_high_water_mark_it_evicts_to_the_low_one(live: Live) -> None:
    live.admit(600)
    capacity = live.bytes() // 2
    cursor = live.store.last_change()

    gone = await live.evictor(capacity_bytes=capacity).evict()

    assert 0.9 * LOW_WATER * capacity < live.bytes() <= LOW_WATER * capacity
    assert gone == 600 - live.store.count_examples() == len(live.store.changes(cursor)), "followers are told"
    assert live.evicted("space") == gone and live.evicted("expired") == 0
    assert live.news > 1, "in small transactions"


async def test_below_the_mark_nothing_is_even_solved(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    live.admit(20)
    evictor = live.evictor(capacity_bytes=live.bytes())
    monkeypatch.setattr("iccache.examples.eviction.solve", None)
    assert await evictor.evict() == 0
    assert live.store.count_examples() == 20


async def test_what_brings_offloads_stays(live: Live) -> None:
    live.admit(40)
    used = ExampleStats(offloads=3.0, offloads_at=AT)
    for n in range(5):
        live.store.admit(make_example(f"used{n}", stats=used))
    await live.evictor(capacity_bytes=live.bytes() // 4).evict()
    assert {f"used{n}" for n in range(5)} <= {row.id for row in live.store.weighed()}


async def test_what_is_too_old_goes_by_the_timer_though_there_is_room(live: Live) -> None:
    live.admit(3)
    live.store.admit(make_example("old", at=AT - 3 * DAY_S))
    evictor = live.evictor(ttl_days=2)
    assert await evictor.evict() == 1
    assert live.evicted("expired") == 1

    live.now += 1.5 * DAY_S
    evictor.expired = live.now - EXPIRE_EVERY_S + 1
    assert await evictor.evict() == 0, "not yet due"
    live.now += 1.5 * DAY_S
    assert await evictor.evict() == 3


async def test_a_look_begins_at_most_one_eviction_and_waits_for_none(live: Live) -> None:
    live.admit(30)
    evictor = live.evictor(capacity_bytes=live.bytes() // 2)
    evictor.look()
    first = evictor.task
    assert first is not None and not first.done() and live.store.count_examples() == 30
    live.now += CHECK_EVERY_S
    evictor.look()
    assert evictor.task is first
    await first
    assert live.store.count_examples() < 30
    evictor.look()
    second = evictor.task
    assert second is not None and second is not first
    await second
    evictor.look()
    assert evictor.task is second, "looked at a moment ago"
    await evictor.stop()


async def test_a_failure_is_logged_and_the_next_look_tries_again(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    live.admit(30)
    evictor = live.evictor(capacity_bytes=live.bytes() // 2)
    live.writer.close()
    evictor.look()
    assert evictor.task is not None
    await asyncio.wait({evictor.task})
    assert evictor.task.exception() is None
    assert "nothing could be evicted: the store is closed" in caplog.text
