"""A backend's own limit per minute is kept: what is over it goes to another, by the router's own choice."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.world import world


async def test_what_is_over_the_limit_goes_to_another(tmp_path: Path) -> None:
    async with world(tmp_path, small={"requests_per_minute": 6}, routing={"policy": "student"}) as w:
        first, second = await w.ask("one"), await w.ask("two")
        assert [a.header("backend") for a in (first, second)] == ["small", "large"]
        assert (second.header("decision"), second.header("propensity")) == ("routed", "1")
        pinned = await w.ask("three", model="small")  # whom there is no other for is asked all the same
        assert (pinned.status, pinned.header("backend")) == (200, "small")


async def test_a_limit_of_tokens_is_kept(tmp_path: Path) -> None:
    async with world(tmp_path, small={"tokens_per_minute": 12}, routing={"policy": "student"}) as w:
        answers = [await w.ask("a question of a few words") for _ in range(2)]
        assert [a.header("backend") for a in answers] == ["small", "large"]


async def test_a_fallback_passes_over_who_is_used_up(tmp_path: Path) -> None:
    async with world(tmp_path, large={"requests_per_minute": 6}, routing={"policy": "teacher"}) as w:
        await w.ask("one", headers={"x-iccache-session": "s"})
        again = await w.ask("two", headers={"x-iccache-session": "s"})
        assert (again.header("backend"), again.header("decision"), again.header("reason")) == (
            "small", "fallback", "limit",
        )  # fmt: skip
