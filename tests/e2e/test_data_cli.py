"""Import, export, examples, stats, backup and restore as a user runs them, beside a proxy that serves."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from iccache.examples.store import open_store, restore_store
from tests.e2e.served import Served, served
from tests.e2e.world import READY_WITHIN_S, Process, world
from tests.factories import make_example, make_exchange

LONG = 30_000  # lines that take some seconds


def pairs(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"the question {n}"},
                {"role": "assistant", "content": f"answer {n}"},
            ]
        }
        for n in range(first, first + count)
    ]


def write(path: Path, rows: Sequence[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def count(store: Path) -> int:
    with closing(sqlite3.connect(store)) as db:
        return int(db.execute("SELECT count(*) FROM examples").fetchone()[0])


def is_sound(store: Path) -> bool:
    with closing(sqlite3.connect(store)) as db:
        return db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def said(s: Served, *command: str) -> Any:
    """What a command that succeeds prints as JSON."""
    code, out, err = await s.run(*command, "--json")
    assert code == 0, err
    return json.loads(out)


async def wrong(s: Served, code: int, *command: str) -> str:
    """The one line that a command says when it fails."""
    found, out, err = await s.run(*command)
    assert (found, out) == (code, ""), err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith(("iccache: ", "Error: "))]
    assert len(lines) == 1, err
    return lines[0]


# ---- import


async def test_imported_lines_are_shown_by_a_live_proxy(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        file = write(tmp_path / "logs.jsonl.gz", [*pairs(3), "bad", {"messages": []}])
        code, out, err = await s.run("import", str(file), "--tenant", "default")
        assert code == 0
        assert "5 lines: 3 examples added, 0 updated, 0 known already, 2 bad lines" in out
        assert "line 4: is not JSON" in err and "line 5: " in err
        await asyncio.sleep(1)
        assert (await s.ask("the question 1", "small")).header("examples") == "3"
        done = await said(s, "import", str(file), "--tenant", "default")
        assert (done["added"], done["known"], done["bad"], done["resumed_after_line"]) == (0, 3, 2, None)
        assert [(b["line"], b["reason"]) for b in done["bad_lines"]] == [(4, "json"), (5, "messages")]


def _heed_sigint() -> None:
    """Who runs the tests in the background has it ignored, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
async def test_a_broken_off_import_goes_on(tmp_path: Path, number: int) -> None:
    async with served(tmp_path, start=False) as s:
        file = write(tmp_path / "logs.jsonl", pairs(LONG))
        reached = 0
        for at_least in (1, 1000):
            running = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "iccache", "import", str(file), "--tenant", "default"),
                *("--config", str(s.file)),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                preexec_fn=_heed_sigint,
            )
            async with asyncio.timeout(READY_WITHIN_S):
                while examples_in(s.store) < reached + at_least:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            running.send_signal(number)
            _, err = await running.communicate()
            if number == signal.SIGINT:
                assert running.returncode == 1 and b"Traceback" not in err
                assert err.endswith(b"iccache: interrupted: run it again to go on\n")
            before, reached = reached, count(s.store)
            assert before < reached < LONG
        done = await said(s, "import", str(file), "--tenant", "default")
        assert done["resumed_after_line"] == reached
        assert (done["lines"], done["added"], done["known"], done["bad"]) == (LONG, LONG, 0, 0)
        assert count(s.store) == LONG and is_sound(s.store)


def examples_in(store: Path) -> int:
    """Also while it is just being made."""
    try:
        return count(store) if store.exists() else 0
    except sqlite3.Error:
        return 0


