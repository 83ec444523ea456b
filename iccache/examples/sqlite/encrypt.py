"""Bringing a store, or a backup, to another key, or to none: a file is written apart, checked, and put in its place.

    old file  | written anew apart, both locked | checked, on disk | renamed | old bytes overwritten

A kill at any moment leaves the old file or the new one, whole, under the one name. While it works nobody else has the
store open, and nobody who waits for it can go on with the old file afterwards: it is no database any more.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from iccache import private
from iccache.errors import StoreError
from iccache.examples import migrations
from iccache.examples.index import snapshot
from iccache.examples.sqlite import beside, driver
from iccache.examples.sqlite.driver import Translated
from iccache.examples.sqlite.key import Key

WAIT_S = 2.0  # for others who look at the store for a moment
BLOCK = 1 << 20
ENCRYPTING = "encrypting"


class Done(StrEnum):
    """What became of a file."""

    ENCRYPTED = "encrypted"
    CHANGED = "encrypted with the new key"
    DECRYPTED = "written in clear"
    NOTHING = "as it should be already"


def bring_to_key(path: Path, key: Key | None, old: Key | None = None) -> Done:
    """Have the file in `path` encrypted with `key`; None: not at all. `old`: what it is encrypted with until now.

    Raises StoreError, leaving the file as it was: it is in use, is no store, or is encrypted with neither.
    """
    if not path.is_file():
        raise StoreError(f"{path}: there is no such file")
    beside.sweep(path, ENCRYPTING)
    before = _key_of(path, key, old)
    if before == key:
        return Done.NOTHING
    staged = beside.under_way(path, ENCRYPTING)
    try:
        # its descriptor outlives the connection: closing one takes all locks of this process on the file with it
        with path.open("r+b") as file, _alone(path, before) as connection:
            _copy(connection, path, staged, key)
            _check(connection, path, staged, key)
            _forget_vectors(path)
            _put_in_place(staged, path, file)
    except OSError as exc:
        raise StoreError(f"{path}: cannot be written anew: {exc.strerror}") from exc
    finally:
        beside.remove(staged)
    if key is None:
        return Done.DECRYPTED
    return Done.ENCRYPTED if before is None else Done.CHANGED


def in_clear_beside(path: Path) -> list[Path]:
    """Files of the store that are not encrypted: what a restore kept, or backups beside it."""
    return sorted(p for p in path.parent.glob(f"{path.name}*") if p != path and p.is_file() and driver.is_plain(p))


def _key_of(path: Path, key: Key | None, old: Key | None) -> Key | None:
    """What the file is encrypted with: one of these, or nothing."""
    if driver.is_plain(path):
        return None
    for candidate in (key, old):
        if candidate is not None and driver.fits(path, candidate):
            return candidate
    if not driver.looks_encrypted(path):
        raise StoreError(f"{path}: is no store of iccache")
    if old is None:
        raise StoreError(f"{path}: is encrypted with another key: name that one with --old-key-env")
    raise StoreError(f"{path}: cannot be read with the key of --old-key-env, nor with the one of store.key_env")


@contextmanager
def _alone(path: Path, key: Key | None) -> Generator[driver.Connection]:
    """The file's content, which no other connection has or can get. Raises StoreError."""
    with Translated(path), closing(driver.connect_by_cipher(f"{path.as_uri()}?mode=rw", key)) as connection:
        connection.execute(f"PRAGMA busy_timeout = {int(WAIT_S * 1000)}")
        if connection.execute("PRAGMA application_id").fetchone()[0] != migrations.APPLICATION_ID:
            raise StoreError(f"{path}: is no store of iccache")
        try:
            # SQLite leaves WAL only where nobody else has the file open; then all of it is in the one file
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("BEGIN EXCLUSIVE")
            connection.execute("COMMIT")
            left = connection.execute("PRAGMA main.journal_mode").fetchone()[0] == "delete"
        except driver.errors() as exc:
            if not driver.is_busy(exc):
                raise
            left = False
        if not left:
            raise StoreError(f"{path}: is in use: stop the proxies and the replay that have it open, and try again")
        sound = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if sound != "ok":
            raise StoreError(f"{path}: is damaged ({' '.join(str(sound).split())}): restore a backup first")
        yield connection


def _copy(connection: driver.Connection, path: Path, staged: Path, key: Key | None) -> None:
    os.chmod(private.make(staged), path.stat().st_mode & 0o777)
    with suppress(OSError):  # who may not give files away runs as their owner
        os.chown(staged, path.stat().st_uid, path.stat().st_gid)
    written = "''" if key is None else driver.literal(key)
    connection.execute(f"ATTACH DATABASE ? AS fresh KEY {written}", [str(staged)])
    if key is not None:
        connection.execute(f"PRAGMA fresh.cipher_page_size = {driver.PAGE_BYTES}")
    connection.execute(f"PRAGMA fresh.page_size = {driver.PAGE_BYTES}")
    connection.execute("SELECT sqlcipher_export('fresh')")
    for pragma in ("application_id", "user_version"):
        number = int(connection.execute(f"PRAGMA main.{pragma}").fetchone()[0])
        connection.execute(f"PRAGMA fresh.{pragma} = {number}")
    connection.execute("DETACH DATABASE fresh")
    beside.sync(staged)


def _check(connection: driver.Connection, path: Path, staged: Path, key: Key | None) -> None:
    """Raise StoreError unless the copy is sound and has the rows of every table."""
    with driver.opened(staged, "ro", key) as copy:
        sound = copy.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if sound != "ok" or _counts(copy) != _counts(connection):
            raise StoreError(f"{path}: the copy that was written is not the same: nothing was changed")


def _counts(connection: driver.Connection) -> dict[str, int]:
    """Rows by table."""
    names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {
        name: int(connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0])  # noqa: S608 - of the schema
        for name in sorted(names)
    }


def _forget_vectors(path: Path) -> None:
    """The snapshot of the vectors is in clear, and only a cache."""
    vectors = snapshot.beside(path)
    snapshot.sweep(vectors)
    if vectors.exists():
        with vectors.open("r+b") as file:
            _overwrite(file)
        vectors.unlink()


def _put_in_place(staged: Path, path: Path, old: BinaryIO) -> None:
    """`old`: the file that has the name `path` until now."""
    os.replace(staged, path)
    beside.sync(path.parent)
    _overwrite(old)


def _overwrite(file: BinaryIO) -> None:
    """With zeros, where they are: some file systems and disks write them elsewhere."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    for at in range(0, size, BLOCK):
        file.write(bytes(min(BLOCK, size - at)))
    file.flush()
    os.fsync(file.fileno())
