"""The schema of the SQLite store, as numbered steps. A step that was released is never edited: add the next one.

The number of a store is that of its last applied step. A store with steps that are not known here was made by a newer
version and is left alone.
"""

from __future__ import annotations

import time
from pathlib import Path

from iccache.errors import StoreError, StoreVersionError
from iccache.examples.database import Database, Migrations
from iccache.examples.sqlite import driver

APPLICATION_ID = 0x69636361  # "icca", in the header of the file: tells our files from other SQLite files
SET = "iccache"
RETRY_S = 0.02

steps = Migrations(SET)

INITIAL = """
CREATE TABLE exchanges (
    request_id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    subject TEXT,
    session TEXT,
    at REAL NOT NULL,
    dialect TEXT NOT NULL,
    model TEXT NOT NULL,
    stream INTEGER NOT NULL,
    backend TEXT NOT NULL,
    decision TEXT NOT NULL,
    reason TEXT,
    status INTEGER NOT NULL,
    complete INTEGER NOT NULL,
    offloaded INTEGER NOT NULL,
    relative_cost REAL NOT NULL,
    quality REAL,                        -- all its feedback in one number
    counted INTEGER NOT NULL DEFAULT 0,  -- whether its shown examples have their `uses`
    text_bytes INTEGER NOT NULL,         -- of system, task and answer
    finish_reason TEXT,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    example_tokens INTEGER NOT NULL,
    estimated INTEGER NOT NULL,
    cost_usd REAL NOT NULL,
    latency_s REAL NOT NULL,
    first_byte_s REAL,
    overhead_s REAL NOT NULL,
    propensity REAL,
    features BLOB,                       -- little-endian float64
    shown TEXT NOT NULL,                 -- JSON: [id, ...]
    considered TEXT NOT NULL,            -- JSON: [[id, similarity, utility, shown], ...]
    backends TEXT NOT NULL,              -- JSON: [[name, score, load_bias, probability], ...]
    extra TEXT NOT NULL,                 -- JSON object
    system TEXT NOT NULL,
    task TEXT NOT NULL,
    answer TEXT NOT NULL
);
CREATE INDEX exchanges_at ON exchanges (at, request_id, text_bytes);
CREATE INDEX exchanges_spending ON exchanges (tenant, at, cost_usd);
CREATE INDEX exchanges_session ON exchanges (tenant, session, at, backend) WHERE session IS NOT NULL;

CREATE TABLE feedback (
    request_id TEXT NOT NULL REFERENCES exchanges (request_id) ON DELETE CASCADE,
    source TEXT NOT NULL,
    score REAL,
    at REAL NOT NULL,
    demonstration TEXT,
    PRIMARY KEY (request_id, source)
) WITHOUT ROWID;

CREATE TABLE examples (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    subject TEXT,
    request_id TEXT NOT NULL,
    at REAL NOT NULL,
    dialect TEXT NOT NULL,
    backend TEXT NOT NULL,
    digest BLOB NOT NULL,                -- of system and request: what makes a duplicate
    original INTEGER NOT NULL,           -- whether the answer is the one of the exchange request_id
    tokens INTEGER NOT NULL,
    text_bytes INTEGER NOT NULL,         -- of system, request and answer
    embedding_bytes INTEGER NOT NULL,
    embedder TEXT NOT NULL,
    embedding BLOB NOT NULL,             -- little-endian float32
    system TEXT NOT NULL,
    request TEXT NOT NULL,
    answer TEXT NOT NULL
);
CREATE UNIQUE INDEX examples_digest ON examples (tenant, digest);
CREATE INDEX examples_request ON examples (request_id);
CREATE INDEX examples_newest ON examples (tenant, at, id);
CREATE INDEX examples_at ON examples (at, id);
CREATE INDEX examples_sizes ON examples (tenant, text_bytes, embedding_bytes);

-- apart from `examples`: small rows that change often beside large ones that do not
CREATE TABLE example_stats (
    example_id TEXT PRIMARY KEY REFERENCES examples (id) ON DELETE CASCADE,
    uses INTEGER NOT NULL,
    credit REAL NOT NULL,
    credited_quality REAL NOT NULL,
    offloads REAL NOT NULL,
    offloads_at REAL NOT NULL,
    gain REAL NOT NULL,
    own_quality REAL,
    replays INTEGER NOT NULL,
    scored INTEGER NOT NULL DEFAULT 0,     -- answers in the EMA of gain
    gain_since INTEGER NOT NULL DEFAULT 0  -- `scored` when the gain was last set: earlier answers no longer count in it
) WITHOUT ROWID;

CREATE VIEW full_examples AS
SELECT e.*, uses, credit, credited_quality, offloads, offloads_at, gain, own_quality, replays
FROM examples e JOIN example_stats s ON s.example_id = e.id;

-- which answers are in the statistics of which example
CREATE TABLE credits (
    request_id TEXT NOT NULL REFERENCES exchanges (request_id) ON DELETE CASCADE,
    example_id TEXT NOT NULL REFERENCES examples (id) ON DELETE CASCADE,
    ordinal INTEGER NOT NULL,            -- its place among the example's scored answers, from 1
    PRIMARY KEY (request_id, example_id)
) WITHOUT ROWID;
CREATE INDEX credits_example ON credits (example_id);

CREATE TABLE changes (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    key TEXT NOT NULL,
    old REAL,
    new REAL
);

CREATE TABLE states (
    name TEXT PRIMARY KEY,
    cursor INTEGER NOT NULL,
    blob BLOB NOT NULL
);

CREATE TABLE probe (id INTEGER PRIMARY KEY CHECK (id = 1), at REAL NOT NULL);
"""


