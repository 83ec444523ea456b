"""The store in one SQLite file, through sqlite-utils: the rooms of `sql` on a connection of its own.

    connection  transactions, statements, the log, backups
    driver      opening a file; SQLite's errors as ours

`key` is what a store is encrypted with, `encrypt` brings one to another key.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from iccache.examples import credit
from iccache.examples.index import snapshot
from iccache.examples.sql.store import SqlStore
from iccache.examples.sqlite.connection import SqliteConnection
from iccache.examples.sqlite.key import Key


class SqliteStore(SqlStore, SqliteConnection):
    """One connection. Give `path` as MEMORY for a store that ends with its last connection."""

    def __init__(
        self,
        path: Path | str,
        *,
        read_only: bool = False,
        key: Key | None = None,
        decay_per_hour: float = credit.DECAY_PER_HOUR,
        quality_floor: float = credit.QUALITY_FLOOR,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._decay_per_hour = decay_per_hour
        self._quality_floor = quality_floor
        self._clock = clock
        super().__init__(path, read_only=read_only, key=key)

    def reader(self) -> SqliteStore:
        return SqliteStore(
            self.path,
            read_only=True,
            key=self._key,
            decay_per_hour=self._decay_per_hour,
            quality_floor=self._quality_floor,
            clock=self._clock,
        )

    def last_change(self) -> int:
        return int(self._number("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'changes'"))

    def size_bytes(self) -> dict[str, int]:
        sizes = self._text_sizes()
        file, wal = self._files()
        index = 0 if isinstance(self.path, str) else _file_size(snapshot.beside(self.path))
        return {**sizes, "other": max(0, file - sum(sizes.values())), "wal": wal, "index": index}

    def _files(self) -> tuple[int, int]:
        """Sizes of the file and of its write-ahead log."""
        if isinstance(self.path, str):
            return int(self._number("PRAGMA page_count") * self._number("PRAGMA page_size")), 0
        return _file_size(self.path), _file_size(Path(f"{self.path}-wal"))


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
