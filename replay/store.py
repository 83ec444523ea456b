"""The store with replay's own tables beside the others, on one connection: a change and its price are one commit.

replay_runs     one row for a run, which may take several invocations (a kill in between, or two at once)
replay_workers  invocations at work, with a lease that they renew
replay_items    one round of one example: who is at it, or what became of it
replay_calls    the money: reserved before a call, confirmed after it
replay_answers  what calls said, until their item is done, so that a kill costs only the calls in flight
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sqlite_utils import Database, Migrations

from iccache import config
from iccache.examples import migrations
from iccache.examples.sqlite import PAGE, Params, SqliteStore
from iccache.examples.store import SQLITE

steps = Migrations("iccache-replay")

INITIAL = """
CREATE TABLE replay_runs (
    id TEXT PRIMARY KEY,
    started_at REAL NOT NULL,
    seen_at REAL NOT NULL,               -- when an invocation last came or went
    completed_at REAL,                   -- NULL: an invocation is at work, or was killed
    invocations INTEGER NOT NULL DEFAULT 0,
    replayed INTEGER NOT NULL DEFAULT 0,
    improved INTEGER NOT NULL DEFAULT 0,
    kept INTEGER NOT NULL DEFAULT 0,
    refused INTEGER NOT NULL DEFAULT 0,
    overtaken INTEGER NOT NULL DEFAULT 0,
    expired INTEGER NOT NULL DEFAULT 0,
    evicted INTEGER NOT NULL DEFAULT 0,
    evicted_bytes INTEGER NOT NULL DEFAULT 0,
    trimmed INTEGER NOT NULL DEFAULT 0,
    seconds REAL NOT NULL DEFAULT 0      -- of all its invocations that came to their end
);
CREATE INDEX replay_runs_open ON replay_runs (seen_at) WHERE completed_at IS NULL;

CREATE TABLE replay_workers (
    worker TEXT PRIMARY KEY,
    run_id TEXT NOT NULL REFERENCES replay_runs (id),
    lease_until REAL NOT NULL
) WITHOUT ROWID;

CREATE TABLE replay_items (
    example_id TEXT NOT NULL REFERENCES examples (id) ON DELETE CASCADE,
    round INTEGER NOT NULL,              -- from 1
    run_id TEXT NOT NULL,                -- the run that did it, or was last at it
    worker TEXT,                         -- NULL: nobody is at it
    lease_until REAL NOT NULL,
    attempt INTEGER NOT NULL,            -- grows with every lease: an older one no longer counts
    failures INTEGER NOT NULL DEFAULT 0, -- attempts that ended because an upstream failed at it
    result TEXT,                         -- NULL: not done
    PRIMARY KEY (example_id, round)
) WITHOUT ROWID;
CREATE INDEX replay_items_held ON replay_items (worker) WHERE worker IS NOT NULL;

CREATE TABLE replay_calls (
    id INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL,
    example_id TEXT NOT NULL,            -- of an example that may be gone by now: what was spent stays spent
    round INTEGER NOT NULL,
    kind TEXT NOT NULL,                  -- answer, judgement
    backend TEXT NOT NULL,
    at REAL NOT NULL,
    reserved_nusd INTEGER NOT NULL,      -- the most it can cost, in 1e-9 USD
    state TEXT NOT NULL,                 -- reserved, confirmed; free: certainly not billed
    nusd INTEGER NOT NULL DEFAULT 0,     -- when confirmed
    input_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    estimated INTEGER NOT NULL DEFAULT 0 -- the upstream did not say: the tokens are upper bounds
);
CREATE INDEX replay_calls_run ON replay_calls (run_id, state, reserved_nusd, nusd);

CREATE TABLE replay_answers (
    example_id TEXT NOT NULL REFERENCES examples (id) ON DELETE CASCADE,
    round INTEGER NOT NULL,
    digest BLOB NOT NULL,                -- of what was asked
    text TEXT NOT NULL,                  -- '' where the answer cannot be used
    PRIMARY KEY (example_id, round, digest)
) WITHOUT ROWID;
"""


@steps(name="0001_replay")
def initial(db: Database) -> None:
    """Runs, workers, items, calls and their answers."""
    db.executescript(INITIAL)


@steps(name="0002_recovered")
def recovered(db: Database) -> None:
    """How an example's answers went before a round: what an improvement is measured against."""
    for column in ("credit_before", "quality_before"):
        db.execute(f"ALTER TABLE replay_items ADD COLUMN {column} REAL NOT NULL DEFAULT 0")


