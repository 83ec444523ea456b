"""What a smaller cache still brings, by what is kept: the knapsack of the proxy, the latest used, or anything.

    python -m tests.bench.eviction                the table of the README, in seconds; no model is needed
    python -m tests.bench.eviction --json FILE    the same as data too

The requests are real: 400 utterances with their intents and 480 questions from 30 folders of the evals registry, both
shipped. Sixty per cent of them are the cache; requests are drawn from the others by Zipf's law (the n-th most popular
as often as 1/n), over a day. Each is shown its three nearest examples by the `hash` embedder, and an offload succeeds
where the nearest is of the request's own kind (its intent, its folder). The examples' statistics follow as in the store
(`credit.py`). Then the cache is cut to a share of its bytes, and another day's requests tell what is left of the
successes: in the same popularity, and, where it `shifts`, with every second request's popularity drawn anew.

Or what is asked when is real too: in the `trace`, each request stands for an object that a cache of Twitter's was asked
for, whose 88 minutes are stretched to the two days (`data/README.md`).
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from iccache.demo.tasks import TASKS
from iccache.examples import eviction
from iccache.examples.credit import DECAY_PER_HOUR, Credit, with_first
from iccache.examples.embed.hashed import HashEmbedder
from iccache.examples.eviction import Thing
from iccache.types import ExampleStats, Weighed
from tests.bench import multi_turn

CACHED = 0.6
REQUESTS = 6000  # in each of the two days
SHOWN = 3
SHARES = (0.1, 0.25, 0.5)
SEEDS = range(20)
DAY_S = 86_400.0
AT = 1_700_000_000.0
TRACE = Path(__file__).parent / "data" / "accesses.csv.xz"
Rng = np.random.Generator


class Item(NamedTuple):
    """A real request, and what an example has to be like to help."""

    text: str
    answer: str
    kind: str


class World(NamedTuple):
    """Examples and requests, and who is near whom."""

    examples: Sequence[Item]
    requests: Sequence[Item]
    near: NDArray[np.intp]  # (requests, examples): by falling cosine
    same: NDArray[np.bool_]  # (requests, examples): whether the kind is the same


class History(NamedTuple):
    """What a day left of each example."""

    stats: list[ExampleStats]
    used_at: NDArray[np.float64]


def items() -> list[Item]:
    intents = next(task for task in TASKS if task.name == "intent_recognition")
    rows = [json.loads(line) for line in multi_turn.DATA.read_text(encoding="utf-8").splitlines()]
    return [Item(i.prompt, i.target, i.target) for i in intents.items()] + [
        Item(row["question"], row["answer"], row["folder"]) for row in rows
    ]


def world(rng: Rng) -> World:
    everything = items()
    order = rng.permutation(len(everything))
    cut = round(CACHED * len(order))
    examples, requests = ([everything[i] for i in part] for part in (order[:cut], order[cut:]))
    embedder = HashEmbedder()
    cosine = embedder.embed([r.text for r in requests]) @ embedder.embed([e.text for e in examples]).T
    same = np.array([[r.kind == e.kind for e in examples] for r in requests])
    return World(examples, requests, np.argsort(-cosine, axis=1, kind="stable"), same)


def popularity(count: int, rng: Rng) -> NDArray[np.float64]:
    """(count,): Zipf's law over a random order; sums to 1."""
    weights = rng.permutation(1.0 / np.arange(1, count + 1))
    return weights / weights.sum()


class Day(NamedTuple):
    """What is asked, and when: (n,) places in the requests, and (n,) seconds from the day's start."""

    requests: NDArray[np.intp]
    at: NDArray[np.float64]


def drawn(popular: NDArray[np.float64], rng: Rng) -> Day:
    """A day of that popularity."""
    return Day(rng.choice(len(popular), REQUESTS, p=popular / popular.sum()), np.arange(REQUESTS) / REQUESTS * DAY_S)


def traced(count: int, rng: Rng) -> tuple[Day, Day]:
    """Two days in which `count` objects of the trace, drawn at random, are asked for as often and when they were."""
    with lzma.open(TRACE, "rt") as file:
        steps = np.loadtxt(file, delimiter=",", dtype=np.int64)
    at, objects = np.cumsum(steps[:, 0]), steps[:, 1]
    place = np.full(objects.max() + 1, -1)
    place[rng.choice(len(place), count, replace=False)] = np.arange(count)
    at, requests = at[place[objects] >= 0] / (at[-1] + 1) * 2 * DAY_S, place[objects][place[objects] >= 0]
    first = at < DAY_S
    return Day(requests[first], at[first]), Day(requests[~first], at[~first] - DAY_S)


