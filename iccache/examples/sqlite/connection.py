"""One connection to a store's file: opening it, transactions, statements, the log, backups.

WAL, so that readers never wait for the writer. synchronous=FULL: a commit is on disk when it returns, so what was
acknowledged survives a power cut too; the writer commits many requests at once, which makes that cheap.
secure_delete=ON: deleted bytes are overwritten.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from iccache import private
from iccache.errors import StoreError
from iccache.examples import migrations
from iccache.examples.database import Database
from iccache.examples.index import snapshot
from iccache.examples.sql.connection import Connection, Params, Row
from iccache.examples.sqlite import driver
from iccache.examples.sqlite.beside import sync
from iccache.examples.sqlite.driver import MEMORY, MEMORY_URI, Translated
from iccache.examples.sqlite.key import Key

CHECKPOINT_TIMEOUT_S = 0.2  # for the checkpoint that follows an erasure: the writer must not stand still for a reader
CHECKPOINT_EVERY_S = 1.0  # while a long reader, such as a backup, is in its way
JOURNAL_LIMIT_BYTES = 64 * 1024 * 1024  # a log that grew beyond this is cut back at the next checkpoint

_memory_names = itertools.count()


class SqliteConnection(Connection):
    """Belongs to the thread that opened it. Give `path` as MEMORY for what ends with its last connection.

    `key`: all that it writes to disk is encrypted with it.
    """

    def __init__(self, path: Path | str, *, read_only: bool = False, key: Key | None = None) -> None:
        self._memory = isinstance(path, str) and path.startswith((MEMORY, MEMORY_URI))
        self.path: Path | str = _memory_name(str(path)) if self._memory else Path(path).absolute()
        self.read_only = read_only
        self._key = None if self._memory else key
        self._depth = 0  # of transactions
        self._log_holds_erased = False  # the log may still hold what was deleted
        self._deleted: list[str] = []  # ids of examples; the snapshot of the index may still hold their vectors
        self._next_checkpoint = 0.0  # monotonic; not before, where a long reader was in the way
        with self._translated():
            self._db = self._open()
        self._identity = _file_identity(self.path) if isinstance(self.path, Path) else None

    def close(self) -> None:
        with self._translated():
            self._db.close()

    # transactions

    def transaction(self) -> AbstractContextManager[None]:
        return Savepoint(self) if self._depth else self._outermost()

    @contextmanager
    def _outermost(self) -> Generator[None]:
        with self._translated():
            # IMMEDIATE: a transaction that starts by reading could not become a writing one once another has written
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._require_file()
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1
                self._require_open()
                self._db.commit()
            except BaseException:
                self._db.rollback()
                self._deleted.clear()
                raise
        if self._deleted:
            self._scrub()
        if self._log_holds_erased and time.monotonic() >= self._next_checkpoint:
            with suppress(StoreError):  # the log could not be emptied now: a later commit tries again
                self.checkpoint()

    def _scrub(self) -> None:
        """Erase from the snapshot of the index what was deleted here. One that cannot be written to is removed."""
        ids, self._deleted = self._deleted, []
        if isinstance(self.path, str):
            return
        beside = snapshot.beside(self.path)
        try:
            snapshot.scrub(beside, ids)
        except OSError:
            with suppress(OSError):
                beside.unlink(missing_ok=True)

    def _require_open(self) -> None:
        """A full disk can end a transaction in the middle: what follows must not be written outside of it."""
        if not self._db.conn.in_transaction:
            raise StoreError(f"{self.path}: the transaction was undone by an earlier failure; nothing was written")

    def _require_file(self) -> None:
        """What is written to a file that has no name any more is lost with the last process that has it open."""
        if isinstance(self.path, Path) and _file_identity(self.path) != self._identity:
            raise StoreError(f"{self.path}: was deleted or replaced while in use: restart to go on with what is there")

    # statements

    def _translated(self) -> Translated:
        return Translated(self.path)

    def _rows(self, sql: str, params: Params = ()) -> Sequence[Row]:
        with self._translated():
            return self._db.execute(sql, params).fetchall()

    def _write(self, sql: str, params: Params) -> int:
        with self._translated():
            return self._db.execute(sql, params).rowcount

    def _note_deleted(self, ids: Sequence[str]) -> None:
        self._deleted += ids

    def _note_erased(self) -> None:
        self._log_holds_erased = True

    # opening

    def _open(self) -> Database:
        conn = self._connect()
        try:
            db = Database(conn, execute_plugins=False)
            db.execute(f"PRAGMA busy_timeout = {int(driver.BUSY_TIMEOUT_S * 1000)}")
            db.execute("PRAGMA foreign_keys = ON")
            if self.read_only:
                db.execute("PRAGMA query_only = ON")
                if self._memory:
                    db.execute("PRAGMA read_uncommitted = ON")  # else a reader and the writer lock each other's tables
                migrations.check(db, self.path)
                return db
            db.execute(f"PRAGMA page_size = {driver.PAGE_BYTES}")  # of a file that is just being made
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA secure_delete = ON")
            db.execute(f"PRAGMA journal_size_limit = {JOURNAL_LIMIT_BYTES}")
            migrations.refuse_strangers(db, self.path)
            if not self._memory:
                migrations.enable_wal(db)
            migrations.migrate(db, self.path)
        except BaseException:
            conn.close()
            raise
        return db

    def _reading(self) -> SqliteConnection:
        """Another connection, for the thread that calls this."""
        return SqliteConnection(self.path, read_only=True, key=self._key)

    def _copy(self, path: Path) -> driver.Connection:
        """To the file of a copy, under the same key."""
        return driver.connect(path, key=self._key)

    def _connect(self) -> driver.Connection:
        if isinstance(self.path, str):
            return driver.connect(self.path)
        if not self.path.parent.is_dir():
            raise StoreError(f"{self.path}: its directory does not exist: create {self.path.parent}")
        if not self.read_only:
            with suppress(OSError):  # SQLite says it better
                private.make(self.path)
        return driver.connect(self.path, "ro" if self.read_only else "rwc", self._key)

    # the log, and copies

    def checkpoint(self) -> bool:
        if self._depth or self.read_only:
            return False
        with self._translated():
            self._db.execute(f"PRAGMA busy_timeout = {int(CHECKPOINT_TIMEOUT_S * 1000)}")
            try:
                blocked = bool(self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
            finally:
                self._db.execute(f"PRAGMA busy_timeout = {int(driver.BUSY_TIMEOUT_S * 1000)}")
        self._log_holds_erased = self._log_holds_erased and blocked
        self._next_checkpoint = time.monotonic() + CHECKPOINT_EVERY_S if blocked else 0.0
        return not blocked

    def backup(self, path: Path | str) -> None:
        path = Path(path).absolute()
        if path == self.path:
            raise StoreError(f"{path}: is the store itself: give the backup another name")
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            private.make(partial)
            with Translated(path), closing(self._reading()) as source, closing(self._copy(partial)) as target:
                # in one step: a consistent copy that no writer can make start again
                source._db.conn.backup(target, pages=-1)
                target.execute("PRAGMA journal_mode = DELETE")  # one file, readable where nothing can be written
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
        except OSError as exc:
            raise StoreError(f"{path}: the backup cannot be written: {exc.strerror}") from exc
        finally:
            partial.unlink(missing_ok=True)


class Savepoint:
    """A part of a transaction that can be undone alone. Named by its depth: SQLite prepares a statement once, but one
    that has another name each time anew, which takes longer than all that is done between.
    """

    def __init__(self, store: SqliteConnection) -> None:
        self._store = store

    def __enter__(self) -> None:
        store = self._store
        store._require_open()
        self._name, self._deleted = f"depth_{store._depth}", len(store._deleted)
        with store._translated():
            store._db.conn.execute(f"SAVEPOINT {self._name}")
        store._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        store, conn = self._store, self._store._db.conn
        store._depth -= 1
        if exc is None:
            try:
                with store._translated():
                    conn.execute(f"RELEASE {self._name}")
            except BaseException:
                del store._deleted[self._deleted :]
                raise
            return
        del store._deleted[self._deleted :]
        with store._translated():
            if conn.in_transaction:  # else the failure has undone all of it
                conn.execute(f"ROLLBACK TO {self._name}")
                conn.execute(f"RELEASE {self._name}")
        store._translated().__exit__(kind, exc, traceback)


def _memory_name(path: str) -> str:
    """A name under which the connections of this process find one store in memory; a new one for MEMORY."""
    return f"{MEMORY_URI}{next(_memory_names)}?mode=memory&cache=shared" if path == MEMORY else path


def _file_identity(path: Path) -> tuple[int, int] | None:
    """Which file has that name; None when there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
