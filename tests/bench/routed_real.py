"""Any policy, exactly, on real models: every request was answered once by every backend.

    python -m tests.bench.routed_real [--orders 20] [--picture FILE.svg] [--json FILE]

The answers are those of `make bench-quality`: SmolLM2-135M and Qwen2.5-Coder-0.5B, each with and without the three
nearest examples. The teacher is Qwen2.5-Coder-1.5B where it has answered at least `ENOUGH` of the test requests; until
then the data set's own answer stands in, a teacher that is always right. Who chooses a backend for a request is told
what its answer was worth (exact match) and pays its tokens; nothing is simulated but the choice.

`auto` is the real router with the default configuration and its floor: it first routes the requests of the train split
in a drawn order, learning from the score of the backend that it chose alone, then those of the test split, which are
counted. `auto from nothing` has the test split alone. RouteLLM-style: a logistic regression on the request's
embedding, trained on *all* answers of the train split, predicts each student's; the cheapest student at or above the
threshold answers, else the teacher. Intervals are 95 % bootstraps over the test requests, and over orders too where
the order matters.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from iccache import config
from iccache.examples.utility import LearnedUtility, candidate_rows
from iccache.quality.kinds import kind_of
from router.linear import LinearThompson
from router.routing import Router
from router.types import Arm, ExampleSignals, Signals
from tests.bench.quality.answers import Answers
from tests.bench.quality.models import LARGE, MIDDLE, SMALL
from tests.bench.quality.prompts import AT, Request, chosen, messages, pool, requests, shots
from tests.bench.quality.tasks import TASKS, correct
from tests.bench.routing import default_floor

PRICES = {
    SMALL.name: (0.05, 0.20),
    MIDDLE.name: (0.15, 0.60),
    LARGE.name: (1.0, 4.0),
}  # USD per million tokens, in and out
STUDENTS = (SMALL.name, MIDDLE.name)
TEACHER = LARGE.name
ENOUGH = 0.8  # share of the test requests that the teacher must have answered to be the teacher
THRESHOLDS = np.linspace(0.0, 1.0, 21)
RESAMPLES = 2000
HIGH_LOAD = 1.2  # of the teacher's capacity

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Answered:
    """What one backend's answer was worth and cost."""

    quality: float
    usd: float


@dataclass(frozen=True)
class Row:
    """One request with everybody's answer: of students with the nearest examples and without (`plain`)."""

    request: Request
    shown: dict[str, Answered]  # the teacher's, which is shown none, among them
    plain: dict[str, Answered]
    signals: Signals


