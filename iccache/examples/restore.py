"""A backup in the place of a store's content, while others use it.

The backup is copied, checked and made ready apart; then its pages go into the live file as one transaction. Who reads
meanwhile keeps what there was, who reads afterwards has the backup; a kill in between leaves what there was.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from sqlite_utils import Database

from iccache import private
from iccache.errors import StoreError
from iccache.examples import migrations
from iccache.examples.index import snapshot
from iccache.examples.sqlite import RESTORED_STATE, SqliteStore, Translated

KEPT = ".before-restore"
HEADROOM = 1_000_000  # changes that others may append between a look at the live feed and the copy
LOCKED_AT_MOST_S = 30.0  # waiting for others' writes to end
COMPANIONS = ("-wal", "-shm")

SHIFT_FEED = """
UPDATE changes SET seq = seq + {shift};
UPDATE states SET cursor = cursor + {shift};
INSERT OR REPLACE INTO states (name, cursor, blob) VALUES ('{name}', {shift}, x'');
DELETE FROM sqlite_sequence WHERE name = 'changes';
INSERT INTO sqlite_sequence (name, seq) VALUES ('changes', {newest});
"""
# replay's table: while a run is under way, its account of what it has spent must not be set back
REPLAY_AT_WORK = "SELECT count(*) FROM replay_workers WHERE lease_until > ?"


def restore_file(target: Path, backup: Path, *, keep: bool) -> Path | None:
    """The contract is store.restore_store."""
    if not backup.is_file():
        raise StoreError(f"{backup}: there is no such file")
    if target.exists() and backup.samefile(target):
        raise StoreError(f"{backup}: is the store itself")
    _sweep(target)
    staged = target.with_name(f"{target.name}.{os.getpid()}.restoring")
    try:
        _stage(backup, staged)
        try:
            return _replace_content(target, staged, keep)
        except StoreError as exc:
            if not _is_damage(exc):
                raise
            return _replace_file(target, staged, keep)
    except OSError as exc:
        raise StoreError(f"{exc.filename}: the backup cannot be restored: {exc.strerror}") from exc
    finally:
        _remove(staged)


def _stage(backup: Path, staged: Path) -> None:
    """A copy of `backup` with the schema of this version. Raises StoreError when it is no sound backup."""
    private.make(staged)
    with Translated(backup), closing(_connect(backup, "ro")) as source, closing(sqlite3.connect(staged)) as copy:
        if problem := _problem(source):
            raise StoreError(f"{backup}: {problem}: nothing was restored")
        source.backup(copy)
    with Translated(backup), closing(sqlite3.connect(staged)) as copy:
        migrations.refuse_strangers(Database(copy), backup)
    SqliteStore(staged).close()  # brings it to the schema of this version


def _problem(source: sqlite3.Connection) -> str | None:
    """What is wrong with a backup; None when nothing is."""
    try:
        if source.execute("PRAGMA application_id").fetchone()[0] != migrations.APPLICATION_ID:
            return "is not a backup of iccache"
        sound = source.execute("PRAGMA integrity_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as exc:
        if not _is_damage_name(exc):
            raise
        sound = "it is no SQLite file" if "NOTADB" in exc.sqlite_errorname else str(exc)
    return None if sound == "ok" else f"is damaged ({' '.join(str(sound).split())})"


def _replace_content(target: Path, staged: Path, keep: bool) -> Path | None:
    """The usual way: other processes go on with the same file, and find the new content in it."""
    with closing(SqliteStore(target)) as live:
        with Translated(target), closing(sqlite3.connect(target)) as connection:
            _refuse_under_replay(connection)
        _shift_feed(staged, live.last_change())
        kept = target.with_name(target.name + KEPT) if keep else None
        if kept is not None:
            live.backup(kept)
        with Translated(target), closing(_connect(target, "rw")) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")
            with closing(sqlite3.connect(staged)) as source:
                source.backup(connection, pages=-1, progress=_patience(target))
        snapshot.beside(target).unlink(missing_ok=True)  # it may hold what the backup does not
        live.checkpoint()
        return kept


def _shift_feed(staged: Path, last_of_live: int) -> None:
    """Renumber the backup's changes, and all cursors with them, to come after every change that was ever made here.

    A follower's cursor is then below what the feed can give, by which it knows that it has to rebuild.
    """
    with closing(SqliteStore(staged)) as store:
        newest = store.last_change()
    shift = max(last_of_live, newest) + HEADROOM
    with Translated(staged), closing(sqlite3.connect(staged)) as copy:
        copy.executescript(f"BEGIN;{SHIFT_FEED.format(shift=shift, newest=newest + shift, name=RESTORED_STATE)}COMMIT;")


def _refuse_under_replay(connection: sqlite3.Connection) -> None:
    with contextlib.suppress(sqlite3.OperationalError):  # no such table: replay never ran
        if connection.execute(REPLAY_AT_WORK, [time.time()]).fetchone()[0]:
            raise StoreError("iccache-replay run is at work on the store: wait for its end, or stop it")


def _patience(target: Path) -> Callable[[int, int, int], None]:
    """Called after each attempt to take the write lock."""
    until = time.monotonic() + LOCKED_AT_MOST_S

    def check(status: int, remaining: int, total: int) -> None:
        if status != sqlite3.SQLITE_DONE and time.monotonic() > until:
            raise StoreError(f"{target}: was locked for more than {LOCKED_AT_MOST_S:.0f} s: nothing was restored")

    return check


def _replace_file(target: Path, staged: Path, keep: bool) -> Path | None:
    """Where the store itself is damaged. Processes that still have it open refuse to write to it from now on."""
    kept = target.with_name(target.name + KEPT)
    _remove(kept)
    for suffix in ("", *COMPANIONS):
        old = Path(f"{target}{suffix}")
        if keep and old.exists():
            os.replace(old, f"{kept}{suffix}")
        else:
            old.unlink(missing_ok=True)
    os.replace(staged, target)
    snapshot.beside(target).unlink(missing_ok=True)
    return kept if keep else None


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, isolation_level=None)


def _is_damage(exc: StoreError) -> bool:
    return isinstance(exc.__cause__, sqlite3.DatabaseError) and _is_damage_name(exc.__cause__)


def _is_damage_name(exc: sqlite3.Error) -> bool:
    return str(getattr(exc, "sqlite_errorname", "")).startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))


def _remove(path: Path) -> None:
    for suffix in ("", "-journal", *COMPANIONS):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def _sweep(target: Path) -> None:
    """Copies that a killed restore left behind."""
    for left in target.parent.glob(f"{target.name}.*.restoring"):
        pid = left.name.removeprefix(f"{target.name}.").removesuffix(".restoring")
        if pid.isdecimal() and not _is_running(int(pid)):
            _remove(left)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
