"""The store in one SQLite file, through sqlite-utils. The contract is store.ExampleStore.

WAL, so that readers never wait for the writer. synchronous=FULL: a commit is on disk when it returns, so what was
acknowledged survives a power cut too; the writer commits many requests at once, which makes that cheap.
secure_delete=ON: deleted bytes are overwritten. Vectors are raw little-endian floats, structures are JSON.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from sqlite_utils import Database

from iccache import private
from iccache.errors import StoreError
from iccache.examples import credit, migrations, standing
from iccache.examples.credit import GOOD_ENOUGH, NO_CREDIT, Outcome
from iccache.examples.index import snapshot
from iccache.examples.tracing import Standing, Traced
from iccache.types import (
    Agreement,
    BackendScore,
    Change,
    ChangeKind,
    Considered,
    Daily,
    DecisionKind,
    Example,
    ExampleStats,
    Exchange,
    Feedback,
    Hold,
    Kept,
    Reason,
    Usage,
    Vector,
    Weighed,
)

MEMORY = ":memory:"
MEMORY_URI = "file:iccache-"
BUSY_TIMEOUT_S = 10.0
CHECKPOINT_TIMEOUT_S = 0.2  # for the checkpoint that follows an erasure: the writer must not stand still for a reader
CHECKPOINT_EVERY_S = 1.0  # while a long reader, such as a backup, is in its way
PAGE_BYTES = 8192  # an example with its embedding is often over half of SQLite's usual 4096: one a page, the rest waste
JOURNAL_LIMIT_BYTES = 64 * 1024 * 1024  # a log that grew beyond this is cut back at the next checkpoint
PAGE = 1000  # rows read at a time
TEXT_PAGE = 100  # of rows with long texts
RESTORED_STATE = "restored"  # its cursor is what `restored_at` says
ERASED_STATE = "erased"  # its cursor is how often something was erased
LEARNED_STATES = ["router", "utility"]  # of followers that learn from exchanges
DAY_S = 86400.0
DEMONSTRATION = "demonstration"

Params = Sequence[Any] | dict[str, Any]
_memory_names = itertools.count()


class SqliteStore:
    """One connection. Give `path` as MEMORY for a store that ends with its last connection."""

    def __init__(
        self,
        path: Path | str,
        *,
        read_only: bool = False,
        decay_per_hour: float = credit.DECAY_PER_HOUR,
        quality_floor: float = credit.QUALITY_FLOOR,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._memory = isinstance(path, str) and path.startswith((MEMORY, MEMORY_URI))
        self.path: Path | str = _memory_name(str(path)) if self._memory else Path(path).absolute()
        self.read_only = read_only
        self._decay_per_hour = decay_per_hour
        self._quality_floor = quality_floor
        self._clock = clock
        self._depth = 0  # of transactions
        self._erased = False  # the log may still hold what was deleted
        self._deleted: list[str] = []  # ids of examples; the snapshot of the index may still hold their vectors
        self._next_checkpoint = 0.0  # monotonic; not before, where a long reader was in the way
        with self._translated():
            self._db = self._open()
        self._identity = _file_identity(self.path) if isinstance(self.path, Path) else None

    def reader(self) -> SqliteStore:
        return SqliteStore(
            self.path,
            read_only=True,
            decay_per_hour=self._decay_per_hour,
            quality_floor=self._quality_floor,
            clock=self._clock,
        )

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
        if self._erased and time.monotonic() >= self._next_checkpoint:
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

    # exchanges and feedback

    def record(self, exchange: Exchange) -> None:
        with self.transaction():
            before = self._outcome(exchange.request_id)
            if before is not None and before.complete and not exchange.complete:
                return
            row = _exchange_row(exchange)
            self._write(UPSERT_EXCHANGE, [row[column] for column in EXCHANGE_COLUMNS])
            self._count_uses(exchange.request_id)
            if before is not None and before.quality is not None:
                after = self._outcome(exchange.request_id)
                assert after is not None
                self._credit(exchange.request_id, before, after)

    def exchange(self, request_id: str) -> Exchange | None:
        row = self._row("SELECT * FROM exchanges WHERE request_id = ?", [request_id])
        return None if row is None else _exchange(row)

    def latest_scored(self, limit: int) -> list[Exchange]:
        rows = self._rows("SELECT * FROM exchanges WHERE quality IS NOT NULL ORDER BY at DESC LIMIT ?", [limit])
        return [_exchange(row) for row in rows]

    def exchanges(self, since: float, tenant: str | None = None) -> Iterator[Exchange]:
        at, request_id = since, ""
        while True:
            rows = self._rows(
                "SELECT * FROM exchanges WHERE (at, request_id) > (:at, :request_id)"
                " AND (:tenant IS NULL OR tenant = :tenant) ORDER BY at, request_id LIMIT :page",
                {"at": at, "request_id": request_id, "tenant": tenant, "page": PAGE},
            )
            yield from map(_exchange, rows)
            if len(rows) < PAGE:
                return
            at, request_id = rows[-1]["at"], rows[-1]["request_id"]

    def feedback(self, request_id: str) -> list[Feedback]:
        rows = self._rows(
            "SELECT request_id, source, score, at FROM feedback WHERE request_id = ? ORDER BY source", [request_id]
        )
        return [Feedback(*row) for row in rows]

    def add_feedback(
        self,
        feedback: Feedback,
        *,
        tenant: str,
        demonstration: str | None = None,
        embedding: Vector | None = None,
        embedder: str | None = None,
        tokens: int | None = None,
        held: Hold | None = None,
    ) -> bool:
        if feedback.score is None and demonstration is None:
            raise ValueError("feedback has a score or a demonstration")
        if feedback.score is not None and not 0.0 <= feedback.score <= 1.0:
            raise ValueError(f"a score is in [0, 1], not {feedback.score}")
        with self.transaction():
            if self._outcome(feedback.request_id, tenant) is None:
                return False
            if not self._put_feedback(feedback, demonstration):
                return True
            if demonstration is not None:
                self._demonstrate(feedback, demonstration, embedding, embedder, tokens, held)
            self._follow_feedback(feedback.request_id)
            return True

    def preference(self, winner_id: str, loser_id: str, tenant: str, at: float) -> bool:
        if winner_id == loser_id:
            raise ValueError("an answer cannot be preferred over itself")
        with self.transaction():
            if any(self._outcome(id, tenant) is None for id in (winner_id, loser_id)):
                return False
            self.add_feedback(Feedback(winner_id, "user", 1.0, at), tenant=tenant)
            self.add_feedback(Feedback(loser_id, "user", 0.0, at), tenant=tenant)
            return True

    def reserve_judging(self, at: float, request_id: str, kind: str, most_nusd: int, budget_nusd: int) -> int | None:
        midnight = at - at % DAY_S
        with self.transaction():
            spent = self._number(
                "SELECT coalesce(sum(nusd), 0) FROM judging WHERE at >= ? AND at < ?", [midnight, midnight + DAY_S]
            )
            if spent + most_nusd > budget_nusd:
                return None
            self._write(
                "INSERT INTO judging (at, request_id, kind, nusd) VALUES (?, ?, ?, ?)",
                [at, request_id, kind, most_nusd],
            )
            return int(self._number("SELECT last_insert_rowid()"))

    def settle_judging(self, number: int, nusd: int) -> None:
        with self.transaction():
            self._write("UPDATE judging SET nusd = ?, settled = 1 WHERE id = ?", [nusd, number])

    def judged_usd(self, since: float) -> float:
        return self._number("SELECT coalesce(sum(nusd), 0) FROM judging WHERE at >= ?", [since]) / 1e9

    def agreements(self, since: float, tenant: str | None = None, limit: int = 20_000) -> list[Agreement]:
        rows = self._rows(AGREEMENTS, {"since": since, "tenant": tenant, "limit": limit})
        return [
            Agreement(
                row["source"],
                row["n"],
                row["mean"],
                row["compared"],
                row["difference"],
                credit.deviation(row["compared"], row["difference"], row["squares"]),
            )
            for row in rows
        ]

    def spent_today(self, tenant: str, now: float) -> float:
        midnight = now - now % DAY_S
        return self._number(
            "SELECT coalesce(sum(cost_usd), 0.0) FROM exchanges WHERE tenant = ? AND at >= ? AND at < ?",
            [tenant, midnight, midnight + DAY_S],
        )

    def session_backend(self, tenant: str, session: str) -> str | None:
        row = self._row(
            "SELECT backend FROM exchanges WHERE tenant = ? AND session = ? ORDER BY at DESC LIMIT 1", [tenant, session]
        )
        return None if row is None else str(row[0])

    # exact reuse

    def keep_answer(self, key: bytes, answer: Kept, *, tenant: str, expired_before: float) -> None:
        with self.transaction():
            self._write("DELETE FROM reusable WHERE at < ?", [expired_before])
            self._write(
                "INSERT OR REPLACE INTO reusable (key, tenant, request_id, at, content_type, body)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                [key, tenant, answer.request_id, answer.at, answer.content_type, answer.body],
            )

    def kept_answer(self, key: bytes, *, tenant: str, since: float) -> Kept | None:
        row = self._row(
            "SELECT r.*, e.backend, e.quality FROM reusable r JOIN exchanges e USING (request_id)"
            " WHERE r.key = ? AND r.tenant = ? AND r.at >= ?",
            [key, tenant, since],
        )
        if row is None or (row["quality"] is not None and row["quality"] < GOOD_ENOUGH):
            return None
        return Kept(row["request_id"], row["backend"], row["at"], row["content_type"], row["body"])

    def _put_feedback(self, feedback: Feedback, demonstration: str | None) -> bool:
        """Whether this says anything new."""
        identity = [feedback.request_id, feedback.source]
        old = self._row("SELECT score, demonstration FROM feedback WHERE request_id = ? AND source = ?", identity)
        if old is not None and tuple(old) == (feedback.score, demonstration):
            return False
        self._write(
            "INSERT OR REPLACE INTO feedback (request_id, source, score, at, demonstration) VALUES (?, ?, ?, ?, ?)",
            [*feedback, demonstration],
        )
        return True

    def _follow_feedback(self, request_id: str) -> None:
        """Bring quality, the shown examples' statistics and the feed to what the feedback says now."""
        before = self._outcome(request_id)
        assert before is not None
        quality = credit.combined_quality({f.source: f.score for f in self.feedback(request_id)})
        if quality == before.quality:
            return
        self._write("UPDATE exchanges SET quality = ? WHERE request_id = ?", [quality, request_id])
        judged = [row["id"] for row in self._rows(standing.ANSWERED_BY, [request_id, request_id])]
        self._write(
            "UPDATE example_stats SET own_quality = ? WHERE example_id IN (SELECT value FROM json_each(?))",
            [quality, _json(judged)],
        )
        checked = any(f.source != "user" and f.score is not None for f in self.feedback(request_id))
        for id in judged:
            self._stand(id, checked)
        if quality is not None and quality < GOOD_ENOUGH:
            self._write(FORGET_REPEATED, [request_id])
        self._credit(request_id, before, before._replace(quality=quality))
        self._append(ChangeKind.QUALITY, request_id, before.quality, quality)

    def _outcome(self, request_id: str, tenant: str | None = None) -> Outcome | None:
        """What the credit of an exchange depends on; None when it is unknown, or not of `tenant` where one is given."""
        row = self._row(
            "SELECT tenant, at, shown, offloaded, relative_cost, quality, complete FROM exchanges WHERE request_id = ?",
            [request_id],
        )
        if row is None or (tenant is not None and row["tenant"] != tenant):
            return None
        shown = tuple(orjson.loads(row["shown"]))
        return Outcome(
            at=row["at"],
            shown=shown,
            offloaded=bool(row["offloaded"]),
            relative_cost=row["relative_cost"],
            quality=row["quality"],
            complete=bool(row["complete"]),
        )

    def _count_uses(self, request_id: str) -> None:
        """Add 1 to `uses` of the shown examples when the exchange is complete for the first time."""
        first = self._write(
            "UPDATE exchanges SET counted = 1 WHERE request_id = ? AND complete AND NOT counted", [request_id]
        )
        if first:
            self._write(
                "UPDATE example_stats SET uses = uses + 1 WHERE example_id IN"
                " (SELECT value FROM json_each((SELECT shown FROM exchanges WHERE request_id = ?)))",
                [request_id],
            )

    def _credit(self, request_id: str, before: Outcome, after: Outcome) -> None:
        """Move the statistics of the shown examples from one outcome of an exchange to another."""
        old, new = credit.credit_of(before), credit.credit_of(after)
        rows = self._rows(
            "SELECT s.*, c.ordinal FROM example_stats s LEFT JOIN credits c"
            " ON c.example_id = s.example_id AND c.request_id = ?"
            " WHERE s.example_id IN (SELECT value FROM json_each(?))",
            [request_id, _json([*before.shown, *after.shown])],
        )
        for row in rows:
            id, stats, ordinal, scored = row["example_id"], _stats(row), row["ordinal"], row["scored"]
            added = new if id in after.shown else NO_CREDIT
            if ordinal is not None:
                removed = old if id in before.shown else NO_CREDIT
                later = None if ordinal <= row["gain_since"] else scored - ordinal
                stats = credit.with_replaced(stats, removed, added, after.at, later, self._decay_per_hour)
            elif id in after.shown and after.quality is not None:
                scored += 1
                self._write("INSERT INTO credits VALUES (?, ?, ?)", [request_id, id, scored])
                stats = credit.with_first(stats, added, after.at, self._decay_per_hour)
            self._write(UPDATE_STATS, {"example_id": id, "scored": scored, **stats._asdict()})

    def _demonstrate(
        self,
        feedback: Feedback,
        answer: str,
        embedding: Vector | None,
        embedder: str | None,
        tokens: int | None,
        held: Hold | None,
    ) -> None:
        """Make `answer` the answer of the example that came from the exchange; make the example if there is none."""
        existing = self.example_of(feedback.request_id)
        if existing is not None:
            self.update_example(existing.id, answer=answer, backend=DEMONSTRATION, own_quality=1.0, tokens=tokens)
            return
        exchange = self.exchange(feedback.request_id)
        if exchange is None or not exchange.task or embedding is None or embedder is None or tokens is None:
            return
        example = Example(
            id=f"ex_{uuid.uuid4().hex}",
            tenant=exchange.tenant,
            subject=exchange.subject,
            request_id=exchange.request_id,
            at=feedback.at,
            dialect=exchange.dialect,
            system=exchange.system,
            request=exchange.task,
            answer=answer,
            backend=DEMONSTRATION,
            embedder=embedder,
            embedding=embedding,
            tokens=tokens,
            stats=ExampleStats(own_quality=1.0),
            held=held,
        )
        self.admit(example)

    # examples

    def admit(self, example: Example) -> str:
        with self.transaction():
            example = self._as_judged(example)
            original = example.backend != DEMONSTRATION
            digest = _digest(example.system, example.request)
            old = self._row(
                "SELECT id, original, subject, answer, own_quality, confirmations, held FROM full_examples"
                " WHERE tenant = ? AND digest = ?",
                [example.tenant, digest],
            )
            if old is None:
                id = example.id
                example = example._replace(held=standing.hold_at_first(example, self._quality_floor))
                self._write(INSERT_EXAMPLE, _example_row(example, digest, original))
                self._write(INSERT_STATS, {"example_id": id, **example.stats._asdict()})
                self._append(ChangeKind.EXAMPLE, id)
                return id
            id = str(old["id"])
            match standing.meet(standing.Known(*old[1:]), example, original, self._quality_floor):
                case standing.Meeting.CONFIRMS:
                    self.confirm(id, example)
                case standing.Meeting.YIELDS:
                    self._write("UPDATE examples SET at = max(at, ?) WHERE id = ?", [example.at, id])
                case standing.Meeting.DOUBTS:
                    self._write(standing.DOUBT, [id])
                case standing.Meeting.REPLACES:
                    kept = example._replace(held=standing.hold_replaced(old["held"], example, self._quality_floor))
                    self._write(REPLACE_EXAMPLE, _example_row(kept, digest, original) | {"id": id})
                    self._write(standing.REPLACE_STATS, [example.stats.own_quality, id])
                    self._write("DELETE FROM witnesses WHERE example_id = ?", [id])
                    self._judge_from_now(id)
            self._append(ChangeKind.EXAMPLE, id)
            return id

    def examples(self, ids: Sequence[str]) -> list[Example]:
        rows = self._rows(
            "SELECT * FROM full_examples WHERE id IN (SELECT value FROM json_each(?))", [_json(list(ids))]
        )
        found = {row["id"]: row for row in rows}
        return [_example(found[id]) for id in ids if id in found]

    def example_of(self, request_id: str) -> Example | None:
        row = self._row("SELECT * FROM full_examples WHERE request_id = ? ORDER BY seq DESC LIMIT 1", [request_id])
        return None if row is None else _example(row)

    def list_examples(
        self, tenant: str | None = None, subject: str | None = None, *, limit: int = 100, offset: int = 0
    ) -> list[Example]:
        sql = LIST_EXAMPLES if tenant is None else LIST_TENANTS_EXAMPLES
        rows = self._rows(sql, {"tenant": tenant, "subject": subject, "limit": limit, "offset": offset})
        return [_example(row) for row in rows]

    def each_example(self, tenant: str | None = None, subject: str | None = None) -> Iterator[Example]:
        seq = 0
        while True:
            rows = self._rows(EACH_EXAMPLE, {"seq": seq, "tenant": tenant, "subject": subject, "page": TEXT_PAGE})
            yield from map(_example, rows)
            if len(rows) < TEXT_PAGE:
                return
            seq = rows[-1]["seq"]

    def answer_to(self, tenant: str, system: str, request: str) -> str | None:
        row = self._row(
            "SELECT answer FROM examples WHERE tenant = ? AND digest = ?", [tenant, _digest(system, request)]
        )
        return None if row is None else str(row["answer"])

    def count_examples(self, tenant: str | None = None) -> int:
        sql = "SELECT count(*) FROM examples WHERE :tenant IS NULL OR tenant = :tenant"
        return int(self._number(sql, {"tenant": tenant}))

    def embeddings(self) -> Iterator[tuple[str, str, str, float, Vector]]:
        seq = 0
        while True:
            rows = self._rows(
                "SELECT seq, id, tenant, embedder, at, embedding FROM examples WHERE seq > ? AND held IS NULL"
                " ORDER BY seq LIMIT ?",
                [seq, PAGE],
            )
            for row in rows:
                yield row["id"], row["tenant"], row["embedder"], row["at"], _vector(row["embedding"])
            if len(rows) < PAGE:
                return
            seq = rows[-1]["seq"]

    def weighed(self) -> Iterator[Weighed]:
        after = ""
        while True:
            rows = self._rows(SELECT_WEIGHED, {"after": after, "page": PAGE})
            yield from (Weighed(*row) for row in rows)
            if len(rows) < PAGE:
                return
            after = rows[-1]["id"]

    def example_bytes(self) -> tuple[int, int]:
        row = self._row("SELECT coalesce(sum(text_bytes), 0), coalesce(sum(embedding_bytes), 0) FROM examples")
        assert row is not None
        return int(row[0]), int(row[1])

    def update_example(
        self,
        id: str,
        *,
        expected_answer: str | None = None,
        answer: str | None = None,
        backend: str | None = None,
        own_quality: float | None = None,
        replays: int | None = None,
        gain: float | None = None,
        tokens: int | None = None,
        embedder: str | None = None,
        embedding: Vector | None = None,
    ) -> bool:
        with self.transaction():
            old = self._row("SELECT system, request, answer FROM examples WHERE id = ?", [id])
            if old is None or (expected_answer is not None and old["answer"] != expected_answer):
                return False
            blob = None if embedding is None else _blob(embedding)
            new_answer = old["answer"] if answer is None else answer
            self._write(
                UPDATE_EXAMPLE,
                {
                    "id": id,
                    "answer": answer,
                    "backend": backend,
                    "tokens": tokens,
                    "embedder": embedder,
                    "embedding": blob,
                    "text_bytes": _size(old["system"], old["request"], new_answer),
                },
            )
            self._write(
                "UPDATE example_stats SET own_quality = coalesce(:own_quality, own_quality),"
                " replays = coalesce(:replays, replays), gain = coalesce(:gain, gain),"
                " credit = CASE WHEN :gain IS NULL THEN credit ELSE 0 END,"
                " credited_quality = CASE WHEN :gain IS NULL THEN credited_quality ELSE 0 END,"
                " gain_since = CASE WHEN :gain IS NULL THEN gain_since ELSE scored END WHERE example_id = :id",
                {"id": id, "own_quality": own_quality, "replays": replays, "gain": gain},
            )
            if own_quality is not None:
                better = backend != DEMONSTRATION  # which is its user's word
                self._stand(id, checked=better, renewed=better and answer is not None)
            if answer is not None:
                self._judge_from_now(id)
            if answer is not None or embedding is not None:
                self._append(ChangeKind.EXAMPLE, id)
            return True

    # whether an example is shown

    def confirm(self, id: str, witness: Example) -> None:
        with self.transaction():
            row = self._row("SELECT subject FROM examples WHERE id = ?", [id])
            if row is None:
                return
            known = self._rows("SELECT subject FROM witnesses WHERE example_id = ?", [id])
            counts = standing.counts(witness.subject, row["subject"], {r["subject"] for r in known})
            self._write(
                "INSERT OR REPLACE INTO witnesses (example_id, request_id, subject, at) VALUES (?, ?, ?, ?)",
                [id, witness.request_id, witness.subject, witness.at],
            )
            self._write(standing.FORGET_WITNESSES, [id, id, standing.WITNESSES_KEPT])
            self._write("UPDATE examples SET at = max(at, ?) WHERE id = ?", [witness.at, id])
            self._write(
                "UPDATE example_stats SET confirmations = confirmations + ?, own_quality = coalesce(?, own_quality)"
                " WHERE example_id = ?",
                [int(counts), witness.stats.own_quality, id],
            )
            self._stand(id, checked=False)
            self._append(ChangeKind.EXAMPLE, id)

    def hold(self, ids: Sequence[str], reason: Hold) -> list[str]:
        with self.transaction():
            rows = self._rows(standing.WITH_DERIVED, [_json(list(ids))])
            held = [row["id"] for row in rows if row["held"] is None]
            for id in held:
                self._set_hold(id, reason)
            return held

    def release(self, ids: Sequence[str]) -> list[str]:
        with self.transaction():
            rows = self._rows(
                "SELECT id FROM examples WHERE held IS NOT NULL AND id IN (SELECT value FROM json_each(?))",
                [_json(list(ids))],
            )
            for row in rows:
                self._set_hold(row["id"], None)
            return [row["id"] for row in rows]

    def derive(self, id: str, sources: Sequence[str]) -> None:
        with self.transaction():
            for source in sources:
                self._write("INSERT OR IGNORE INTO derivations (derived_id, source_id) VALUES (?, ?)", [id, source])

    def judged_tenants(self) -> list[str]:
        return [row["tenant"] for row in self._rows("SELECT DISTINCT tenant FROM exchanges WHERE quality IS NOT NULL")]

    def judged(self, tenant: str, limit: int) -> list[Traced]:
        rows = self._rows(standing.JUDGED, [tenant, limit])
        return [
            Traced(
                row["backend"],
                row["at"],
                row["quality"],
                tuple(orjson.loads(row["shown"])),
                tuple(item[0] for item in orjson.loads(row["considered"])),
            )
            for row in reversed(rows)
        ]

    def standings(self, tenant: str) -> dict[str, Standing]:
        rows = self._rows("SELECT id, seq, subject, judged_from FROM examples WHERE tenant = ?", [tenant])
        return {row["id"]: Standing(row["seq"], row["subject"], row["judged_from"]) for row in rows}

    def held_near(self, tenant: str, vector: Vector, embedder: str, k: int) -> list[tuple[str, float]]:
        rows = self._rows(standing.NEWEST_HELD, [tenant, embedder, standing.HELD_SEARCHED])
        vectors = [(row["id"], _vector(row["embedding"])) for row in rows]
        near = [(id, float(v @ vector)) for id, v in vectors if v.shape == vector.shape]
        return sorted(near, key=lambda pair: -pair[1])[:k]

    def _stand(self, id: str, checked: bool, renewed: bool = False) -> None:
        """Hold or release an example by what is known of it now. `checked`: by more than its user's word."""
        row = self._row("SELECT held, own_quality, confirmations FROM full_examples WHERE id = ?", [id])
        if row is None:
            return
        before = None if row["held"] is None else Hold(row["held"])
        facts = standing.Facts(row["own_quality"], row["confirmations"], checked, renewed)
        after = standing.hold_after(before, facts, self._quality_floor)
        if after is not before:
            self._set_hold(id, after)

    def _judge_from_now(self, id: str) -> None:
        """What answers were like so far says nothing of this example any more."""
        self._write("UPDATE examples SET judged_from = ? WHERE id = ?", [self._clock(), id])

    def _set_hold(self, id: str, reason: Hold | None) -> None:
        self._write("UPDATE examples SET held = ? WHERE id = ?", [None if reason is None else reason.value, id])
        if reason is None:
            self._judge_from_now(id)
        self._append(ChangeKind.EXAMPLE, id)

    def delete_examples(self, ids: Sequence[str], *, keep_exchanges: bool = False) -> int:
        with self.transaction():
            rows = self._rows(standing.WITH_DERIVED, [_json(list(ids))])
            if rows and not keep_exchanges:
                self._erase_text([row["request_id"] for row in rows])
            self._write(
                "DELETE FROM examples WHERE id IN (SELECT value FROM json_each(?))", [_json([r["id"] for r in rows])]
            )
            for row in rows:
                self._append(ChangeKind.EXAMPLE, row["id"])
            self._deleted += [row["id"] for row in rows]
            self._erased = self._erased or bool(rows)
            return len(rows)

    def purge(self, tenant: str, subject: str | None = None, *, dry_run: bool = False) -> dict[str, int]:
        whose = {"tenant": tenant, "subject": subject}
        with self.transaction():
            examples = self._rows(
                "SELECT id FROM examples WHERE tenant = :tenant AND (:subject IS NULL OR subject = :subject)", whose
            )
            exchanges = self._rows(
                "SELECT request_id FROM exchanges WHERE tenant = :tenant AND (:subject IS NULL OR subject = :subject)"
                " AND (text_bytes > 0 OR subject IS NOT NULL OR session IS NOT NULL OR extra <> '{}')",
                whose,
            )
            if not dry_run:
                self.delete_examples([row["id"] for row in examples])
                self._erase_text([row["request_id"] for row in exchanges])
        return {"examples": len(examples), "exchanges": len(exchanges)}

    def _as_judged(self, example: Example) -> Example:
        """`example` with what feedback on its exchange said before it was admitted."""
        given = self._row(
            "SELECT demonstration FROM feedback WHERE request_id = ? AND demonstration IS NOT NULL",
            [example.request_id],
        )
        if given is not None:
            stats = example.stats._replace(own_quality=1.0)
            return example._replace(answer=given["demonstration"], backend=DEMONSTRATION, stats=stats)
        outcome = self._outcome(example.request_id, example.tenant)
        if example.stats.own_quality is None and outcome is not None:
            return example._replace(stats=example.stats._replace(own_quality=outcome.quality))
        return example

    def _erase_text(self, request_ids: list[str]) -> None:
        """Leave of these exchanges nothing but numbers."""
        ids = [_json(request_ids)]
        self._write(
            "UPDATE exchanges SET system = '', task = '', answer = '', text_bytes = 0, subject = NULL, session = NULL,"
            " extra = '{}', features = NULL WHERE request_id IN (SELECT value FROM json_each(?))",
            ids,
        )
        self._write(
            "UPDATE feedback SET demonstration = NULL WHERE request_id IN (SELECT value FROM json_each(?))", ids
        )
        self._write("DELETE FROM reusable WHERE request_id IN (SELECT value FROM json_each(?))", ids)
        self._write("DELETE FROM witnesses WHERE request_id IN (SELECT value FROM json_each(?))", ids)
        self._erased = self._erased or bool(request_ids)
        if request_ids:
            self._count_erasure()

    def _count_erasure(self) -> None:
        """What was learned from the erased goes with it: kept states now, those in memory when their process looks."""
        count, _ = self.erasures()
        self._write("DELETE FROM states WHERE name IN (SELECT value FROM json_each(?))", [_json(LEARNED_STATES)])
        self._write(
            "INSERT OR REPLACE INTO states (name, cursor, blob) VALUES (?, ?, ?)",
            [ERASED_STATE, count + 1, orjson.dumps(self._clock())],
        )

    def erasures(self) -> tuple[int, float]:
        state = self.load_state(ERASED_STATE)
        return (0, 0.0) if state is None else (state[0], float(orjson.loads(state[1])))

    def expire(self, tenant: str, before: float, limit: int = 1000) -> int:
        with self.transaction():
            examples = self._rows(
                "SELECT id FROM examples WHERE tenant = ? AND at < ? LIMIT ?", [tenant, before, limit]
            )
            self.delete_examples([row["id"] for row in examples])
            exchanges = self._write(
                "DELETE FROM exchanges WHERE request_id IN"
                " (SELECT request_id FROM exchanges WHERE tenant = ? AND at < ? LIMIT ?)",
                [tenant, before, limit],
            )
            if exchanges:
                self._erased = True
                self._count_erasure()
            return len(examples) + exchanges

    # the feed of changes, and what followers keep

    def changes(self, since: int, limit: int = 1000) -> list[Change]:
        rows = self._rows(
            "SELECT seq, kind, key, old, new FROM changes WHERE seq > ? ORDER BY seq LIMIT ?", [since, limit]
        )
        return [Change(row["seq"], ChangeKind(row["kind"]), row["key"], row["old"], row["new"]) for row in rows]

    def next_change(self, kind: ChangeKind, since: int) -> int | None:
        row = self._row("SELECT seq FROM changes WHERE seq > ? AND kind = ? ORDER BY seq LIMIT 1", [since, str(kind)])
        return None if row is None else int(row["seq"])

    def last_change(self) -> int:
        return int(self._number("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'changes'"))

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

    # upkeep

    def daily(self, since: float, tenant: str | None = None) -> list[Daily]:
        return [Daily(*row) for row in self._rows(DAILY, {"since": since, "tenant": tenant})]

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

    def checkpoint(self) -> bool:
        if self._depth or self.read_only:
            return False
        with self._translated():
            self._db.execute(f"PRAGMA busy_timeout = {int(CHECKPOINT_TIMEOUT_S * 1000)}")
            try:
                blocked = bool(self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
            finally:
                self._db.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
        self._erased = self._erased and blocked
        self._next_checkpoint = time.monotonic() + CHECKPOINT_EVERY_S if blocked else 0.0
        return not blocked

    def backup(self, path: Path | str) -> None:
        path = Path(path).absolute()
        if path == self.path:
            raise StoreError(f"{path}: is the store itself: give the backup another name")
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            private.make(partial)
            with Translated(path), closing(self.reader()) as source, closing(sqlite3.connect(partial)) as target:
                # in one step: a consistent copy that no writer can make start again
                source._db.conn.backup(target, pages=-1)
                target.execute("PRAGMA journal_mode = DELETE")  # one file, readable where nothing can be written
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
        except OSError as exc:
            raise StoreError(f"{path}: the backup cannot be written: {exc.strerror}") from exc
        finally:
            partial.unlink(missing_ok=True)

    # the connection

    def _open(self) -> Database:
        conn = self._connect()
        try:
            conn.row_factory = sqlite3.Row
            db = Database(conn, execute_plugins=False)
            db.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
            db.execute("PRAGMA foreign_keys = ON")
            if self.read_only:
                db.execute("PRAGMA query_only = ON")
                if self._memory:
                    db.execute("PRAGMA read_uncommitted = ON")  # else a reader and the writer lock each other's tables
                migrations.check(db, self.path)
                return db
            db.execute(f"PRAGMA page_size = {PAGE_BYTES}")  # of a file that is just being made
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

    def _connect(self) -> sqlite3.Connection:
        if isinstance(self.path, str):
            return sqlite3.connect(self.path, uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S)
        if not self.path.parent.is_dir():
            raise StoreError(f"{self.path}: its directory does not exist: create {self.path.parent}")
        if not self.read_only:
            with suppress(OSError):  # SQLite says it better
                private.make(self.path)
        mode = "ro" if self.read_only else "rwc"
        uri = f"{self.path.as_uri()}?mode={mode}"
        return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=BUSY_TIMEOUT_S)

    def _translated(self) -> Translated:
        return Translated(self.path)

    def _rows(self, sql: str, params: Params = ()) -> list[sqlite3.Row]:
        with self._translated():
            return self._db.execute(sql, params).fetchall()

    def _row(self, sql: str, params: Params = ()) -> sqlite3.Row | None:
        rows = self._rows(sql, params)
        return rows[0] if rows else None

    def _number(self, sql: str, params: Params = ()) -> float:
        """The one number that `sql` selects."""
        return float(self._rows(sql, params)[0][0])

    def _write(self, sql: str, params: Params) -> int:
        """Returns how many rows it touched. Only inside a transaction."""
        with self._translated():
            return self._db.execute(sql, params).rowcount


