"""A store in a database that speaks SQL. The contract is store.ExampleStore.

Each room adds its tables to those of the room below:

    store       SqlStore: the whole, and its upkeep
    feedback    what is said of answers, and what follows from it
    examples    what is shown
    exchanges   what was asked and answered, what it cost, what is handed out again
    feed        the changes, and what followers keep
    connection  transactions and statements: what each database has its own of, in `sqlite` and `postgres`

`rows` turns records into rows and back.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from iccache.errors import StoreError
from iccache.examples.sql.exchanges import DAY_S
from iccache.examples.sql.feedback import Opinions

if TYPE_CHECKING:
    from iccache.examples.store import ExampleStore


class SqlStore(Opinions):
    """Opening it, its size, its copies and its readers are each database's own."""

    @abstractmethod
    def reader(self) -> ExampleStore: ...

    @abstractmethod
    def size_bytes(self) -> dict[str, int]: ...

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

    def writable(self) -> bool:
        put = "INSERT INTO probe (id, at) VALUES (1, ?) ON CONFLICT (id) DO UPDATE SET at = excluded.at"
        try:
            with self.transaction():
                self._write(put, [self._clock()])
        except StoreError:
            return False
        return True

    def _text_sizes(self) -> dict[str, int]:
        """Bytes of texts and embeddings, by part."""
        text, embeddings = self.example_bytes()
        exchanges = int(self._number("SELECT coalesce(sum(text_bytes), 0) FROM exchanges"))
        return {"examples": text, "embeddings": embeddings, "exchanges": exchanges}
