"""The store with replay's own tables beside the others, on one connection: a change and its price are one commit.

replay_runs     one row for a run, which may take several invocations (a kill in between, or two at once)
replay_workers  invocations at work, with a lease that they renew
replay_items    one round of one example: who is at it, or what became of it
replay_calls    the money: reserved before a call, confirmed after it
replay_answers  what calls said, until their item is done, so that a kill costs only the calls in flight
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson

from iccache import config
from iccache.examples import migrations
from iccache.examples.credit import add_decaying
from iccache.examples.database import Database, Migrations
from iccache.examples.sql.connection import Params, Row
from iccache.examples.sql.exchanges import PAGE
from iccache.examples.sql.store import SqlStore
from iccache.examples.sqlite.key import key_of
from iccache.examples.sqlite.store import SqliteStore
from iccache.examples.store import SQLITE, refuse_key
from iccache.postgres_url import is_postgres
from iccache.types import Example, Matrix, Vector
from replay.doubt import Said

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


class Failure(NamedTuple):
    """An answer that was not good enough."""

    request: str
    answer: str


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


# without those of which nothing bad is known, nor that they were ever shown
SELECT_RECORDS = """
SELECT e.id, e.tokens, length(CAST(e.system AS BLOB)), length(CAST(e.request AS BLOB)), length(CAST(e.answer AS BLOB)),
    s.credit, s.credited_quality, s.gain, s.own_quality, s.replays, s.uses, e.at
FROM example_stats s JOIN examples e ON e.id = s.example_id
WHERE s.example_id > :after AND (:tenant IS NULL OR e.tenant = :tenant) AND e.backend <> 'distilled'
    AND (s.gain > 0 OR s.credit > 0 OR s.own_quality < 1 OR s.uses > 0)
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
DISTILLED = "distilled"  # who answered an entry that was made of others
SELECT_FAILURES = """
SELECT task, answer FROM exchanges WHERE quality < :good_enough AND task <> '' AND answer <> ''
    AND request_id IN (SELECT request_id FROM credits WHERE example_id IN (SELECT value FROM json_each(:ids)))
    AND (subject IS NULL OR subject IN (SELECT subject FROM examples WHERE id IN (SELECT value FROM json_each(:seen))))
ORDER BY at DESC, request_id LIMIT :count
"""
PEERS_AMONG = 2000  # of a tenant's newest examples
SELECT_PEERS = """
SELECT answer FROM (
    SELECT system, answer FROM examples WHERE tenant = :tenant AND backend <> 'distilled'
    ORDER BY at DESC, id DESC LIMIT :among
) AS newest WHERE system = :system
"""
SELECT_KINDS = """
SELECT id, tenant, system, embedder FROM examples WHERE id IN (SELECT value FROM json_each(?))
ORDER BY tenant, system, embedder, id
"""
SELECT_NEWEST_OF_KIND = """
SELECT id FROM examples WHERE tenant = ? AND system = ? AND embedder = ? AND held IS NULL AND backend <> 'distilled'
ORDER BY at DESC, id LIMIT ?
"""
SAID_KEPT = 50  # newest scored answers that are read for one example
SELECT_SAID = """
SELECT example_id, answer, quality FROM (
    SELECT c.example_id, x.answer, x.quality,
        row_number() OVER (PARTITION BY c.example_id ORDER BY c.ordinal DESC) AS place
    FROM credits c JOIN exchanges x ON x.request_id = c.request_id
    WHERE c.example_id IN (SELECT value FROM json_each(:ids)) AND x.quality IS NOT NULL AND x.answer <> ''
) AS ranked WHERE place <= :kept
"""