class Table:
    """All rows of one split, as far as every backend has answered."""

    def __init__(self, gold: bool | None = None) -> None:
        """`gold`: whether the data set's answers stand in for the teacher's; None: where there are too few."""
        self.answers = {name: Answers(name) for name in PRICES}
        asked = [r for task in TASKS for r in requests(task, "test", 50)]
        known = np.mean([self.answers[TEACHER].knows(messages(r), r.task.max_tokens) for r in asked])
        self.gold = known < ENOUGH if gold is None else gold

    @cached_property
    def train(self) -> list[Row]:
        return list(self._rows("train"))

    @cached_property
    def test(self) -> list[Row]:
        return list(self._rows("test"))

    def _rows(self, split: str) -> Iterator[Row]:
        for task in TASKS:
            for request in requests(task, split):
                shown, plain = self._answered(request, "nearest3"), self._answered(request, "none")
                if shown and plain:
                    yield Row(request, shown, plain, self._signals(request))

    def _answered(self, request: Request, way: str) -> dict[str, Answered] | None:
        """By backend; None where one has not answered."""
        prompt = messages(request, shots(chosen(pool(request.item.task), request, way)))
        found = {}
        for name in STUDENTS:
            if not self.answers[name].knows(prompt, request.task.max_tokens):
                return None
            said = self.answers[name].get(prompt, request.task.max_tokens)
            found[name] = Answered(
                float(correct(said.text, request.item)), usd(name, said.prompt_tokens, said.output_tokens)
            )
        teacher = self._teacher(request)
        return None if teacher is None else found | {TEACHER: teacher}

    def _teacher(self, request: Request) -> Answered | None:
        bare = messages(request)
        if not self.gold:
            if not self.answers[TEACHER].knows(bare, request.task.max_tokens):
                return None
            said = self.answers[TEACHER].get(bare, request.task.max_tokens)
            return Answered(
                float(correct(said.text, request.item)), usd(TEACHER, said.prompt_tokens, said.output_tokens)
            )
        target = request.item.targets[0]
        words = sum(len(m["content"]) for m in bare)
        return Answered(1.0, usd(TEACHER, words // 4 + 4 * len(bare), len(target) // 4 + 1))

    def _signals(self, request: Request) -> Signals:
        """As the proxy has them: the embedding, the system prompt, and what is known of the examples shown."""
        near = pool(request.item.task).recall(request, 3)
        similarity = np.array([cosine for _, cosine in near])
        rows = candidate_rows(near, request=request.item.prompt, system=request.task.system, now=AT)
        examples = {}
        for student in STUDENTS:
            utility = LearnedUtility().predict(rows, student)
            examples[student] = ExampleSignals(
                len(near),
                float(similarity.max()),
                float(similarity.mean()),
                float(utility.max()),
                float(utility.mean()),
                sum(e.tokens for e, _ in near),
            )
        words = len(request.item.prompt) + len(request.task.system)
        return Signals(request.vector, words // 4, 1, examples, system=request.task.system)


def usd(name: str, tokens_in: int, tokens_out: int) -> float:
    price_in, price_out = PRICES[name]
    return (tokens_in * price_in + tokens_out * price_out) / 1e6


# ---- policies: quality and cost (2, n_orders, n_test) of what they choose


def always(rows: Sequence[Row], name: str, plain: bool = False) -> Vector:
    return outcome([(row.plain if plain else row.shown)[name] for row in rows])


def oracle(rows: Sequence[Row]) -> Vector:
    """The cheapest backend whose answer is right; where none is, the cheapest."""
    chosen_ = []
    for row in rows:
        by_cost = sorted(row.shown.values(), key=lambda a: a.usd)
        chosen_.append(next((a for a in by_cost if a.quality == 1.0), by_cost[0]))
    return outcome(chosen_)


def outcome(answers: Sequence[Answered]) -> Vector:
    return np.array([[[a.quality for a in answers]], [[a.usd for a in answers]]])


def threshold(train: Sequence[Row], rows: Sequence[Row], at: float, plain: bool) -> Vector:
    """RouteLLM-style, by `predictions`."""
    return _above(predictions(train, rows, plain), rows, at, plain)


def predictions(train: Sequence[Row], rows: Sequence[Row], plain: bool) -> dict[str, Vector]:
    """(n,) by student: the predicted chance that its answer is right."""
    x, new = (np.stack([row.request.vector for row in each]) for each in (train, rows))
    found = {}
    for name in STUDENTS:
        y = [(row.plain if plain else row.shown)[name].quality for row in train]
        if len(set(y)) == 1:  # all right or all wrong: nothing to tell apart
            found[name] = np.full(len(rows), y[0])
            continue
        model = LogisticRegression(C=10.0, max_iter=500).fit(x, y)
        found[name] = np.asarray(model.predict_proba(new)[:, 1])
    return found


def _above(predicted: dict[str, Vector], rows: Sequence[Row], at: float, plain: bool) -> Vector:
    chosen_ = []
    for i, row in enumerate(rows):
        name = next((s for s in STUDENTS if predicted[s][i] >= at), TEACHER)
        chosen_.append((row.plain if plain else row.shown)[name])
    return outcome(chosen_)


def auto(before: Sequence[Row], rows: Sequence[Row], orders: int, load: float = 0.0, **routing: float) -> Vector:
    """The real router, learning as it goes."""
    found = np.empty((2, orders, len(rows)))
    for order in range(orders):
        rng = np.random.default_rng(order)
        router, floor = _router(order, routing), default_floor(TEACHER)
        stream = [*(before[i] for i in rng.permutation(len(before)))]
        for at, row in enumerate(stream):
            _route(router, floor, row, load, float(at))
        for at, i in enumerate(rng.permutation(len(rows))):
            answered = _route(router, floor, rows[i], load, float(len(stream) + at))
            found[:, order, i] = answered.quality, answered.usd
    return found


def _route(router: Router, floor: object, row: Row, load: float, at: float) -> Answered:
    kind = kind_of(row.request.task.system)
    arms = [
        Arm(name, answered.usd, name == TEACHER, list_price=sum(PRICES[name])) for name, answered in row.shown.items()
    ]
    decision = router.route(row.signals, arms, load, floor.standing("t", kind))  # type: ignore[attr-defined]
    answered = row.shown[decision.arm]
    router.learn(decision.arm, decision.features, answered.quality)
    floor.learn("t", kind, decision.arm, answered.quality, at=at, weight=decision.meant)  # type: ignore[attr-defined]
    return answered


def _router(seed: int, changes: dict[str, float]) -> Router:
    r = config.Routing()
    asked = {
        name: getattr(r, name)
        for name in ("exploration", "quality_target", "theta", "lambda0", "gamma", "probe_share", "holdout_share")
    }
    return Router(LinearThompson(), rng=np.random.default_rng([seed, 3]), **asked | changes)  # type: ignore[arg-type]


# ---- the report


@dataclass(frozen=True)
class Result:
    """Means with their 95 % intervals; cost in USD per 1000 requests."""

    policy: str
    quality: tuple[float, float, float]
    cost: tuple[float, float, float]

    @classmethod
    def of(cls, policy: str, found: Vector, seed: int = 0) -> Result:
        rng, (_, orders, n) = np.random.default_rng(seed), found.shape
        means = np.empty((2, RESAMPLES))
        for i in range(RESAMPLES):
            picked = found[:, rng.integers(orders, size=orders)].mean(axis=1) if orders > 1 else found[:, 0]
            means[:, i] = picked[:, rng.integers(n, size=n)].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975], axis=1)
        mean = found.mean(axis=(1, 2))
        both = [
            (float(m) * k, float(a) * k, float(b) * k) for m, a, b, k in zip(mean, low, high, (1, 1000), strict=True)
        ]
        return cls(policy, both[0], both[1])


def measured(table: Table, orders: int) -> tuple[list[Result], dict[str, list[Result]]]:
    """The policies, and the curves of thresholds."""
    train, test = table.train, table.test
    named = {
        "teacher only": always(test, TEACHER),
        "SmolLM2-135M with examples": always(test, SMALL.name),
        "Qwen-0.5B with examples": always(test, MIDDLE.name),
        "SmolLM2-135M alone": always(test, SMALL.name, plain=True),
        "Qwen-0.5B alone": always(test, MIDDLE.name, plain=True),
        "**auto**": auto(train, test, orders),
        "auto from nothing": auto([], test, orders),
        "auto, quality_target 0.9": auto(train, test, orders, quality_target=0.9),
        f"auto at {HIGH_LOAD:.0%} load".replace("%", " %"): auto(train, test, orders, load=HIGH_LOAD),
        "oracle": oracle(test),
    }
    curves = {}
    for name, plain in (("threshold, students with examples", False), ("threshold, students alone", True)):
        predicted = predictions(train, test, plain)
        curves[name] = [Result.of(f"{at:.2f}", _above(predicted, test, at, plain)) for at in THRESHOLDS]
    return [Result.of(name, found) for name, found in named.items()], curves


def same_cost(curve: Sequence[Result], cost: float) -> float:
    """The quality on the curve at a cost, straight between its points; at its end where the cost is beyond."""
    points = sorted((r.cost[0], r.quality[0]) for r in curve)
    return float(np.interp(cost, [c for c, _ in points], [q for _, q in points]))


def lines(table: Table, results: Sequence[Result], curves: dict[str, list[Result]]) -> Iterator[str]:
    teacher = "the data set's answers (always right)" if table.gold else "Qwen2.5-Coder-1.5B"
    yield f"Teacher: {teacher}. {len(table.train)} requests before, {len(table.test)} counted."
    yield ""
    yield "| policy | quality [95 %] | USD per 1000 requests [95 %] |"
    yield "|---|---|---|"
    for r in results:
        yield f"| {r.policy} | {_cell(r.quality, 3)} | {_cell(r.cost, 4)} |"
    auto_ = next(r for r in results if r.policy == "**auto**")
    for name, curve in curves.items():
        for at in (5, 10, 15):
            yield f"| {name}, {curve[at].policy} | {_cell(curve[at].quality, 3)} | {_cell(curve[at].cost, 4)} |"
    yield ""
    yield "; ".join(
        f"{name} at the cost of auto: {same_cost(curve, auto_.cost[0]):.3f}" for name, curve in curves.items()
    )


def _cell(value: tuple[float, float, float], digits: int) -> str:
    mean, low, high = value
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def draw(path: Path, results: Sequence[Result], curves: dict[str, list[Result]]) -> None:
    """Quality over cost."""
    import matplotlib.figure  # noqa: PLC0415 - only a picture needs it

    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for (name, curve), colour in zip(curves.items(), ("#888888", "#bbbbbb"), strict=True):
        axes.plot([r.cost[0] for r in curve], [r.quality[0] for r in curve], ".-", color=colour, label=name)
    for i, r in enumerate(results):
        spread = [[abs(v[0] - v[k])] for v in (r.cost, r.quality) for k in (1, 2)]
        axes.errorbar(
            [r.cost[0]], [r.quality[0]], xerr=spread[:2], yerr=spread[2:], fmt="o", color=f"C{i}",
            label=r.policy.strip("*"), capsize=2,
        )  # fmt: skip
    axes.set(xlabel="USD per 1000 requests", ylabel="share of right answers", ylim=(0, 1.03))
    axes.legend(fontsize=7, loc="lower right")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=20)
    parser.add_argument("--gold", action="store_true", help="the data set's answers for the teacher's in any case")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    table = Table(gold=True if args.gold else None)
    results, curves = measured(table, args.orders)
    print("\n".join(lines(table, results, curves)))
    if args.picture:
        draw(args.picture, results, curves)
    if args.json:
        found = {"policies": results, "curves": curves}
        args.json.write_text(json.dumps(found, default=lambda r: r.__dict__, indent=1))


if __name__ == "__main__":
    main()
