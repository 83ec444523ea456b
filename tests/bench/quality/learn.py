"""Train the prior of the ways on the train split, as replay does on what was scored; no test request is looked at.

python -m tests.bench.quality.learn      writes data/prior.json, and prints the weights that ship as UNTRAINED
"""

from __future__ import annotations

import numpy as np

from iccache.examples.training import Scored, calibration, fit
from iccache.examples.ways import NAMES, Prior, Way, features
from tests.bench.quality.answers import DATA, Answers
from tests.bench.quality.models import STUDENTS
from tests.bench.quality.prompts import chosen, described, messages, pool, requests, shots
from tests.bench.quality.tasks import TASKS, correct

PRIOR = DATA / "prior.json"
SHOWN = {"none": Way.NONE, "shared": Way.SHARED, "nearest3": Way.OWN, "recalled3": Way.OWN}
# What is believed before any answer: that an example adds something, and a nearer one more.
BELIEVED = {"constant": 0.3, "own": 0.1, "own_similarity_mean": 0.1, "own_similarity_max": 0.1, "shared": 0.1}
BELIEF = Prior({"": [BELIEVED.get(name, 0.0) for name in NAMES]})


def scored(student: str, answers: Answers, split: str = "train") -> list[Scored]:
    """All answers of `student` on one split that are on file, with the task as the kind of request."""
    found = []
    for task in TASKS.values():
        cache = pool(task.name)
        for request in requests(task.name, split):
            for name, way in SHOWN.items():
                examples = chosen(cache, request, name)
                prompt = messages(request, shots(examples))
                if answers.knows(prompt, task.max_tokens):
                    x = features(len(request.item.prompt), way, described(cache, request, examples))
                    right = correct(answers.get(prompt, task.max_tokens).text, request.item)
                    found.append(Scored(student, task.name, x.tolist(), float(right)))
    return found


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
    main()
