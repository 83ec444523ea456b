"""The store in one SQLite file, through sqlite-utils. The contract is store.ExampleStore.

Each room adds its tables to those of the room below:

    store       SqliteStore: the whole, and its upkeep
    feedback    what is said of answers, and what follows from it
    examples    what is shown
    exchanges   what was asked and answered, what it cost, what is handed out again
    feed        the changes, and what followers keep
    connection  transactions, statements, the log, backups
    driver      opening a file; SQLite's errors as ours

`rows` turns records into rows and back; `key` is what a store is encrypted with, `encrypt` brings one to another key.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from iccache.errors import StoreError
from iccache.examples import credit
from iccache.examples.index import snapshot
from iccache.examples.sqlite.exchanges import DAY_S
from iccache.examples.sqlite.feedback import Opinions
from iccache.examples.sqlite.key import Key


class SqliteStore(Opinions):
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

    def trim(self, now: float, keep_days: float, limit: int = 5000) -> int:
        if not keep_days:
            return 0
        before = now - keep_days * DAY_S
        with self.transaction():
            exchanges = self._write(
                "DELETE FROM exchanges WHERE request_id IN"
                " (SELECT request_id FROM exchanges WHERE at < ? ORDER BY at LIMIT ?)",
                [before, limit],
            )
            young = "SELECT coalesce((SELECT seq FROM changes WHERE at >= ? ORDER BY seq LIMIT 1), ?)"
            first_young = int(self._number(young, [before, self.last_change() + 1]))
            changes = self.trim_changes(min(first_young, self.oldest_change() + limit))
            return exchanges + changes

    def size_bytes(self) -> dict[str, int]:
        examples = self._row("SELECT coalesce(sum(text_bytes), 0), coalesce(sum(embedding_bytes), 0) FROM examples", [])
        assert examples is not None
        sizes = {
            "examples": int(examples[0]),
            "embeddings": int(examples[1]),
            "exchanges": int(self._number("SELECT coalesce(sum(text_bytes), 0) FROM exchanges")),
        }
        file, wal = self._files()
        index = 0 if isinstance(self.path, str) else _file_size(snapshot.beside(self.path))
        return {**sizes, "other": max(0, file - sum(sizes.values())), "wal": wal, "index": index}

    def _files(self) -> tuple[int, int]:
        """Sizes of the file and of its write-ahead log."""
        if isinstance(self.path, str):
            return int(self._number("PRAGMA page_count") * self._number("PRAGMA page_size")), 0
        return _file_size(self.path), _file_size(Path(f"{self.path}-wal"))

    def writable(self) -> bool:
        try:
            with self.transaction():
                self._write("INSERT OR REPLACE INTO probe (id, at) VALUES (1, ?)", [self._clock()])
        except StoreError:
            return False
        return True


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
