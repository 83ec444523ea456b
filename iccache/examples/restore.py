"""A backup in the place of a store's content, while others use it.

The backup is copied, checked and made ready apart; then its pages go into the live file as one transaction. Who reads
meanwhile keeps what there was, who reads afterwards has the backup; a kill in between leaves what there was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from iccache import private
from iccache.errors import StoreError
from iccache.examples import migrations
from iccache.examples.database import Database
from iccache.examples.index import snapshot
from iccache.examples.sql.feed import RESTORED_STATE
from iccache.examples.sqlite import beside, driver
from iccache.examples.sqlite.driver import Translated
from iccache.examples.sqlite.key import Key
from iccache.examples.sqlite.store import SqliteStore

KEPT = ".before-restore"
HEADROOM = 1_000_000  # changes that others may append between a look at the live feed and the copy
LOCKED_AT_MOST_S = 30.0  # waiting for others' writes to end
RESTORING = "restoring"

SHIFT_FEED = """
UPDATE changes SET seq = seq + {shift};
UPDATE states SET cursor = cursor + {shift};
INSERT OR REPLACE INTO states (name, cursor, blob) VALUES ('{name}', {shift}, x'');
DELETE FROM sqlite_sequence WHERE name = 'changes';
INSERT INTO sqlite_sequence (name, seq) VALUES ('changes', {newest});
"""
# replay's table: while a run is under way, its account of what it has spent must not be set back
REPLAY_EVER_RAN = "SELECT 1 FROM sqlite_master WHERE name = 'replay_workers'"
REPLAY_AT_WORK = "SELECT count(*) FROM replay_workers WHERE lease_until > ?"


def restore_file(target: Path, backup: Path, *, keep: bool, key: Key | None = None) -> Path | None:
    """The contract is store.restore_store."""
    if not backup.is_file():
        raise StoreError(f"{backup}: there is no such file")
    if target.exists() and backup.samefile(target):
        raise StoreError(f"{backup}: is the store itself")
    beside.sweep(target, RESTORING)
    staged = beside.under_way(target, RESTORING)
    try:
        _stage(backup, staged, key)
        try:
            return _replace_content(target, staged, keep, key)
        except StoreError as exc:
            # one that may well be whole is not put aside for a wrong key
            if not driver.is_damage(exc.__cause__) or driver.has_another_key(target, key):
                raise
            return _replace_file(target, staged, keep)
    except OSError as exc:
        raise StoreError(f"{exc.filename}: the backup cannot be restored: {exc.strerror}") from exc
    finally:
        beside.remove(staged)


def _stage(backup: Path, staged: Path, key: Key | None) -> None:
    """A copy of `backup` with the schema of this version. Raises StoreError when it is no sound backup."""
    private.make(staged)
    with driver.opened(backup, "ro", key) as source, closing(driver.connect(staged, key=key)) as copy:
        if problem := _problem(source, backup, key):
            raise StoreError(f"{backup}: {problem}: nothing was restored")
        source.backup(copy)
    with Translated(backup), closing(driver.connect(staged, key=key)) as copy:
        migrations.refuse_strangers(Database(copy), backup)
    SqliteStore(staged, key=key).close()  # brings it to the schema of this version


def _problem(source: driver.Connection, backup: Path, key: Key | None) -> str | None:
    """What is wrong with a backup; None when nothing is."""
    try:
        if source.execute("PRAGMA application_id").fetchone()[0] != migrations.APPLICATION_ID:
            return "is not a backup of iccache"
        sound = source.execute("PRAGMA integrity_check(1)").fetchone()[0]
    except driver.errors() as exc:
        if not driver.is_damage(exc) or (driver.is_no_database(exc) and driver.has_another_key(backup, key)):
            raise
        sound = "it is no SQLite file" if driver.is_no_database(exc) else str(exc)
    return None if sound == "ok" else f"is damaged ({' '.join(str(sound).split())})"


def _replace_content(target: Path, staged: Path, keep: bool, key: Key | None) -> Path | None:
    """The usual way: other processes go on with the same file, and find the new content in it."""
    with closing(SqliteStore(target, key=key)) as live:
        with driver.opened(target, key=key) as connection:
            _refuse_under_replay(connection)
        _shift_feed(staged, live.last_change(), key)
        kept = target.with_name(target.name + KEPT) if keep else None
        if kept is not None:
            live.backup(kept)
        with driver.opened(target, "rw", key) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")
            with closing(driver.connect(staged, key=key)) as source:
                source.backup(connection, pages=-1, progress=_patience(target))
        snapshot.beside(target).unlink(missing_ok=True)  # it may hold what the backup does not
        live.checkpoint()
        return kept


def _shift_feed(staged: Path, last_of_live: int, key: Key | None) -> None:
    """Renumber the backup's changes, and all cursors with them, to come after every change that was ever made here.

    A follower's cursor is then below what the feed can give, by which it knows that it has to rebuild.
    """
    with closing(SqliteStore(staged, key=key)) as store:
        newest = store.last_change()
    shift = max(last_of_live, newest) + HEADROOM
    with driver.opened(staged, key=key) as copy:
        copy.executescript(f"BEGIN;{SHIFT_FEED.format(shift=shift, newest=newest + shift, name=RESTORED_STATE)}COMMIT;")


def _refuse_under_replay(connection: driver.Connection) -> None:
    if connection.execute(REPLAY_EVER_RAN).fetchone() is None:
        return
    if connection.execute(REPLAY_AT_WORK, [time.time()]).fetchone()[0]:
        raise StoreError("iccache-replay run is at work on the store: wait for its end, or stop it")


def _patience(target: Path) -> Callable[[int, int, int], None]:
    """Called after each attempt to take the write lock."""
    until = time.monotonic() + LOCKED_AT_MOST_S

    def check(status: int, remaining: int, total: int) -> None:
        if status != driver.DONE and time.monotonic() > until:
            raise StoreError(f"{target}: was locked for more than {LOCKED_AT_MOST_S:.0f} s: nothing was restored")

    return check


def _replace_file(target: Path, staged: Path, keep: bool) -> Path | None:
    """Where the store itself is damaged. Processes that still have it open refuse to write to it from now on."""
    kept = target.with_name(target.name + KEPT)
    beside.remove(kept)
    for suffix in ("", *beside.COMPANIONS):
        old = Path(f"{target}{suffix}")
        if keep and old.exists():
            os.replace(old, f"{kept}{suffix}")
        else:
            old.unlink(missing_ok=True)
    os.replace(staged, target)
    snapshot.beside(target).unlink(missing_ok=True)
    return kept if keep else None
