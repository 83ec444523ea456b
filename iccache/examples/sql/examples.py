"""The examples: admitting, reading, changing and erasing them, and whether they are shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import orjson

from iccache.examples import standing
from iccache.examples.sql.exchanges import PAGE, Exchanges
from iccache.examples.sql.rows import (
    INSERT_EXAMPLE,
    INSERT_STATS,
    REPLACE_EXAMPLE,
    UPDATE_EXAMPLE,
    digest_of,
    example_row,
    size_of,
    to_blob,
    to_example,
    to_json,
    to_vector,
)
from iccache.examples.tracing import Standing, Traced
from iccache.types import ChangeKind, Example, Hold, Vector, Weighed

TEXT_PAGE = 100  # of rows with long texts
DEMONSTRATION = "demonstration"

EACH_EXAMPLE = """
SELECT * FROM full_examples
WHERE seq > :seq AND (:tenant IS NULL OR tenant = :tenant) AND (:subject IS NULL OR subject = :subject)
ORDER BY seq LIMIT :page
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


class Examples(Exchanges):
    """Tables `examples`, `example_stats`, `witnesses` and `derivations`."""

    _quality_floor: float

    def admit(self, example: Example) -> str:
        with self.transaction():
            example = self._as_judged(example)
            original = example.backend != DEMONSTRATION
            digest = digest_of(example.system, example.request)
            old = self._row(
                "SELECT id, original, subject, answer, own_quality, confirmations, held FROM full_examples"
                " WHERE tenant = ? AND digest = ?",
                [example.tenant, digest],
            )
            if old is None:
                id = example.id
                example = example._replace(held=standing.hold_at_first(example, self._quality_floor))
                self._write(INSERT_EXAMPLE, example_row(example, digest, original))
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
                    self._write(REPLACE_EXAMPLE, example_row(kept, digest, original) | {"id": id})
                    self._write(standing.REPLACE_STATS, [example.stats.own_quality, id])
                    self._write("DELETE FROM witnesses WHERE example_id = ?", [id])
                    self._judge_from_now(id)
            self._append(ChangeKind.EXAMPLE, id)
            return id

    def examples(self, ids: Sequence[str]) -> list[Example]:
        rows = self._rows(
            "SELECT * FROM full_examples WHERE id IN (SELECT value FROM json_each(?))", [to_json(list(ids))]
        )
        found = {row["id"]: row for row in rows}
        return [to_example(found[id]) for id in ids if id in found]

    def example_of(self, request_id: str) -> Example | None:
        row = self._row("SELECT * FROM full_examples WHERE request_id = ? ORDER BY seq DESC LIMIT 1", [request_id])
        return None if row is None else to_example(row)

    def list_examples(
        self, tenant: str | None = None, subject: str | None = None, *, limit: int = 100, offset: int = 0
    ) -> list[Example]:
        sql = LIST_EXAMPLES if tenant is None else LIST_TENANTS_EXAMPLES
        rows = self._rows(sql, {"tenant": tenant, "subject": subject, "limit": limit, "offset": offset})
        return [to_example(row) for row in rows]

    def each_example(self, tenant: str | None = None, subject: str | None = None) -> Iterator[Example]:
        seq = 0
        while True:
            rows = self._rows(EACH_EXAMPLE, {"seq": seq, "tenant": tenant, "subject": subject, "page": TEXT_PAGE})
            yield from map(to_example, rows)
            if len(rows) < TEXT_PAGE:
                return
            seq = rows[-1]["seq"]

    def answer_to(self, tenant: str, system: str, request: str) -> str | None:
        row = self._row(
            "SELECT answer FROM examples WHERE tenant = ? AND digest = ?", [tenant, digest_of(system, request)]
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
                yield row["id"], row["tenant"], row["embedder"], row["at"], to_vector(row["embedding"])
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
            blob = None if embedding is None else to_blob(embedding)
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
                    "embedding_bytes": None if blob is None else len(blob),
                    "text_bytes": size_of(old["system"], old["request"], new_answer),
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
                "INSERT INTO witnesses (example_id, request_id, subject, at) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (example_id, request_id) DO UPDATE SET subject = excluded.subject, at = excluded.at",
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
            rows = self._rows(standing.WITH_DERIVED, [to_json(list(ids))])
            held = [row["id"] for row in rows if row["held"] is None]
            for id in held:
                self._set_hold(id, reason)
            return held

    def release(self, ids: Sequence[str]) -> list[str]:
        with self.transaction():
            rows = self._rows(
                "SELECT id FROM examples WHERE held IS NOT NULL AND id IN (SELECT value FROM json_each(?))",
                [to_json(list(ids))],
            )
            for row in rows:
                self._set_hold(row["id"], None)
            return [row["id"] for row in rows]

    def derive(self, id: str, sources: Sequence[str]) -> None:
        put = "INSERT INTO derivations (derived_id, source_id) VALUES (?, ?) ON CONFLICT DO NOTHING"
        with self.transaction():
            for source in sources:
                self._write(put, [id, source])

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
        vectors = [(row["id"], to_vector(row["embedding"])) for row in rows]
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
            rows = self._rows(standing.WITH_DERIVED, [to_json(list(ids))])
            if rows and not keep_exchanges:
                self._erase_text([row["request_id"] for row in rows])
            self._write(
                "DELETE FROM examples WHERE id IN (SELECT value FROM json_each(?))", [to_json([r["id"] for r in rows])]
            )
            for row in rows:
                self._append(ChangeKind.EXAMPLE, row["id"])
            if rows:
                self._note_deleted([row["id"] for row in rows])
                self._note_erased()
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
                self._note_erased()
                self._count_erasure()
            return len(examples) + exchanges
