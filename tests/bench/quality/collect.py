"""Ask the models everything that the tables need. Whatever is on file is not asked again.

    python -m tests.bench.quality.collect MODEL [STEP ...]      all steps where none is named

A step is `split:requests per task:condition`, as `test:100:nearest3`; tasks may follow, as `train:60:none:qa_wikidata`.
`conditions` says what there is. Or `cold`: see cold.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from iccache.examples.ways import Ways
from tests.bench.quality import cold
from tests.bench.quality.answers import Answers
from tests.bench.quality.conditions import Condition, prompt, taught
from tests.bench.quality.models import LARGE, MIDDLE, MODELS, SMALL, asking
from tests.bench.quality.prompts import requests
from tests.bench.quality.table import CACHES, FRAMINGS, MORE, ORACLE, TITLES, VARIED
from tests.bench.quality.tasks import TASKS

TRAIN = {
    SMALL.name: ["train:60:none", "train:60:shared", "train:60:nearest3", "train:100:recalled3"],
    MIDDLE.name: ["train:40:none", "train:40:shared", "train:40:nearest3", "train:40:recalled3"],
    LARGE.name: [],
}
_FRAMED = [f"test:{VARIED}:{framing}" for framing in FRAMINGS]
_TRIED = [f"test:30:{alone}" for alone in ORACLE]
TAUGHT = {SMALL.name: ["train:60:utility3"], MIDDLE.name: ["train:40:utility3"]}  # by the weights trained on those
TEST = {
    SMALL.name: TAUGHT[SMALL.name]
    + [f"test:100:{condition}" for condition in TITLES]
    + _TRIED
    + _FRAMED
    + [f"test:{MORE.get(cache, VARIED)}:{way}/{cache}" for cache in CACHES for way in ("nearest3", "learned")]
    + ["cold"],
    MIDDLE.name: TAUGHT[MIDDLE.name] + [f"test:50:{condition}" for condition in TITLES] + _TRIED + _FRAMED,
    LARGE.name: ["test:50:none"],
}  # what names utility or the learned choice needs what was learned from the train split


def collect(answers: Answers, steps: Sequence[str]) -> None:
    """Ask for what is missing, step by step."""
    ways = taught(answers.model, answers) if any(step.startswith("test") for step in steps) else Ways()
    for step in steps:
        if step == "cold":
            for way in cold.WAYS:
                right = [right for right, _ in cold.run(way, answers)]
                print(f"cold {way}: {sum(right)} of {len(right)}", file=sys.stderr, flush=True)
            continue
        split, count, condition, *only = step.split(":")
        how = Condition.read(condition)
        for task in TASKS.values():
            if only and task.name not in only:
                continue
            began, before = time.monotonic(), answers.asked
            for request in requests(task.name, split, int(count)):
                answers.get(prompt(ways, answers.model, request, how), task.max_tokens)
            asked = answers.asked - before
            if asked:
                print(f"{step} {task.name}: {asked} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("steps", nargs="*")
    options = parser.parse_args()
    with asking(MODELS[options.model], True) as answers:
        collect(answers, options.steps or TRAIN[options.model] + TEST[options.model])


if __name__ == "__main__":
    main()
