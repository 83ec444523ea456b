"""What a run did and what it cost: as text, as JSON, and as a Prometheus text file.

Counts and money are of the whole run, which may have had several invocations (a kill in between, or two at once);
`seconds` is of the invocation that reports.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from iccache.backends.judge import Verdict, position_bias
from iccache.errors import IccacheError
from replay.eviction import Eviction
from replay.job import Stop
from replay.ledger import Ledger
from replay.plan import Candidate, Models, covered
from replay.prices import NUSD
from replay.store import ReplayStore

FIRST = 20  # candidates that a plan names


class Report(NamedTuple):
    """One run, as numbers. `as_json` is its schema."""

    run: str
    resumed: bool
    tenant: str | None
    started_at: float  # of the run
    seconds: float
    stopped: Stop
    error: str | None
    considered: int
    replayed: int
    improved: int
    kept: int
    refused: int
    overtaken: int
    answers: int
    judgements: int
    unconfirmed_calls: int
    input_tokens: int
    output_tokens: int
    budget_nusd: int
    confirmed_nusd: int
    unconfirmed_nusd: int
    verdicts: Counter[Verdict]
    expired: int
    evicted: int
    evicted_bytes: int
    trimmed: int
    cache: Eviction
    capacity_bytes: int

    def as_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "resumed": self.resumed,
            "tenant": self.tenant,
            "started_at": self.started_at,
            "seconds": round(self.seconds, 3),
            "stopped": self.stopped.value,
            "error": self.error,
            "examples": {
                name: getattr(self, name)
                for name in ("considered", "replayed", "improved", "kept", "refused", "overtaken")
            },
            "calls": {
                "answers": self.answers,
                "judgements": self.judgements,
                "unconfirmed": self.unconfirmed_calls,
            },
            "tokens": {"input": self.input_tokens, "output": self.output_tokens},
            "usd": {
                "budget": self.budget_nusd / NUSD,
                "confirmed": self.confirmed_nusd / NUSD,
                "unconfirmed": self.unconfirmed_nusd / NUSD,
            },
            "judge": {
                "first": self.verdicts[Verdict.FIRST],
                "second": self.verdicts[Verdict.SECOND],
                "tie": self.verdicts[Verdict.TIE],
                "unreadable": self.verdicts[Verdict.UNREADABLE],
                "position_bias": position_bias(self.verdicts),
            },
            "evicted": {"expired": self.expired, "evicted": self.evicted, "bytes": self.evicted_bytes},
            "trimmed": self.trimmed,
            "cache": cache_as_json(self.cache, self.capacity_bytes),
        }

    def as_text(self) -> str:
        usd = self.as_json()["usd"]
        bias = position_bias(self.verdicts)
        rows = [
            ("stopped", self.stopped.value + (f": {self.error}" if self.error else "")),
            ("examples", f"{self.considered} considered, {self.replayed} replayed, {self.refused} without an answer"),
            ("", f"{self.improved} improved, {self.kept} kept, {self.overtaken} changed by others meanwhile"),
            ("calls", f"{self.answers} answers, {self.judgements} judgements, {self.unconfirmed_calls} unconfirmed"),
            ("tokens", f"{self.input_tokens} in, {self.output_tokens} out"),
            ("USD", f"{usd['confirmed']:.6f} confirmed, {usd['unconfirmed']:.6f} unconfirmed, of {usd['budget']:g}"),
            ("judge", f"{_judged(self.verdicts)}, bias to the first {'unknown' if bias is None else f'{bias:+.2f}'}"),
            ("evicted", f"{self.expired} expired, {self.evicted} for space, {self.evicted_bytes} bytes"),
            ("trimmed", f"{self.trimmed} old exchanges and changes"),
            ("cache", _cache_as_text(self.cache, self.capacity_bytes)),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        return _table(rows)


def collect(
    store: ReplayStore,
    ledger: Ledger,
    *,
    tenant: str | None,
    seconds: float,
    stopped: Stop,
    error: str | None,
    considered: int,
    verdicts: Counter[Verdict],
    cache: Eviction,
    capacity_bytes: int,
) -> Report:
    """The report of the ledger's run."""
    run = store.row("SELECT * FROM replay_runs WHERE id = ?", [ledger.run_id])
    calls = store.row(
        "SELECT count(*) FILTER (WHERE state = 'confirmed' AND kind = 'answer') AS answers,"
        " count(*) FILTER (WHERE state = 'confirmed' AND kind = 'judgement') AS judgements,"
        " count(*) FILTER (WHERE state = 'reserved') AS unconfirmed_calls,"
        " coalesce(sum(input_tokens), 0) AS input_tokens, coalesce(sum(output_tokens), 0) AS output_tokens"
        " FROM replay_calls WHERE run_id = ?",
        [ledger.run_id],
    )
    assert run is not None and calls is not None
    money = ledger.money()
    of_run = ("started_at", "replayed", "improved", "kept", "refused", "overtaken", "expired", "evicted")
    return Report(
        run=ledger.run_id,
        resumed=ledger.resumed,
        tenant=tenant,
        seconds=seconds,
        stopped=stopped,
        error=error,
        considered=considered,
        budget_nusd=ledger.budget_nusd,
        confirmed_nusd=money.confirmed,
        unconfirmed_nusd=money.unconfirmed,
        verdicts=verdicts,
        cache=cache,
        capacity_bytes=capacity_bytes,
        **{name: run[name] for name in (*of_run, "evicted_bytes", "trimmed")},
        **dict(calls),
    )


