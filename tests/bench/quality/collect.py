"""Ask the models everything that the tables need. Whatever is on file is not asked again.

    python -m tests.bench.quality.collect MODEL [STEP ...]      all steps without any

A step is `split:requests per task:way`, as `test:100:nearest3`; tasks may follow, as `train:60:none:qa_wikidata`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from tests.bench.quality import prompts
from tests.bench.quality.answers import Answers
from tests.bench.quality.models import MIDDLE, MODELS, SMALL, asking
from tests.bench.quality.tasks import TASKS

STEPS = {
    SMALL.name: [
        "test:100:none", "test:100:random3", "test:100:nearest3", "test:100:shared",
        "train:60:none", "train:60:shared", "train:60:nearest3", "train:60:recalled3",
    ],
    MIDDLE.name: [
        "test:50:none", "test:50:random3", "test:50:nearest3", "test:50:shared",
        "train:40:none", "train:40:shared", "train:40:nearest3",
    ],
}  # fmt: skip


def collect(answers: Answers, steps: Sequence[str]) -> None:
    for step in steps:
        split, count, way, *only = step.split(":")
        for task in TASKS.values():
            if only and task.name not in only:
                continue
            began, before = time.monotonic(), answers.asked
            for request in prompts.requests(task.name, split, int(count)):
                shown = prompts.chosen(prompts.pool(task.name), request, way)
                answers.get(prompts.messages(request, prompts.shots(shown)), task.max_tokens)
            asked = answers.asked - before
            if asked:
                print(f"{step} {task.name}: {asked} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("steps", nargs="*")
    options = parser.parse_args()
    with asking(MODELS[options.model], True) as answers:
        collect(answers, options.steps or STEPS[options.model])


if __name__ == "__main__":
    main()
