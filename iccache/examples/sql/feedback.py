"""What users, checks and judges say of answers, and what follows from it for the examples shown."""

from __future__ import annotations

import uuid

from iccache.examples import credit, standing
from iccache.examples.credit import GOOD_ENOUGH
from iccache.examples.sql.examples import DEMONSTRATION, Examples
from iccache.examples.sql.rows import to_json
from iccache.types import Agreement, ChangeKind, Example, ExampleStats, Feedback, Hold, Vector

# Where the answer of an exchange came from the record, that answer: it is not handed out again.
FORGET_REPEATED = """
    DELETE FROM reusable WHERE request_id =
        (SELECT json_extract(extra, '$.answered_by') FROM exchanges WHERE request_id = ? AND decision = 'cached')
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


class Opinions(Examples):
    """Table `feedback`."""

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

    def _put_feedback(self, feedback: Feedback, demonstration: str | None) -> bool:
        """Whether this says anything new."""
        identity = [feedback.request_id, feedback.source]
        old = self._row("SELECT score, demonstration FROM feedback WHERE request_id = ? AND source = ?", identity)
        if old is not None and tuple(old) == (feedback.score, demonstration):
            return False
        self._write(
            "INSERT INTO feedback (request_id, source, score, at, demonstration) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT (request_id, source) DO UPDATE SET score = excluded.score, at = excluded.at,"
            " demonstration = excluded.demonstration",
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
            [quality, to_json(judged)],
        )
        checked = any(f.source != "user" and f.score is not None for f in self.feedback(request_id))
        for id in judged:
            self._stand(id, checked)
        if quality is not None and quality < GOOD_ENOUGH:
            self._write(FORGET_REPEATED, [request_id])
        self._credit(request_id, before, before._replace(quality=quality))
        self._append(ChangeKind.QUALITY, request_id, before.quality, quality)

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
