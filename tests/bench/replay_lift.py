"""Whether a replay of a cache with bad answers lifts the student: real models, real data, paired on the same requests.

    python -m tests.bench.replay_lift                everything; what the record lacks is asked of the models
    python -m tests.bench.replay_lift --json FILE    the same as data too
    python -m tests.bench.replay_lift --record FILE  another record; what it lacks is asked of the models

For each task a cache of POOL requests is filled with the data set's answers, of which BAD are replaced by another
request's answer. TRAFFIC other requests go to the student with the examples that the selector chooses, and each answer
is scored by a check: that is all that is known of the examples. Then the student answers HELD_OUT requests that nobody
has seen, the replay runs once over the REPLAYED that rank first (`replay.assemble.run`: ranking, budget, teacher,
choice, cut-off), and the student answers the same requests again. Nothing else changes between the two. The student is
SmolLM2-135M, the teacher Qwen2.5-Coder-1.5B; answers count as correct by exact match. Intervals are 95 %, of the mean
of paired differences, by bootstrap over requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import orjson
from sklearn.metrics import roc_auc_score

from iccache import config
from iccache.demo import tasks as demo
from iccache.demo.models import STUDENT, TEACHER
from iccache.demo.run import PRICES
from iccache.dialects.chat import Chat
from iccache.examples.embed import make_embedder
from iccache.examples.retriever import Retriever
from iccache.examples.selector import Selector
from iccache.examples.tokens import count_prompt, make_tokenizer
from iccache.examples.utility import NAMES, RecordUtility
from iccache.types import DecisionKind, Example, ExampleStats, Exchange, Feedback, Match, Query, Shot, Usage
from replay import assemble, plan
from replay.assemble import Options
from replay.ledger import Money, Result
from replay.prices import nusd
from replay.report import Report
from replay.store import ReplayStore, open_replay_store
from tests.bench.quality import tasks as quality
from tests.bench.quality.tasks import Item, correct
from tests.bench.recorded import Recorded, asking

RECORD = Path(__file__).with_name("data") / "replay_lift.jsonl.gz"
POOL, TRAFFIC, HELD_OUT = 60, 90, 66
REPLAYED = 12  # the examples that rank first
BAD = 0.3
SEED = 11
DAY_S = 86_400.0  # all that is known came in the last day
TENANT = "bench"
BOOTSTRAP = 10_000
EMBEDDER = config.Embedder(backend="sentence-transformers")  # the record is of its choices
KEPT_BY = {"agreement": 3, "judge": 1}  # samples: from three on they can agree, one alone has to be judged


class Quiet:
    """Progress that nobody watches."""

    def begin(self, total: int) -> None:
        pass

    def step(self, result: Result | None, money: Money) -> None:
        pass


class Task(NamedTuple):
    """One application with its requests."""

    name: str
    system: str
    max_tokens: int
    items: Sequence[Item]


def tasks() -> dict[str, Task]:
    """The demo's two, and facts, of which no form gives away that they are wrong."""
    found = {
        task.name: Task(
            *(task.name, task.system, task.max_tokens),
            [Item(task.name, "", item.prompt, (item.target,)) for item in task.items()],
        )
        for task in demo.TASKS
    }
    facts = quality.TASKS["qa_wikidata"]
    items = [item for split in quality.SIZES for item in quality.items(facts.name, split)]
    return {**found, facts.name: Task(facts.name, facts.system, facts.max_tokens, items)}


class Split(NamedTuple):
    pool: list[Item]
    traffic: list[Item]
    held_out: list[Item]


class Ranking(NamedTuple):
    """How well the examples worth asking again are ordered, the wrong ones first."""

    auc: float
    wrong_first: int  # of the REPLAYED that rank first
    wrong: int  # of all that are worth it
    candidates: int


