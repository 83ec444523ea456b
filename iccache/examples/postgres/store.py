"""The store in a PostgreSQL database, for several machines: the rooms of `sql` on a connection of its own.

    connection  transactions, statements, reconnecting
    schema      the tables, and bringing them to this version
    dialect     SQLite's SQL in PostgreSQL's words
    driver      psycopg: opening a connection; its errors as ours

What may be shown of an address says iccache/postgres_url.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from iccache.errors import StoreError
from iccache.examples import credit
from iccache.examples.postgres import driver, schema
from iccache.examples.postgres.connection import PostgresConnection
from iccache.examples.postgres.driver import SCHEMA
from iccache.examples.sql.store import SqlStore
from iccache.postgres_url import shown
from iccache.types import ChangeKind

LAST_CHANGE = "SELECT greatest((SELECT max(seq) FROM changes), (SELECT seq FROM trimmed))"
APPEND = f"INSERT INTO changes (seq, at, kind, key, old, new) VALUES (({LAST_CHANGE}) + 1, ?, ?, ?, ?, ?)"  # noqa: S608
RELATION_BYTES = f"""
SELECT coalesce(sum(pg_total_relation_size(oid)), 0) FROM pg_class
WHERE relnamespace = to_regnamespace('{SCHEMA}') AND relkind = 'r'
"""  # noqa: S608


class PostgresStore(SqlStore, PostgresConnection):
    """One connection."""

    def __init__(
        self,
        url: str,
        *,
        read_only: bool = False,
        decay_per_hour: float = credit.DECAY_PER_HOUR,
        quality_floor: float = credit.QUALITY_FLOOR,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._decay_per_hour = decay_per_hour
        self._quality_floor = quality_floor
        self._clock = clock
        super().__init__(url, read_only=read_only)

    def reader(self) -> PostgresStore:
        return PostgresStore(
            self.url,
            read_only=True,
            decay_per_hour=self._decay_per_hour,
            quality_floor=self._quality_floor,
            clock=self._clock,
        )

    def last_change(self) -> int:
        return int(self._number(LAST_CHANGE))

    def trim_changes(self, before: int) -> int:
        with self.transaction():
            self._write(f"UPDATE trimmed SET seq = ({LAST_CHANGE})", [])  # noqa: S608
            return super().trim_changes(before)

    def _append(self, kind: ChangeKind, key: str, old: float | None = None, new: float | None = None) -> None:
        """Numbers without a gap, in the order of commits: only who writes may count."""
        self._write(APPEND, [self._clock(), str(kind), key, old, new])

    def size_bytes(self) -> dict[str, int]:
        """Of the tables in this database; its log is the server's."""
        sizes = self._text_sizes()
        tables = int(self._number(RELATION_BYTES))
        return {**sizes, "other": max(0, tables - sum(sizes.values())), "wal": 0, "index": 0}

    def checkpoint(self) -> bool:
        """The server does that by itself."""
        return True

    def backup(self, path: Path | str) -> None:
        raise StoreError(
            f"{self.place}: is backed up by PostgreSQL's own means: pg_dump -Fc --schema={SCHEMA} -f {path}"
        )


def holds_store(url: str) -> bool:
    """Whether the database is there, and a store in it. Raises ConfigError, StoreError."""
    with driver.Translated(shown(url)), closing(driver.connect(url, read_only=True)) as native:
        return schema.is_there(native)
