"""What a run did and what it cost: as text, as JSON, and as a Prometheus text file.

Counts and money are of the whole run, which may have had several invocations (a kill in between, or two at once);
`seconds` is of the invocation that reports.
"""

from __future__ import annotations

import http.client
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest, push_to_gateway
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from iccache.backends.judge import Verdict, position_bias
from iccache.errors import IccacheError
from iccache.examples.eviction import Eviction
from replay.best import By
from replay.cutoff import CutOff
from replay.job import Stop
from replay.ledger import Ledger
from replay.plan import Candidate, Models, covered
from replay.prices import NUSD
from replay.store import ReplayStore

FIRST = 20  # candidates that a plan names
PUSHED_AS = "iccache-replay"  # the job's name at a push gateway
PUSH_TIMEOUT_S = 10.0


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
    decided: Counter[By]
    cut_off: CutOff
    recovered: float
    expired: int
    evicted: int
    evicted_bytes: int
    trimmed: int
    cache: Eviction
    capacity_bytes: int
    told: Mapping[str, Any]  # what further steps tell, by their names

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
            "decided_by": {by.value: self.decided[by] for by in By},
            "cut_off": {
                "recovered": self.recovered,
                "saving_usd": self.cut_off.saving_nusd / NUSD,
                "cost_usd": self.cut_off.cost_nusd / NUSD,
            },
            "evicted": {"expired": self.expired, "evicted": self.evicted, "bytes": self.evicted_bytes},
            "trimmed": self.trimmed,
            "cache": cache_as_json(self.cache, self.capacity_bytes),
            **self.told,
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
            ("kept by", ", ".join(f"{self.decided[by]} {by.value}" for by in By)),
            (
                "saving",
                f"{self.cut_off.saving_nusd / NUSD:.6f} USD expected, for {self.cut_off.cost_nusd / NUSD:.6f} spent;"
                f" {self.recovered:.0%} of lost answers won back",
            ),
            ("evicted", f"{self.expired} expired, {self.evicted} for space, {self.evicted_bytes} bytes"),
            ("trimmed", f"{self.trimmed} old exchanges and changes"),
            ("cache", _cache_as_text(self.cache, self.capacity_bytes)),
            *((name.replace("_", " "), _said(said)) for name, said in self.told.items()),
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
    decided: Counter[By],
    cut_off: CutOff,
    recovered: float,
    cache: Eviction,
    capacity_bytes: int,
    told: Mapping[str, Any],
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
        decided=decided,
        cut_off=cut_off,
        recovered=recovered,
        cache=cache,
        capacity_bytes=capacity_bytes,
        told=told,
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
    guidance: Sequence[int] = ()  # the most that the guidance of each cluster can cost, in nanodollars

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
            "guidance": {"clusters": len(self.guidance), "most_usd": sum(self.guidance) / NUSD},
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
        return min(self.budget_nusd, sum(c.most_nusd for c in self.candidates) + sum(self.guidance))

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
            ("guidance", f"for {len(self.guidance)} clusters, {sum(self.guidance) / NUSD:.6f} USD at most"),
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


class Metrics(Collector):
    """All runs so far, as Prometheus wants them."""

    def __init__(self, store: ReplayStore, now: float) -> None:
        self.store = store
        self.now = now

    def collect(self) -> Iterator[Metric]:
        runs = self.store.row(
            "SELECT count(*) AS runs, coalesce(sum(replayed), 0) AS replayed, coalesce(sum(improved), 0) AS improved,"
            " coalesce(sum(expired + evicted), 0) AS evicted, coalesce(sum(seconds), 0) AS seconds FROM replay_runs"
        )
        calls = self.store.row(
            "SELECT coalesce(sum(CASE state WHEN 'confirmed' THEN nusd END), 0) AS confirmed,"
            " coalesce(sum(CASE state WHEN 'reserved' THEN reserved_nusd END), 0) AS unconfirmed FROM replay_calls"
        )
        assert runs is not None and calls is not None
        for name, sentence in (
            ("runs", "Runs begun."),
            ("replayed", "Examples asked again and compared."),
            ("improved", "Examples whose answer a better one replaced."),
            ("evicted", "Examples expired or evicted."),
            ("seconds", "Time that runs took."),
        ):
            yield CounterMetricFamily(f"iccache_replay_{name}", sentence, runs[name])
        usd = CounterMetricFamily(
            "iccache_replay_usd",
            "US dollars spent; unconfirmed: the most of calls whose end is not known.",
            labels=["state"],
        )
        for state in ("confirmed", "unconfirmed"):
            usd.add_metric([state], calls[state] / NUSD)
        yield usd
        yield GaugeMetricFamily(
            "iccache_replay_last_success_timestamp_seconds", "When a run last came to a good end.", self.now
        )


def metrics(store: ReplayStore, now: float) -> str:
    """All runs so far, in Prometheus' text format."""
    return generate_latest(_registry(store, now)).decode()


def push(url: str, store: ReplayStore, now: float) -> None:
    """Replace what a push gateway holds of the job `iccache-replay`. Raises IccacheError, in one line."""
    try:
        push_to_gateway(url, PUSHED_AS, _registry(store, now), timeout=PUSH_TIMEOUT_S)
    except (OSError, ValueError, http.client.HTTPException) as exc:
        said = " ".join(str(exc).split()) or type(exc).__name__
        raise IccacheError(f"{url}: the push gateway did not take the metrics: {said}") from exc


def _registry(store: ReplayStore, now: float) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(Metrics(store, now))
    return registry


def write_whole(path: Path, text: str) -> None:
    """Write a file in such a way that a reader sees the old or the new one, never a part. Raises IccacheError."""
    made: Path | None = None
    try:
        folder = path.absolute().parent
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=f".{path.name}.", delete=False) as file:
            made = Path(file.name)
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
        os.replace(made, path)
    except OSError as exc:
        if made is not None:
            made.unlink(missing_ok=True)
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
    return "\n".join(f"{name:<10} {text}" if len(name) > 9 else f"{name:<10}{text}" for name, text in rows)


def _said(said: object) -> str:
    """What a further step tells, as one line."""
    if not isinstance(said, Mapping):
        return str(said)
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in said.items())