class Recovery(NamedTuple):
    """How answers went with an improved example."""

    answers: float  # scored since, each shared among the examples shown for it
    quality: float  # their mean
    quality_before: float  # mean of those before


class Record(NamedTuple):
    """How an example did, and how long its texts are: enough to rank it."""

    id: str
    tokens: int  # of request and answer
    system_bytes: int
    request_bytes: int
    answer_bytes: int
    credit: float
    credited_quality: float
    gain: float
    own_quality: float | None
    replays: int
    uses: int
    at: float


# without those of which nothing bad is known
SELECT_RECORDS = """
SELECT e.id, e.tokens, length(CAST(e.system AS BLOB)), length(CAST(e.request AS BLOB)), length(CAST(e.answer AS BLOB)),
    s.credit, s.credited_quality, s.gain, s.own_quality, s.replays, s.uses, e.at
FROM example_stats s JOIN examples e ON e.id = s.example_id
WHERE s.example_id > :after AND (:tenant IS NULL OR e.tenant = :tenant)
    AND (s.gain > 0 OR s.credit > 0 OR s.own_quality < 1)
ORDER BY s.example_id LIMIT :page
"""

# of an example's rounds, the last that improved it: its record is of that answer
SELECT_RECOVERIES = """
SELECT s.credit, s.credited_quality / s.credit, i.quality_before / i.credit_before
FROM replay_items i JOIN example_stats s ON s.example_id = i.example_id
WHERE i.result = 'improved' AND s.credit > 0 AND i.credit_before > 0 AND i.round = (
    SELECT max(round) FROM replay_items o WHERE o.example_id = i.example_id AND o.result = 'improved'
)
"""
PEERS_AMONG = 2000  # of a tenant's newest examples
SELECT_PEERS = """
SELECT answer FROM (
    SELECT system, answer FROM examples WHERE tenant = :tenant ORDER BY at DESC, id DESC LIMIT :among
) WHERE system = :system
"""


class ReplayStore(SqliteStore):
    """A SqliteStore that also lets replay's own files read and write their tables."""

    def _open(self) -> Database:
        db = super()._open()
        if not self.read_only:
            migrations.migrate(db, self.path, migrations=steps)
        return db

    def rows(self, sql: str, params: Params = ()) -> list[sqlite3.Row]:
        return self._rows(sql, params)

    def row(self, sql: str, params: Params = ()) -> sqlite3.Row | None:
        return self._row(sql, params)

    def write(self, sql: str, params: Params = ()) -> int:
        """How many rows it touched. Only inside a transaction."""
        return self._write(sql, params)

    def records(self, tenant: str | None = None) -> Iterator[Record]:
        """The examples of which something bad may be known, in pages."""
        return (Record(*row) for row in self._pages(SELECT_RECORDS, {"tenant": tenant}))

    def peers(self, tenant: str, system: str) -> list[str]:
        """The answers of a tenant's newer examples under one system prompt; none without one: they are of all kinds."""
        if not system:
            return []
        found = self._rows(SELECT_PEERS, {"tenant": tenant, "system": system, "among": PEERS_AMONG})
        return [row["answer"] for row in found]

    def recoveries(self) -> list[Recovery]:
        """The improved examples of which answers were scored before and since."""
        return [Recovery(*row) for row in self._rows(SELECT_RECOVERIES)]

    def _pages(self, sql: str, params: dict[str, str | None]) -> Iterator[sqlite3.Row]:
        after = ""
        while True:
            rows = self._rows(sql, {**params, "after": after, "page": PAGE})
            yield from rows
            if len(rows) < PAGE:
                return
            after = rows[-1]["id"]


def open_replay_store(settings: config.Config) -> ReplayStore:
    """The configured store, made or migrated where needed. Raises StoreVersionError, StoreError."""
    path = Path(settings.store.url.removeprefix(SQLITE))
    cache = settings.cache
    return ReplayStore(path, decay_per_hour=cache.decay_per_hour, quality_floor=cache.quality_floor)
