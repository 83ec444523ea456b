"""The floor under quality, through the whole proxy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from router.floor import Standing
from tests.e2e.world import World, world

BAD = {"role": "system", "content": "Translate."}
GOOD = {"role": "system", "content": "Spell."}


async def served(w: World, n: int, system: dict[str, str], small: float, large: float = 1.0) -> list[str]:
    """Who answered each of `n` requests; a score is fed back for each."""
    names = []
    for i in range(n):
        messages = [system, {"role": "user", "content": f"Number {i}, please."}]
        answered = await w.ask("", messages=messages)
        name = answered.header("backend") or ""
        assert (await w.feedback(answered.id, score=small if name == "small" else large)).status == 204
        names.append(name)
    return names


def fixed(**routing: Any) -> dict[str, Any]:
    return {"routing": {"policy": "student", "probe_share": 0.1} | routing}


async def test_a_student_that_fails_is_held_back_though_the_policy_is_fixed_to_it(tmp_path: Path) -> None:
    async with world(tmp_path, **fixed()) as w:
        assert set(await served(w, 5, GOOD, 1.0)) == {"small"}
        names = await served(w, 60, BAD, 0.0)
        assert names[0] == "small" and names[-25:].count("small") <= 8
        assert set(await served(w, 15, GOOD, 1.0)) == {"small"}, "another kind of request is another matter"
        metrics = (await w.get("/metrics")).body.decode()
        assert 'iccache_floor_held{backend="small"} 1.0' in metrics
        withheld = [e async for e in _withheld(w)]
        assert withheld and all(e.backend == "large" and e.extra["withheld"] == "small" for e in withheld)
        assert all(abs(e.propensity - 0.9) < 1e-9 for e in withheld)

    async with world(tmp_path, **fixed()) as w:  # a restart
        assert _standing(w) == [Standing.HELD, Standing.OPEN]
        again = await served(w, 20, BAD, 0.0)
        assert again.count("small") <= 6


async def test_with_certify_first_nothing_is_offloaded_before_it_is_proved(tmp_path: Path) -> None:
    async with world(tmp_path, **fixed(certify_first=True)) as w:
        assert set(await served(w, 5, GOOD, 1.0)) == {"large"}
        for i in range(30):  # evidence from requests that ask for the student by name
            messages = [GOOD, {"role": "user", "content": f"Number {i}, please."}]
            await w.feedback((await w.ask("", "small", messages=messages)).id, score=1)
        assert set(await served(w, 5, GOOD, 1.0)) == {"small"}
        assert set(await served(w, 5, BAD, 1.0)) == {"large"}


async def test_shadow_mode_notes_what_would_have_served(tmp_path: Path) -> None:
    async with world(tmp_path, **fixed(shadow=True)) as w:
        assert set(await served(w, 3, GOOD, 1.0)) == {"large"}
        withheld = [e async for e in _withheld(w)]
        assert [e.extra["withheld"] for e in withheld] == ["small"] * 3


async def _withheld(w: World) -> Any:
    for exchange in await w.proxy.read(lambda store: list(store.exchanges(0))):
        if "withheld" in exchange.extra:
            yield exchange


def _standing(w: World) -> list[Standing]:
    found = {k: ledger.standing.get("small") for k, ledger in w.proxy.floor.ledgers_.items() if k[1]}
    return sorted(s for s in found.values() if s)
