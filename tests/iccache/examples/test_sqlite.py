"""What only the SQLite store has: a file, with its permissions, its log and its neighbours."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest

from iccache.errors import StoreError
from iccache.examples.sql.exchanges import PAGE
from iccache.examples.sqlite.store import SqliteStore
from iccache.examples.store import open_store
from tests.factories import AT, make_example, make_exchange, make_feedback

ROOT = Path(__file__).parents[3]  # where processes of these tests start

SECRET = "my-number-is-4929-1234"


def bytes_on_disk(path: Path) -> bytes:
    return b"".join(p.read_bytes() for p in sorted(path.parent.glob(f"{path.name}*")))


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with closing(open_store("sqlite:///relative.db")), closing(open_store(f"sqlite:///{tmp_path}/absolute #1?.db")):
        assert {p.name for p in tmp_path.glob("*.db")} == {"relative.db", "absolute #1?.db"}


def test_two_stores_in_memory_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with closing(open_store("sqlite:///:memory:")) as one, closing(open_store("sqlite:///:memory:")) as two:
        one.admit(make_example())
        assert (one.count_examples(), two.count_examples()) == (1, 0)
    assert list(tmp_path.iterdir()) == []


def test_commits_are_synced(tmp_path: Path) -> None:
    with closing(SqliteStore(tmp_path / "s.db")) as store:
        settings = {
            name: store._db.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "foreign_keys", "secure_delete")
        }
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "secure_delete": 1}


# what cannot be opened says why, in one line


def failure(path: Path, *, read_only: bool = False) -> str:
    with pytest.raises(StoreError) as caught:
        SqliteStore(path, read_only=read_only).close()
    assert caught.value.__cause__ is None or isinstance(caught.value.__cause__, sqlite3.Error)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


def test_a_missing_directory(tmp_path: Path) -> None:
    assert f"create {tmp_path}/no" in failure(tmp_path / "no" / "s.db")


def test_a_directory_in_its_place(tmp_path: Path) -> None:
    assert "cannot be opened" in failure(tmp_path)


def test_a_missing_file_for_a_reader(tmp_path: Path) -> None:
    assert "check that it exists" in failure(tmp_path / "s.db", read_only=True)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    path.write_text("just some text, longer than the header of SQLite's files" * 100)
    assert "not an SQLite file" in failure(path)


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with closing(SqliteStore(path)) as store, store.transaction():
        for i in range(200):
            store.record(make_exchange(f"r{i}"))
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(StoreError, match="restore a backup"):
        SqliteStore(path).record(make_exchange("r0"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_read_only_file(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    SqliteStore(path).close()
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        assert "write permission" in failure(path)
    finally:
        tmp_path.chmod(0o755)


def test_a_lock_that_is_never_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iccache.examples.sqlite.driver.BUSY_TIMEOUT_S", 0.1)
    path = tmp_path / "s.db"
    with closing(SqliteStore(path)) as store, closing(SqliteStore(path)) as other, other.transaction():
        with pytest.raises(StoreError, match="locked by another process"):
            store.record(make_exchange())
        assert not store.writable()
        assert store.exchange("r1") is None  # reading goes on


# erasure


@pytest.mark.parametrize("how", ["delete", "purge tenant", "purge subject", "replace"])
def test_erased_text_is_in_no_file(tmp_path: Path, how: str) -> None:
    path = tmp_path / "s.db"
    with closing(SqliteStore(path)) as store:
        for i in range(50):  # neighbours on the same pages
            store.admit(make_example(f"before{i}"))
        long = f"{SECRET} " * 600  # spills to pages of its own
        embedding = make_example(request="x").embedding * 7
        store.record(make_exchange("r1", subject=f"ann {SECRET}", task=f"q {SECRET}", answer=long, extra={"x": SECRET}))
        id = store.admit(
            make_example(
                "e1", subject=f"ann {SECRET}", request_id="r1", request=f"q {SECRET}", answer=long, embedding=embedding
            )
        )
        store.add_feedback(
            make_feedback("r1", None, "demonstration"), tenant="t", demonstration=f"better {SECRET}", tokens=3
        )
        store.checkpoint()
        assert SECRET.encode() in bytes_on_disk(path) and embedding.tobytes() in bytes_on_disk(path)
        if how == "delete":
            assert store.delete_examples([id]) == 1
        elif how == "purge tenant":
            store.purge("t")
        elif how == "purge subject":
            store.purge("t", f"ann {SECRET}")
        else:
            store.delete_examples([id], keep_exchanges=True)
            store.purge("t", f"ann {SECRET}")
        # no checkpoint asked for: the store does it by itself
        assert SECRET.encode() not in bytes_on_disk(path)
        assert embedding.tobytes() not in bytes_on_disk(path)


def test_a_reader_in_the_way_delays_the_erasure_only(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with closing(SqliteStore(path)) as store, closing(SqliteStore(path)) as other:
        store.admit(make_example("e1", request=SECRET))
        other._db.execute("BEGIN")
        other.count_examples()  # holds a snapshot
        started = time.monotonic()
        store.delete_examples(["e1"])
        assert time.monotonic() - started < 2
        assert SECRET.encode() in bytes_on_disk(path)
        other._db.execute("COMMIT")
        store._next_checkpoint = 0.0
        store.record(make_exchange())  # the next commit catches up
        assert SECRET.encode() not in bytes_on_disk(path)


# neighbours

WRITE = """
import sys
from pathlib import Path
from iccache.examples.sqlite.store import SqliteStore
from tests.factories import make_exchange, make_feedback
path, name = sys.argv[1:]
store = SqliteStore(Path(path))
for i in range(100):
    id = f"{name}-{i}"
    store.record(make_exchange(id, shown=("e1",)))
    store.add_feedback(make_feedback(id, 0.5), tenant="t")
