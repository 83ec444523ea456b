"""What was asked and answered, what it cost, and which answers may be handed out again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import orjson

from iccache.examples import credit
from iccache.examples.credit import GOOD_ENOUGH, NO_CREDIT, Outcome
from iccache.examples.sql.feed import Feed
from iccache.examples.sql.rows import (
    UPDATE_STATS,
    UPSERT_EXCHANGE,
    exchange_values,
    inserted_together,
    to_exchange,
    to_json,
    to_stats,
)
from iccache.types import Daily, Exchange, Kept

PAGE = 1000  # rows read at a time
DAY_S = 86400.0

DAILY = """
SELECT date(at, 'unixepoch') AS day, backend, decision, count(*), count(*) FILTER (WHERE status >= 400),
    count(*) FILTER (WHERE offloaded), sum(input_tokens), sum(output_tokens), sum(example_tokens), sum(cost_usd),
    sum(latency_s), count(quality), coalesce(sum(quality), 0.0),
    coalesce(sum(input_tokens - example_tokens) FILTER (WHERE offloaded), 0),
    coalesce(sum(output_tokens) FILTER (WHERE offloaded), 0), coalesce(sum(cost_usd) FILTER (WHERE offloaded), 0.0)
FROM exchanges WHERE at >= :since AND (:tenant IS NULL OR tenant = :tenant)
GROUP BY day, backend, decision ORDER BY day, backend, decision
"""


class Exchanges(Feed):
    """Tables `exchanges`, `credits`, `judging` and `reusable`."""

    _decay_per_hour: float

    def record(self, exchange: Exchange) -> None:
        with self.transaction():
            before = self._outcome(exchange.request_id)
            if before is not None and before.complete and not exchange.complete:
                return
            self._write(UPSERT_EXCHANGE, exchange_values(exchange))
            self._count_uses(exchange.request_id)
            if before is not None and before.quality is not None:
                after = self._outcome(exchange.request_id)
                assert after is not None
                self._credit(exchange.request_id, before, after)

    def record_all(self, exchanges: Sequence[Exchange]) -> None:
        with self.transaction():
            there = self._rows(
                "SELECT request_id FROM exchanges WHERE request_id IN (SELECT value FROM json_each(?))",
                [to_json([exchange.request_id for exchange in exchanges])],
            )
            known = {str(row[0]) for row in there}
            new: list[Exchange] = []
            others: list[Exchange] = []
            for exchange in exchanges:
                (others if exchange.request_id in known else new).append(exchange)
                known.add(exchange.request_id)
            for statement, values in inserted_together(new):
                self._write(statement, values)
            uses = Counter(id for exchange in new if exchange.complete for id in set(exchange.shown))
            for count in sorted(set(uses.values())):
                self._write(
                    "UPDATE example_stats SET uses = uses + ? WHERE example_id IN (SELECT value FROM json_each(?))",
                    [count, to_json([id for id, used in uses.items() if used == count])],
                )
            for exchange in others:
                self.record(exchange)

    def exchange(self, request_id: str) -> Exchange | None:
        row = self._row("SELECT * FROM exchanges WHERE request_id = ?", [request_id])
        return None if row is None else to_exchange(row)

    def latest_scored(self, limit: int) -> list[Exchange]:
        rows = self._rows("SELECT * FROM exchanges WHERE quality IS NOT NULL ORDER BY at DESC LIMIT ?", [limit])
        return [to_exchange(row) for row in rows]

    def exchanges(self, since: float, tenant: str | None = None) -> Iterator[Exchange]:
        at, request_id = since, ""
        while True:
            rows = self._rows(
                "SELECT * FROM exchanges WHERE (at, request_id) > (:at, :request_id)"
                " AND (:tenant IS NULL OR tenant = :tenant) ORDER BY at, request_id LIMIT :page",
                {"at": at, "request_id": request_id, "tenant": tenant, "page": PAGE},
            )
            yield from map(to_exchange, rows)
            if len(rows) < PAGE:
                return
            at, request_id = rows[-1]["at"], rows[-1]["request_id"]

    def reserve_judging(self, at: float, request_id: str, kind: str, most_nusd: int, budget_nusd: int) -> int | None:
        midnight = at - at % DAY_S
        with self.transaction():
            spent = self._number(
                "SELECT coalesce(sum(nusd), 0) FROM judging WHERE at >= ? AND at < ?", [midnight, midnight + DAY_S]
            )
            if spent + most_nusd > budget_nusd:
                return None
            reserve = "INSERT INTO judging (at, request_id, kind, nusd) VALUES (?, ?, ?, ?) RETURNING id"
            return int(self._number(reserve, [at, request_id, kind, most_nusd]))

    def settle_judging(self, number: int, nusd: int) -> None:
        with self.transaction():
            self._write("UPDATE judging SET nusd = ?, settled = TRUE WHERE id = ?", [nusd, number])

    def judged_usd(self, since: float) -> float:
        return self._number("SELECT coalesce(sum(nusd), 0) FROM judging WHERE at >= ?", [since]) / 1e9

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
                "INSERT INTO reusable (key, tenant, request_id, at, content_type, body) VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (key) DO UPDATE SET tenant = excluded.tenant, request_id = excluded.request_id,"
                " at = excluded.at, content_type = excluded.content_type, body = excluded.body",
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
            "UPDATE exchanges SET counted = TRUE WHERE request_id = ? AND complete AND NOT counted", [request_id]
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
            [request_id, to_json([*before.shown, *after.shown])],
        )
        for row in rows:
            id, stats, ordinal, scored = row["example_id"], to_stats(row), row["ordinal"], row["scored"]
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

    def _erase_text(self, request_ids: list[str]) -> None:
        """Leave of these exchanges nothing but numbers."""
        ids = [to_json(request_ids)]
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
        if request_ids:
            self._note_erased()
            self._count_erasure()

    def daily(self, since: float, tenant: str | None = None) -> list[Daily]:
        return [Daily(*row) for row in self._rows(DAILY, {"since": since, "tenant": tenant})]