@steps(name="0001_initial")
def initial(db: Database) -> None:
    """Exchanges, feedback, examples with their statistics, the feed of changes, saved states."""
    db.executescript(INITIAL)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")


@steps(name="0002_reuse")
def reuse(db: Database) -> None:
    """Whole answers, for exact reuse."""
    db.execute(
        """
        CREATE TABLE reusable (
            key BLOB PRIMARY KEY,                -- digest of tenant and request
            tenant TEXT NOT NULL,
            request_id TEXT NOT NULL REFERENCES exchanges (request_id) ON DELETE CASCADE,
            at REAL NOT NULL,
            content_type TEXT NOT NULL,
            body BLOB NOT NULL                   -- as it came
        ) WITHOUT ROWID
        """
    )
    db.execute("CREATE INDEX reusable_at ON reusable (at)")
    db.execute("CREATE INDEX reusable_request ON reusable (request_id)")


@steps(name="0003_standing")
def standing(db: Database) -> None:
    """What is kept back, who confirmed what, and what was made from what."""
    db.execute("ALTER TABLE examples ADD COLUMN held TEXT")
    db.execute("CREATE INDEX examples_held ON examples (tenant, held, at) WHERE held IS NOT NULL")
    db.execute("ALTER TABLE example_stats ADD COLUMN confirmations INTEGER NOT NULL DEFAULT 0")
    db.execute("DROP VIEW full_examples")
    db.execute(
        "CREATE VIEW full_examples AS SELECT e.*, s.* FROM examples e JOIN example_stats s ON s.example_id = e.id"
    )
    db.execute(
        """
        CREATE TABLE witnesses (                 -- exchanges whose answer agreed with an example's
            example_id TEXT NOT NULL REFERENCES examples (id) ON DELETE CASCADE,
            request_id TEXT NOT NULL,
            subject TEXT,
            at REAL NOT NULL,
            PRIMARY KEY (example_id, request_id)
        ) WITHOUT ROWID
        """
    )
    db.execute("CREATE INDEX witnesses_request ON witnesses (request_id)")
    db.execute(
        """
        CREATE TABLE derivations (               -- examples that were made from others
            derived_id TEXT NOT NULL REFERENCES examples (id) ON DELETE CASCADE,
            source_id TEXT NOT NULL,
            PRIMARY KEY (derived_id, source_id)
        ) WITHOUT ROWID
        """
    )
    db.execute("CREATE INDEX derivations_source ON derivations (source_id)")


