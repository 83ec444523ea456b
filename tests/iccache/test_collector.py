"""Full rounds of the garbage collector come where nobody waits. On the real collector."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from iccache import collector
from iccache.collector import MIDDLE_AGED, YOUNG, Collector


class Ring:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


class World:
    def __init__(self, **more: Any) -> None:
        self.begun = self.open = 0
        self.busy = False
        self.collector = Collector(self.asked, lambda: self.open, **more)

    def asked(self) -> int:
        self.begun += collector.FEW * self.busy
        return self.begun


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(collector, "LOOK_EVERY_S", 0.02)
    before = gc.get_threshold()
    yield
    assert gc.get_threshold() == before


def full() -> int:
    return int(gc.get_stats()[2]["collections"])


def grow() -> list[list[int]]:
    """So many objects that stay that the collector has looked at the middle-aged more than once."""
    return [[i] for i in range(YOUNG * (MIDDLE_AGED + 2) * 3)]


def aged() -> weakref.ref[Ring]:
    """Garbage that has outlived the rounds over the young."""
    ring = Ring()
    gc.collect(1)
    found = weakref.ref(ring)
    del ring
    gc.collect(1)
    assert found() is not None
    return found


async def test_no_full_round_while_requests_come() -> None:
    world = World()
    world.collector.start()
    try:
        before, garbage = full(), aged()
        held = []
        world.busy = True
        for _ in range(10):
            held.append(grow())
            await asyncio.sleep(0.03)
        assert full() == before and garbage() is not None
        world.busy, world.open = False, 1  # one that takes long
        for _ in range(5):
            held.append(grow())
            await asyncio.sleep(0.03)
        assert full() == before
        world.open = 0
        await asyncio.sleep(0.1)
        assert full() == before + 1 and garbage() is None
    finally:
        world.collector.stop()


async def test_without_it_full_rounds_come_while_requests_do() -> None:
    before = full()
    held = [grow() for _ in range(15)]
    assert full() > before
    assert held


async def test_where_nothing_has_grown_old_there_is_nothing_to_do() -> None:
    world = World()
    world.collector.start()
    try:
        before = full()
        await asyncio.sleep(0.2)
        assert full() == before
    finally:
        world.collector.stop()


async def test_what_is_left_is_not_looked_at_again() -> None:
    world = World()
    world.collector.start()
    try:
        held = grow()
        assert len(gc.get_objects(2)) + len(gc.get_objects(1)) > len(held) / 2
        await asyncio.sleep(0.1)
        assert len(gc.get_objects(2)) < len(held) / 10
    finally:
        world.collector.stop()


async def test_where_requests_never_cease_there_is_one_now_and_then() -> None:
    world = World(at_latest_s=0.1)
    world.collector.start()
    try:
        garbage, world.busy = aged(), True
        await asyncio.sleep(0.3)
        assert garbage() is None
    finally:
        world.collector.stop()
