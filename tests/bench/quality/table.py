"""The tables of the quality benchmark, drawn from the answers on file: no model is asked.

    make bench-quality ARGS="--offline"        python -m tests.bench.quality.table

What is not on file is not in the table; n says how many requests a cell stands for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from iccache.examples.showing import ENOUGH
from iccache.examples.ways import WAYS, Prior, Shown, Way, Ways
from iccache.types import Example
from tests.bench.quality.answers import Answers, Said
from tests.bench.quality.learn import PRIOR, SHOWN
from tests.bench.quality.models import STUDENTS
from tests.bench.quality.prompts import Request, by_utility, chosen, described, messages, pool, requests, shots
from tests.bench.quality.tasks import TASKS, correct

TENANT = "t"
TOKEN_PRICE = 0.00002  # quality that a prompt token has to bring: a tenth of a point for fifty tokens
CONDITIONS = ("none", "random3", "nearest3", "shared", "utility3", "learned")
COMPARED = (("utility3", "nearest3"), ("learned", "nearest3"), ("learned", "none"), ("shared", "nearest3"))
TITLES = {
    "none": "no examples",
    "random3": "3 random",
    "nearest3": "3 nearest",
    "shared": "shared set",
    "utility3": "3 by utility",
    "learned": "**learned choice of the three ways**",
}


class Cell(NamedTuple):
    """One request under one condition."""

    right: bool
    said: Said


@cache
def prior() -> Prior:
    return Prior.restored(PRIOR.read_bytes())


def examples_for(ways: Ways, student: str, request: Request, condition: str) -> list[Example]:
    """What a condition shows for a request."""
    cache_ = pool(request.item.task)
    if condition == "utility3":
        return by_utility(cache_, request, prior(), student)
    if condition == "learned":
        return learned(ways, student, request)
    return chosen(cache_, request, condition)


def taught(student: str, answers: Answers) -> Ways:
    """The ways after the train split was scored, as serving would know it; nothing of the test split is in it."""
    ways = Ways(prior())
    for task in TASKS.values():
        cache_ = pool(task.name)
        for request in requests(task.name, "train"):
            for name in ("none", "shared", "nearest3"):
                examples = chosen(cache_, request, name)
                prompt = messages(request, shots(examples))
                if not answers.knows(prompt, task.max_tokens):
                    continue
                way = SHOWN[name]
                right = correct(answers.get(prompt, task.max_tokens).text, request.item)
                expected = ways.estimate(
                    ways.near(TENANT, student, request.vector, task.system),
                    student,
                    len(request.item.prompt),
                    {way: described(cache_, request, examples)},
                ).prior[WAYS.index(way)]
                ways.learn(
                    TENANT,
                    f"{request.seed} {name}",
                    student,
                    request.vector,
                    task.system,
                    way,
                    float(right),
                    float(expected),
                )
    return ways


def learned(ways: Ways, student: str, request: Request) -> list[Example]:
    """The way with the best expected quality less the price of its tokens; no exploration."""
    cache_, task = pool(request.item.task), request.task
    offers = {
        Way.NONE: list[Example](),
        Way.OWN: by_utility(cache_, request, prior(), student),
        Way.SHARED: cache_.shared(task.system),
    }
    local = ways.near(TENANT, student, request.vector, task.system)
    if local.answers < ENOUGH:
        return offers[Way.OWN]
    seen = {way: described(cache_, request, shown) if shown else Shown(()) for way, shown in offers.items()}
    estimate = ways.estimate(local, student, len(request.item.prompt), seen)
    price = [TOKEN_PRICE * sum(e.tokens + 8 for e in offers[way]) for way in WAYS]
    return offers[WAYS[int(np.argmax(estimate.quality - np.array(price)))]]


def cells(student: str, answers: Answers, condition: str, ways: Ways, task: str) -> dict[int, Cell]:
    """By the request's place in the test split, as far as its answer is on file."""
    found = {}
    for request in requests(task, "test"):
        prompt = messages(request, shots(examples_for(ways, student, request, condition)))
        if answers.knows(prompt, request.task.max_tokens):
            said = answers.get(prompt, request.task.max_tokens)
            found[request.place] = Cell(correct(said.text, request.item), said)
    return found


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share."""
    share, centre = right / n, (right / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def difference(a: Sequence[bool], b: Sequence[bool]) -> tuple[float, float, float]:
    """Mean paired difference with its 95 % interval (normal)."""
    d = np.array(a, float) - np.array(b, float)
    half = 1.96 * float(d.std(ddof=1)) / math.sqrt(len(d)) if len(d) > 1 else math.inf
    return float(d.mean()), float(d.mean()) - half, float(d.mean()) + half


def table(student: str) -> Iterator[str]:
    answers = Answers(student)
    ways = taught(student, answers)
    found = {c: {t: cells(student, answers, c, ways, t) for t in TASKS} for c in CONDITIONS}
    yield f"| {student} | {' | '.join(TASKS)} | all | prompt tokens | new |"
    yield "|---" * (len(TASKS) + 4) + "|"
    for condition in CONDITIONS:
        every = [cell for by_place in found[condition].values() for cell in by_place.values()]
        if not every:
            continue
        shown = [_share([c.right for c in found[condition][t].values()]) for t in TASKS]
        tokens = np.mean([c.said.prompt_tokens for c in every]), np.mean([c.said.new_tokens for c in every])
        total = _share([c.right for c in every])
        yield f"| {TITLES[condition]} | {' | '.join(shown)} | {total} | {tokens[0]:.0f} | {tokens[1]:.0f} |"
    for condition, than in (
        ("utility3", "nearest3"),
        ("learned", "nearest3"),
        ("learned", "none"),
        ("shared", "nearest3"),
    ):
        pairs = [
            (found[condition][t][i].right, found[than][t][i].right)
            for t in TASKS
            for i in found[condition][t].keys() & found[than][t].keys()
        ]
        if pairs:
            mean, low, high = difference(*zip(*pairs, strict=True))
            yield ""
            yield (
                f"{student}: {TITLES[condition]} less {TITLES[than]}, paired, n = {len(pairs)}: "
                f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            )


def _share(right: Sequence[bool]) -> str:
    if not right:
        return ""
    low, high = wilson(sum(right), len(right))
    return f"{_short(np.mean(right))} [{_short(low)}, {_short(high)}] {len(right)}"


def _short(share: float) -> str:
    return f"{abs(share):.2f}".removeprefix("0")


def main() -> None:
    for model in STUDENTS:
        print("\n".join(table(model.name)))
        print()


if __name__ == "__main__":
    main()
