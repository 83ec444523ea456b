"""The feed of changes, and what its followers keep."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import orjson

from iccache.examples.sql.connection import Connection
from iccache.examples.sql.rows import to_json
from iccache.types import Change, ChangeKind

RESTORED_STATE = "restored"  # its cursor is what `restored_at` says
ERASED_STATE = "erased"  # its cursor is how often something was erased
LEARNED_STATES = ["router", "utility"]  # of followers that learn from exchanges


class Feed(Connection):
    """Tables `changes` and `states`."""

    _clock: Callable[[], float]

    def changes(self, since: int, limit: int = 1000) -> list[Change]:
        rows = self._rows(
            "SELECT seq, kind, key, old, new FROM changes WHERE seq > ? ORDER BY seq LIMIT ?", [since, limit]
        )
        return [Change(row["seq"], ChangeKind(row["kind"]), row["key"], row["old"], row["new"]) for row in rows]

    def next_change(self, kind: ChangeKind, since: int) -> int | None:
        row = self._row("SELECT seq FROM changes WHERE seq > ? AND kind = ? ORDER BY seq LIMIT 1", [since, str(kind)])
        return None if row is None else int(row["seq"])

    @abstractmethod
    def last_change(self) -> int: ...

    def oldest_change(self) -> int:
        oldest = "SELECT coalesce((SELECT min(seq) FROM changes), :next)"
        return int(self._number(oldest, {"next": self.last_change() + 1}))

    def trim_changes(self, before: int) -> int:
        with self.transaction():
            return self._write("DELETE FROM changes WHERE seq < ?", [before])

    def restored_at(self) -> int:
        state = self.load_state(RESTORED_STATE)
        return 0 if state is None else state[0]

    def save_state(self, name: str, cursor: int, blob: bytes) -> bool:
        with self.transaction():
            saved = self._write(
                "INSERT INTO states (name, cursor, blob) VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE"
                " SET cursor = excluded.cursor, blob = excluded.blob WHERE excluded.cursor > states.cursor",
                [name, cursor, blob],
            )
            return saved > 0

    def load_state(self, name: str) -> tuple[int, bytes] | None:
        row = self._row("SELECT cursor, blob FROM states WHERE name = ?", [name])
        return None if row is None else (int(row["cursor"]), bytes(row["blob"]))

    def _append(self, kind: ChangeKind, key: str, old: float | None = None, new: float | None = None) -> None:
        self._write(
            "INSERT INTO changes (at, kind, key, old, new) VALUES (?, ?, ?, ?, ?)",
            [self._clock(), str(kind), key, old, new],
        )

    def _count_erasure(self) -> None:
        """What was learned from the erased goes with it: kept states now, those in memory when their process looks."""
        count, _ = self.erasures()
        self._write("DELETE FROM states WHERE name IN (SELECT value FROM json_each(?))", [to_json(LEARNED_STATES)])
        self.save_state(ERASED_STATE, count + 1, orjson.dumps(self._clock()))

    def erasures(self) -> tuple[int, float]:
        state = self.load_state(ERASED_STATE)
        return (0, 0.0) if state is None else (state[0], float(orjson.loads(state[1])))
