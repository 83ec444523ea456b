"""How well wrong answers in a cache are found without asking anybody (`replay.doubt`), on recorded answers alone.

    python -m tests.bench.doubt

For each task of `tests.bench.quality` and each kind of wrong answer: COUNT examples, of which BAD are wrong, and the
AUC of the doubt, the probability that a wrong answer is doubted more than a right one. Wrong answers are those of
another request of the task, or what a small model answered wrongly, without examples or with the three nearest. Nothing
was shown to anybody, so there is no traffic to learn from. The weights of `replay.doubt` are beside those that a
logistic regression gives on the other five tasks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from replay import doubt
from replay.doubt import Evidence, Peer, evidence
from tests.bench.quality import conditions
from tests.bench.quality.answers import Answers
from tests.bench.quality.conditions import Condition
from tests.bench.quality.models import STUDENTS
from tests.bench.quality.prompts import embedder, messages, requests, shots
from tests.bench.quality.tasks import TASKS, Item, correct, items

COUNT, BAD = 200, 0.3
LEAST_WRONG = 20  # fewer show nothing
ANOTHERS = "another request's"
KINDS = (ANOTHERS, *(model.name for model in STUDENTS))
ASKED = (Condition("none"), Condition("nearest3"))


class Pair(NamedTuple):
    """An example as the cache has it."""

    item: Item
    answer: str
    wrong: bool


class Measured(NamedTuple):
    """One cache."""

    task: str
    kind: str
    wrong: ArrayLike  # (n,) bool
    found: Evidence


def swapped(task: str, rng: random.Random) -> list[Pair]:
    pool = items(task, "pool")[:COUNT]
    bad = set(rng.sample(range(len(pool)), round(BAD * len(pool))))
    return [
        Pair(item, rng.choice([o.targets[0] for o in pool if not correct(o.targets[0], item)]), True)
        if place in bad
        else Pair(item, item.targets[0], False)
        for place, item in enumerate(pool)
    ]


def answered(task: str, model: str, rng: random.Random) -> list[Pair]:
    """BAD of them as `model` answered wrongly, as far as it did; the others right."""
    answers, pairs = Answers(model), []
    for split in ("train", "test"):
        for request in requests(task, split):
            wrong = next(_wrong(answers, model, request), None)
            pairs.append(Pair(request.item, request.item.targets[0] if wrong is None else wrong, wrong is not None))
    failed = [pair for pair in pairs if pair.wrong]
    kept = set(rng.sample(range(len(failed)), min(len(failed), round(BAD * len(pairs)))))
    right = [Pair(p.item, p.item.targets[0], False) for n, p in enumerate(failed) if n not in kept]
    right += [pair for pair in pairs if not pair.wrong]
    rng.shuffle(right)
    return [failed[n] for n in sorted(kept)] + right[: round(len(kept) * (1 - BAD) / BAD)]


def _wrong(answers: Answers, model: str, request: conditions.Request) -> Iterator[str]:
    for condition in ASKED:
        asked = messages(request, shots(conditions.examples_for(conditions.Ways(), model, request, condition)))
        if answers.knows(asked, request.task.max_tokens):
            text = answers.get(asked, request.task.max_tokens).text
            if not correct(text, request.item):
                yield text


def measure() -> list[Measured]:
    found = []
    for kind in KINDS:
        for task in TASKS:
            rng = random.Random(f"{task} {kind}")
            pairs = swapped(task, rng) if kind == ANOTHERS else answered(task, kind, rng)
            wrong = np.array([pair.wrong for pair in pairs])
            if wrong.sum() >= LEAST_WRONG:
                peers = [Peer(str(n), pair.item.prompt, pair.answer) for n, pair in enumerate(pairs)]
                vectors = embedder().embed([pair.item.prompt for pair in pairs])
                found.append(Measured(task, kind, wrong, evidence(peers, vectors)))
    return found


def fitted(caches: Sequence[Measured]) -> tuple[float, float]:
    """(BASE, ODD) of a logistic regression on `odd` alone, each cache counting alike."""
    odd = np.concatenate([c.found.odd for c in caches])
    wrong = np.concatenate([np.asarray(c.wrong) for c in caches])
    weight = np.concatenate([np.full(len(c.found.odd), COUNT / len(c.found.odd)) for c in caches])
    learned = LogisticRegression(C=10.0).fit(odd[:, None], wrong, sample_weight=weight)
    return float(learned.intercept_[0]), float(learned.coef_[0, 0])


def main() -> None:
    found = measure()
    print(f"| wrong answers are | {' | '.join(TASKS)} |\n|---|{'---|' * len(TASKS)}")
    for kind in KINDS:
        cells = {c.task: f"{roc_auc_score(c.wrong, c.found.doubt()):.2f}" for c in found if c.kind == kind}
        print(f"| {kind} | {' | '.join(cells.get(task, '') for task in TASKS)} |")
    print(f"weights: BASE {doubt.BASE}, ODD {doubt.ODD}")
    for task in TASKS:
        base, odd = fitted([c for c in found if c.task != task])
        print(f"  without {task}: {base:.1f}, {odd:.1f}")


if __name__ == "__main__":
    main()
