"""Two `iccache serve` on one PostgreSQL, as on two machines; kills, and a server that is away for a while."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.e2e.served import Served, served
from tests.postgres import PASSWORD, WITH_STORE, Server

SEEN_WITHIN_S = 2.0


@asynccontextmanager
async def two(tmp_path: Path, url: str) -> AsyncIterator[tuple[Served, Served]]:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    async with (
        served(tmp_path / "one", store={"url": url}) as one,
        served(tmp_path / "other", store={"url": url}) as other,
    ):
        yield one, other


async def shown(s: Served, text: str) -> int:
    answered = await s.ask(text, "small")
    assert answered.status == 200
    return int(answered.headers["x-iccache-examples"])


async def test_what_one_was_taught_the_other_shows_and_what_one_erased_the_other_does_not(
    tmp_path: Path, postgres_url: str
) -> None:
    async with two(tmp_path, postgres_url) as (one, other):
        taught = await one.teach("What is the capital of France?", "Paris.")
        await other.until(lambda: shown(other, "What is the capital of France?"), lambda n: n == 1, SEEN_WITHIN_S)
        assert (await other.feedback(taught.id, score=1.0)).status == 204
        assert (await one.get(f"/admin/exchanges/{taught.id}")).json["feedback"][0]["score"] == 1.0
        code, _, said = await one.run("examples", "purge", "--tenant", "default", "--yes")
        assert code == 0, said
        await asyncio.sleep(1.0)
        assert await shown(other, "What is the capital of France?") == 0
        assert await shown(one, "What is the capital of France?") == 0


async def test_a_kill_in_mid_write_loses_nothing_acknowledged_and_blocks_nobody(
    tmp_path: Path, postgres_url: str
) -> None:
    async with two(tmp_path, postgres_url) as (one, other):
        acknowledged = []
        for n in range(3):
            asked = await one.ask(f"question {n}?", "large")
            live = [asyncio.create_task(one.ask(f"live {n} {i}", "large")) for i in range(8)]
            assert (await one.feedback(asked.id, score=0.25)).status == 204
            acknowledged.append(asked.id)
            await one.kill()
            await asyncio.gather(*live, return_exceptions=True)
            again = await other.ask(f"other {n}?", "large")
            await other.recorded(again.id)  # the dead one's lock is gone
            await one.start()
        for id in acknowledged:
            for each in (one, other):
                assert (await each.get(f"/admin/exchanges/{id}")).json["feedback"][0]["score"] == 0.25


async def test_while_the_server_is_away_requests_are_answered_and_recording_goes_on_afterwards(
    tmp_path: Path, postgres_server: Server, postgres_url: str
) -> None:
    async with served(tmp_path, store={"url": postgres_url}) as s:
        taught = await s.teach("What is the capital of France?", "Paris.")
        await asyncio.to_thread(postgres_server.stop)
        try:
            answered = [await s.ask(f"question {n}?", model) for n in range(3) for model in ("auto", "small", "large")]
            assert [a.status for a in answered] == [200] * 9
            assert (await s.feedback(taught.id, score=1.0)).status == 503
            assert (await s.get("/readyz")).status == 503
            await s.until(lambda: s.get("/metrics"), lambda a: b"\niccache_dropped_total{cause=" in a.body)
        finally:
            await asyncio.to_thread(postgres_server.start)
        await s.until(lambda: s.get("/readyz"), lambda a: a.status == 200, 5)
        assert (await s.feedback(taught.id, score=1.0)).status == 204
        later = await s.ask("and of Italy?", "large")
        await s.recorded(later.id)
        await s.until(lambda: shown(s, "What is the capital of France?"), lambda n: n >= 1, 5)
        assert await s.stop() == 0
    assert PASSWORD not in s.log.decode()


async def test_the_commands_work_on_it(tmp_path: Path, postgres_url: str) -> None:
    async with served(tmp_path, store={"url": postgres_url}) as s:
        taught = await s.teach("What is the capital of France?", "Paris.")
        file = tmp_path / "examples.jsonl"
        for command, expected in (
            (("check",), f"{WITH_STORE}, 1 examples"),
            (("config",), "***"),
            (("stats", "--json"), '"examples": 1'),
            (("explain", taught.id), "large"),
            (("examples", "list"), "France"),
            (("export", str(file)), ""),
        ):
            code, out, err = await s.run(*command)
            assert code == 0 and expected in out, (command, out, err)
            assert PASSWORD not in out + err
        code, _, err = await s.run("examples", "purge", "--tenant", "default", "--yes")
        assert code == 0, err
        code, out, err = await s.run("import", str(file), "--tenant", "default")
        assert code == 0, err
        assert await s.examples() == 1
        for command in (("backup", str(tmp_path / "b")), ("restore", str(file)), ("encrypt", "--in-clear")):
            code, out, err = await s.run(*command)
            assert code in (1, 2) and len(err.strip().splitlines()) == 1, (command, err)
            assert PASSWORD not in out + err


async def test_a_store_that_cannot_be_reached_at_the_start_is_a_line(tmp_path: Path, postgres_server: Server) -> None:
    url = postgres_server.url("nowhere")
    async with served(tmp_path, start=False, store={"url": url}) as s:
        with pytest.raises(AssertionError, match="createdb") as caught:
            await s.start()
        assert PASSWORD not in str(caught.value)