class PlanReport(NamedTuple):
    """What a run would do."""

    models: Models
    budget_nusd: int
    candidates: Sequence[Candidate]
    due: Eviction
    capacity_bytes: int

    def as_json(self) -> dict[str, Any]:
        return {
            "teacher": self.models.teacher.name,
            "judge": self.models.judge.name,
            "examples": {
                "considered": len(self.candidates),
                "covered": covered(self.candidates, self.budget_nusd),
            },
            "usd": {
                "budget": self.budget_nusd / NUSD,
                "most": self.most_nusd / NUSD,
                "expected": sum(c.expected_nusd for c in self.candidates) / NUSD,
            },
            "first": [
                {
                    "id": c.id,
                    "need": c.need,
                    "score": c.score,
                    "rounds": c.rounds,
                    "expected_usd": c.expected_nusd / NUSD,
                    "most_usd": c.most_nusd / NUSD,
                }
                for c in self.candidates[:FIRST]
            ],
            "evicted": {
                "expired": len(self.due.expired),
                "evicted": len(self.due.evicted),
                "bytes": self.due.bytes,
            },
            "cache": cache_as_json(self.due, self.capacity_bytes),
        }

    @property
    def most_nusd(self) -> int:
        """The most a run can spend."""
        return min(self.budget_nusd, sum(c.most_nusd for c in self.candidates))

    def as_text(self) -> str:
        told = self.as_json()
        usd, examples = told["usd"], told["examples"]
        rows = [
            ("teacher", f"{told['teacher']}, judged by {told['judge']}"),
            (
                "examples",
                f"{examples['considered']} worth asking again; the budget covers {examples['covered']} or more",
            ),
            ("USD", f"{usd['most']:.6f} at most, of {usd['budget']:g}; {usd['expected']:.6f} expected for all of them"),
            ("evict", f"{len(self.due.expired)} expired, {len(self.due.evicted)} for space, {self.due.bytes} bytes"),
            ("cache", "then " + _cache_as_text(self.due, self.capacity_bytes)),
        ]
        first = [
            f"  {c.id}  need {c.need:.3f}  rounds {c.rounds}  USD {c.expected_nusd / NUSD:.6f}"
            for c in self.candidates[:FIRST]
        ]
        return "\n".join([_table(rows), *(["first", *first] if first else [])])


def cache_as_json(kept: Eviction, capacity_bytes: int) -> dict[str, int]:
    """What the cache holds when the eviction is done."""
    return {
        "examples": kept.kept,
        "text_bytes": kept.kept_text_bytes,
        "embedding_bytes": kept.kept_embedding_bytes,
        "bytes": kept.kept_text_bytes + kept.kept_embedding_bytes,
        "capacity_bytes": capacity_bytes,
    }


def metrics(store: ReplayStore, now: float) -> str:
    """All runs so far, in Prometheus' text format."""
    runs = store.row(
        "SELECT count(*) AS runs, coalesce(sum(replayed), 0) AS replayed, coalesce(sum(improved), 0) AS improved,"
        " coalesce(sum(expired + evicted), 0) AS evicted, coalesce(sum(seconds), 0) AS seconds FROM replay_runs"
    )
    calls = store.row(
        "SELECT coalesce(sum(CASE state WHEN 'confirmed' THEN nusd END), 0) AS confirmed,"
        " coalesce(sum(CASE state WHEN 'reserved' THEN reserved_nusd END), 0) AS unconfirmed FROM replay_calls"
    )
    assert runs is not None and calls is not None
    return "\n".join(
        line
        for name, kind, sentence, values in (
            ("runs_total", "counter", "Runs begun.", {"": runs["runs"]}),
            ("replayed_total", "counter", "Examples asked again and compared.", {"": runs["replayed"]}),
            ("improved_total", "counter", "Examples whose answer a better one replaced.", {"": runs["improved"]}),
            ("evicted_total", "counter", "Examples expired or evicted.", {"": runs["evicted"]}),
            ("seconds_total", "counter", "Time that runs took.", {"": runs["seconds"]}),
            (
                "usd_total",
                "counter",
                "US dollars spent; unconfirmed: the most of calls whose end is not known.",
                {f'{{state="{state}"}}': calls[state] / NUSD for state in ("confirmed", "unconfirmed")},
            ),
            ("last_success_timestamp_seconds", "gauge", "When a run last came to a good end.", {"": now}),
        )
        for line in _metric(f"iccache_replay_{name}", kind, sentence, values)
    )


def _metric(name: str, kind: str, sentence: str, values: dict[str, float]) -> Iterator[str]:
    yield f"# HELP {name} {sentence}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values.items():
        yield f"{name}{labels} {value}"


def write_whole(path: Path, text: str) -> None:
    """Write a file in such a way that a reader sees the old or the new one, never a part. Raises IccacheError."""
    try:
        folder = path.absolute().parent
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=f".{path.name}.", delete=False) as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
        os.replace(file.name, path)
    except OSError as exc:
        raise IccacheError(f"{path}: cannot be written: {exc.strerror}") from exc


def _judged(verdicts: Counter[Verdict]) -> str:
    return (
        f"{verdicts[Verdict.FIRST]} first, {verdicts[Verdict.SECOND]} second, {verdicts[Verdict.TIE]} ties,"
        f" {verdicts[Verdict.UNREADABLE]} unreadable"
    )


def _cache_as_text(kept: Eviction, capacity_bytes: int) -> str:
    told = cache_as_json(kept, capacity_bytes)
    return f"{told['examples']} examples, {told['bytes']} of {capacity_bytes} bytes"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<10}{text}" for name, text in rows)
