"""SQLite itself: the one place that opens a file, and where what it raises becomes ours."""

from __future__ import annotations

import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal

from iccache.errors import StoreError

Connection = sqlite3.Connection
Row = sqlite3.Row
ERRORS = (sqlite3.Error,)
DONE = sqlite3.SQLITE_DONE

MEMORY = ":memory:"
MEMORY_URI = "file:iccache-"
BUSY_TIMEOUT_S = 10.0

Mode = Literal["ro", "rw", "rwc"]  # rwc: the file is made where it is not there


def connect(path: Path | str, mode: Mode = "rwc") -> Connection:
    """A connection that begins no transaction by itself. `path`: a file, or the name of a store in memory."""
    uri = path if isinstance(path, str) else f"{path.as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S)
    connection.row_factory = Row
    return connection


@contextmanager
def opened(path: Path, mode: Mode = "rwc") -> Generator[Connection]:
    """A connection for one piece of work, outside of a store. Raises StoreError."""
    with Translated(path):
        connection = connect(path, mode)
        try:
            yield connection
        finally:
            connection.close()


class Translated:
    """Turns what SQLite raises inside the block into a StoreError that names the file and the cure."""

    def __init__(self, path: Path | str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(exc, ERRORS):
            raise StoreError(f"{self._path}: {_cure(exc)}") from exc
        if isinstance(exc, UnicodeEncodeError):
            raise StoreError(f"{self._path}: text with lone surrogates cannot be stored") from exc


def is_busy(exc: BaseException | None) -> bool:
    """Whether another connection was in the way."""
    return _name(exc).startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


def is_no_database(exc: BaseException | None) -> bool:
    """Whether the file is none of SQLite's."""
    return _name(exc).startswith("SQLITE_NOTADB")


def is_damage(exc: BaseException | None) -> bool:
    """Whether the file cannot be read as what it should be."""
    return _name(exc).startswith("SQLITE_CORRUPT") or is_no_database(exc)


CURES = {
    "SQLITE_CANTOPEN": "cannot be opened: check that it exists, and that this user may read it and write its directory",
    "SQLITE_READONLY": "cannot be written: give this user write permission to the file and its directory",
    "SQLITE_PERM": "cannot be opened: give this user permission to the file and its directory",
    "SQLITE_AUTH": "cannot be opened: give this user permission to the file and its directory",
    "SQLITE_NOTADB": "is not an SQLite file: point store.url at another file, or restore a backup",
    "SQLITE_CORRUPT": "is damaged: restore a backup with `iccache restore`",
    "SQLITE_FULL": "cannot be written: the disk is full; free some space",
    "SQLITE_IOERR_WRITE": "cannot be written: the disk is full or failing, or a size limit was reached",
    "SQLITE_IOERR_SHMSIZE": "cannot be opened: the disk is full, or a size limit was reached; free some space",
    "SQLITE_IOERR": "cannot be read or written: the disk is failing, or the file was moved away",
    "SQLITE_BUSY": f"was locked by another process for more than {BUSY_TIMEOUT_S:.0f} s: try again",
    "SQLITE_LOCKED": "was locked by another connection: try again",
    "SQLITE_TOOBIG": "cannot take a value this large",
}


def _cure(exc: Exception) -> str:
    """What is wrong and what helps, by SQLite's extended error name, else by its first two words."""
    name = _name(exc)
    return CURES.get(name) or CURES.get("_".join(name.split("_")[:2])) or f"{name} {exc}".strip()


def _name(exc: BaseException | None) -> str:
    """SQLite's extended name of an error; "" of what is none."""
    return str(getattr(exc, "sqlite_errorname", ""))
