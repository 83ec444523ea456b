"""One connection to a PostgreSQL database: transactions, statements, and another connection when it is lost.

One process writes at a time, for the length of a transaction: so the changes are numbered in the order in which they
become visible, and a sum that is read before it is spent is nobody else's. READ COMMITTED is enough then. What waits
is written together (see examples/writer.py), which makes that cheap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from types import TracebackType
from typing import TypeVar

import psycopg
from psycopg import pq

from iccache.errors import StoreError
from iccache.examples.postgres import driver, schema
from iccache.examples.postgres.dialect import translated
from iccache.examples.postgres.driver import Native, Row, Translated
from iccache.examples.sql.connection import Connection, Params
from iccache.postgres_url import shown

T = TypeVar("T")

WRITING = 0x69636361  # "icca": the lock of who writes, one for each database
BEGIN = f"BEGIN; SELECT pg_advisory_xact_lock({WRITING})"
AGAIN_AFTER_S = 1.0  # between attempts to reach a database that could not be reached: nobody is to wait for each


class PostgresConnection(Connection):
    """Belongs to the thread that opened it. A lost one is made anew by whatever comes next.

    Outside of a transaction a statement is then tried once more; a transaction whose connection is lost fails. Where
    that happens at its very end, whether it was written is not known: all that is written may be written again.
    """

    def __init__(self, url: str, *, read_only: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.url = url
        self.place = shown(url)
        self.read_only = read_only
        self._monotonic = clock
        self._depth = 0  # of transactions
        self._savepoints = _Savepoints()
        self._unreachable: tuple[float, str] | None = None  # until when nobody tries, and why
        self._native: Native | None = None
        with self._translated():
            self._open()

    def close(self) -> None:
        if self._native is not None:
            with self._translated():
                self._native.close()

    def _open(self) -> None:
        """Connect, and bring the database to the schema of this version, or make sure that it has it."""
        native = driver.connect(self.url, read_only=self.read_only)
        try:
            self._prepare(native)
        except BaseException:
            native.close()
            raise
        self._native = native

    def _prepare(self, native: Native) -> None:
        if self.read_only:
            schema.check(native, self.place)
        else:
            schema.migrate(native, self.place)

    def _alive(self) -> Native:
        """The connection, or another one where it is lost. Raises StoreError."""
        native = self._native
        if native is not None and not native.closed:
            return native
        if self._unreachable is not None and self._monotonic() < self._unreachable[0]:
            raise StoreError(self._unreachable[1])
        try:
            with self._translated():
                self._open()
        except StoreError as exc:
            self._unreachable = self._monotonic() + AGAIN_AFTER_S, str(exc)
            raise
        self._unreachable = None
        assert self._native is not None
        return self._native

    def _retried(self, ask: Callable[[Native], T]) -> T:
        """`ask`, once more on another connection where this one turns out to be lost. Nothing may have been written."""
        native = self._alive()
        try:
            with self._translated():
                return ask(native)
        except StoreError as exc:
            if exc.__cause__ is None or not driver.is_lost(exc.__cause__):
                raise
            native.close()
        with self._translated():
            return ask(self._alive())

    # transactions

    def transaction(self) -> AbstractContextManager[None]:
        return _Part(self) if self._depth else self._outermost()

    @contextmanager
    def _outermost(self) -> Generator[None]:
        self._retried(_begin)
        self._savepoints = _Savepoints()
        with self._translated():
            try:
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1
                self._require_sound()
                _say(self._in_transaction(), "COMMIT")
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        """A connection that cannot do that is given up: its transaction ends with it."""
        native = self._native
        if native is None or native.closed:
            return
        try:
            _say(native, "ROLLBACK")
        except psycopg.Error:
            native.close()

    def _require_sound(self) -> None:
        """PostgreSQL would answer COMMIT by rolling back, and call that well done."""
        if self._in_transaction().info.transaction_status != pq.TransactionStatus.INTRANS:
            raise StoreError(f"{self.place}: the transaction was undone by an earlier failure; nothing was written")

    def _in_transaction(self) -> Native:
        """Never another connection than that of the transaction."""
        if self._native is None or self._native.closed:
            raise StoreError(f"{self.place}: the connection was lost; nothing was written")
        return self._native

    # statements

    def _translated(self) -> Translated:
        return Translated(self.place)

    def _rows(self, sql: str, params: Params = ()) -> Sequence[Row]:
        if not self._depth:
            return self._retried(lambda native: _selected(native, sql, params))
        with self._translated():
            return _selected(self._in_part(), sql, params)

    def _write(self, sql: str, params: Params) -> int:
        with self._translated():
            return _written(self._in_part(), sql, params)

    def _note_deleted(self, ids: Sequence[str]) -> None:
        """What lies in memory and beside it follows the feed."""

    def _note_erased(self) -> None:
        """The server's own vacuum frees the room, and overwrites it with what comes next."""

    def _in_part(self) -> Native:
        """The connection, with the savepoints set that belong before this statement."""
        native = self._in_transaction()
        if words := self._savepoints.wanted():
            _say(native, words)
        return native