class Measured(NamedTuple):
    """What one replay of one task's cache did."""

    task: str
    kept_by: str
    seed: int
    bad_before: float  # share of the cache's answers that are wrong
    bad_after: float
    ranking: Ranking
    before: list[bool]  # per held-out request
    after: list[bool]
    report: Report
    billed_nusd: int  # by the upstream's ledger


class World(NamedTuple):
    """Which requests, and how many."""

    seed: int = SEED
    traffic: int = TRAFFIC
    held_out: int = HELD_OUT


USUAL = World()


def split(task: Task, world: World = USUAL) -> Split:
    """Three lists that share no request."""
    items = list({item.prompt: item for item in task.items}.values())
    random.Random(f"{task.name} {world.seed}").shuffle(items)
    a, b = POOL, POOL + world.traffic
    return Split(items[:a], items[a:b], items[b : b + world.held_out])


def spoiled(pool: Sequence[Item], share: float, seed: int = SEED) -> list[str]:
    """The answers for `pool`, `share` of them another request's, which is another answer."""
    rng = random.Random(seed)
    bad = set(rng.sample(range(len(pool)), round(share * len(pool))))
    return [
        rng.choice([o.targets[0] for o in pool if not correct(o.targets[0], item)]) if n in bad else item.targets[0]
        for n, item in enumerate(pool)
    ]


def settings_for(folder: Path, base_url: str, samples: int, **replay: Any) -> config.Config:
    """A student and a teacher at `base_url`, a store in `folder`, no proxy."""
    return config.parse(
        {
            "server": {"port": 0},  # no proxy runs: there is no load to look at
            "store": {"url": f"sqlite:///{folder / 'cache.db'}"},
            "backends": [
                {
                    "name": model.name,
                    "base_url": base_url,
                    "model": model.name,
                    "usd_per_million_input_tokens": PRICES[role].input,
                    "usd_per_million_output_tokens": PRICES[role].output,
                    "context_window_tokens": 2048,
                    "timeout_s": 600,
                    "first_token_timeout_s": 600,
                    "idle_timeout_s": 600,
                }
                for role, model in (("student", STUDENT), ("teacher", TEACHER))
            ],
            "replay": {"samples": samples, "usd_budget": 1.0, **replay},
        }
    )


