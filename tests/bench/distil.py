"""Whether distilled guidance wins its place in the prompt: real models, real data, paired on the same requests.

    python -m tests.bench.distil                the table, from the record; what it lacks is asked of the models
    python -m tests.bench.distil --json FILE    the same as data too

A cache is filled with POOL requests of a task and the data set's answers; `replay.distil` lets the teacher write its
guidance (`replay.assemble.run` with `replay.distil`). Then the student answers HELD_OUT other requests three times:
shown the examples that the selector chooses, the guidance and one example fewer, and the guidance alone. Student,
teacher, check and intervals are those of `tests.bench.replay_lift`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from iccache import config
from iccache.demo import tasks as demo
from iccache.errors import IccacheError
from iccache.examples.embed import make_embedder
from iccache.types import Match
from replay import assemble
from replay.assemble import Options
from replay.store import DISTILLED
from tests.bench.quality.tasks import correct
from tests.bench.recorded import Recorded, asking
from tests.bench.replay_lift import TENANT, Cache, Quiet, Task, paired, settings_for, split, spoiled, tasks

RECORD = Path(__file__).with_name("data") / "distil.jsonl.gz"
HELD_OUT = 60
CONDITIONS = ("examples", "guidance and examples", "guidance alone")


async def measure(
    task: Task, recorded: Recorded, base_url: str, embedder: Any, session: aiohttp.ClientSession, held_out: int
) -> dict[str, Any]:
    """One row of the table."""
    parts = split(task)
    recorded.begin()
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_for(Path(folder), base_url, 1, distil=True)
        cache = Cache(settings, embedder, session)
        with closing(cache.store):
            cache.fill(task, parts.pool, spoiled(parts.pool, 0.0))
            await assemble.run(settings, Options(workers=1, limit=0), Quiet(), environ={})
            guidance = [e for e in cache.store.list_examples(TENANT, limit=1000) if e.backend == DISTILLED]
            if not guidance:
                raise IccacheError(f"{task.name}: the teacher wrote no guidance that can be used")
            outcomes: dict[str, list[bool]] = {condition: [] for condition in CONDITIONS}
            for item in parts.held_out[:held_out]:
                shown = cache.choose(task, item)
                vector = cache.retriever.embed([item.prompt])[0]
                near = sorted(guidance, key=lambda e: -float(e.embedding @ vector))[:1]
                first = [Match(e, 0.0, 0.0) for e in near]
                for condition, matches in zip(CONDITIONS, (shown, [*first, *shown[1:]], first), strict=True):
                    answer = await cache.ask(task, item, matches)
                    outcomes[condition].append(correct(answer, item))
    return {
        "task": task.name,
        "n": len(outcomes["examples"]),
        "guidance": [e.answer for e in guidance],
        "accuracy": {name: float(np.mean(each)) for name, each in outcomes.items()},
        "against_examples": {name: paired(outcomes["examples"], each) for name, each in outcomes.items()},
    }


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'task':<22}{'shown':<24}{'accuracy':>9}  difference to examples"]
    for row in rows:
        for name in CONDITIONS:
            mean, low, high = row["against_examples"][name]
            lines.append(
                f"{row['task']:<22}{name:<24}{row['accuracy'][name]:>9.2f}  {mean:+.2f} [{low:+.2f}, {high:+.2f}]"
            )
    return "\n".join(lines)


async def run(record: Path, chosen: Sequence[Task], held_out: int = HELD_OUT) -> list[dict[str, Any]]:
    rows = []
    embedder = make_embedder(config.Embedder())
    async with asking(record) as (recorded, base_url, session):
        for task in chosen:
            rows.append(await measure(task, recorded, base_url, embedder, session, held_out))
            print(as_table(rows[-1:]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--task", choices=[*tasks()], action="append")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="Requests that are asked.")
    options = parser.parse_args()
    named = options.task or [task.name for task in demo.TASKS]
    chosen = [task for name, task in tasks().items() if name in named]
    rows = asyncio.run(run(options.record, chosen, options.held_out))
    print(as_table(rows))
    for row in rows:
        for text in row["guidance"]:
            print(f"\n{row['task']}: {text}")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
