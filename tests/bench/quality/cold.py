"""From an empty cache: one stream of all tasks mixed, each request answered by the student and then put into the cache
with the data set's answer, as a teacher's would be. The learned choice starts with the weights that ship, and learns
from the score of each of its own answers alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from iccache.examples.ways import Way, Ways
from iccache.types import Example
from tests.bench.quality.answers import Answers, Missing
from tests.bench.quality.conditions import choose, note
from tests.bench.quality.prompts import Cache, Request, example, messages, requests, shots
from tests.bench.quality.tasks import TASKS, correct

EACH = 40  # requests of each task
SEED = 7
PARTS = 6  # of the stream, each with its own share of right answers
WAYS = ("none", "nearest3", "learned")


def stream() -> list[Request]:
    """The same for every way."""
    mixed = [request for task in TASKS for request in requests(task, "test", EACH)]
    random.Random(SEED).shuffle(mixed)
    return mixed


def run(way: str, answers: Answers) -> Iterator[tuple[bool, int]]:
    """Of each request in turn, whether the answer was right, and how many examples it was shown. Raises Missing."""
    ways, seen = Ways(), list[Example]()
    for request in stream():
        cache = Cache(seen)
        how, shown = _shown(way, ways, answers.model, request, cache)
        right = correct(answers.get(messages(request, shots(shown)), request.task.max_tokens).text, request.item)
        if way == "learned":
            note(ways, answers.model, request, request.seed, how, cache, shown, right)
        seen.append(example(request.item.task, request.place, split="test"))
        yield right, len(shown)


def _shown(way: str, ways: Ways, student: str, request: Request, cache: Cache) -> tuple[Way, list[Example]]:
    if way == "none" or not cache.examples:
        return Way.NONE, []
    if way == "nearest3":
        return Way.OWN, [e for e, _ in cache.recall(request, 3)][::-1]
    return choose(ways, student, request, cache)


def table(answers: Answers) -> Iterator[str]:
    """Nothing where answers are missing."""
    rows = {}
    for way in WAYS:
        try:
            rows[way] = list(run(way, answers))
        except Missing:
            continue
    if "learned" not in rows:
        return
    step = len(rows["learned"]) // PARTS
    spans = [(at, at + step) for at in range(0, step * PARTS, step)]
    yield f"| {answers.model}, requests | {' | '.join(f'{a + 1} to {b}' for a, b in spans)} |"
    yield "|---" * (PARTS + 1) + "|"
    for way, found in rows.items():
        yield f"| {way} | {' | '.join(_mean([right for right, _ in found[a:b]]) for a, b in spans)} |"
    shown = [float(count) for _, count in rows["learned"]]
    yield f"| learned: examples shown | {' | '.join(f'{sum(shown[a:b]) / step:.1f}' for a, b in spans)} |"


def _mean(right: Sequence[bool]) -> str:
    return f"{sum(right) / len(right):.2f}".removeprefix("0")
