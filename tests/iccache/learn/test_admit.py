"""What was recorded becomes an example beside the records, and never at their cost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from iccache.learn import admit
from tests.e2e.world import World, world


def dropped(w: World, cause: str = "busy") -> float:
    return float(w.proxy.metrics.dropped.labels(cause)._value.get())


async def taught(w: World, count: int) -> None:
    """So many answers of the teacher, all different, asked for together; all of them are recorded."""
    answers = await asyncio.gather(*(w.ask(f"What is item {i} of list {i * 7919}?", "large") for i in range(count)))
    assert all(answer.status == 200 for answer in answers)
    for answer in answers:
        assert await w.recorded(answer.id) is not None


async def test_all_of_many_at_once_become_examples(tmp_path: Path) -> None:
    async with world(tmp_path, cache={"merge_similarity": 1.0}) as w:
        await taught(w, 3 * admit.WRITTEN_AT_ONCE + 5)
        await w.until(w.examples, lambda n: n == 3 * admit.WRITTEN_AT_ONCE + 5)
        assert dropped(w) == 0


async def test_records_come_first_and_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admit, "MOST_WAITING", 5)
    async with world(tmp_path, cache={"merge_similarity": 1.0}) as w:
        admission = w.proxy.learner.recorder.admission
        admission.behind = lambda: True
        await taught(w, 8)
        assert await w.examples() == 0
        assert dropped(w) == 3 and dropped(w, "store") == 0
        admission.behind = lambda: False
        await w.until(w.examples, lambda n: n == 5)


async def test_what_nobody_foresaw_costs_only_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admit, "WRITTEN_AT_ONCE", 1)
    async with world(tmp_path, cache={"merge_similarity": 1.0}) as w:
        near, faults = w.proxy.select.near, []

        def broken(texts: object, now: float) -> object:
            if not faults:
                faults.append(texts)
                raise ValueError("a fault of ours")
            return near(texts, now)  # type: ignore[arg-type]

        monkeypatch.setattr(w.proxy.select, "near", broken)
        await taught(w, 3)
        await w.until(w.examples, lambda n: n == 2)
        assert faults


async def test_the_end_waits_for_what_is_on_its_way(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        answer = await w.ask("What is the capital of France?", "large")
        await w.proxy.learner.background.drain(10)
        assert await w.recorded(answer.id) is not None
        assert await w.examples() == 1
