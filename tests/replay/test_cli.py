"""The job as a process: what cron sees, and what a kill leaves."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from iccache import config
from replay.prices import NUSD
from tests.fakes import Script
from tests.replay.world import World, bad, examples_of, fill, make_settings, opened

ROOT = Path(__file__).parents[2]


class Process:
    """`python -m replay` with a configuration file."""

    def __init__(self, settings: config.Config, folder: Path) -> None:
        self.file = folder / "iccache.toml"
        self.file.write_text(config.to_toml(settings))
        self.child: asyncio.subprocess.Process | None = None

    async def start(self, command: str, *more: str) -> asyncio.subprocess.Process:
        self.child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "replay", command, "--config", str(self.file), *more),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        return self.child

    async def run(self, command: str, *more: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        child = await self.start(command, *more)
        out, err = await asyncio.wait_for(child.communicate(), 30)
        assert child.returncode is not None
        return child.returncode, out.decode(), err.decode()

    def kill(self) -> None:
        assert self.child is not None
        os.kill(self.child.pid, signal.SIGKILL)


async def test_run_prints_a_report_and_writes_json_and_metrics(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(n) for n in range(3)])
    process = Process(settings, tmp_path)
    metrics = tmp_path / "replay.prom"

    code, out, err = await process.run("run", "--json", str(tmp_path / "r.json"), "--metrics-file", str(metrics))

    assert code == 0, err
    assert "3 improved" in out and "nothing_left" in out
    assert "3 of 3" in err
    told = json.loads((tmp_path / "r.json").read_text())
    assert told["examples"]["improved"] == 3
    assert told["usd"]["confirmed"] == world.billed_nusd(settings) / NUSD
    values = dict(re.findall(r"^(iccache_replay_\S+) (\S+)$", metrics.read_text(), re.MULTILINE))
    assert float(values["iccache_replay_improved_total"]) == 3
    assert float(values['iccache_replay_usd_total{state="confirmed"}']) == told["usd"]["confirmed"]
    assert sorted(values) == [
        "iccache_replay_evicted_total",
        "iccache_replay_improved_total",
        "iccache_replay_last_success_timestamp_seconds",
        "iccache_replay_replayed_total",
        "iccache_replay_runs_total",
        "iccache_replay_seconds_total",
        'iccache_replay_usd_total{state="confirmed"}',
        'iccache_replay_usd_total{state="unconfirmed"}',
    ]


class Gateway:
    """A small push gateway: keeps what was put last, and under which path."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.got: list[tuple[str, str, str]] = []  # method, path, body

    async def __aenter__(self) -> str:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._take)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def __aexit__(self, *_: object) -> None:
        await self.runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        self.got.append((request.method, request.path, await request.text()))
        return web.Response(status=self.status)


async def test_metrics_are_pushed_to_a_gateway(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(n) for n in range(2)])
    gateway = Gateway()
    async with gateway as url:
        code, _, err = await Process(settings, tmp_path).run("run", "--push-gateway", url)
    assert code == 0, err
    ((method, path, body),) = gateway.got
    assert (method, path) == ("PUT", "/metrics/job/iccache-replay")
    assert "\niccache_replay_improved_total 2.0\n" in body
    assert f'iccache_replay_usd_total{{state="confirmed"}} {world.billed_nusd(settings) / NUSD}' in body


async def test_a_gateway_that_takes_nothing_is_one_line_and_exit_1(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0)])
    async with Gateway(status=500) as url:
        code, out, err = await Process(settings, tmp_path).run("run", "--push-gateway", url)
    assert code == 1 and "1 improved" in out, "the report is printed all the same"
    assert "push gateway" in err and "500" in err and "Traceback" not in err


async def test_plan_says_what_run_does_and_calls_nobody(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url, cache={"capacity_bytes": 350})
    fill(settings, [bad(n) for n in range(4)])
    process = Process(settings, tmp_path)

    code, out, err = await process.run("plan", "--json")
    assert code == 0, err
    planned = json.loads(out)
    assert not world.upstream.requests
    assert len(examples_of(settings)) == 4

    code, out, err = await process.run("run", "--json", "--workers", "1")
    assert code == 0, err
    told = json.loads(out)
    order = [call.prompt.split()[-1] for call in world.asked("teacher")]
    assert order == [one["id"] for one in planned["first"]]
    assert told["examples"]["considered"] == planned["examples"]["considered"] == planned["examples"]["covered"] == 4
    assert told["usd"]["confirmed"] <= planned["usd"]["most"]
    assert told["evicted"]["evicted"] == planned["evicted"]["evicted"] == 1
    assert told["cache"]["bytes"] <= told["cache"]["capacity_bytes"] == 350


async def test_an_empty_cache_is_done_at_once(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [])
    code, out, _ = await Process(settings, tmp_path).run("run", "--json")
    assert code == 0
    assert json.loads(out)["examples"]["considered"] == 0


async def test_a_teacher_that_is_down_is_one_line_and_exit_1(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, "http://127.0.0.1:9/v1")
    fill(settings, [bad(0)])
    code, out, err = await Process(settings, tmp_path).run("run", "--json")
    assert code == 1
    assert json.loads(out)["stopped"] == "error"
    assert [line for line in err.splitlines() if line.startswith("iccache-replay: large cannot be reached")]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("change", "args", "code", "said"),
    [
        ("nonsense", [], 2, "is not TOML"),
        ("[replay]\nbudget = 1", [], 2, "unknown key replay.budget"),
        ("", ["--bogus"], 2, "No such option"),
        ("", ["--limit", "-1"], 2, "--limit"),
        ("", [], 2, "at least one [[backends]]"),
        ('[[backends]]\nname = "b"\nbase_url = "http://x"\nmodel = "m"\n', [], 1, "there is no store"),
    ],
)
async def test_wrong_usage_is_one_line(tmp_path: Path, change: str, args: Sequence[str], code: int, said: str) -> None:
    process = Process(config.Config(), tmp_path)
    process.file.write_text(change + '\n[store]\nurl = "sqlite:///nowhere.db"' if "replay" not in change else change)
    got, out, err = await process.run("run", *args)
    assert (got, out) == (code, "")
    assert said in err and "Traceback" not in err


