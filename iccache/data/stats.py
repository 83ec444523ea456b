"""`iccache stats`: what the record adds up to."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from iccache import config
from iccache.examples.store import ExampleStore
from iccache.explain import WIDE
from iccache.types import Agreement, Daily, DecisionKind
from router.floor import Floor


def stats(store: ExampleStore, settings: config.Config, since: float, tenant: str | None) -> dict[str, Any]:
    """Examples and bytes as they are now, and the exchanges with `at >= since`. None: nothing to take a share of."""
    every = store.daily(since, tenant)
    rows = [r for r in every if r.decision != DecisionKind.COMPARED]
    dearest = settings.by_price()[-1] if settings.backends else None
    tenants = [t.name for t in settings.tenants] if tenant is None else [tenant]
    return {
        "tenant": tenant,
        "since": since,
        "examples": store.count_examples(tenant),
        "examples_by_tenant": {name: store.count_examples(name) for name in tenants},
        "bytes": store.size_bytes(),
        **_sums(rows, dearest),
        "decisions": {kind: _requests(group) for kind, group in _grouped(rows, "decision")},
        "tokens": {
            "input": sum(r.input_tokens for r in rows),
            "output": sum(r.output_tokens for r in rows),
            "example": sum(r.example_tokens for r in rows),
        },
        "backends": [{"name": name, **_sums(group, dearest)} for name, group in _grouped(rows, "backend")],
        "feedback": [_source(a) for a in store.agreements(since, tenant)],
        "compared": _requests(r for r in every if r.decision == DecisionKind.COMPARED),
        "judging_usd": store.judged_usd(since),
        "held_back": _held_back(store, settings, tenant),
        "days": [{"day": day, **_sums(group, dearest)} for day, group in _grouped(rows, "day")],
    }


def _sums(rows: Sequence[Daily], dearest: config.Backend | None) -> dict[str, Any]:
    requests, judged = _requests(rows), sum(r.judged for r in rows)
    offloaded = sum(r.offloaded for r in rows)
    return {
        "requests": requests,
        "failed": sum(r.failed for r in rows),
        "offloaded": offloaded,
        "offload_share": offloaded / requests if requests else None,
        "cost_usd": sum(r.cost_usd for r in rows),
        "saved_usd": sum(_saved(r, dearest) for r in rows),
        "judged": judged,
        "quality": sum(r.quality for r in rows) / judged if judged else None,
        "mean_latency_s": sum(r.latency_s for r in rows) / requests if requests else None,
    }


def _source(found: Agreement) -> dict[str, Any]:
    """One source's scores, and its bias against the users' on the same answers with a 95 % interval."""
    reach = None if found.deviation is None else 1.96 * found.deviation / found.both**0.5
    difference = found.difference
    return {
        "source": found.source,
        "scores": found.n,
        "mean": found.mean,
        "scored_by_users_too": found.both,
        "bias": difference,
        "bias_low": None if reach is None or difference is None else difference - reach,
        "bias_high": None if reach is None or difference is None else difference + reach,
    }


def _held_back(store: ExampleStore, settings: config.Config, tenant: str | None) -> list[dict[str, Any]]:
    """Where the floor holds a backend back, as of the last state that was kept."""
    kept = store.load_state("floor")
    if kept is None or not settings.backends:
        return []
    floor = Floor(settings.by_price()[-1].name, quality_target=settings.routing.quality_target)
    try:
        floor.restore(kept[1])
    except ValueError:
        return []
    return [
        {"tenant": whose, "kind": kind, "backend": arm, "mean": short.mean, "teacher_at_least": short.dearest}
        for (whose, kind), ledger in floor.ledgers_.items()
        for arm, short in ledger.held.items()
        if tenant in (None, whose)
    ]


def _requests(rows: Iterable[Daily]) -> int:
    return sum(r.requests for r in rows)


def _saved(row: Daily, dearest: config.Backend | None) -> float:
    """What the dearest backend would have cost at today's prices for what was offloaded, less what was paid."""
    if dearest is None:
        return 0.0
    plain = row.offloaded_plain_tokens * dearest.usd_per_million_input_tokens
    return (plain + row.offloaded_output_tokens * dearest.usd_per_million_output_tokens) / 1e6 - row.offloaded_cost_usd


def _grouped(rows: Sequence[Daily], name: str) -> list[tuple[str, list[Daily]]]:
    groups: dict[str, list[Daily]] = {}
    for row in rows:
        groups.setdefault(getattr(row, name), []).append(row)
    return sorted(groups.items())


def show(found: dict[str, Any]) -> None:
    """`stats` as text and tables."""
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    of = f" of tenant {escape(found['tenant'])}" if found["tenant"] else ""
    console.print(f"{found['examples']:,} examples{of}")
    if not found["tenant"]:
        for name, count in found["examples_by_tenant"].items():
            console.print(f"  {escape(name)}: {count:,}")
    parts = ", ".join(f"{part} {size / 1e6:.1f}" for part, size in found["bytes"].items())
    console.print(f"{sum(found['bytes'].values()) / 1e6:.1f} MB in the store: {parts}")
    if not found["requests"]:
        console.print(f"no requests{of} are recorded")
        return
    decisions = ", ".join(f"{kind} {count:,}" for kind, count in found["decisions"].items())
    console.print(f"{found['requests']:,} requests{of}, {found['failed']:,} failed: {decisions}")
    console.print(
        f"{found['offload_share']:.1%} offloaded; {found['cost_usd']:.4f} USD spent, {found['saved_usd']:.4f} USD saved"
    )
    for f in found["feedback"]:
        against = "" if f["bias"] is None else f"; {f['bias']:+.3f} against users on {f['scored_by_users_too']:,}"
        if f["bias_low"] is not None:
            against += f" [{f['bias_low']:+.3f}, {f['bias_high']:+.3f}]"
        console.print(f"feedback by {escape(f['source'])}: {f['scores']:,}, mean {f['mean']:.3f}{escape(against)}")
    if found["compared"]:
        console.print(
            f"{found['compared']:,} answers asked to be compared; judging cost {found['judging_usd']:.4f} USD"
        )
    for h in found["held_back"]:
        console.print(
            f"held back: {escape(h['backend'])} for {escape(h['tenant'])}, kind {h['kind'] or 'none'}: quality "
            f"{h['mean']:.3f}, the teacher's at least {h['teacher_at_least']:.3f}"
        )
    _table(console, found["backends"], "name", "by backend")
    _table(console, found["days"], "day", "by day")


def _table(console: Console, rows: Sequence[dict[str, Any]], key: str, title: str) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    table.add_column(key, overflow="fold", no_wrap=key == "day")
    for name in ("requests", "failed", "offload", "USD", "USD saved", "quality", "judged", "mean s"):
        table.add_column(name, justify="right", overflow="fold")
    for r in rows:
        quality = "" if r["quality"] is None else f"{r['quality']:.3f}"
        money = f"{r['cost_usd']:.4f}", f"{r['saved_usd']:.4f}"
        counts = (f"{r[k]:,}" for k in ("requests", "failed", "offloaded"))
        table.add_row(escape(r[key]), *counts, *money, quality, f"{r['judged']:,}", f"{r['mean_latency_s']:.2f}")
    console.print(table)
