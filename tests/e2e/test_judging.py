"""Answers compared in the background, through the whole proxy."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from iccache.examples.sqlite.store import SqliteStore
from iccache.types import DecisionKind, Exchange
from tests.e2e.world import World, world
from tests.fakes import Script


def prefers(word: str) -> Script:
    """A judge that prefers the answer with `word` in it, wherever it stands; else a tie."""

    def verdict(messages: list[dict[str, str]]) -> str:
        text = messages[-1]["content"]
        first = text.index(word) < text.index("--- answer B") if word in text else None
        return "tie" if first is None else "A" if first else "B"

    return Script(answer=verdict)


def judged(**judge: Any) -> dict[str, Any]:
    """The large backend judges too: the fakes tell what it is asked apart by the prompt."""
    return {"routing": {"policy": "student"}, "judge": {"sample_rate": 1.0, "usd_per_day": 10.0} | judge}


def both(w: World, small: str, large: str, better: str) -> None:
    w.small.script.answer = small
    verdict = prefers(better).answer
    assert callable(verdict)
    w.large.script.answer = lambda m: verdict(m) if "--- answer A" in m[-1]["content"] else large


async def compared(w: World, n: int = 1) -> list[Exchange]:
    """The answers that were asked for in the background, once there are `n`."""

    async def look() -> list[Exchange]:
        found = await w.proxy.read(lambda store: list(store.exchanges(0)))
        return [e for e in found if e.decision is DecisionKind.COMPARED and e.quality is not None]

    found: list[Exchange] = await w.until(look, lambda found: len(found) >= n)
    await w.proxy.learner.catch_up()
    return found


@pytest.mark.parametrize(("better", "small", "large"), [("good", 1.0, 0.0), ("fine", 0.0, 1.0), ("neither", 1.0, 1.0)])
async def test_an_offloaded_answer_is_compared_with_the_teachers(
    tmp_path: Path, better: str, small: float, large: float
) -> None:
    async with world(tmp_path, **judged()) as w:
        both(w, "a good one", "a fine one", better)
        asked = await w.ask("Which is better?")
        assert (asked.header("backend"), asked.text) == ("small", "a good one")
        (other,) = await compared(w)
        mine = await w.recorded(asked.id)
        assert (mine.quality, other.quality) == (small, large)
        assert (other.backend, other.answer) == ("large", "a fine one")
        assert other.extra["compared_with"] == asked.id and other.cost_usd == 0 and other.session is None
        assert len(w.large.requests) == 3, "one answer, and both orders"
        told = (await w.get(f"/admin/exchanges/{asked.id}")).json["feedback"]
        assert [(f["source"], f["score"]) for f in told] == [("judge", small)]
        metrics = (await w.get("/metrics")).body.decode()
        assert 'iccache_feedback_total{source="judge"} 2.0' in metrics
        spent = await w.proxy.read(lambda store: store.judged_usd(0))
        assert 0 < spent < 0.001, "what was set aside has given way to what it cost"


async def test_the_same_answer_needs_no_judge(tmp_path: Path) -> None:
    async with world(tmp_path, **judged()) as w:
        both(w, "same", "same ", "x")
        await w.ask("Which is better?", stream=True)
        (other,) = await compared(w)
        assert other.quality == 1.0 and len(w.large.requests) == 1


async def test_what_the_floor_withheld_is_asked_so_that_evidence_returns(tmp_path: Path) -> None:
    sections = judged() | {"routing": {"policy": "student", "certify_first": True}}
    async with world(tmp_path, **sections) as w:
        both(w, "a good one", "a fine one", "good")
        asked = await w.ask("Which is better?")
        assert asked.header("backend") == "large"
        (other,) = await compared(w)
        assert (other.backend, other.quality) == ("small", 1.0)
        for i in range(30):
            await w.ask(f"And which of these {i}?")
        await compared(w, 31)
        assert (await w.ask("And now?")).header("backend") == "small", "proved without a single answer risked"


async def test_duels_where_the_router_is_of_two_minds(tmp_path: Path) -> None:
    sections = {"routing": {"policy": "uniform"}, "judge": {"duel_share": 1.0, "usd_per_day": 10.0}}
    async with world(tmp_path, **sections) as w:
        both(w, "a good one", "a fine one", "good")
        asked = await w.ask("Which is better?")
        (other,) = await compared(w)
        qualities = {other.backend: other.quality, asked.header("backend"): (await w.recorded(asked.id)).quality}
        assert qualities == {"small": 1.0, "large": 0.0}


@pytest.mark.parametrize(
    ("sections", "headers"),
    [
        ({"judge": {}}, {}),
        (judged(usd_per_day=0.0), {}),
        (judged(), {"x-iccache-store": "no"}),
        (judged(), {"x-iccache-backend": "small"}),
    ],
)
async def test_nothing_is_asked_where_nothing_may_be(
    tmp_path: Path, sections: dict[str, Any], headers: dict[str, str]
) -> None:
    async with world(tmp_path, **{"routing": {"policy": "student"}} | sections) as w:
        both(w, "a good one", "a fine one", "good")
        await w.ask("Which is better?", headers=headers)
        await w.proxy.learner.background.drain(5)
        assert w.large.requests == []


@pytest.mark.parametrize("said", ["I cannot say", ""])
async def test_a_judge_that_gives_no_verdict_teaches_nothing(tmp_path: Path, said: str) -> None:
    async with world(tmp_path, **judged()) as w:
        both(w, "a good one", "a fine one", "good")
        w.large.script.answer = lambda m: said if "--- answer A" in m[-1]["content"] else "a fine one"
        asked = await w.ask("Which is better?")
        await w.proxy.learner.background.drain(5)
        assert (await w.recorded(asked.id)).quality is None


async def test_a_judge_that_goes_by_the_place_is_found_out(tmp_path: Path) -> None:
    async with world(tmp_path, **judged()) as w:
        both(w, "a good one", "a fine one", "good")
        w.large.script.answer = lambda m: "A" if "--- answer A" in m[-1]["content"] else "a fine one"
        ids = []
        for i in range(14):
            ids.append((await w.ask(f"Which is better, {i}?")).id)
            await w.proxy.learner.background.drain(5)
        qualities = [(await w.recorded(i)).quality for i in ids]
        assert qualities[-1] is None and set(qualities[:9]) == {1.0}
        assert "iccache_judge_position_bias 1.0" in (await w.get("/metrics")).body.decode()


async def test_a_failing_teacher_costs_nothing_and_breaks_nothing(tmp_path: Path) -> None:
    async with world(tmp_path, **judged()) as w:
        both(w, "a good one", "a fine one", "good")
        w.large.script.status = 500
        asked = await w.ask("Which is better?")
        await w.proxy.learner.background.drain(5)
        assert asked.status == 200 and (await w.recorded(asked.id)).quality is None
        assert await w.proxy.read(lambda store: store.judged_usd(0)) == 0


def test_the_budget_holds_however_many_set_aside_at_once(tmp_path: Path) -> None:
    """Eight connections, as of eight workers; each takes what it can get."""
    path, budget = tmp_path / "ic.db", 1_000
    SqliteStore(path).close()

    def take(_: int) -> int:
        taken = 0
        with closing(SqliteStore(path)) as store:
            for i in range(20):
                number = store.reserve_judging(1000.0, f"r{i}", "answer", 30, budget)
                if number is not None:
                    taken += 30
                    if i % 2:
                        store.settle_judging(number, 10)
                        taken -= 20
        return taken

    with ThreadPoolExecutor(8) as pool:
        taken = sum(pool.map(take, range(8)))
    with closing(SqliteStore(path)) as store:
        assert store.judged_usd(0) * 1e9 == pytest.approx(taken)
        assert budget - 30 < taken <= budget
        assert store.reserve_judging(1000.0 + 86400, "r", "answer", 30, budget) is not None, "a new day"


async def test_the_budget_holds_under_many_requests_at_once(tmp_path: Path) -> None:
    async with world(tmp_path, **judged(usd_per_day=0.1)) as w:
        both(w, "a good one", "a fine one", "good")
        await asyncio.gather(*(w.ask(f"Which is better, {i}?", max_tokens=2000) for i in range(24)))
        await w.proxy.learner.background.drain(10)
        answers = [r for r in w.large.requests if b"--- answer A" not in r.body]
        assert len(answers) >= 1
        assert await w.proxy.read(lambda store: store.judged_usd(0)) <= 0.1
