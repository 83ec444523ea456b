"""Fifty kills at named points: nothing is lost, nothing is done twice, no budget is broken, and the books agree."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from iccache import config
from iccache.types import ExampleStats
from replay.job import Stop
from replay.prices import NUSD
from tests.replay import killed
from tests.replay.world import World, bad, examples_of, fill, make_settings, opened, replayed

KILLS = 50
EXAMPLES = 60


class Killer:
    """Starts runs that kill themselves, from a server that has imported everything: quickly, and free of torch."""

    def __init__(self, settings: config.Config, folder: Path) -> None:
        self.file = folder / "iccache.toml"
        self.file.write_text(config.to_toml(settings))
        self.forks = multiprocessing.get_context("forkserver")
        self.forks.set_forkserver_preload(["tests.replay.killed"])

    async def kill_at(self, point: str, nth: int) -> int | None:
        """How the process ended."""
        process = self.forks.Process(target=killed.run, args=(self.file, point, nth))
        process.start()
        await asyncio.to_thread(process.join, 60)
        return process.exitcode


def check(world: World, settings: config.Config, examples: int = EXAMPLES) -> None:
    """What holds after every kill."""
    path = Path(settings.store.url.removeprefix("sqlite:///"))
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert not db.execute("PRAGMA foreign_key_check").fetchall()
        confirmed, bound = db.execute(
            "SELECT coalesce(sum(CASE state WHEN 'confirmed' THEN nusd ELSE 0 END), 0),"
            " coalesce(sum(CASE state WHEN 'confirmed' THEN nusd WHEN 'reserved' THEN reserved_nusd END), 0)"
            " FROM replay_calls"
        ).fetchone()
    assert confirmed <= world.billed_nusd(settings) <= bound <= settings.replay.usd_budget * NUSD
    found = examples_of(settings)
    assert len(found) == examples
    for example in found.values():
        old, new = f"q3 of {int(example.id[1:])}", f"q9 to {example.request}"
        assert (example.answer, example.stats.replays) in ((old, 0), (new, 1)), example.id


async def test_fifty_kills_at_named_points_lose_nothing_and_break_no_budget(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    used = ExampleStats(uses=9, credit=9.0, gain=0.9)  # so that asking again pays to the last
    fill(settings, [bad(n, at=time.time(), stats=used) for n in range(EXAMPLES)])
    killer, rng = Killer(settings, tmp_path), random.Random(50)

    for n in range(KILLS):
        point = [*killed.POINTS][n % len(killed.POINTS)]
        assert await killer.kill_at(point, rng.randint(1, 3)) == -signal.SIGKILL, point
        check(world, settings)

    report = await replayed(settings)

    check(world, settings)
    assert report.stopped is Stop.NOTHING_LEFT and report.resumed
    assert report.improved == EXAMPLES, "every one of them, and none twice"
    assert all(e.stats.replays == 1 for e in examples_of(settings).values())
    assert report.unconfirmed_calls <= KILLS, "at most one call is in flight"
    assert len(world.billed) <= 3 * EXAMPLES + KILLS, "only a call in flight is asked once more"
    billed = world.billed_nusd(settings)
    assert report.confirmed_nusd <= billed <= report.confirmed_nusd + report.unconfirmed_nusd
    assert report.unconfirmed_nusd > 0
    store = opened(settings)
    assert not store.rows("SELECT * FROM replay_answers") and not store.rows("SELECT * FROM replay_workers")


async def test_kills_use_up_a_small_budget_and_never_break_it(world: World, tmp_path: Path) -> None:
    """What was in flight stays reserved, so a budget can end in calls that nobody knows the end of."""
    settings = make_settings(tmp_path, world.upstream.base_url, replay={"usd_budget": 0.02})
    fill(settings, [bad(n) for n in range(20)])
    killer = Killer(settings, tmp_path)

    kills = 0
    while await killer.kill_at("after calling", 1) == -signal.SIGKILL:
        kills += 1
        check(world, settings, 20)

    check(world, settings, 20)
    assert 2 <= kills <= 6, "then no call was covered, none was made, and the run came to its end"
    assert len(world.billed) == kills
    run = opened(settings).row("SELECT count(*), max(completed_at) FROM replay_runs")
    assert run is not None and run[0] == 1 and run[1] is not None

    assert (await replayed(settings)).improved > 0, "the next run has a budget of its own"