store.close()
"""


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    with closing(SqliteStore(path)) as store:
        store.admit(make_example("e1"))
        writers = [subprocess.Popen([sys.executable, "-c", WRITE, str(path), name], cwd=ROOT) for name in ("a", "b")]
        assert [writer.wait(30) for writer in writers] == [0, 0]
        stats = store.examples(["e1"])[0].stats
        assert (stats.uses, stats.credit, stats.credited_quality) == (200, pytest.approx(200), pytest.approx(100))
        seqs = [change.seq for change in store.changes(0)]
        assert seqs == list(range(1, 202))


def test_a_backup_while_others_write(tmp_path: Path) -> None:
    path, target = tmp_path / "s.db", tmp_path / "copy.db"
    stop = threading.Event()
    written: list[str] = []

    def write() -> None:
        with closing(SqliteStore(path)) as store:
            for i in range(100_000):
                if stop.is_set():
                    return
                store.record(make_exchange(f"r{i}", answer="x" * 2000))
                written.append(f"r{i}")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        while len(written) < 100:
            time.sleep(0.005)
        with closing(SqliteStore(path)) as store:
            for _ in range(5):
                before = list(written)
                store.backup(target)
                with closing(sqlite3.connect(target)) as copy:
                    assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                with closing(SqliteStore(target)) as opened:
                    assert all(opened.exchange(id) for id in before[-50:])
    finally:
        stop.set()
        thread.join()


def test_a_backup_that_cannot_be_written_replaces_nothing(tmp_path: Path) -> None:
    target = tmp_path / "copy.db"
    target.write_text("the old backup")
    with closing(SqliteStore(tmp_path / "s.db")) as store:
        with pytest.raises(StoreError, match="another name"):
            store.backup(store.path)
        with pytest.raises(StoreError, match="cannot be"):
            store.backup(tmp_path / "no" / "copy.db")
    assert target.read_text() == "the old backup"


# scale


def plan(store: SqliteStore, sql: str, *params: object) -> str:
    return "\n".join(str(tuple(row)) for row in store._db.execute(f"EXPLAIN QUERY PLAN {sql}", params).fetchall())


def test_the_request_path_scans_no_table(tmp_path: Path) -> None:
    with closing(SqliteStore(tmp_path / "s.db")) as store:
        asked: list[tuple[str, object]] = []
        store._db._tracer = lambda sql, params: asked.append((sql, params))
        store.examples(["e1", "e2"])
        store.spent_today("t", AT)
        store.session_backend("t", "s")
        store.exchange("r")
        store.example_of("r")
        store.changes(0)
        next(store.exchanges(AT), None)
        store._db._tracer = None
        for sql, params in asked:
            values = params if isinstance(params, dict) else tuple(params)  # type: ignore[arg-type]
            rows = store._db.execute(f"EXPLAIN QUERY PLAN {sql}", values).fetchall()
            for row in rows:
                assert "SCAN" not in row["detail"] or "json_each" in row["detail"], (sql, row["detail"])
        assert len(asked) == 7


def test_embeddings_stream_in_constant_memory(tmp_path: Path) -> None:
    count = 5 * PAGE
    with closing(SqliteStore(tmp_path / "s.db")) as store:
        with store.transaction():
            for i in range(count):
                store.admit(make_example(f"e{i}", embedding=make_example().embedding.repeat(48)))  # 384 numbers
        tracemalloc.start()
        try:
            assert sum(1 for _ in store.embeddings()) == count
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 3 * PAGE * 384 * 4


def test_recording_says_the_same_to_sqlite_each_time(tmp_path: Path) -> None:
    """What is said in new words each time is prepared anew each time: that took longer than the record itself."""
    with closing(SqliteStore(tmp_path / "ic.db")) as store:
        said: list[str] = []

        def record(i: int) -> None:
            with store.transaction(), store.transaction(), store.transaction():
                store.record(make_exchange(request_id=f"r{i}"))

        record(0)
        store._db.conn.set_trace_callback(said.append)
        record(1)
        first, said[:] = [re.sub(r"'(?:[^']|'')*'", "?", s) for s in said], []
        record(2)
        again = [re.sub(r"'(?:[^']|'')*'", "?", s) for s in said]
        assert again == first and len(first) > 8


def test_a_part_that_fails_is_undone_alone_however_deep(tmp_path: Path) -> None:
    with closing(SqliteStore(tmp_path / "ic.db")) as store:
        with store.transaction():
            store.record(make_exchange(request_id="outer"))
            for failing in (StoreError("x"), KeyError("y")):
                with pytest.raises(type(failing)), store.transaction():
                    store.record(make_exchange(request_id="undone"))
                    with store.transaction():
                        store.record(make_exchange(request_id="undone too"))
                        raise failing
            with pytest.raises(StoreError), store.transaction():
                store._db.conn.execute("INSERT INTO nowhere VALUES (1)")
            with store.transaction():
                store.record(make_exchange(request_id="inner"))
        kept = [store.exchange(id) is not None for id in ("outer", "undone", "undone too", "inner")]
        assert kept == [True, False, False, True]


def test_many_records_take_few_statements(tmp_path: Path) -> None:
    """Each lets the interpreter go, and its thread waits to get it back: with some for every exchange, records fall
    behind where the event loop is busy all the time.
    """
    with closing(SqliteStore(tmp_path / "cache.db")) as store:
        for i in range(3):
            store.admit(make_example(f"e{i}"))
        said: list[str] = []
        store._db.conn.set_trace_callback(said.append)
        store.record_all([make_exchange(f"r{i}", shown=("e0", "e1", "e2")[: i % 4]) for i in range(128)])
        store._db.conn.set_trace_callback(None)
        assert 4 <= len(said) <= 10
        assert [store.examples([f"e{i}"])[0].stats.uses for i in range(3)] == [96, 64, 32]