async def test_a_missing_key_is_named(world: World, tmp_path: Path) -> None:
    settings = make_settings(
        tmp_path, world.upstream.base_url, backends=[_backend(world, key_env="REPLAY_TEST_KEY")], judge={}
    )
    fill(settings, [bad(0)])
    code, _, err = await Process(settings, tmp_path).run("run")
    assert code == 2 and "REPLAY_TEST_KEY" in err


def _backend(world: World, **more: Any) -> dict[str, Any]:
    return {"name": "large", "base_url": world.upstream.base_url, "model": "teacher", **more}


async def check_after_kills(world: World, settings: config.Config, process: Process, kills: int) -> None:
    """Run to the end; then nothing is lost, nothing done twice, and the books agree with the upstream's."""
    world.on_call = lambda number: None
    code, out, err = await process.run("run", "--json")
    assert code == 0, err
    told = json.loads(out)
    found = examples_of(settings)
    assert all(e.answer == f"q9 to {e.request}" and e.stats.replays == 1 for e in found.values())
    assert told["examples"]["improved"] == len(found)
    confirmed, unconfirmed = (round(told["usd"][state] * NUSD) for state in ("confirmed", "unconfirmed"))
    billed = world.billed_nusd(settings)
    assert confirmed <= billed <= confirmed + unconfirmed <= settings.replay.usd_budget * NUSD
    assert told["calls"]["unconfirmed"] <= kills
    assert len(world.billed) <= 3 * len(found) + kills, "only a call in flight is asked once more"
    store = opened(settings)
    assert not store.rows("SELECT * FROM replay_answers"), "answers are kept no longer than needed"
    assert store.row("SELECT count(*) FROM replay_runs")[0] == 1, "it was one run, with one budget"  # type: ignore[index]


async def test_a_kill_at_every_call_loses_nothing_and_breaks_no_budget(world: World, tmp_path: Path) -> None:
    """The upstream kills the job as soon as it has counted the call: before each answer arrives, in turn."""
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(n) for n in range(2)])
    process = Process(settings, tmp_path)

    calls = 6  # of two examples: an answer and two judgements each
    for nth in range(1, calls + 1):
        last = len(world.billed) + (1 if nth == 1 else 2)  # what was in flight is asked again, and the next one is cut
        world.on_call = lambda number, last=last: process.kill() if number == last else None
        child = await process.start("run", "--workers", "1")
        await asyncio.wait_for(child.communicate(), 30)
        assert child.returncode == -signal.SIGKILL, nth
    await check_after_kills(world, settings, process, kills=calls)
    assert len(world.billed) == 2 * calls


async def test_kills_at_random_times_lose_nothing_and_break_no_budget(world: World, tmp_path: Path) -> None:
    for script in world.upstream.by_model.values():
        script.before_body_s = 0.01
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(n) for n in range(12)])
    process = Process(settings, tmp_path)
    rng = random.Random(6)

    kills = 0
    for _ in range(5):
        first = asyncio.Event()
        world.on_call = lambda number, first=first: first.set()
        child = await process.start("run", "--workers", "2")
        done = asyncio.create_task(child.communicate())
        await asyncio.wait({done, asyncio.create_task(first.wait())}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(rng.uniform(0, 0.08))
        if done.done():
            break
        process.kill()
        kills += 2  # two workers, each with a call in flight
        await done
    assert kills
    await check_after_kills(world, settings, process, kills)


async def test_two_processes_at_once_do_each_example_once(world: World, tmp_path: Path) -> None:
    for script in world.upstream.by_model.values():
        script.before_head_s = 0.02
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(n) for n in range(30)])

    ended = await asyncio.gather(
        *(Process(settings, tmp_path).run("run", "--json", "--workers", "2") for _ in range(2))
    )

    assert [code for code, _, _ in ended] == [0, 0]
    assert len({call.prompt for call in world.asked("teacher")}) == len(world.asked("teacher")) == 30
    assert all(e.stats.replays == 1 for e in examples_of(settings).values())


async def test_sigterm_lets_the_call_in_flight_end_and_the_next_run_goes_on(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(n) for n in range(4)])
    process = Process(settings, tmp_path)

    def stop(number: int) -> None:
        assert process.child is not None
        process.child.send_signal(signal.SIGTERM)

    world.upstream.by_model["teacher"].before_body_s = 0.1
    world.on_call = lambda number: stop(number) if number == 1 else None
    code, out, err = await process.run("run", "--json", "--workers", "1")
    assert code == 1, err
    told = json.loads(out)
    assert (told["stopped"], told["examples"]["improved"], told["calls"]["unconfirmed"]) == ("interrupted", 1, 0)

    code, out, _ = await process.run("run", "--json")
    assert (code, json.loads(out)["examples"]["improved"]) == (0, 3)


async def test_a_full_upstream_queue_is_waited_for(world: World, tmp_path: Path) -> None:
    world.upstream.queue.append(Script(status=429, headers={"Retry-After": "1"}))
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [bad(0)])
    code, out, _ = await Process(settings, tmp_path).run("run", "--json")
    assert code == 0
    first, second, *_ = world.upstream.requests
    assert second.at - first.at >= 1
    assert json.loads(out)["usd"]["unconfirmed"] == 0