class Cache:
    """One store with what chooses from it, as the proxy has them."""

    def __init__(self, settings: config.Config, embedder: Any, session: aiohttp.ClientSession) -> None:
        self.settings = settings
        self.store: ReplayStore = open_replay_store(settings)
        self.retriever = Retriever(self.store, embedder)
        self.utility = RecordUtility()
        self.selector = Selector(self.utility, settings.selection)
        self.session = session
        self.at = time.time() - DAY_S
        self.tokenizer = make_tokenizer(settings.by_price()[-1].tokenizer)

    def fill(self, task: Task, pool: Sequence[Item], answers: Sequence[str]) -> None:
        vectors = self.retriever.embed([item.prompt for item in pool])
        with self.store.transaction():
            for n, (item, answer, vector) in enumerate(zip(pool, answers, vectors, strict=True)):
                tokens = self.tokenizer.count(item.prompt) + self.tokenizer.count(answer)
                self.store.admit(
                    Example(
                        *(f"e{n:03}", TENANT, None, f"log-{n:03}", self.at, "chat", task.system, item.prompt, answer),
                        *("import", self.retriever.embedder.identity, vector, tokens, ExampleStats()),
                    )
                )
        self.retriever.load()

    def choose(self, task: Task, item: Item) -> Sequence[Match]:
        wanted = Query(TENANT, item.prompt, self.settings.selection.recall_k)
        (recalled,) = self.retriever.recall([wanted], self.at)
        return self.selector.select(
            recalled,
            student_window_tokens=2048,
            request_tokens=count_prompt(self.tokenizer, [task.system, item.prompt]),
            reply_tokens=task.max_tokens,
            cap=None,
            system=task.system,
            now=self.at,
            student=STUDENT.name,
        ).shown

    async def ask(self, task: Task, item: Item, shown: Sequence[Match]) -> str:
        """What the student says."""
        client = {
            "model": "auto",
            "messages": [{"role": "system", "content": task.system}, {"role": "user", "content": item.prompt}],
            "temperature": 0,
            "max_tokens": task.max_tokens,
        }
        chat = Chat()
        shots = [Shot(m.example.request, m.example.answer) for m in shown]
        body = chat.compose(chat.read(orjson.dumps(client)), model=STUDENT.name, shots=shots)
        url = self.settings.by_price()[0].base_url
        async with self.session.post(f"{url}/chat/completions", data=body) as reply:
            reply.raise_for_status()
            return str((await reply.json())["choices"][0]["message"]["content"])

    async def serve(self, task: Task, items: Sequence[Item]) -> None:
        """Traffic: answers with their scores, in the record as the proxy writes it."""
        dearest = self.settings.by_price()[-1]
        share = PRICES["student"].output / dearest.usd_per_million_output_tokens
        for n, item in enumerate(items):
            shown = self.choose(task, item)
            answer = await self.ask(task, item, shown)
            quality = float(correct(answer, item))
            self.store.record(
                Exchange(
                    *(f"traffic-{n:03}", TENANT, None, None, self.at, "chat", "auto", False, STUDENT.name),
                    *(DecisionKind.ROUTED, None, 200, True, True, share, task.system, item.prompt, answer, "stop"),
                    usage=Usage(1, 1),
                    shown=[m.example.id for m in shown],
                )
            )
            self.store.add_feedback(Feedback(f"traffic-{n:03}", "check", quality, self.at), tenant=TENANT)
            if shown:
                self.utility.partial_fit(np.zeros((1, len(NAMES))), [quality], student=STUDENT.name)

    async def accuracy(self, task: Task, items: Sequence[Item]) -> list[bool]:
        return [correct(await self.ask(task, item, self.choose(task, item)), item) for item in items]

    def wrong(self, pool: Sequence[Item]) -> set[str]:
        """Ids of the examples whose answer is wrong."""
        targets = {item.prompt: item for item in pool}
        found = self.store.list_examples(TENANT, limit=len(pool))
        return {e.id for e in found if not correct(e.answer, targets[e.request])}

    def ranking(self, wrong: set[str]) -> Ranking:
        found = assemble.ranked(self.store, self.settings, plan.models(self.settings), Options())
        bad = [c.id in wrong for c in found]
        return Ranking(float(roc_auc_score(bad, [c.score for c in found])), sum(bad[:REPLAYED]), sum(bad), len(bad))


async def measure(
    task: Task,
    kept_by: str,
    world: World,
    recorded: Recorded,
    base_url: str,
    embedder: Any,
    session: aiohttp.ClientSession,
) -> Measured:
    parts = split(task, world)
    recorded.begin()
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_for(Path(folder), base_url, KEPT_BY[kept_by], merge=False)
        cache = Cache(settings, embedder, session)
        with closing(cache.store):
            cache.fill(task, parts.pool, spoiled(parts.pool, BAD, world.seed))
            wrong = cache.wrong(parts.pool)
            await cache.serve(task, parts.traffic)
            ranking = cache.ranking(wrong)
            before = await cache.accuracy(task, parts.held_out)
            recorded.ledger.clear()
            report = await assemble.run(settings, Options(workers=1, limit=REPLAYED), Quiet(), environ={})
            prices = {b.model: b for b in settings.backends}
            billed = sum(nusd(prices[call.model], call.input, call.output) for call in recorded.ledger)
            cache.retriever.load()
            after = await cache.accuracy(task, parts.held_out)
            bad = len(wrong) / POOL, len(cache.wrong(parts.pool)) / POOL
    return Measured(*(task.name, kept_by, world.seed, *bad, ranking, before, after, report, billed))