class ReplayStore(SqlStore):
    """A store that also lets replay's own files read and write their tables."""

    def rows(self, sql: str, params: Params = ()) -> Sequence[Row]:
        return self._rows(sql, params)

    def row(self, sql: str, params: Params = ()) -> Row | None:
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

    def kinds(self, ids: Sequence[str]) -> Iterator[tuple[list[str], list[str]]]:
        """Of examples `ids` those of one tenant, system prompt and embedder, and the newest such that are shown."""
        rows = self._rows(SELECT_KINDS, [orjson.dumps(list(ids)).decode()])
        for kind, some in groupby(rows, key=lambda row: (row["tenant"], row["system"], row["embedder"])):
            newest = self._rows(SELECT_NEWEST_OF_KIND, [*kind, PEERS_AMONG])
            yield [row["id"] for row in some], [row["id"] for row in newest]

    def said(self, ids: Sequence[str]) -> list[Said]:
        """The newest scored answers that each of `ids` was shown for."""
        found = self._rows(SELECT_SAID, {"ids": orjson.dumps(list(ids)).decode(), "kept": SAID_KEPT})
        return [Said(row["example_id"], row["answer"], row["quality"]) for row in found]

    def tenants(self) -> list[str]:
        """Whose examples there are."""
        return [row["tenant"] for row in self._rows("SELECT DISTINCT tenant FROM examples ORDER BY tenant")]

    def by_system(self, tenant: str) -> list[list[Example]]:
        """A tenant's newer examples that are shown, by system prompt and embedder."""
        groups: dict[tuple[str, str], list[Example]] = {}
        for example in self.examples(self._newest(tenant, PEERS_AMONG)):
            groups.setdefault((example.system, example.embedder), []).append(example)
        return list(groups.values())

    def requests_of(self, tenant: str, among: int) -> list[tuple[str, list[str], Matrix]]:
        """(embedder, ids, embeddings) of a tenant's newest examples that are shown; rows (n, dim)."""
        groups: dict[tuple[str, int], tuple[list[str], list[Vector]]] = {}
        for row in self._rows(
            "SELECT id, embedder, embedding FROM examples WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id",
            [orjson.dumps(self._newest(tenant, among)).decode()],
        ):
            vector = np.frombuffer(row["embedding"], "<f4").astype(np.float32)
            ids, vectors = groups.setdefault((row["embedder"], len(vector)), ([], []))
            ids.append(row["id"])
            vectors.append(vector)
        return [(embedder, ids, np.stack(vectors)) for (embedder, _), (ids, vectors) in groups.items()]

    def _newest(self, tenant: str, count: int) -> list[str]:
        rows = self._rows(
            "SELECT id FROM examples WHERE tenant = ? AND held IS NULL AND backend <> ? ORDER BY at DESC, id LIMIT ?",
            [tenant, DISTILLED, count],
        )
        return [row["id"] for row in rows]

    def distilled_from(self, ids: Sequence[str]) -> int:
        """How large the cluster was when the guidance was written that was made from any of `ids`, or when what the
        teacher said of it could not be used; 0: neither.
        """
        row = self._row(
            "SELECT coalesce(max(-round), 0) FROM replay_items WHERE round < 0"
            " AND example_id IN (SELECT value FROM json_each(:ids)) AND (result = 'unusable' OR result = 'distilled'"
            " AND EXISTS (SELECT 1 FROM derivations d JOIN examples e ON e.id = d.derived_id"
            " WHERE d.source_id IN (SELECT value FROM json_each(:ids)) AND e.backend = 'distilled'))",
            {"ids": orjson.dumps(list(ids)).decode()},
        )
        assert row is not None
        return int(row[0])

    def failures(self, ids: Sequence[str], seen: Sequence[str], good_enough: float, count: int) -> list[Failure]:
        """The latest answers that failed with the examples `ids`.

        Those with a subject only where an example of `seen` is that subject's, so that its purge reaches what is made
        of both.
        """
        lists = {"ids": orjson.dumps(list(ids)).decode(), "seen": orjson.dumps(list(seen)).decode()}
        return [
            Failure(row["task"], row["answer"])
            for row in self._rows(SELECT_FAILURES, {**lists, "good_enough": good_enough, "count": count})
        ]

    def absorb(self, kept: str, gone: str) -> bool:
        """Make two examples that say the same one. False, and nothing written, when either is no more.

        Sums are added; the gain is the mean of both by their credit. What is said later of the answers that `gone` was
        shown for moves the record of `kept` no more.
        """
        with self.transaction():
            found = self.examples([kept, gone])
            if len(found) < 2:
                return False
            stays, goes = found[0].stats, found[1].stats
            offloads, at = add_decaying(
                stays.offloads, stays.offloads_at, goes.offloads, goes.offloads_at, self._decay_per_hour
            )
            credit = stays.credit + goes.credit
            self._write(
                "UPDATE example_stats SET uses = ?, credit = ?, credited_quality = ?, offloads = ?, offloads_at = ?,"
                " gain = ? WHERE example_id = ?",
                [
                    *(stays.uses + goes.uses, credit, stays.credited_quality + goes.credited_quality, offloads, at),
                    (stays.gain * stays.credit + goes.gain * goes.credit) / credit if credit > 0 else stays.gain,
                    kept,
                ],
            )
            known = goes._replace(own_quality=None)
            self.confirm(kept, found[1]._replace(stats=known))
            self.delete_examples([gone], keep_exchanges=True)
            return True

    def delete_orphans(self) -> int:
        """Delete guidance of which a source is gone, as older versions left it: no purge would reach it. How many."""
        rows = self._rows(
            "SELECT DISTINCT derived_id FROM derivations WHERE source_id NOT IN (SELECT id FROM examples)"
        )
        return self.delete_examples([row["derived_id"] for row in rows])

    def recoveries(self) -> list[Recovery]:
        """The improved examples of which answers were scored before and since."""
        return [Recovery(*row) for row in self._rows(SELECT_RECOVERIES)]

    def _pages(self, sql: str, params: dict[str, str | None]) -> Iterator[Row]:
        after = ""
        while True:
            rows = self._rows(sql, {**params, "after": after, "page": PAGE})
            yield from rows
            if len(rows) < PAGE:
                return
            after = rows[-1]["id"]


class SqliteReplayStore(ReplayStore, SqliteStore):
    """In an SQLite file."""

    def _open(self) -> Database:
        db = super()._open()
        if not self.read_only:
            migrations.migrate(db, self.path, migrations=steps)
        return db


def open_replay_store(settings: config.Config) -> ReplayStore:
    """The configured store, made or migrated where needed. Raises ConfigError, StoreVersionError, StoreError."""
    url, cache, key = settings.store.url, settings.cache, key_of(settings.store, os.environ)
    if is_postgres(url):
        refuse_key(key)
        from replay.postgres import PostgresReplayStore  # noqa: PLC0415 - an extra

        return PostgresReplayStore(url, decay_per_hour=cache.decay_per_hour, quality_floor=cache.quality_floor)
    path = Path(url.removeprefix(SQLITE))
    return SqliteReplayStore(path, key=key, decay_per_hour=cache.decay_per_hour, quality_floor=cache.quality_floor)