class Savepoint:
    """A part of a transaction that can be undone alone. Named by its depth: SQLite prepares a statement once, but one
    that has another name each time anew, which takes longer than all that is done between.
    """

    def __init__(self, store: SqliteStore) -> None:
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


class Translated:
    """Turns what SQLite raises inside the block into a StoreError that names the file and the cure."""

    def __init__(self, path: Path | str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(exc, sqlite3.Error):
            raise StoreError(f"{self._path}: {_cure(exc)}") from exc
        if isinstance(exc, UnicodeEncodeError):
            raise StoreError(f"{self._path}: text with lone surrogates cannot be stored") from exc


CURES = {
    "SQLITE_CANTOPEN": "cannot be opened: check that it exists, and that this user may read it and write its directory",
    "SQLITE_READONLY": "cannot be written: give this user write permission to the file and its directory",
    "SQLITE_PERM": "cannot be opened: give this user permission to the file and its directory",
    "SQLITE_AUTH": "cannot be opened: give this user permission to the file and its directory",
    "SQLITE_NOTADB": "is not an SQLite file: point store.url at another file, or restore a backup",
    "SQLITE_CORRUPT": "is damaged: restore a backup with `iccache restore`",
    "SQLITE_FULL": "cannot be written: the disk is full; free some space",
    "SQLITE_IOERR_WRITE": "cannot be written: the disk is full or failing, or a size limit was reached",
    "SQLITE_IOERR_SHMSIZE": "cannot be opened: the disk is full, or a size limit was reached; free some space",
    "SQLITE_IOERR": "cannot be read or written: the disk is failing, or the file was moved away",
    "SQLITE_BUSY": f"was locked by another process for more than {BUSY_TIMEOUT_S:.0f} s: try again",
    "SQLITE_LOCKED": "was locked by another connection: try again",
    "SQLITE_TOOBIG": "cannot take a value this large",
}


def _cure(exc: sqlite3.Error) -> str:
    """What is wrong and what helps, by SQLite's extended error name, else by its first two words."""
    name = str(getattr(exc, "sqlite_errorname", ""))
    return CURES.get(name) or CURES.get("_".join(name.split("_")[:2])) or f"{name} {exc}".strip()


# rows

EXCHANGE_COLUMNS = (
    *("request_id", "tenant", "subject", "session", "at", "dialect", "model", "stream", "backend", "decision"),
    *("reason", "status", "complete", "offloaded", "relative_cost", "text_bytes", "finish_reason", "input_tokens"),
    *("output_tokens", "example_tokens", "estimated", "cost_usd", "latency_s", "first_byte_s", "overhead_s"),
    *("propensity", "features", "shown", "considered", "backends", "extra", "system", "task", "answer"),
)
EXAMPLE_COLUMNS = (
    *("id", "tenant", "subject", "request_id", "at", "dialect", "backend", "digest", "original", "tokens"),
    *("text_bytes", "embedding_bytes", "embedder", "embedding", "system", "request", "answer", "held"),
)
STATS_COLUMNS = ExampleStats._fields


def _names(columns: Sequence[str]) -> str:
    return ", ".join(columns)


def _values(columns: Sequence[str]) -> str:
    return ", ".join(f":{column}" for column in columns)


def _assignments(columns: Sequence[str]) -> str:
    return ", ".join(f"{column} = :{column}" for column in columns)


# S608 below: made of the column names above, never of data
UPSERT_EXCHANGE = (
    f"INSERT INTO exchanges ({_names(EXCHANGE_COLUMNS)}) VALUES ({', '.join('?' * len(EXCHANGE_COLUMNS))})"  # noqa: S608
    f" ON CONFLICT (request_id) DO UPDATE SET {', '.join(f'{c} = excluded.{c}' for c in EXCHANGE_COLUMNS[1:])}"
)
INSERT_EXAMPLE = f"INSERT INTO examples ({_names(EXAMPLE_COLUMNS)}) VALUES ({_values(EXAMPLE_COLUMNS)})"  # noqa: S608
REPLACE_EXAMPLE = f"UPDATE examples SET {_assignments(EXAMPLE_COLUMNS[1:])} WHERE id = :id"  # noqa: S608
INSERT_STATS = (
    f"INSERT INTO example_stats (example_id, {_names(STATS_COLUMNS)})"  # noqa: S608
    f" VALUES (:example_id, {_values(STATS_COLUMNS)})"
)
# Where the answer of an exchange came from the record, that answer: it is not handed out again.
FORGET_REPEATED = """
    DELETE FROM reusable WHERE request_id =
        (SELECT json_extract(extra, '$.answered_by') FROM exchanges WHERE request_id = ? AND decision = 'cached')
"""
UPDATE_STATS = (
    f"UPDATE example_stats SET scored = :scored, {_assignments(STATS_COLUMNS)}"  # noqa: S608
    " WHERE example_id = :example_id"
)
UPDATE_EXAMPLE = """
UPDATE examples SET
    original = original AND :answer IS NULL,
    answer = coalesce(:answer, answer),
    text_bytes = :text_bytes,
    backend = coalesce(:backend, backend),
    tokens = coalesce(:tokens, tokens),
    embedder = coalesce(:embedder, embedder),
    embedding = coalesce(:embedding, embedding),
    embedding_bytes = coalesce(length(:embedding), embedding_bytes)
WHERE id = :id
"""
EACH_EXAMPLE = """
SELECT * FROM full_examples
WHERE seq > :seq AND (:tenant IS NULL OR tenant = :tenant) AND (:subject IS NULL OR subject = :subject)
ORDER BY seq LIMIT :page
"""
AGREEMENTS = """
SELECT f.source AS source, count(*) AS n, avg(f.score) AS mean, count(u.score) AS compared,
    avg(f.score - u.score) AS difference, avg((f.score - u.score) * (f.score - u.score)) AS squares
FROM (SELECT request_id FROM exchanges WHERE at >= :since AND (:tenant IS NULL OR tenant = :tenant)
      AND quality IS NOT NULL ORDER BY at DESC LIMIT :limit) e
JOIN feedback f ON f.request_id = e.request_id AND f.score IS NOT NULL
LEFT JOIN feedback u ON u.request_id = e.request_id AND u.source = 'user' AND f.source <> 'user'
GROUP BY f.source ORDER BY f.source
"""
DAILY = """
SELECT date(at, 'unixepoch') AS day, backend, decision, count(*), sum(status >= 400), sum(offloaded),
    sum(input_tokens), sum(output_tokens), sum(example_tokens), sum(cost_usd), sum(latency_s),
    count(quality), coalesce(sum(quality), 0.0),
    sum(offloaded * (input_tokens - example_tokens)), sum(offloaded * output_tokens), sum(offloaded * cost_usd)
FROM exchanges WHERE at >= :since AND (:tenant IS NULL OR tenant = :tenant)
GROUP BY day, backend, decision ORDER BY day, backend, decision
"""
SELECT_WEIGHED = """
SELECT e.id, e.at, e.text_bytes, e.embedding_bytes, s.credit, s.offloads, s.offloads_at
FROM example_stats s JOIN examples e ON e.id = s.example_id
WHERE s.example_id > :after ORDER BY s.example_id LIMIT :page
"""
LIST_EXAMPLES = """
SELECT * FROM full_examples WHERE :subject IS NULL OR subject = :subject
ORDER BY at DESC, id DESC LIMIT :limit OFFSET :offset
"""
LIST_TENANTS_EXAMPLES = """
SELECT * FROM full_examples WHERE tenant = :tenant AND (:subject IS NULL OR subject = :subject)
ORDER BY at DESC, id DESC LIMIT :limit OFFSET :offset
"""


def _exchange_row(exchange: Exchange) -> dict[str, Any]:
    return {
        "request_id": exchange.request_id,
        "tenant": exchange.tenant,
        "subject": exchange.subject,
        "session": exchange.session,
        "at": exchange.at,
        "dialect": exchange.dialect,
        "model": exchange.model,
        "stream": exchange.stream,
        "backend": exchange.backend,
        "decision": exchange.decision.value,
        "reason": None if exchange.reason is None else exchange.reason.value,
        "status": exchange.status,
        "complete": exchange.complete,
        "offloaded": exchange.offloaded,
        "relative_cost": exchange.relative_cost,
        "text_bytes": _size(exchange.system, exchange.task, exchange.answer),
        "finish_reason": exchange.finish_reason,
        "input_tokens": exchange.usage.input,
        "output_tokens": exchange.usage.output,
        "example_tokens": exchange.usage.example,
        "estimated": exchange.usage.estimated,
        "cost_usd": exchange.cost_usd,
        "latency_s": exchange.latency_s,
        "first_byte_s": exchange.first_byte_s,
        "overhead_s": exchange.overhead_s,
        "propensity": exchange.propensity,
        "features": None if exchange.features is None else np.asarray(exchange.features, dtype="<f8").tobytes(),
        "shown": _json(list(exchange.shown)),
        "considered": _json([list(c) for c in exchange.considered]),
        "backends": _json([list(b) for b in exchange.backends]),
        "extra": _json(exchange.extra),
        "system": exchange.system,
        "task": exchange.task,
        "answer": exchange.answer,
    }


def _exchange(row: sqlite3.Row) -> Exchange:
    return Exchange(
        request_id=row["request_id"],
        tenant=row["tenant"],
        subject=row["subject"],
        session=row["session"],
        at=row["at"],
        dialect=row["dialect"],
        model=row["model"],
        stream=bool(row["stream"]),
        backend=row["backend"],
        decision=DecisionKind(row["decision"]),
        reason=None if row["reason"] is None else Reason(row["reason"]),
        status=row["status"],
        complete=bool(row["complete"]),
        offloaded=bool(row["offloaded"]),
        relative_cost=row["relative_cost"],
        system=row["system"],
        task=row["task"],
        answer=row["answer"],
        finish_reason=row["finish_reason"],
        usage=Usage(row["input_tokens"], row["output_tokens"], row["example_tokens"], bool(row["estimated"])),
        cost_usd=row["cost_usd"],
        latency_s=row["latency_s"],
        first_byte_s=row["first_byte_s"],
        overhead_s=row["overhead_s"],
        propensity=row["propensity"],
        features=None if row["features"] is None else _features(row["features"]),
        shown=tuple(orjson.loads(row["shown"])),
        considered=tuple(Considered(*item) for item in orjson.loads(row["considered"])),
        backends=tuple(BackendScore(*item) for item in orjson.loads(row["backends"])),
        quality=row["quality"],
        extra=orjson.loads(row["extra"]),
    )


def _example_row(example: Example, digest: bytes, original: bool) -> dict[str, Any]:
    blob = _blob(example.embedding)
    return {
        "id": example.id,
        "tenant": example.tenant,
        "subject": example.subject,
        "request_id": example.request_id,
        "at": example.at,
        "dialect": example.dialect,
        "backend": example.backend,
        "digest": digest,
        "original": original,
        "tokens": example.tokens,
        "text_bytes": _size(example.system, example.request, example.answer),
        "embedding_bytes": len(blob),
        "embedder": example.embedder,
        "embedding": blob,
        "system": example.system,
        "request": example.request,
        "answer": example.answer,
        "held": None if example.held is None else example.held.value,
    }


def _example(row: sqlite3.Row) -> Example:
    return Example(
        id=row["id"],
        tenant=row["tenant"],
        subject=row["subject"],
        request_id=row["request_id"],
        at=row["at"],
        dialect=row["dialect"],
        system=row["system"],
        request=row["request"],
        answer=row["answer"],
        backend=row["backend"],
        embedder=row["embedder"],
        embedding=_vector(row["embedding"]),
        tokens=row["tokens"],
        stats=_stats(row),
        held=None if row["held"] is None else Hold(row["held"]),
    )


def _stats(row: sqlite3.Row) -> ExampleStats:
    return ExampleStats(*(row[name] for name in STATS_COLUMNS))


def _digest(system: str, request: str) -> bytes:
    """Equal for duplicates. JSON keeps the two texts apart."""
    return hashlib.sha256(_json([system, request]).encode()).digest()


def _json(value: Any) -> str:
    try:
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    except orjson.JSONEncodeError as exc:
        raise StoreError(f"the store takes JSON and Unicode text without lone surrogates only: {exc}") from exc


def _size(*texts: str) -> int:
    """Bytes of the texts in UTF-8."""
    return sum(len(text.encode()) for text in texts)


def _blob(vector: Vector) -> bytes:
    return np.asarray(vector, dtype="<f4").tobytes()


def _vector(blob: bytes) -> Vector:
    return np.frombuffer(blob, dtype="<f4").astype(np.float32, copy=False)


def _features(blob: bytes) -> NDArray[np.float64]:
    return np.frombuffer(blob, dtype="<f8").astype(np.float64, copy=False)


# files


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


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
