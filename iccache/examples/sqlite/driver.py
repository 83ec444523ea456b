"""SQLite itself: the one place that opens a file, and where what it raises becomes ours.

With a key it is SQLCipher, an SQLite that writes every page of the file and of its logs as AES-256-CBC under a random
start vector with an HMAC-SHA512. It is loaded where a key is given, and only there.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast

from iccache.errors import ConfigError, StoreError
from iccache.examples.sqlite.key import Key

Connection = sqlite3.Connection
Row = sqlite3.Row
DONE = sqlite3.SQLITE_DONE

MEMORY = ":memory:"
MEMORY_URI = "file:iccache-"
BUSY_TIMEOUT_S = 10.0
PAGE_BYTES = 8192  # an example with its embedding is often over half of SQLite's usual 4096: one a page, the rest waste
HEADER = b"SQLite format 3\0"  # with which a file begins that is not encrypted

Mode = Literal["ro", "rw", "rwc"]  # rwc: the file is made where it is not there


def connect(path: Path | str, mode: Mode = "rwc", key: Key | None = None) -> Connection:
    """A connection that begins no transaction by itself. `path`: a file, or the name of a store in memory.

    A file is read at the first statement: it is then that a wrong key is noticed. Raises ConfigError where what a key
    needs is not installed.
    """
    uri = path if isinstance(path, str) else f"{path.as_uri()}?mode={mode}"
    if key is not None:
        return connect_by_cipher(uri, key)
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S)
    connection.row_factory = Row
    return connection


def connect_by_cipher(uri: str, key: Key | None) -> Connection:
    """As `connect`, by SQLCipher whether there is a key or not."""
    cipher = _cipher()
    connection = cipher.connect(uri, uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S)
    connection.row_factory = cipher.Row
    connection.execute("PRAGMA cipher_log_level = NONE")  # it would tell of a wrong key on stderr
    if key is not None:
        connection.execute(f"PRAGMA key = {literal(key)}")
        connection.execute(f"PRAGMA cipher_page_size = {PAGE_BYTES}")
    connection.execute("PRAGMA temp_store = MEMORY")
    return cast(Connection, connection)


def literal(key: Key) -> str:
    """A key in SQLCipher's words: the bytes themselves, no password that they would have to be derived from."""
    return f"\"x'{key.reveal()}'\""


def _cipher() -> Any:
    try:
        from sqlcipher3 import dbapi2  # noqa: PLC0415 - an extra
    except ImportError as exc:
        raise ConfigError(f"store.key_env: needs `pip install 'iccache[encryption]'`: {exc}") from exc
    return dbapi2


def errors() -> tuple[type[Exception], ...]:
    """What either of the two raises. SQLCipher may say of a page that is not what was encrypted: no memory."""
    cipher: Any = sys.modules.get("sqlcipher3.dbapi2")
    return (sqlite3.Error,) if cipher is None else (sqlite3.Error, cipher.Error, MemoryError)


@contextmanager
def opened(path: Path, mode: Mode = "rwc", key: Key | None = None) -> Generator[Connection]:
    """A connection for one piece of work, outside of a store. Raises StoreError."""
    with Translated(path):
        connection = connect(path, mode, key)
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
        if exc is None:
            return
        if isinstance(exc, errors()):
            raise StoreError(f"{self._path}: {_cure(exc, self._path)}") from exc
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


WITHOUT_KEY = "is encrypted, or no store at all: name its key with store.key_env"
NOT_ENCRYPTED = "is not encrypted, but store.key_env names a key: use `iccache encrypt`, or take that setting out"
WRONG_KEY = "cannot be read with the key that store.key_env names: it is not the key of this file, or that is damaged"


def _cure(exc: BaseException, path: Path | str) -> str:
    """What is wrong and what helps, by SQLite's extended error name, else by its first two words."""
    name = _name(exc)
    if is_no_database(exc) and isinstance(path, Path):
        wrong_key = _wrong_key(path, keyed=not isinstance(exc, sqlite3.Error))
        if wrong_key is not None:
            return wrong_key
    return CURES.get(name) or CURES.get("_".join(name.split("_")[:2])) or f"{name} {exc}".strip()


def has_another_key(path: Path, key: Key | None) -> bool:
    """Whether a file may well be whole, and have another key than `key`, or none. As `is_plain`, only where nobody here
    has it open. Raises StoreError."""
    return (looks_encrypted(path) or (key is not None and is_plain(path))) and not fits(path, key)


def fits(path: Path, key: Key | None) -> bool:
    """Whether the first page of a file can be read with `key`. Raises StoreError."""
    with opened(path, "rw", key) as connection:
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except errors() as exc:
            if not is_no_database(exc):
                raise
            return False
        return True


def _wrong_key(path: Path, keyed: bool) -> str | None:
    """What is wrong where a file was opened with a key though it has none, with a wrong one, or with none."""
    if not keyed:
        return WITHOUT_KEY if looks_encrypted(path) else None
    return NOT_ENCRYPTED if is_plain(path) else WRONG_KEY


def is_plain(path: Path) -> bool:
    """Whether a file is SQLite's and not encrypted. To be asked only where no connection of this process has it open:
    a file that is closed takes the locks of its process with it."""
    return _first_page(path).startswith(HEADER)


def looks_encrypted(path: Path) -> bool:
    """Whether a file is pages of what looks like chance: of 8192 random bytes, all 256 values are there. As `is_plain`,
    only where nobody here has it open."""
    page = _first_page(path)
    return len(page) == PAGE_BYTES and len(set(page)) == 256 and path.stat().st_size % PAGE_BYTES == 0


def _first_page(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(PAGE_BYTES)
    except OSError:
        return b""


def _name(exc: BaseException | None) -> str:
    """SQLite's extended name of an error; "" of what is none."""
    if isinstance(exc, MemoryError):
        return "SQLITE_CORRUPT"  # see `errors`
    return str(getattr(exc, "sqlite_errorname", ""))
