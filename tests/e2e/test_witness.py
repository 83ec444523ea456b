"""What is seen of answers without being told, through the whole proxy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iccache.data import stats
from tests.e2e.world import World, world

JSON = {"response_format": {"type": "json_object"}}


async def sources(w: World, request_id: str) -> dict[str, float]:
    for _ in range(3):  # what is seen begins what is written
        await w.proxy.learner.background.drain(5)
    told = (await w.get(f"/admin/exchanges/{request_id}")).json["feedback"]
    return {f["source"]: f["score"] for f in told}


def always(w: World) -> None:
    """Every failure is told, however rare."""
    w.proxy.learner.witness.failing._draw = lambda: 0.0
    w.proxy.learner.witness.dissatisfying._draw = lambda: 0.0


async def test_a_failed_check_is_feedback_and_a_passed_one_is_none(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        always(w)
        w.small.script.answer = w.large.script.answer = "no JSON at all"
        bad = await w.ask("Who?", **JSON)
        w.small.script.answer = w.large.script.answer = '{"who": "me"}'
        good = await w.ask("Who?", **JSON)
        assert await sources(w, bad.id) == {"check": 0.0}
        assert await sources(w, good.id) == {}
        assert (await w.recorded(good.id)).quality is None
        assert 'iccache_feedback_total{source="check"} 1.0' in (await w.get("/metrics")).body.decode()


async def test_a_user_outweighs_a_check(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        always(w)
        w.small.script.answer = w.large.script.answer = "no JSON at all"
        asked = await w.ask("Who?", **JSON)
        assert await sources(w, asked.id) == {"check": 0.0}
        await w.feedback(asked.id, score=1)
        assert (await w.recorded(asked.id)).quality == pytest.approx(1 / 1.7)


async def test_a_backend_that_always_fails_is_noticed_and_a_rare_failure_is_not(tmp_path: Path) -> None:
    async with world(tmp_path, seed=3) as w:
        w.small.script.answer = "no JSON at all"
        for _ in range(40):
            await w.ask("Who?", "small", **JSON)
        await w.proxy.learner.background.drain(5)
        known = await w.proxy.read(lambda store: [e.quality for e in store.exchanges(0) if e.quality is not None])
        assert 10 <= len(known) <= 35 and set(known) == {0.0}


async def test_the_same_asked_again_is_feedback_on_the_answer_before(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        always(w)
        now = [1000.0]
        w.proxy.wall = w.proxy.learner.wall = lambda: now[0]
        question, user = "What is the capital of the largest country in South America?", {"user": "u1"}
        first = await _at(w, now, 1000.0, question, user)
        second = await _at(w, now, 1030.0, question, user)
        other = await _at(w, now, 1060.0, "How high is the highest mountain of the Alps, and where is it?", user)
        assert await sources(w, first) == {"reask": 0.25}
        assert await sources(w, second) == {} and await sources(w, other) == {}


async def _at(w: World, now: list[float], at: float, question: str, body: dict[str, Any]) -> str:
    now[0] = at
    asked = await w.ask(question, **body)
    await w.proxy.learner.background.drain(5)
    return asked.id


async def test_the_bias_of_each_source_is_told(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        always(w)
        w.small.script.answer = w.large.script.answer = "no JSON at all"
        for question, score in (("Who?", 0.2), ("Where?", 0.4), ("When?", 0.3), ("Why?", None)):
            asked = await w.ask(question, **JSON)
            assert await sources(w, asked.id) == {"check": 0.0}
            if score is not None:
                await w.feedback(asked.id, score=score)
        found = await w.proxy.read(lambda store: stats.stats(store, w.proxy.settings, 0.0, None))
        check, user = found["feedback"]
        assert (check["source"], check["scores"], check["scored_by_users_too"]) == ("check", 4, 3)
        assert check["bias"] == pytest.approx(-0.3) and check["bias_low"] < -0.3 < check["bias_high"]
        assert (user["source"], user["scores"], user["bias"]) == ("user", 3, None)
        stats.show(found)
        w.proxy.learner.upkeep.looked_after = w.proxy.learner.upkeep.compared_at = 0.0
        await w.proxy.learner.upkeep()
        assert 'iccache_feedback_bias{source="check"} -0.3' in (await w.get("/metrics")).body.decode()