def paired(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """Mean of the differences on the same requests, and its 95 % interval by bootstrap."""
    differences = np.array(after, float) - np.array(before, float)
    rng = np.random.default_rng(SEED)
    means = differences[rng.integers(0, len(differences), (BOOTSTRAP, len(differences)))].mean(axis=1)
    return float(differences.mean()), *map(float, np.quantile(means, [0.025, 0.975]))


def as_row(m: Measured) -> dict[str, Any]:
    lift, low, high = paired(m.before, m.after)
    told = m.report.as_json()
    return {
        "task": m.task,
        "kept_by": m.kept_by,
        "seed": m.seed,
        "bad_before": m.bad_before,
        "bad_after": m.bad_after,
        "ranking": m.ranking._asdict(),
        "accuracy": {name: float(np.mean(getattr(m, name))) for name in ("before", "after")},
        "lift": {"mean": lift, "low": low, "high": high, "n": len(m.after)},
        "outcomes": {"before": m.before, "after": m.after},
        "usd": {"report": told["usd"]["confirmed"], "upstream": m.billed_nusd / 1e9},
        "report": told,
    }


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"{'task, seed':<26}{'kept by':<11}{'bad answers':<14}{'of them first':>14}{'AUC':>5}"
        f"{'student before':>15}{'after':>7}  {'lift':<22}{'USD':>10}{'upstream':>10}"
    ]
    for row in rows:
        lift, accuracy = row["lift"], row["accuracy"]
        interval = f"{lift['mean']:+.2f} [{lift['low']:+.2f}, {lift['high']:+.2f}]"
        name = f"{row['task']}, {row['seed']}"
        first = f"{row['ranking']['wrong_first']} of {REPLAYED}"
        lines.append(
            f"{name:<26}{row['kept_by']:<11}{row['bad_before']:.2f} -> {row['bad_after']:.2f}  "
            f"{first:>14}{row['ranking']['auc']:>5.2f}"
            f"{accuracy['before']:>15.2f}{accuracy['after']:>7.2f}"
            f"  {interval:<22}{row['usd']['report']:>10.6f}{row['usd']['upstream']:>10.6f}"
        )
    return "\n".join(lines)


def pooled(rows: Sequence[dict[str, Any]]) -> str:
    """All of them as one: the mean lift over all requests, its interval by bootstrap over them."""
    before, after = ([right for row in rows for right in row["outcomes"][when]] for when in ("before", "after"))
    lift, low, high = paired(before, after)
    mean = f"{np.mean(before):.2f} -> {np.mean(after):.2f}"
    return f"together, n = {len(after)}: {mean}, {lift:+.2f} [{low:+.2f}, {high:+.2f}]"


async def run(record: Path, kept_by: Sequence[str], chosen: Sequence[Task], world: World) -> list[dict[str, Any]]:
    rows = []
    embedder = make_embedder(EMBEDDER)
    async with asking(record) as (recorded, base_url, session):
        for how in kept_by:
            for task in chosen:
                rows.append(as_row(await measure(task, how, world, recorded, base_url, embedder, session)))
                print(as_table(rows[-1:]), flush=True)
    if recorded.asked_models:
        print(f"{recorded.asked_models} answers were not recorded yet and came from the models")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--kept-by", choices=[*KEPT_BY], action="append")
    parser.add_argument("--task", choices=[*tasks()], action="append")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=SEED, help="Which requests, and which answers are bad.")
    parser.add_argument("--traffic", type=int, default=TRAFFIC)
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--with", dest="others", type=Path, action="append", default=[], help="Pool with this --json.")
    options = parser.parse_args()
    chosen = [task for name, task in tasks().items() if options.task is None or name in options.task]
    world = World(options.seed, options.traffic, options.held_out)
    rows = asyncio.run(run(options.record, options.kept_by or [*KEPT_BY], chosen, world))
    print(as_table(rows))
    print(pooled([*rows, *(row for file in options.others for row in json.loads(file.read_text()))]))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
