"""Records as JSON: what `iccache explain` and /admin show."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from iccache.types import Example, Exchange, Feedback

REQUEST_CHARS = 60  # shown of each in a list
WIDE = 220  # columns where no terminal says how many it has


def exchange_as_json(exchange: Exchange, feedback: Sequence[Feedback]) -> dict[str, Any]:
    """One request with everything that decided its fate."""
    return {
        "request_id": exchange.request_id,
        "tenant": exchange.tenant,
        "at": exchange.at,
        "decision": exchange.decision.value,
        "reason": exchange.reason.value if exchange.reason else None,
        "backend": exchange.backend,
        "propensity": exchange.propensity,
        "considered": [c._asdict() for c in exchange.considered],
        "backends": [b._asdict() for b in exchange.backends],
        "tokens": exchange.usage._asdict(),
        "cost_usd": exchange.cost_usd,
        "latency_s": exchange.latency_s,
        "feedback": [{"source": f.source, "score": f.score, "at": f.at} for f in feedback],
        "status": exchange.status,
        "complete": exchange.complete,
        "shown": list(exchange.shown),
    }


def example_as_json(example: Example) -> dict[str, Any]:
    """One example, its embedding apart."""
    row = example._asdict()
    del row["embedding"]
    row["stats"] = example.stats._asdict()
    return row


def show(record: dict[str, Any]) -> None:
    """`exchange_as_json` as tables on the terminal."""
    console = Console(width=None if sys.stdout.isatty() else WIDE)
    where = f"{record['decision']}" + (f" ({record['reason']})" if record["reason"] else "")
    console.print(
        f"[bold]{record['request_id']}[/] of tenant {escape(record['tenant'])}, {_date(record['at'])}: "
        f"{where} -> {escape(record['backend'])}"
    )
    tokens = record["tokens"]
    console.print(
        f"{tokens['input']} tokens in ({tokens['example']} of examples), {tokens['output']} out"
        f"{', estimated' if tokens['estimated'] else ''}; {record['cost_usd']:.6f} USD; {record['latency_s']:.3f} s; "
        f"status {record['status']}{'' if record['complete'] else ', incomplete'}"
    )
    _table(console, "backends", record["backends"])
    _table(console, "examples considered", record["considered"])
    _table(console, "feedback", [f | {"at": _date(f["at"])} for f in record["feedback"]])


def list_examples(examples: Sequence[Example]) -> None:
    """One line each on the terminal."""
    table = Table("id", "tenant", "subject", "at", "backend", "uses", "quality", "held", "request")
    for e in examples:
        quality = "" if e.stats.own_quality is None else f"{e.stats.own_quality:.2f}"
        asked = " ".join(e.request.split())
        cells = (e.id, e.tenant, e.subject or "", _date(e.at), e.backend, str(e.stats.uses), quality, e.held or "")
        table.add_row(*map(escape, (*cells, asked[:REQUEST_CHARS])))
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


def show_example(example: Example) -> None:
    """One example whole, as text."""
    record = example_as_json(example)
    stats = ", ".join(f"{name} {value}" for name, value in record.pop("stats").items())
    texts = {name: record.pop(name) for name in ("system", "request", "answer")}
    click.echo("\n".join([*(f"{name}: {value}" for name, value in record.items()), f"stats: {stats}"]))
    for name, text in texts.items():
        click.echo(f"{name}:\n{textwrap.indent(text, '    ')}")
    click.echo()


def _date(at: float) -> str:
    """In UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))


def _table(console: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        console.print(f"{title}: none")
        return
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else escape(str(v)) for v in row.values()))
    console.print(table)