@steps(name="0004_scored")
def scored(db: Database) -> None:
    """The newest scored exchanges are found without reading the others."""
    db.execute("CREATE INDEX exchanges_scored ON exchanges (at) WHERE quality IS NOT NULL")


@steps(name="0005_traced")
def traced(db: Database) -> None:
    """From when on an example's outcomes count against it, and the scored exchanges of a tenant by time."""
    db.execute("ALTER TABLE examples ADD COLUMN judged_from REAL NOT NULL DEFAULT 0")
    db.execute("CREATE INDEX exchanges_judged ON exchanges (tenant, at) WHERE quality IS NOT NULL")


@steps(name="0006_judging")
def judging(db: Database) -> None:
    """What comparing answers in the background costs."""
    db.execute(
        """
        CREATE TABLE judging (
            id INTEGER PRIMARY KEY,
            at REAL NOT NULL,
            request_id TEXT NOT NULL,            -- of an exchange that may be gone by now: what was spent stays spent
            kind TEXT NOT NULL,                  -- answer, judgement
            nusd INTEGER NOT NULL,               -- 1e-9 USD: the most it can cost, then what it did
            settled INTEGER NOT NULL DEFAULT 0
        )
        """
    )
    db.execute("CREATE INDEX judging_at ON judging (at, nusd)")


def newest(migrations: Migrations = steps) -> int:
    """The number of the schema that this version writes."""
    return max(_number(migration.name) for migration in migrations._migrations)


def migrate(db: Database, path: Path | str, *, migrations: Migrations = steps, timeout_s: float = 30.0) -> None:
    """Bring the store to the newest schema. Several processes may do so at once: one works, the others wait.

    All pending steps are one transaction: a failure leaves the store as it was. Raises StoreVersionError, StoreError.
    """
    _check(db, path, migrations)
    if _is_current(db, migrations):
        return
    _begin(db, timeout_s)
    try:
        _check(db, path, migrations)
        migrations.apply(db)
        db.commit()
    except BaseException:
        db.rollback()
        raise


def check(db: Database, path: Path | str, *, migrations: Migrations = steps) -> None:
    """For readers, which cannot migrate: raise unless the store has exactly the schema of this version."""
    _check(db, path, migrations)
    if not _is_current(db, migrations):
        raise StoreError(f"{path}: is not a store of this version yet: start `iccache serve` on it once to migrate it")


def refuse_strangers(db: Database, path: Path | str) -> None:
    """Raise before anything is written if the file is another program's, or a newer version's."""
    _check(db, path, steps)


def _check(db: Database, path: Path | str, migrations: Migrations) -> None:
    """Raise if the file is another program's, or a newer version's."""
    applied = {migration.name for migration in migrations.applied(db)}
    unknown = applied - {migration.name for migration in migrations._migrations}
    if unknown:
        theirs = max(_number(name) for name in unknown)
        raise StoreVersionError(
            f"{path}: was made by a newer version of iccache: its schema is {theirs}, this version knows "
            f"{newest(migrations)}: upgrade iccache, or point store.url at another file"
        )
    if not applied and db.table_names() and not _is_ours(db):
        raise StoreError(f"{path}: is an SQLite file of another program: point store.url at another file")


def _is_current(db: Database, migrations: Migrations) -> bool:
    return not migrations.pending(db)


def _is_ours(db: Database) -> bool:
    return bool(db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID)


def _begin(db: Database, timeout_s: float) -> None:
    """Take the write lock. SQLite's own waiting does not cover every collision on a file that is just being made."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            db.execute("BEGIN IMMEDIATE")
            return
        except driver.errors() as exc:
            if not driver.is_busy(exc) or time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)


def enable_wal(db: Database, timeout_s: float = 30.0) -> None:
    """Switch to WAL, once for the file. Waits for others that do the same."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            db.enable_wal()
            return
        except driver.errors() as exc:
            if not driver.is_busy(exc) or time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)


def _number(name: str) -> int:
    """7 of `0007_what_it_does`; 0 of a name without a number."""
    digits = name.split("_", 1)[0]
    return int(digits) if digits.isdecimal() else 0