async def test_serving_goes_on_beside_an_import(tmp_path: Path) -> None:
    """Nothing is dropped, and feedback is taken in time."""
    async with served(tmp_path) as s:
        file = write(tmp_path / "logs.jsonl", pairs(LONG))
        importing = asyncio.create_task(said(s, "import", str(file), "--tenant", "default"))
        asked = slowest = 0.0
        while not importing.done():
            answered = await s.ask(f"a live question {asked}", "large")
            started = time.monotonic()
            assert (await s.feedback(answered.id, score=1)).status == 204
            slowest = max(slowest, time.monotonic() - started)
            asked += 1
        assert (await importing)["added"] == LONG
        assert asked > 10 and slowest < 5
        assert await s.metric('iccache_dropped_total{cause="store"}') == 0
        await s.stop()
        assert count(s.store) == LONG + asked


TENANTS = {"tenants": [{"name": "team-a", "key_env": "A"}, {"name": "team-b", "key_env": "B"}]}


async def test_wrong_imports(tmp_path: Path) -> None:
    file = write(tmp_path / "logs.jsonl", pairs(1))
    nothing = write(tmp_path / "nothing.jsonl", ["bad", "worse"])
    empty = write(tmp_path / "empty.jsonl", [])
    async with served(tmp_path, start=False, **TENANTS) as s:
        assert "team-a, team-b" in await wrong(s, 2, "import", str(file), "--tenant", "team-c")
        assert not s.store.exists()
        assert "--tenant" in await wrong(s, 2, "import", str(file))
        assert "no.jsonl" in await wrong(s, 2, "import", "no.jsonl", "--tenant", "team-a")
        code, out, err = await s.run("import", str(nothing), "--tenant", "team-a", "--json")
        assert code == 1 and json.loads(out)["bad"] == 2 and "no line could be imported" in err
        assert (await said(s, "import", str(empty), "--tenant", "team-a"))["lines"] == 0
        assert (await said(s, "import", str(file), "--tenant", "team-a"))["added"] == 1
        s.store.write_bytes(b"a letter to my aunt")
        assert "ic.db" in await wrong(s, 1, "import", str(file), "--tenant", "team-a")
        s.file.write_text("[cache]\nadmitt = 1\n")
        assert "admit" in await wrong(s, 2, "import", str(file), "--tenant", "team-a")


# ---- export


async def test_an_export_of_an_import_imports_to_the_same(tmp_path: Path) -> None:
    async with served(tmp_path, start=False) as s:
        await said(s, "import", str(write(tmp_path / "logs.jsonl", pairs(500))), "--tenant", "default")
        code, out, err = await s.run("export", "--json")
        assert (code, [json.loads(row) for row in out.splitlines()]) == (0, pairs(500))
        assert json.loads(err)["examples"] == 500
        for name in ("out.jsonl", "out.jsonl.gz"):
            assert (await s.run("export", str(tmp_path / name), "--tenant", "default"))[0] == 0
        shutil.move(s.store, tmp_path / "first.db")
        done = await said(s, "import", str(tmp_path / "out.jsonl.gz"), "--tenant", "default")
        assert (done["added"], done["bad"]) == (500, 0)
        assert (await s.run("export"))[1] == (tmp_path / "out.jsonl").read_text() == out


async def test_commands_on_no_store(tmp_path: Path) -> None:
    async with served(tmp_path, start=False) as s:
        for command in ("export", "stats", "examples list", "examples show x", "examples delete x", "backup out.db"):
            assert "there is no store" in await wrong(s, 1, *command.split())
        assert "there is no store" in await wrong(s, 1, "examples", "purge", "--tenant", "t", "--yes")
        assert not s.store.exists()


# ---- examples