def lived(w: World, day: Day) -> History:
    """A day with the whole cache: every answer is scored."""
    stats = [ExampleStats(offloads_at=AT)] * len(w.examples)
    used_at = np.zeros(len(w.examples))
    for request, since in zip(day.requests, day.at, strict=True):
        at = AT + float(since)
        shown = w.near[request, :SHOWN]
        good = float(w.same[request, shown[0]])
        one = Credit(weight=1 / SHOWN, quality=good / SHOWN, offload=good / SHOWN, gain=0.0)
        for e in shown:
            stats[e] = with_first(stats[e]._replace(uses=stats[e].uses + 1), one, at)
            used_at[e] = at
    return History(stats, used_at)


def things(w: World, history: History) -> list[Thing]:
    """The examples as eviction weighs them."""
    dim = HashEmbedder().dim
    rows = [
        Weighed(str(n), AT, len((i.text + i.answer).encode()), 4 * dim, s.credit, s.offloads, s.offloads_at)
        for n, (i, s) in enumerate(zip(w.examples, history.stats, strict=True))
    ]
    now = AT + DAY_S
    return [Thing(r.id, eviction.weight(r), eviction.value(r, now, DECAY_PER_HOUR), r.at) for r in rows]


def by_knapsack(w: World, history: History, capacity: int, rng: Rng) -> set[int]:
    return {int(thing.id) for thing in eviction.solve(things(w, history), capacity)}


def by_last_use(w: World, history: History, capacity: int, rng: Rng) -> set[int]:
    return _as_they_fit(np.argsort(-history.used_at, kind="stable"), things(w, history), capacity)


def by_chance(w: World, history: History, capacity: int, rng: Rng) -> set[int]:
    return _as_they_fit(rng.permutation(len(w.examples)), things(w, history), capacity)


def _as_they_fit(order: NDArray[np.intp], weighed: Sequence[Thing], capacity: int) -> set[int]:
    kept = set()
    for n in order:
        if weighed[n].weight <= capacity:
            kept.add(int(n))
            capacity -= weighed[n].weight
    return kept


HINDSIGHT = "knapsack, knowing the day"  # the second one: what no rule can know
RULES: dict[str, Callable[[World, History, int, Rng], set[int]]] = {
    "knapsack": by_knapsack,
    "least recently used goes": by_last_use,
    "at random": by_chance,
    HINDSIGHT: by_knapsack,
}


def successes(w: World, kept: set[int], requests: NDArray[np.intp]) -> float:
    """Share of `requests` whose nearest example of those kept is of their own kind."""
    is_kept = np.isin(w.near, list(kept))
    first = w.near[np.arange(len(w.requests)), is_kept.argmax(axis=1)]
    good = w.same[np.arange(len(w.requests)), first]
    return float(good[requests].mean())


def measure(seeds: Sequence[int] = SEEDS, shares: Sequence[float] = SHARES) -> list[dict[str, Any]]:
    """For each rule, share of the bytes and kind of second day: the share of the whole cache's successes, per seed."""
    rows: dict[tuple[str, float, str], list[float]] = {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        w = world(rng)
        popular = popularity(len(w.requests), rng)
        shifted = np.where(rng.random(len(popular)) < 0.5, popular, popularity(len(popular), rng))
        before = drawn(popular, rng)
        days = {"same": (before, drawn(popular, rng)), "shifts": (before, drawn(shifted, rng))}
        days["trace"] = traced(len(w.requests), rng)
        for day, (first, second) in days.items():
            history, known = lived(w, first), lived(w, second)
            total = sum(thing.weight for thing in things(w, history))
            whole = successes(w, set(range(len(w.examples))), second.requests)
            for share in shares:
                for name, rule in RULES.items():
                    kept = rule(w, known if name == HINDSIGHT else history, int(share * total), rng)
                    rows.setdefault((name, share, day), []).append(successes(w, kept, second.requests) / whole)
    return [
        {"rule": rule, "share": share, "popularity": day, "benefit": float(np.mean(kept)), "least": min(kept)}
        for (rule, share, day), kept in rows.items()
    ]


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    shares = sorted({row["share"] for row in rows})
    lines = [f"{'kept':<27}{'popularity':<13}" + "".join(f"{share:>8.0%}" for share in shares)]
    found = {(r["rule"], r["popularity"], r["share"]): r["benefit"] for r in rows}
    for day in ("same", "shifts", "trace"):
        for rule in RULES:
            lines.append(f"{rule:<27}{day:<13}" + "".join(f"{found[rule, day, share]:>8.2f}" for share in shares))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = measure()
    print(as_table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
