"""Train the prior of the ways on the train split, as replay does on what was scored; no test request is looked at.

python -m tests.bench.quality.learn              writes data/prior.json, and prints the weights that ship as UNTRAINED
python -m tests.bench.quality.learn --lengths    what the lengths of examples would tell beside it; writes nothing
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from iccache.examples.training import Scored, calibration, fit
from iccache.examples.ways import NAMES, UNTRAINED, Prior, Way, features
from tests.bench.quality.answers import DATA, Answers
from tests.bench.quality.models import STUDENTS
from tests.bench.quality.prompts import chosen, described, messages, pool, requests, shots
from tests.bench.quality.tasks import TASKS, correct

PRIOR = DATA / "prior.json"
SHOWN = {"none": Way.NONE, "shared": Way.SHARED, "nearest3": Way.OWN, "recalled3": Way.OWN}
# What is believed before any answer: that an example adds something, and a nearer one more. All examples here are of
# one age, under one system prompt and without a record, so of that nothing is learned.
BELIEVED = dict(zip(NAMES, UNTRAINED, strict=True)) | {
    "own_overlap": 0.0,
    "own_vote": 0.0,
    "shared_similarity_max": 0.0,
}
BELIEF = Prior({"": list(BELIEVED.values())})
FOLDS = 5


def scored(student: str, answers: Answers, split: str = "train", lengths: bool = False) -> list[Scored]:
    """All answers of `student` on one split that are on file, with the task as the kind of request.

    `lengths`: with those of the examples, which otherwise count as 0.
    """
    found = []
    for task in TASKS.values():
        cache = pool(task.name)
        for request in requests(task.name, split):
            for name, way in SHOWN.items():
                examples = chosen(cache, request, name)
                prompt = messages(request, shots(examples))
                if answers.knows(prompt, task.max_tokens):
                    shown = described(cache, request, examples)
                    if not lengths:
                        shown = shown._replace(request_length=(), answer_length=())
                    x = features(len(request.item.prompt), way, shown)
                    right = correct(answers.get(prompt, task.max_tokens).text, request.item)
                    found.append(Scored(student, task.name, x.tolist(), float(right)))
    return found


def told_by_lengths() -> None:
    """Brier score on tasks left out, and how far expectations for requests left out go with the answers of one task."""
    for lengths in (False, True):
        answers = [lesson for m in STUDENTS for lesson in scored(m.name, Answers(m.name), lengths=lengths)]
        brier, within = calibration(answers, BELIEF).brier, np.mean([_within(answers, seed) for seed in range(3)])
        title = "with" if lengths else "without"
        print(f"{title} lengths: Brier score {brier:.3f} on tasks left out; correlation {within:.3f} within a task")


def _within(answers: Sequence[Scored], seed: int) -> float:
    """Mean correlation of quality and expectation where own examples were shown, over students and tasks."""
    part = np.random.default_rng(seed).integers(FOLDS, size=len(answers))
    pairs = defaultdict(list)
    for fold in range(FOLDS):
        prior = fit([a for a, p in zip(answers, part, strict=True) if p != fold], BELIEF)
        for a, p in zip(answers, part, strict=True):
            if p == fold and a.x[NAMES.index("own")]:
                pairs[a.student, a.kind].append((prior.of_row(a.x, a.student), a.quality))
    varied = [np.array(found).T for found in pairs.values() if len(found) > 20]
    return float(np.mean([np.corrcoef(both)[0, 1] for both in varied if both.std(axis=1).all()]))


def main() -> None:
    answers = [lesson for model in STUDENTS for lesson in scored(model.name, Answers(model.name))]
    prior = fit(answers, BELIEF)
    PRIOR.write_bytes(prior.state())
    measured = calibration(answers, BELIEF)
    print(f"{len(answers)} answers")
    print(f"Brier score on tasks left out {measured.brier:.3f}, of always the mean {measured.brier_of_mean:.3f}")
    for expected, came, n in measured.bins:
        print(f"  expected {expected:.2f}, came {came:.2f} (n = {n})")
    for student, weights in prior.weights.items():
        print(student or "any", dict(zip(NAMES, np.round(weights, 3).tolist(), strict=True)))


if __name__ == "__main__":
    told_by_lengths() if "--lengths" in sys.argv[1:] else main()
