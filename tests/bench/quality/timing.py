"""Time to the first token and to the last, by how examples are shown: asked afresh, on a machine that is at rest.

    python -m tests.bench.quality.timing        writes data/timing.json, from which the tables take it

The engine keeps the beginning of the prompt before, so requests of one kind follow one another, as they do where a kind
of request is frequent; the first of each row is not counted.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np

from tests.bench.quality.answers import Answers
from tests.bench.quality.conditions import Condition, prompt, taught
from tests.bench.quality.models import LARGE, STUDENTS, asking
from tests.bench.quality.prompts import requests
from tests.bench.quality.table import TIMES, TITLES
from tests.bench.quality.tasks import TASKS

TIMED = {
    **dict.fromkeys((model.name for model in STUDENTS), tuple(TITLES)),
    LARGE.name: ("none",),
}
IN_A_ROW = 3


def timed(answers: Answers) -> dict[str, dict[str, float]]:
    """By condition, over all tasks: mean milliseconds, and answers that they are the mean of."""
    ways = taught(answers.model, answers)
    conditions = TIMED[answers.model]
    found: dict[str, list[tuple[float, float]]] = {condition: [] for condition in conditions}
    for task in TASKS.values():
        for condition in conditions:
            how = Condition.read(condition)
            for request in requests(task.name, "test", IN_A_ROW):
                said = answers.ask(prompt(ways, answers.model, request, how), task.max_tokens)
                if request.place:
                    found[condition].append((said.prompt_ms, said.prompt_ms + said.output_ms))
        print(f"{answers.model} {task.name}", file=sys.stderr, flush=True)
    means = {condition: np.mean(times, axis=0).round(1).tolist() for condition, times in found.items()}
    return {c: {"first_ms": first, "last_ms": last, "n": len(found[c])} for c, (first, last) in means.items()}


def main() -> None:
    loads, times = [os.getloadavg()[0]], {}
    for model in (*STUDENTS, LARGE):
        with asking(model, True) as answers:
            times[model.name] = timed(answers)
        loads.append(os.getloadavg()[0])
    TIMES.write_text(json.dumps({"load": np.round(loads, 1).tolist(), "times": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
