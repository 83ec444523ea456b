"""The life of `iccache serve`: signals, reloads, workers, several processes on one store: SPEC, 4 and 7."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from threadpoolctl import threadpool_info

from iccache import config
from iccache.api.serve import bound, listen, run_worker
from tests.e2e.served import Served, served
from tests.e2e.world import settings, world
from tests.fakes import Script

SLOW = "a b c d e f g h i j k l"  # a dozen pieces


def streamed(text: str = SLOW, model: str = "large") -> dict[str, Any]:
    return {"model": model, "stream": True, "messages": [{"role": "user", "content": text}]}


async def begun(s: Served) -> Any:
    """A live stream: its response, the first piece read."""
    response = await s.http.post(s.url + "/v1/chat/completions", json=streamed())
    assert await response.content.readany()
    return response


def told_to(s: Served, number: int) -> None:
    s.process.process.send_signal(number)


@pytest.mark.parametrize("workers", [1, 2])
async def test_sigterm_lets_a_live_stream_end_while_readyz_says_503(tmp_path: Path, workers: int) -> None:
    async with served(tmp_path, server={"workers": workers, "drain_s": 20}) as s:
        s.large.script = Script(between_s=0.15)
        assert (await s.get("/readyz")).status == 200
        response = await begun(s)
        told_to(s, signal.SIGTERM)
        ready = await s.until(lambda: s.get("/readyz"), lambda a: a.status == 503)
        assert "shutting down" in ready.body.decode()
        assert (await s.get("/healthz")).status == 200
        rest = await response.content.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert await s.ended() == 0
        request_id = response.headers["x-request-id"]
        await s.start()
        assert (await s.recorded(request_id))["complete"]  # and it was recorded before the end
        assert await s.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
async def test_sigterm_ends_a_start_that_takes_long(tmp_path: Path, workers: int) -> None:
    """Here a model's file of 200 GB is being read."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "modules.json").write_text("[]")
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(200 << 30)
    embedder = {"backend": "sentence-transformers", "model": str(folder)}
    async with served(tmp_path, start=False, embedder=embedder, server={"workers": workers}) as s:
        started = asyncio.create_task(s.start())
        await s.until(lambda: asyncio.to_thread(s.store.exists), bool, 60)
        await asyncio.sleep(2)
        told_to(s, signal.SIGTERM)
        with pytest.raises(AssertionError, match="did not start"):
            await started
        assert s.process.process.returncode == 0


