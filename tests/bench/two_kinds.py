"""The router's promise over everything that two kinds of request may differ in: 700 requests, a score for each.

    python -m tests.bench.two_kinds [--runs 200] [--texts tuned|held-out] [--first 0]

A run draws two kinds of request, who of them has a system prompt of its own, what scores look like, whether kinds come
mixed or in blocks, and whether scores come at once or 20 requests late. It holds when at least 80 % of the last 60
requests of the kind that the student masters go to it and at most 15 % of the last 60 of the other. Router, floor,
features and embedder are real, as the default configuration makes them; only HTTP is left out, with which
`tests/e2e/test_two_kinds.py` runs it. The texts of `held-out` were looked at only after everything had been chosen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from iccache import config
from iccache.examples.embed import make_embedder
from router.linear import LinearThompson
from tests.bench import everyday
from tests.bench.quality.tasks import TASKS, items
from tests.bench.routing import Kind, Texts, World, bernoulli, exact, holds, run

SCORES = {
    "perfect": {"score": exact, "good": 1.0, "bad": 0.0},
    "0/1 of .95 and .10": {"score": bernoulli, "good": 0.95, "bad": 0.1},
    "0/1 of .90 and .20": {"score": bernoulli, "good": 0.9, "bad": 0.2},
}
SYSTEMS = ("own", "one for both", "none")
BLOCKS = {"mixed": 1, "blocks of 10": 10, "blocks of 35": 35}
DELAYS = {"at once": 0, "20 later": 20}
# Data sets whose own system prompts are left out; the first two were looked at, the others not.
SETS = {"tuned": ("intent_recognition", "linguistic_mappings")}
SETS["held-out"] = tuple(name for name in TASKS if name not in SETS["tuned"])
FACTORS = ("system", "score", "order", "scores come")
KINDS = {"tuned": everyday.TUNED, "held-out": everyday.HELD_OUT}


@dataclass(frozen=True)
class Drawn:
    """One world, and what it is of."""

    world: World
    factors: dict[str, str]


def kinds(which: str) -> dict[str, tuple[str, ...]]:
    """Texts by kind."""
    found = {name: everyday.texts(name) for name in KINDS[which]}
    for name in SETS[which]:
        found[name] = tuple(item.prompt for split in ("train", "pool") for item in items(name, split))
    return found


def draw(which: str, found: dict[str, tuple[str, ...]], seed: int) -> Drawn:
    rng = np.random.default_rng([seed, 7])
    pair = sorted(found)
    first, second = (pair[i] for i in rng.choice(len(pair), size=2, replace=False))
    system, score, order, delay = (
        list(choices)[rng.integers(len(choices))] for choices in (SYSTEMS, SCORES, BLOCKS, DELAYS)
    )
    prompts = {"own": (f"You help with {first}.", f"You help with {second}."), "none": ("", "")}.get(
        system, ("You are a helpful assistant.",) * 2
    )
    world = World(
        Kind(found[first], prompts[0]),
        Kind(found[second], prompts[1]),
        block=BLOCKS[order],
        delay=DELAYS[delay],
        **SCORES[score],
    )
    return Drawn(
        world, {"kinds": f"{first} / {second}", "system": system, "score": score, "order": order, "scores come": delay}
    )


def measured(which: str, seeds: range, file: Path) -> list[dict[str, Any]]:
    """Every run, one line each in `file`; what is there is not run again."""
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    missing = [seed for seed in seeds if seed not in {row["seed"] for row in done}]
    texts, found = Texts(make_embedder(config.Embedder())), kinds(which)
    for seed in missing:
        drawn = draw(which, found, seed)
        texts.embed([*drawn.world.mastered.texts, *drawn.world.other.texts])
        mastered, other, _ = run(drawn.world, texts, LinearThompson(), seed, broken=0)
        done.append({"seed": seed, "mastered": mastered, "other": other, **drawn.factors})
        with file.open("a") as out:
            out.write(json.dumps(done[-1]) + "\n")
    return [row for row in done if row["seed"] in seeds]


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| | runs | mastered kind >= 80 % | other kind <= 15 % | both [95 %] |"
    yield "|---|---|---|---|---|"
    levels = [(f, level) for f in FACTORS for level in dict.fromkeys(str(row[f]) for row in rows)]
    for factor, level in [("all", ""), *sorted(levels)]:
        of = [row for row in rows if not level or row[factor] == level]
        each = np.array([holds((row["mastered"], row["other"], 0.0))[:2] for row in of])
        both = int(each.all(axis=1).sum())
        low, high = stats.binomtest(both, len(of)).proportion_ci(method="wilson")
        named = f"{factor}: {level}" if level else factor
        apart = " | ".join(f"{share:.3f}" for share in each.mean(axis=0))
        yield f"| {named} | {len(of)} | {apart} | {both / len(of):.3f} [{low:.3f}, {high:.3f}] |"
    mastered, other = (np.array([row[name] for row in rows]) for name in ("mastered", "other"))
    yield ""
    yield (
        f"Of the last 60 of the mastered kind {mastered.mean():.2f} on average and {mastered.min():.2f} at the worst "
        f"went to the student, of the other {other.mean():.2f} and {other.max():.2f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--texts", choices=KINDS, default="held-out")
    parser.add_argument("--results", type=Path, help="file of the runs, to go on with; default: a new one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = args.results or Path(folder) / "runs.jsonl"
        rows = measured(args.texts, range(args.first, args.first + args.runs), file)
    print("\n".join(table(rows)))
    for row in rows:
        if not all(holds((row["mastered"], row["other"], 0.0))):
            print("fell short:", json.dumps(row))


if __name__ == "__main__":
    main()
