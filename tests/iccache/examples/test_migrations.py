from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from sqlite_utils import Database, Migrations

from iccache.errors import StoreError, StoreVersionError
from iccache.examples import migrations
from iccache.examples.sqlite.store import SqliteStore
from tests.factories import make_example

ROOT = Path(__file__).parents[3]  # where processes of these tests start


def database(path: Path) -> Database:
    return Database(sqlite3.connect(path, isolation_level=None, timeout=10), execute_plugins=False)


def next_version(fails: bool = False) -> Migrations:
    """The steps of a later version."""
    later = Migrations(migrations.SET)
    later._migrations = list(migrations.steps._migrations)

    @later(name="0007_colour")
    def colour(db: Database) -> None:
        db.execute("ALTER TABLE examples ADD COLUMN colour TEXT NOT NULL DEFAULT 'red'")
        if fails:
            raise ZeroDivisionError

    return later


def test_a_fresh_file_gets_the_newest_schema(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    SqliteStore(path).close()
    with closing(database(path)) as db:
        assert db.journal_mode == "wal"
        assert {"exchanges", "feedback", "examples", "changes", "states"} <= set(db.table_names())
        assert migrations.steps.pending(db) == []
        assert db.execute("PRAGMA application_id").fetchone()[0] == migrations.APPLICATION_ID


def test_a_newer_version_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with closing(SqliteStore(path)) as store:
        store.admit(make_example())
        with closing(database(path)) as db:
            migrations.migrate(db, path, migrations=next_version())
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(StoreVersionError) as caught:
            SqliteStore(path, read_only=read_only)
        text = str(caught.value)
        assert str(path) in text and "schema is 7" in text and f"knows {migrations.newest()}" in text
        assert "\n" not in text
    assert path.read_bytes() == before


def test_an_older_store_is_migrated_and_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with closing(SqliteStore(path)) as store:
        store.admit(make_example())
    with closing(database(path)) as db:
        migrations.migrate(db, path, migrations=next_version())
        assert db.execute("SELECT id, colour FROM examples").fetchall() == [("e1", "red")]
        migrations.migrate(db, path, migrations=next_version())  # again: nothing to do


def test_a_failing_step_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with closing(SqliteStore(path)) as store:
        store.admit(make_example())
    with closing(database(path)) as db:
        with pytest.raises(ZeroDivisionError):
            migrations.migrate(db, path, migrations=next_version(fails=True))
        assert not db.conn.in_transaction
    with closing(SqliteStore(path)) as store:
        assert store.count_examples() == 1


def test_a_reader_does_not_read_an_older_schema(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    SqliteStore(path).close()
    with closing(database(path)) as db, pytest.raises(StoreError, match="migrate"):
        migrations.check(db, path, migrations=next_version())


def test_another_programs_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with closing(database(path)) as db:
        db.execute("CREATE TABLE songs (title TEXT)")
    with pytest.raises(StoreError, match="another program"):
        SqliteStore(path)
    with closing(database(path)) as db:
        assert db.table_names() == ["songs"]


def test_threads_that_open_a_fresh_file_at_once_do_not_collide(tmp_path: Path) -> None:
    for round_ in range(10):
        path = tmp_path / f"{round_}.db"
        barrier = threading.Barrier(8)
        failures: list[BaseException] = []

        def start(
            path: Path = path, barrier: threading.Barrier = barrier, failures: list[BaseException] = failures
        ) -> None:
            barrier.wait()
            try:
                SqliteStore(path).close()
            except BaseException as exc:
                failures.append(exc)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


OPEN = """
import sys
from pathlib import Path
from iccache.examples.sqlite.store import SqliteStore
print("ready", flush=True)
for name in sys.stdin:
    SqliteStore(Path(name.strip())).close()
    print("opened", flush=True)
"""


def test_processes_that_open_a_fresh_file_at_once_do_not_collide(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for round_ in range(10):
            for process in processes:
                assert process.stdin is not None
                process.stdin.write(f"{tmp_path}/{round_}.db\n")
                process.stdin.flush()
            for process in processes:
                assert process.stdout is not None and process.stdout.readline() == "opened\n"
    finally:
        for process in processes:
            process.communicate()