class _Savepoints:
    """Which parts of a transaction are open, and which of them have a savepoint.

    A savepoint is set when a part's first statement comes, and is the same for all parts that began since the statement
    before; it is released together with the setting of the next. So most parts cost one trip to the server, not three.
    """

    def __init__(self) -> None:
        self._parts: list[str | None] = []  # the savepoint of each open part, outermost first; None: not set yet
        self._done: list[str] = []  # savepoints of parts that have ended, inner ones first
        self._set = 0

    def enter(self) -> None:
        self._parts.append(None)

    def wanted(self) -> str:
        """What to say before the next statement; "" where nothing is needed."""
        if not self._parts or self._parts[-1] is not None:
            return ""
        self._set += 1
        name = f"part_{self._set}"
        self._parts = [name if part is None else part for part in self._parts]
        words = [f"RELEASE {done}" for done in self._done] + [f"SAVEPOINT {name}"]
        self._done = []
        return "; ".join(words)

    def leave(self) -> None:
        """The innermost part ended well."""
        name = self._parts.pop()
        if name is not None and name not in self._parts:
            self._done.append(name)

    def undo(self) -> str:
        """The innermost part failed: what takes back what it wrote; "" where it wrote nothing."""
        name = self._parts.pop()
        if name is None:
            return ""
        self._done = [done for done in self._done if _number(done) < _number(name)]  # those set within it end with it
        if name not in self._parts:
            self._done.append(name)
        return f"ROLLBACK TO {name}"


def _number(savepoint: str) -> int:
    return int(savepoint.rpartition("_")[2])


class _Part:
    """A part of a transaction that can be undone alone."""

    def __init__(self, connection: PostgresConnection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection._require_sound()
        self._connection._depth += 1
        self._connection._savepoints.enter()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        connection = self._connection
        connection._depth -= 1
        if exc is None:
            connection._savepoints.leave()
            return
        words = connection._savepoints.undo()
        native = connection._native
        if words and native is not None and not native.closed:
            with suppress(psycopg.Error):  # the transaction is found unsound by whoever goes on with it
                _say(native, words)
        connection._translated().__exit__(kind, exc, traceback)


def _begin(native: Native) -> None:
    """A transaction that writes. What fails leaves none."""
    try:
        _say(native, BEGIN)
    except BaseException:
        with suppress(psycopg.Error):
            _say(native, "ROLLBACK")
        raise


def _say(native: Native, words: str) -> None:
    native.execute(words.encode(), prepare=False)


def _selected(native: Native, sql: str, params: Params) -> Sequence[Row]:
    words = translated(sql)
    return native.execute(words.text, words.values(params), binary=True).fetchall()


def _written(native: Native, sql: str, params: Params) -> int:
    words = translated(sql)
    return native.execute(words.text, words.values(params)).rowcount