async def test_examples_are_listed_shown_and_deleted_beside_a_live_proxy(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        await s.teach("What is the capital of France?", "Paris")
        await s.teach("What is the capital of Spain?", "Madrid", user="ann")
        found = (await said(s, "examples", "list", "--tenant", "default"))["examples"]
        assert [e["answer"] for e in found] == ["Madrid", "Paris"]
        assert found == (await s.get("/admin/examples")).json["examples"]
        assert len((await said(s, "examples", "list", "--subject", "ann"))["examples"]) == 1
        spain, france = (e["id"] for e in found)
        assert "capital of Spain" in (await s.run("examples", "list"))[1]
        assert (await said(s, "examples", "show", spain))["examples"] == found[:1]
        assert "    Madrid\n" in (await s.run("examples", "show", spain, france))[1]
        assert "no such example: nope" in await wrong(s, 1, "examples", "show", "nope")
        assert spain in await wrong(s, 1, "examples", "show", spain, "--tenant", "other")
        assert (await said(s, "examples", "delete", spain, "--dry-run"))["deleted"] == 0
        assert (await s.run("examples", "delete", spain, "--tenant", "other"))[0] == 1
        assert await s.examples() == 2
        code, out, err = await s.run("examples", "delete", spain, "nope")
        assert (code, out, err) == (1, "1 examples deleted\n", "iccache: no such example: nope\n")
        await asyncio.sleep(1)
        asked = await s.ask("What is the capital of Spain?", "small")
        assert asked.header("example-ids") == france
        assert b"Madrid" not in b"".join(p.read_bytes() for p in tmp_path.glob("ic.db*"))


async def test_a_held_example_is_not_shown_until_it_is_released(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        await s.teach("What is the capital of France?", "Paris")
        (example,) = (await said(s, "examples", "list"))["examples"]
        assert await said(s, "examples", "hold", example["id"]) == {"held": [example["id"]], "missing": []}
        assert (await said(s, "examples", "list"))["examples"][0]["held"] == "suspect"
        await asyncio.sleep(1)
        assert (await s.ask("What is the capital of France?", "small")).header("examples") == "0"
        assert (await s.run("export"))[1] == ""
        code, out, err = await s.run("examples", "release", example["id"], "nope")
        assert (code, out, err) == (1, "1 examples released\n", "iccache: no such example: nope\n")
        await asyncio.sleep(1)
        assert (await s.ask("What is the capital of France?", "small")).header("examples") == "1"


async def test_a_purge_asks_first(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        await s.teach("What is the capital of France?", "Paris", user="bob")
        asked = await s.teach("What is the capital of Spain?", "Madrid", user="ann")
        whose = ("examples", "purge", "--tenant", "default", "--subject", "ann")
        assert await said(s, *whose, "--dry-run") == {"examples": 1, "exchanges": 1, "dry_run": True}
        assert "--yes" in await wrong(s, 2, *whose)
        assert "--tenant" in await wrong(s, 2, "examples", "purge", "--yes")
        assert await s.examples() == 2
        assert await said(s, *whose, "--yes") == {"examples": 1, "exchanges": 1, "dry_run": False}
        await asyncio.sleep(1)
        again = await s.ask("What is the capital of Spain?", "small")
        assert again.header("examples") == "1"
        assert b"Madrid" not in b"".join(p.read_bytes() for p in tmp_path.glob("ic.db*"))
        assert (await s.get(f"/admin/exchanges/{asked.id}")).status == 200  # its numbers
        assert (await s.run(*whose, "--yes"))[0] == 0


async def test_stats(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        await s.teach("What is the capital of France?", "Paris")
        answered = [await s.ask(f"What is the capital of country {i}?") for i in range(5)]
        for each in answered:
            await s.recorded(each.id)
            assert (await s.feedback(each.id, score=0.5)).status == 204
        found = await said(s, "stats")
        assert (found["requests"], found["decisions"], found["quality"]) == (6, {"pinned": 1, "routed": 5}, 0.5)
        offloaded = sum(each.header("backend") == "small" for each in answered)
        assert found["offload_share"] == pytest.approx(offloaded / 6)
        assert found["saved_usd"] == pytest.approx(await s.metric("iccache_saved_usd_total"))
        code, out, _ = await s.run("stats", "--tenant", "default", "--days", "1")
        assert code == 0 and "6 requests of tenant default" in out
        assert all(whole in out for whole in ("requests", "USD saved", time.strftime("%Y-%m-", time.gmtime()), "small"))
        assert (await s.run("stats", "--days", "0"))[0] == 2


# ---- backup and restore


async def test_a_backup_while_serving_comes_back_while_serving(tmp_path: Path) -> None:
    """Two proxies on one store; both follow. What came after the backup is gone, and kept beside it."""
    async with served(tmp_path) as s:
        other = Process(s.file)
        urls = s.url, await asyncio.to_thread(other.start)
        try:
            await s.teach("What is the capital of France?", "Paris")
            deleted = await s.teach("What is the capital of Spain?", "Madrid")
            spain, france = (e["id"] for e in (await s.get("/admin/examples")).json["examples"])
            ids = {spain, france}
            file = tmp_path / "copies" / "monday.db"
            file.parent.mkdir()
            backed_up = await said(s, "backup", str(file))
            assert backed_up == {"file": str(file), "bytes": file.stat().st_size}
            await s.http.delete(f"{s.url}/admin/examples/{spain}")
            later = await s.teach("What is the capital of Italy?", "Rome")
            done = await said(s, "restore", str(file))
            kept = tmp_path / "ic.db.before-restore"
            assert done == {"restored": str(file), "examples": 2, "kept": str(kept)}
            await asyncio.sleep(1)
            for base in urls:
                s.url = base
                assert {e["id"] for e in (await s.get("/admin/examples")).json["examples"]} == ids
                asked = await s.ask("What is the capital of Italy?", "small")
                assert set((asked.header("example-ids") or "").split(",")) == ids
                assert (await s.feedback(later.id, score=1)).status == 404
                assert (await s.feedback(deleted.id, score=1)).status == 204
                assert (await s.get("/readyz")).status == 200
            for base in urls:
                s.url = base
                taught = await s.teach(f"What is the capital of {base}?", "nowhere")
                assert (await s.feedback(taught.id, demonstration="here")).status == 204
            assert await s.examples() == 4
            assert (await said(s, "restore", str(kept), "--no-keep"))["examples"] == 2
            await asyncio.sleep(1)
            answers = {e["answer"] for e in (await s.get("/admin/examples")).json["examples"]}
            assert answers == {"Paris", "Rome"}
            assert (await s.ask("What is the capital of Italy?", "small")).header("examples") == "2"
        finally:
            await asyncio.to_thread(other.__exit__, None, None, None)
        assert await s.stop() == 0
        assert is_sound(s.store)
        assert [p.name for p in tmp_path.iterdir() if "restoring" in p.name] == []


@pytest.mark.parametrize("snapshot", [True, False])
async def test_what_was_learned_goes_back_too(tmp_path: Path, snapshot: bool) -> None:
    """Router and utility model are as the backup's feedback alone makes them."""

    async def learned(w: Any) -> tuple[bytes, bytes]:
        await w.proxy.learner.catch_up()
        return w.proxy.router.state(), w.proxy.utility.state()

    async def teach(w: Any, first: int, score: float) -> None:
        for i in range(first, first + 10):
            asked = await w.ask(f"add the numbers {i} and {i + 1}")
            assert (await w.feedback(asked.id, score=score)).status == 204

    async with world(tmp_path) as w:
        await w.teach("add the numbers 1 and 2", "3")
        await teach(w, 0, 1.0)
        if snapshot:
            await w.proxy.learner.follower.snapshot()
            trimmed = w.proxy.writer.submit(lambda store: store.trim_changes(store.last_change() + 1))
            await asyncio.wrap_future(trimmed)  # what the states hold can be learned from nothing else
            await teach(w, 10, 1.0)
        before = await learned(w)
        await w.proxy.read(lambda store: store.backup(tmp_path / "copy.db"))
        await teach(w, 20, 0.0)
        await w.proxy.learner.follower.snapshot()
        assert await learned(w) != before
        restore_store(w.proxy.settings.store.url, tmp_path / "copy.db")
        after = await learned(w)
        same(before, after)
        await teach(w, 40, 0.0)
        changed = await learned(w)
        await w.proxy.learner.follower.snapshot()
    async with world(tmp_path) as w:  # and so in the next life
        same(changed, await learned(w))


async def test_a_restore_between_two_looks_at_the_feed_is_noticed(tmp_path: Path) -> None:
    class Restored:
        """The store, which is restored as soon as something of its feed has been read."""

        def __init__(self, store: Any, url: str) -> None:
            self.store, self.url, self.done = store, url, False

        def __getattr__(self, name: str) -> Any:
            found = getattr(self.store, name)
            if name not in ("changes", "oldest_change") or self.done:
                return found

            def read(*args: Any) -> Any:
                seen, self.done = found(*args), True
                restore_store(self.url, tmp_path / "copy.db")
                return seen

            return read

    async with world(tmp_path) as w:
        await w.teach("What is the capital of France?", "Paris")
        await w.proxy.read(lambda store: store.backup(tmp_path / "copy.db"))
        await w.teach("What is the capital of Spain?", "Madrid")
        learner = w.proxy.learner
        async with learner.follower.following:
            learner.access.store = Restored(learner.access.store, w.proxy.settings.store.url)
        await learner.catch_up()
        await learner.catch_up()
        assert len(learner.access.select.retriever) == 1


def same(a: tuple[bytes, ...], b: tuple[bytes, ...]) -> None:
    for one, other in zip(a, b, strict=True):
        flat_one, flat_other = (list(numbers(json.loads(x))) for x in (one, other))
        assert flat_one == pytest.approx(flat_other)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for key in sorted(value):
            yield from numbers(value[key])
    elif isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, int | float):
        yield float(value)


def spoil(path: Path) -> None:
    """A page in the middle."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 8192 * 8192
    content[middle : middle + 4096] = b"\xa5" * 4096
    path.write_bytes(content)


def newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        row = (
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('iccache', '0099_future', '2030')"
        )
        db.execute(row)
        db.commit()


def anothers(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE recipes (name TEXT)")
        db.commit()


NO_BACKUP = {
    "damaged": (spoil, "damaged"),
    "newer": (newer, "newer version"),
    "another program's": (anothers, "not a backup"),
    "a letter": (lambda path: path.write_text("dear aunt " * 1000), "damaged"),
    "empty": (lambda path: path.write_text(""), "not a backup"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "damaged"),
    "missing": (lambda path: path.unlink(), "no such file"),
}


@pytest.mark.parametrize("what", NO_BACKUP)
async def test_what_is_no_sound_backup_is_refused(tmp_path: Path, what: str) -> None:
    with closing(open_store(f"sqlite:///{tmp_path}/copy.db")) as made:
        for i in range(200):
            made.admit(make_example(f"e{i}", answer="word " * 200))
            made.record(make_exchange(f"r{i}"))
    change, told = NO_BACKUP[what]
    change(tmp_path / "copy.db")
    async with served(tmp_path) as s:
        taught = await s.teach("What is the capital of France?", "Paris")
        line = await wrong(s, 1, "restore", str(tmp_path / "copy.db"))
        assert told in line and "copy.db" in line
        assert await s.examples() == 1
        assert (await s.feedback(taught.id, score=1)).status == 204
        assert sorted(p.name for p in tmp_path.glob("ic.db*") if not p.name.endswith(("-wal", "-shm"))) == ["ic.db"]
        assert "itself" in await wrong(s, 1, "restore", str(s.store))


async def test_an_old_backup_is_brought_to_this_schema(tmp_path: Path) -> None:
    with closing(open_store(f"sqlite:///{tmp_path}/copy.db")) as made:
        made.admit(make_example())
    with closing(sqlite3.connect(tmp_path / "copy.db")) as db:
        db.execute("DROP TABLE reusable")
        db.execute("DELETE FROM _sqlite_migrations WHERE name LIKE '0002%'")
        db.commit()
    before = (tmp_path / "copy.db").read_bytes()
    async with served(tmp_path, start=False) as s:
        assert (await said(s, "restore", str(tmp_path / "copy.db")))["examples"] == 1
        await s.start()
        assert await s.examples() == 1
    assert (tmp_path / "copy.db").read_bytes() == before


@pytest.mark.parametrize("damage", [spoil, lambda path: path.write_text("dear aunt " * 1000)], ids=["page", "all"])
async def test_a_damaged_store_is_replaced(tmp_path: Path, damage: Any) -> None:
    async with served(tmp_path, start=False) as s:
        await said(s, "import", str(write(tmp_path / "logs.jsonl", pairs(300))), "--tenant", "default")
        await said(s, "backup", str(tmp_path / "copy.db"))
        damage(s.store)
        assert (await said(s, "restore", str(tmp_path / "copy.db")))["examples"] == 300
        assert is_sound(s.store)
        assert (tmp_path / "ic.db.before-restore").exists()
        await s.start()
        assert (await s.ask("the question 1", "small")).header("examples") == "3"


async def test_a_kill_leaves_the_old_content_or_the_new(tmp_path: Path) -> None:
    with closing(open_store(f"sqlite:///{tmp_path}/copy.db")) as made, made.transaction():
        for i in range(20_000):
            made.admit(make_example(f"e{i}", answer="word " * 200))
    async with served(tmp_path, start=False) as s:
        await said(s, "import", str(write(tmp_path / "logs.jsonl", pairs(100))), "--tenant", "default")
        command = (sys.executable, "-m", "iccache", "restore", str(tmp_path / "copy.db"), "--config", str(s.file))
        outcomes = []
        for i in range(5):
            running = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
            left = tmp_path / f"ic.db.{running.pid}.restoring"
            async with asyncio.timeout(READY_WITHIN_S):
                while not left.exists() and running.returncode is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await asyncio.sleep(i * 0.25)
            if running.returncode is None:
                running.kill()
            await running.wait()
            assert is_sound(s.store)
            outcomes.append(count(s.store))
        assert outcomes[0] == 100 and set(outcomes) <= {100, 20_000}
        assert (await said(s, "restore", str(tmp_path / "copy.db")))["examples"] == 20_000
        assert [p.name for p in tmp_path.iterdir() if "restoring" in p.name] == []


async def test_a_restore_waits_for_replay(tmp_path: Path) -> None:
    async with served(tmp_path, start=False) as s:
        await said(s, "import", str(write(tmp_path / "logs.jsonl", pairs(2))), "--tenant", "default")
        await said(s, "backup", str(tmp_path / "copy.db"))
        with closing(sqlite3.connect(s.store)) as db:
            db.execute("CREATE TABLE replay_workers (worker TEXT, run_id TEXT, lease_until REAL)")
            db.execute("INSERT INTO replay_workers VALUES ('w', 'r', ?)", [time.time() + 60])
            db.commit()
        assert "iccache-replay run" in await wrong(s, 1, "restore", str(tmp_path / "copy.db"))
        with closing(sqlite3.connect(s.store)) as db:
            db.execute("UPDATE replay_workers SET lease_until = 0")
            db.commit()
        assert (await said(s, "restore", str(tmp_path / "copy.db")))["examples"] == 2


async def test_a_backup_is_one_file_that_can_be_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "copies"
    folder.mkdir()
    async with served(tmp_path) as s:
        await s.teach("What is the capital of France?", "Paris")
        await said(s, "backup", str(folder / "monday.db"))
        assert os.listdir(folder) == ["monday.db"]
        before = (folder / "monday.db").read_bytes()
        assert (await said(s, "restore", str(folder / "monday.db")))["examples"] == 1
        assert (folder / "monday.db").read_bytes() == before and os.listdir(folder) == ["monday.db"]
        assert "itself" in await wrong(s, 1, "backup", str(s.store))
        assert "no/such" in await wrong(s, 1, "backup", str(tmp_path / "no/such/copy.db"))