def test_linear_algebra_has_one_thread_where_requests_are_answered(tmp_path: Path) -> None:
    """Two that wait for one another on busy cores made of the first request's 10 ms half a second."""
    seen: list[int] = []

    def announce() -> None:
        seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        os.kill(os.getpid(), signal.SIGTERM)

    url = "http://127.0.0.1:9/v1"
    made = config.parse(settings(url, url, tmp_path / "ic.db"))
    assert run_worker(made, None, listen(bound(made.server, 0)), announce) == 0
    assert seen and set(seen) == {1}


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_second_sigterm_ends_at_once(tmp_path: Path, workers: int) -> None:
    async with served(tmp_path, server={"workers": workers, "drain_s": 60}) as s:
        s.large.script = Script(between_s=5)
        response = await begun(s)
        told_to(s, signal.SIGTERM)
        await s.until(lambda: s.get("/readyz"), lambda a: a.status == 503)
        told_to(s, signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await s.ended() != 0
        response.close()


async def test_a_drain_ends_when_its_time_is_up(tmp_path: Path) -> None:
    async with served(tmp_path, server={"drain_s": 0.3}) as s:
        s.large.script = Script(between_s=30)
        s.small.script = Script(before_head_s=30)
        response = await begun(s)
        whole = asyncio.create_task(s.ask("hello", "small"))
        await s.until(lambda: asyncio.sleep(0, s.small.requests), bool)
        async with asyncio.timeout(15):
            assert await s.stop() == 0
            cut = await response.content.read()
            refused = await whole
        # and those whose answers it cuts off are told
        assert b'"code":"shutting_down"' in cut and b"[DONE]" not in cut
        assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
        assert refused.json["error"]["code"] == "shutting_down"


async def test_sigint_drains_too(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        assert await s.stop(signal.SIGINT) == 0


async def test_a_stop_that_meets_a_change_of_the_store_ends(tmp_path: Path) -> None:
    """The follower is told to end at the very moment it is told of news."""
    for hops in range(4):
        folder = tmp_path / str(hops)
        folder.mkdir()
        async with asyncio.timeout(10):
            async with world(folder) as w:
                w.proxy.learner.follower.kicked.set()
                for _ in range(hops):
                    await asyncio.sleep(0)
                w.proxy.following.cancel()
                await asyncio.wait([w.proxy.following])


async def test_the_follower_outlives_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(tmp_path) as w:
        apply, faults = w.proxy.select.retriever.apply, []

        def broken(changes: Any) -> Any:
            if not faults:
                faults.append(changes)
                raise ValueError("a fault of ours")
            return apply(changes)

        monkeypatch.setattr(w.proxy.select.retriever, "apply", broken)
        await w.ask("What is the capital of France?", "large")
        await w.until(lambda: w.ask("What is the capital of Spain?", "small"), lambda a: a.header("examples") == "1")
        assert faults


# ---- SIGHUP


TENANT = {"name": "team-a", "key_env": "TEAM_KEY"}


async def test_sighup_takes_over_a_good_file_and_no_bad_one(tmp_path: Path) -> None:
    async with served(tmp_path, {"TEAM_KEY": "first"}, tenants=[TENANT]) as s:
        first, second = {"Authorization": "Bearer first"}, {"Authorization": "Bearer second"}
        assert (await s.ask("hello", headers=first)).status == 200

        for text in ("this is not TOML", "[server]\nprot = 1\n", s.file.read_text().replace("TEAM_KEY", "NO_SUCH_KEY")):
            good = s.file.read_text()
            s.file.write_text(text)
            told_to(s, signal.SIGHUP)
            await asyncio.sleep(0.3)  # nothing is to happen: there is nothing to wait for
            assert (await s.ask("hello", headers=first)).status == 200
            s.file.write_text(good)

        # another port, and another backend
        s.file.write_text(good.replace('name = "large"', 'name = "huge"'))
        told_to(s, signal.SIGHUP)
        await s.until(lambda: s.ask("hello", "huge", first), lambda a: a.status == 200)
        assert (await s.ask("hello", "large", first)).status == 404
        assert (await s.ask("hello", headers=second)).status == 401
        await s.stop()
    assert s.log.count(b"the configuration stays as it was") == 3
    assert b"prot" in s.log and b"NO_SUCH_KEY" in s.log


async def test_sighup_rotates_keys_without_a_lost_request(tmp_path: Path) -> None:
    """A key is a variable of the environment, so a new one comes with the name of another variable."""
    environ = {"TEAM_KEY": "first", "TEAM_KEY_NEW": "second"}
    async with served(tmp_path, environ, tenants=[TENANT]) as s:
        s.large.script = Script(between_s=0.1)
        first, second = {"Authorization": "Bearer first"}, {"Authorization": "Bearer second"}
        response = await s.http.post(s.url + "/v1/chat/completions", json=streamed(), headers=first)
        await response.content.readany()
        good = s.file.read_text()
        s.file.write_text(good.replace('"TEAM_KEY"', '["TEAM_KEY", "TEAM_KEY_NEW"]'))
        told_to(s, signal.SIGHUP)
        await s.until(lambda: s.ask("hello", "small", second), lambda a: a.status == 200)
        assert (await s.ask("hello", "small", first)).status == 200
        s.file.write_text(good.replace('"TEAM_KEY"', '"TEAM_KEY_NEW"'))
        told_to(s, signal.SIGHUP)
        await s.until(lambda: s.ask("hello", "small", first), lambda a: a.status == 401)
        assert (await s.ask("hello", "small", second)).status == 200
        assert (await response.content.read()).endswith(b"[DONE]\n\n")  # what was let in goes on
        assert await s.stop() == 0


async def test_what_was_learned_outlives_a_reload(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        asked = await w.ask("hello")
        await w.feedback(asked.id, score=0.5)
        before = w.proxy.router.state()
        w.proxy.reload(w.proxy.settings)
        assert w.proxy.router.state() == before
        other = await w.ask("hello")
        await w.feedback(other.id, score=0.5)
        assert w.proxy.router.state() != before


# ---- workers


async def by_pid(s: Served) -> set[int]:
    """The worker processes."""
    listed = await asyncio.create_subprocess_exec(
        "ps", "-o", "pid=", "--ppid", str(s.process.process.pid), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await listed.communicate()
    return {int(pid) for pid in out.split()}


async def fresh(s: Served, path: str, document: Any) -> Any:
    """POST on a connection of its own, so that any worker may take it."""
    return await s.post(path, document, {"Connection": "close"})


async def test_workers_share_the_port_what_they_learn_and_the_metrics(tmp_path: Path) -> None:
    async with served(tmp_path, server={"workers": 2}, routing={"policy": "student"}) as s:
        assert len(await s.until(lambda: by_pid(s), lambda pids: len(pids) == 2)) == 2
        taught = await s.teach("What is the capital of France?", "Paris")
        count = 30
        question = {"model": "small", "messages": [{"role": "user", "content": "What is the capital of Spain?"}]}

        async def all_show(wanted: str) -> bool:
            answers = [await fresh(s, "/v1/chat/completions", question) for _ in range(count)]
            assert all(a.status == 200 for a in answers)
            return all(a.header("examples") == wanted for a in answers)

        await s.until(lambda: all_show("1"), bool)
        asked = await fresh(s, "/v1/chat/completions", question)
        await s.recorded(asked.id)
        verdicts = [await fresh(s, "/v1/feedback", {"request_id": asked.id, "score": 0.25}) for _ in range(count)]
        assert {v.status for v in verdicts} == {204}  # whichever worker it is told
        assert await s.metric('iccache_feedback_total{source="user"}') == count
        await s.until(lambda: s.metric('iccache_quality{backend="small"}'), lambda q: q == pytest.approx(0.25))
        total = 'iccache_requests_total{backend="small",decision="pinned",status="200"}'
        assert await s.metric(total) % count == 1
        assert await s.metric('iccache_in_flight{backend="small"}') == 0

        (example,) = (await s.get("/admin/examples")).json["examples"]
        assert example["request_id"] == taught.id
        async with s.http.delete(s.url + f"/admin/examples/{example['id']}") as deleted:
            assert deleted.status == 204
        await asyncio.sleep(1)
        assert await all_show("0")
        assert await s.stop() == 0


async def test_feedback_at_once_is_taken_by_whichever_worker_it_reaches(tmp_path: Path) -> None:
    async with served(tmp_path, server={"workers": 2}) as s:
        question = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}
        statuses = []
        for _ in range(16):
            asked = await fresh(s, "/v1/chat/completions", question)
            statuses.append((await fresh(s, "/v1/feedback", {"request_id": asked.id, "score": 1})).status)
        assert statuses == [204] * 16
        assert (await fresh(s, "/v1/feedback", {"request_id": "req_none", "score": 1})).status == 404


async def test_connections_are_spread_over_the_workers(tmp_path: Path) -> None:
    async with served(tmp_path, server={"workers": 2}) as s:
        pids = await s.until(lambda: by_pid(s), lambda pids: len(pids) == 2)
        await s.until(lambda: asyncio.to_thread(listeners, s), lambda count: count == 2)
        before = {pid: sockets(pid) for pid in pids}
        streams = [await asyncio.open_connection("127.0.0.1", int(s.url.rsplit(":", 1)[1])) for _ in range(40)]
        for reader, writer in streams:  # one that answers has been accepted
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b" 200 " in await reader.readuntil(b"\r\n")
        assert all(sockets(pid) >= before[pid] + 5 for pid in pids)  # by chance alone: once in ten million times
        for _, writer in streams:
            writer.close()


def sockets(pid: int) -> int:
    return sum(os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:") for fd in os.listdir(f"/proc/{pid}/fd"))


def listeners(s: Served) -> int:
    """How many sockets listen at the proxy's port."""
    port = f":{int(s.url.rsplit(':', 1)[1]):04X}"
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(port) and row[3] == "0A" for row in rows)


async def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    async with served(tmp_path, server={"workers": 2}) as s:
        before = await s.until(lambda: by_pid(s), lambda pids: len(pids) == 2)
        await s.until(lambda: asyncio.to_thread(listeners, s), lambda count: count == 2, seconds=30)
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        after = await s.until(lambda: by_pid(s), lambda pids: len(pids - {victim}) == 2, seconds=20)
        assert victim not in after
        await s.until(lambda: s.ask("hello"), lambda a: a.status == 200)
        assert await s.stop() == 0


async def test_sighup_reaches_workers_that_are_starting_and_those_that_come_later(tmp_path: Path) -> None:
    async with served(tmp_path, server={"workers": 2}) as s:
        s.file.write_text(s.file.read_text().replace('name = "large"', 'name = "huge"'))
        told_to(s, signal.SIGHUP)  # the second worker has not come far
        pids = await s.until(lambda: by_pid(s), lambda pids: len(pids) == 2)

        async def all_know() -> bool:
            asked = {"model": "huge", "messages": [{"role": "user", "content": "hello"}]}
            answers = [await fresh(s, "/v1/chat/completions", asked) for _ in range(12)]
            return await asyncio.to_thread(listeners, s) == 2 and all(a.status == 200 for a in answers)

        await s.until(all_know, bool, seconds=30)
        assert await by_pid(s) == pids  # and it is alive

        s.file.write_text("[server]\nprot = 1\n")  # a bad one changes nothing for those that come later, either
        told_to(s, signal.SIGHUP)
        await asyncio.sleep(0.3)
        os.kill(min(pids), signal.SIGKILL)
        await s.until(lambda: by_pid(s), lambda now: len(now - {min(pids)}) == 2, seconds=20)
        await s.until(all_know, bool, seconds=30)
        assert await all_know()
        assert await s.stop() == 0


async def test_a_worker_that_is_starting_takes_no_connection(tmp_path: Path) -> None:
    async with served(tmp_path, server={"workers": 2}) as s:
        pids = await s.until(lambda: by_pid(s), lambda pids: len(pids) == 2)
        last = max(pids)
        os.kill(last, signal.SIGSTOP)
        try:
            if await asyncio.to_thread(listeners, s) == 1:  # else it was quicker than this test
                async with asyncio.timeout(20):
                    answers = [await fresh(s, "/v1/feedback", {}) for _ in range(20)]
                assert [a.status for a in answers] == [400] * 20
        finally:
            os.kill(last, signal.SIGCONT)
        await s.until(lambda: asyncio.to_thread(listeners, s), lambda count: count == 2, seconds=30)


async def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    async with served(tmp_path, server={"workers": 2}) as s:
        workers = await s.until(lambda: by_pid(s), lambda pids: len(pids) == 2)
        s.process.process.kill()

        async def gone() -> bool:
            return not any(Path(f"/proc/{pid}").exists() for pid in workers)

        await s.until(gone, bool)


async def test_workers_that_cannot_start_say_so_once(tmp_path: Path) -> None:
    async with served(tmp_path, start=False, large={"key_env": "NO_SUCH_KEY"}) as s:
        for workers in ("1", "2"):
            code, out, err = await s.run("serve", "--workers", workers)
            assert (code, out) == (2, "")
            assert len(err.strip().splitlines()) == 1, err
            assert "NO_SUCH_KEY" in err


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_port_that_is_taken_is_said(tmp_path: Path, workers: int) -> None:
    """Also where it is one that workers share among themselves."""
    async with served(tmp_path, server={"workers": workers}) as s:
        port = s.url.rsplit(":", 1)[1]
        for others in ("1", "2"):
            code, out, err = await s.run("serve", "--port", port, "--workers", others)
            assert (code, out) == (1, "")
            assert len(err.strip().splitlines()) == 1 and port in err


# ---- several processes on one store


async def test_two_processes_on_one_store_follow_each_other(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        (tmp_path / "b").mkdir()
        async with served(tmp_path / "b", store={"url": f"sqlite:///{s.store}"}) as other:
            taught = await s.teach("What is the capital of France?", "Paris")
            ask = lambda: other.ask("What is the capital of Spain?", "small")  # noqa: E731
            shown = await other.until(ask, lambda a: a.header("examples") == "1", seconds=2)
            tell = lambda: s.feedback(shown.id, score=1)  # noqa: E731 - the other's request, told to this one
            await s.until(tell, lambda a: a.status == 204, seconds=2)
            assert (await other.feedback(taught.id, demonstration="Paris!")).status == 204
            await s.until(lambda: s.metric('iccache_quality{backend="small"}'), lambda q: q == 1, seconds=2)
            await s.ask("What is the capital of Spain?", "small")
            assert s.small.requests[-1].json["messages"][1]["content"] == "Paris!"
            example = shown.header("example-ids")
            async with other.http.delete(other.url + f"/admin/examples/{example}") as deleted:
                assert deleted.status == 204
            assert (await ask()).header("examples") == "0"
            await asyncio.sleep(1)
            assert (await s.ask("What is the capital of Spain?", "small")).header("examples") == "0"


async def test_a_deleted_example_is_never_shown_again(tmp_path: Path) -> None:
    """By the process that answered the deletion: not once, whatever is under way."""
    async with world(tmp_path) as w:
        for i in range(5):
            await w.teach(f"What is the capital of country {i}?", f"City {i}")
        examples = [e["id"] for e in (await w.get("/admin/examples")).json["examples"]]
        gone: set[str] = set()
        for example in examples:
            asking = [asyncio.create_task(w.ask(f"What is the capital of {n}?", "small")) for n in range(5)]
            async with w.http.delete(w.url + f"/admin/examples/{example}") as deleted:
                assert deleted.status == 204
            gone.add(example)
            after = [await w.ask(f"What is the capital of {n}?", "small") for n in range(3)]
            for answered in after:
                assert not gone & set((answered.header("example-ids") or "").split(","))
            await asyncio.gather(*asking)
        async with w.http.delete(w.url + f"/admin/examples/{example}") as again:
            assert again.status == 404
        assert await w.examples() == 0


async def test_ready_means_ready(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        assert (await w.get("/readyz")).json == {"status": "ready"}
        await w.small.stop()
        assert (await w.get("/readyz")).status == 200  # one backend is enough
        await w.large.stop()
        w.proxy._reachable_until = 0
        not_ready = await w.get("/readyz")
        assert (not_ready.status, not_ready.json["problems"]) == (503, ["no backend is reachable"])
