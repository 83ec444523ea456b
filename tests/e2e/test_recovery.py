"""What outlives a kill, a full disk and a broken store: SPEC, 7. The proxy is `iccache serve`, a process."""

from __future__ import annotations

import asyncio
import resource
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from iccache.examples.store import open_store
from tests.e2e.served import Served, only_read, served
from tests.e2e.world import READY_WITHIN_S, Answered, world
from tests.factories import make_example
from tests.fakes import Script

KILLS = 3


async def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """kill -9 the moment feedback is answered, while other requests are under way; then it is started again."""
    acknowledged: dict[str, Any] = {}
    forms: list[dict[str, Any]] = [{"score": 0.25}, {"rating": "up"}, {"demonstration": "better"}]
    async with served(tmp_path, start=False) as s:
        for i in range(KILLS):
            await s.start()
            for request_id, verdict in acknowledged.items():
                await kept(s, request_id, verdict)
            s.large.script.between_s = s.small.script.between_s = 0.1
            live = [asyncio.create_task(stream(s, f"a live one {i} {n} c d e f g")) for n in range(3)]
            verdict = forms[i % len(forms)]
            asked = await s.ask(f"question number {i}?", ("auto", "large", "small")[i % 3])
            assert (await s.feedback(asked.id, **verdict)).status == 204
            acknowledged[asked.id] = verdict
            # and one on an answer that still streams
            begun = await until_begun(s, f"begun {i} b c d e f g h")
            assert (await s.feedback(begun.headers["x-request-id"], score=0.75)).status == 204
            await s.kill()
            acknowledged[begun.headers["x-request-id"]] = {"score": 0.75}
            begun.close()
            await asyncio.gather(*live, return_exceptions=True)
        await s.start()
        for request_id, verdict in acknowledged.items():
            await kept(s, request_id, verdict)
        assert await s.stop() == 0
    assert len(acknowledged) == 2 * KILLS
    with closing(sqlite3.connect(tmp_path / "ic.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def kept(s: Served, request_id: str, verdict: dict[str, Any]) -> None:
    answered = await s.get(f"/admin/exchanges/{request_id}")
    assert answered.status == 200, (request_id, verdict)
    source = "demonstration" if "demonstration" in verdict else "user"
    score = None if source == "demonstration" else verdict.get("score", 1.0)
    assert [(f["source"], f["score"]) for f in answered.json["feedback"]] == [(source, score)]
    if source == "demonstration":
        assert "better" in {e["answer"] for e in (await s.get("/admin/examples")).json["examples"]}


async def stream(s: Served, text: str) -> bytes:
    async with s.http.post(s.url + "/v1/chat/completions", json=body(text)) as response:
        return await response.read()


async def until_begun(s: Served, text: str) -> Any:
    response = await s.http.post(s.url + "/v1/chat/completions", json=body(text))
    await response.content.readany()
    return response


def body(text: str) -> dict[str, Any]:
    return {"model": "auto", "stream": True, "messages": [{"role": "user", "content": text}]}


async def test_an_answer_whose_last_byte_was_sent_is_recorded_within_a_second(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        answered = [await s.ask(f"question {i}", "large") for i in range(10)]
        await asyncio.sleep(1)
        await s.kill()
        await s.start()
        for each in answered:
            record = (await s.get(f"/admin/exchanges/{each.id}")).json
            assert record["complete"]
        assert await s.examples() == 10
        shown = await s.ask("question 11", "small")
        assert shown.header("examples") == "3"


@pytest.mark.parametrize("clean", [True, False], ids=["stopped", "killed"])
async def test_what_was_learned_outlives_a_restart(tmp_path: Path, clean: bool) -> None:
    """The router's posterior, the examples' statistics and the utility model: all follow the store."""

    async def known(w: Any) -> tuple[Any, ...]:
        await w.proxy.learner.catch_up()
        examples = await w.proxy.read(lambda store: store.list_examples())
        stats = sorted((e.id, e.stats.uses, e.stats.credit, e.stats.credited_quality) for e in examples)
        policy = w.proxy.router.policy
        return stats, {a: v for a, v in vars(policy).items() if a.endswith("_")}, w.proxy.utility.mean_

    async def live(w: Any, first: int) -> None:
        for i in range(first, first + 130):  # more than one snapshot's worth
            asked = await w.ask(f"add the numbers {i} and {i + 1}")
            assert (await w.feedback(asked.id, score=i % 5 / 4)).status == 204
        await w.proxy.learner.background.drain(5)

    async with world(tmp_path) as w:
        await w.teach("add the numbers 1 and 2", "3")
        await live(w, 0)
        before = await known(w)
        if not clean:
            (tmp_path / "killed").mkdir()
            await w.proxy.learner.catch_up()
            for file in tmp_path.glob("ic.db*"):  # as a kill leaves it: nothing closed, nothing checkpointed
                shutil.copy(file, tmp_path / "killed")
    async with world(tmp_path if clean else tmp_path / "killed") as w:
        after = await known(w)
    assert after[0] == before[0]
    same(before[1], after[1])
    assert after[2] == pytest.approx(before[2])


def same(a: Any, b: Any) -> None:
    """Equal but for rounding, all the way down."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif hasattr(a, "__slots__") or hasattr(a, "__dict__"):
        names = getattr(a, "__slots__", None) or vars(a)
        for name in names:
            if name.startswith("_"):
                continue  # what is only remembered, and worked out again where it is missing
            same(getattr(a, name), getattr(b, name))
    else:
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)


async def test_a_store_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path}/ic.db")
    store.admit(make_example())
    store.close()
    with closing(sqlite3.connect(tmp_path / "ic.db")) as db:
        db.execute("INSERT INTO _sqlite_migrations VALUES (99, 'iccache', '0099_future', '2030')")
        db.commit()
    before = (tmp_path / "ic.db").read_bytes()
    async with served(tmp_path, start=False) as s:
        for workers in ("1", "2"):
            code, out, err = await s.run("serve", "--workers", workers)
            assert code in (1, 2)
            assert "listens" not in out
            assert len(err.strip().splitlines()) == 1, err
            assert "newer version" in err and "ic.db" in err
        code, out, _ = await s.run("check")
        assert (code, "newer version" in out) == (1, True)
        assert (await s.run("explain", "x"))[0] == 1
    assert (tmp_path / "ic.db").read_bytes() == before


BROKEN = {
    "text": b"this is no database, but a letter to my aunt\n" * 100,
    "noise": bytes(range(256)) * 64,
    "half a header": b"SQLite format 3\x00" + b"\xff" * 4096,
    "a directory": None,
    "another program's": b"",
}


@pytest.mark.parametrize("what", BROKEN)
async def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path, what: str) -> None:
    path, content = tmp_path / "ic.db", BROKEN[what]
    if content is None:
        path.mkdir()
    elif content:
        path.write_bytes(content)
    else:
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE recipes (name TEXT)")
            db.commit()
    before = path.read_bytes() if path.is_file() else None
    async with served(tmp_path, start=False) as s:
        code, _, err = await s.run("serve")
        assert code == 1
        assert len(err.strip().splitlines()) == 1, err
        assert "ic.db" in err
    if before is not None:
        assert path.read_bytes() == before


async def test_a_damaged_page_stops_no_answer(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        for i in range(40):
            await s.ask(f"question {i} " + "word " * 100, "large")
        await s.until(s.examples, lambda count: count == 40)
        await s.stop()
        content = bytearray(s.store.read_bytes())
        for at in range(len(content) // 3, len(content) * 2 // 3, 1024):
            content[at : at + 512] = b"\xa5" * 512
        s.store.write_bytes(content)
        try:
            await s.start()
        except AssertionError as exc:
            assert "ic.db" in str(exc) and "Traceback" not in str(exc)  # it says so and ends: fine too
            return
        for model in ("small", "large", "auto"):
            assert (await s.ask("question 3", model)).status == 200


@pytest.mark.parametrize("exists", [False, True])
async def test_a_directory_that_cannot_be_written_to_is_said(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    if exists:
        open_store(f"sqlite:///{folder}/ic.db").close()
        (folder / "ic.db").chmod(0o444)
    folder.chmod(0o555)
    try:
        async with served(tmp_path, start=False, store={"url": f"sqlite:///{folder}/ic.db"}) as s:
            command = only_read([sys.executable, "-m", "iccache", "serve", "--config", str(s.file)])
            made = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
            async with asyncio.timeout(READY_WITHIN_S):
                _, err = await made.communicate()
            assert made.returncode == 1
            assert len(err.decode().strip().splitlines()) == 1, err.decode()
            assert "ic.db" in err.decode()
    finally:
        folder.chmod(0o755)


async def test_a_directory_that_is_not_there_is_said(tmp_path: Path) -> None:
    async with served(tmp_path, start=False, store={"url": f"sqlite:///{tmp_path}/nowhere/ic.db"}) as s:
        code, _, err = await s.run("serve")
        assert (code, len(err.strip().splitlines())) == (1, 1)
        assert "nowhere" in err


async def test_a_full_disk_stops_recording_not_serving(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        taught = await s.teach("What is the capital of France?", "Paris")
        pid = s.process.process.pid
        free = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, free[1]))  # no file may grow any more
        answers = [
            await s.ask(f"What is the capital of country {i}?", model, stream=i % 2 == 1)
            for i, model in enumerate(("auto", "small", "large") * 4)
        ]
        assert [a.status for a in answers] == [200] * 12
        assert any(a.header("examples") == "1" for a in answers)  # what was there is still shown
        await s.until(lambda: s.metric('iccache_dropped_total{cause="store"}'), lambda n: n == 12)
        for verdict in ({"score": 1}, {"demonstration": "Paris!"}):
            refused = await s.feedback(taught.id, **verdict)
            assert refused.status in (500, 503, 507)
            assert set(refused.json["error"]) == {"message", "type", "param", "code"}
            assert "store" in refused.json["error"]["message"] + refused.json["error"]["code"]
        s.large.script = Script(between_s=0.1)
        live = {"model": "large", "stream": True, "messages": [{"role": "user", "content": "a b c d e f g h i j"}]}
        async with s.http.post(s.url + "/v1/chat/completions", json=live) as streaming:
            refused = await s.feedback(streaming.headers["x-request-id"], score=1)
            assert refused.status == 503  # it may be tried again: what it speaks of could not be written yet
            await streaming.read()
        s.large.script = Script()
        await s.until(lambda: s.metric('iccache_dropped_total{cause="store"}'), lambda n: n >= 13)
        assert await s.metric('iccache_dropped_total{cause="store"}') == 13
        ready = await s.get("/readyz")
        assert (ready.status, "writable" in ready.body.decode()) == (503, True)
        assert (await s.get("/healthz")).status == 200
        deleting = await s.http.delete(s.url + "/admin/examples/" + str(answers[0].header("example-ids") or "x"))
        assert deleting.status in (404, 503)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, free)  # room again
        asked = await s.ask("and now?", "large")
        await s.recorded(asked.id)
        assert (await s.feedback(asked.id, score=1)).status == 204
        assert (await s.get("/readyz")).status == 200
        record = (await s.get(f"/admin/exchanges/{taught.id}")).json
        assert record["feedback"] == []  # what was not acknowledged was not half taken either
        assert await s.stop() == 0


async def test_a_store_that_is_deleted_under_way_stops_no_answer(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        await s.teach("What is the capital of France?", "Paris")
        for file in tmp_path.glob("ic.db*"):
            file.unlink()
        for model in ("auto", "small", "large"):
            asked = await s.ask("What is the capital of Spain?", model)
            assert asked.status == 200
        # what is acknowledged now would be lost with the process, so nothing may be
        refused = await s.feedback(asked.id, score=1)
        assert refused.status >= 500
        assert (await s.get("/readyz")).status == 503
        await s.kill()
        await s.start()
        assert (await s.ask("What is the capital of Spain?")).status == 200


async def test_an_empty_cache_answers(tmp_path: Path) -> None:
    async with world(tmp_path, routing={"policy": "student"}) as w:
        for path, asked in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
            ("/v1/responses", {"input": "hello"}),
            ("/v1/messages", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}),
        ):
            for model, decision in (("auto", "routed"), ("small", "pinned")):
                answered: Answered = await w.post(path, {"model": model, **asked})
                assert (answered.status, answered.header("examples")) == (200, "0")
                assert answered.header("decision") == decision
        assert (await w.get("/readyz")).status == 200
        assert (await w.get("/admin/examples")).json == {"examples": []}
