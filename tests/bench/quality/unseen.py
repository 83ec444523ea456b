"""Ten tasks that nothing was trained or tuned on, as a proxy serves them before it has seen any feedback.

    python -m tests.bench.quality.unseen                  the table of the README, from the answers on file
    python -m tests.bench.quality.unseen --ask MODEL      ask MODEL for what is missing first

The tasks and their prompts were fixed before any model was asked (`tasks.UNSEEN`): 40 requests each, 200 examples each.
"As served" ranks with the weights that ship.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import numpy as np

from iccache.examples.ways import Prior
from iccache.types import Example
from tests.bench.quality.answers import Answers
from tests.bench.quality.models import MODELS, STUDENTS, asking
from tests.bench.quality.prompts import Request, by_utility, chosen, messages, pool, requests, shots
from tests.bench.quality.table import Cell, difference, look, wilson
from tests.bench.quality.tasks import UNSEEN, UNSEEN_SIZES

Way = Callable[[Request, str], list[Example]]


def _plain(way: str) -> Way:
    return lambda request, student: chosen(pool(request.item.task), request, way)


WAYS: dict[str, Way] = {
    "no examples": _plain("none"),
    "3 random": _plain("random3"),
    "3 nearest": _plain("nearest3"),
    "as served": lambda request, student: by_utility(pool(request.item.task), request, Prior(), student),
}


def cells(answers: Answers, way: Way, task: str) -> dict[int, Cell]:
    """By the request's place, as far as the answers are on file."""
    found = {}
    for request in requests(task, "test"):
        cell = look(answers, messages(request, shots(way(request, answers.model))), request)
        if cell is not None:
            found[request.place] = cell
    return found


def ask(answers: Answers, most: int) -> None:
    """Of each task the first `most` requests, half of them for every task first."""
    for count in (most // 2, most):
        for task in UNSEEN.values():
            before = answers.asked
            for request in requests(task.name, "test", count):
                for way in WAYS.values():
                    answers.get(messages(request, shots(way(request, answers.model))), task.max_tokens)
            print(f"{task.name}, {count} requests: {answers.asked - before} asked", file=sys.stderr, flush=True)


def table(answers: Answers) -> Iterator[str]:
    """Of the requests that were asked in every way."""
    asked = {title: {task: cells(answers, way, task) for task in UNSEEN} for title, way in WAYS.items()}
    common = {task: set.intersection(*[set(of[task]) for of in asked.values()]) for task in UNSEEN}
    tasks = [task for task, places in common.items() if places]
    found = {title: {t: [of[t][i] for i in sorted(common[t])] for t in tasks} for title, of in asked.items()}
    if not tasks:
        return
    yield f"| {answers.model} | " + " | ".join(task.replace("_", " ") for task in tasks) + " | all | prompt tokens |"
    yield "|---" * (len(tasks) + 3) + "|"
    for title, of in found.items():
        every = [cell for task in tasks for cell in of[task]]
        shares = [f"{np.mean([cell.right for cell in of[task]]):.2f}".removeprefix("0") for task in tasks]
        low, high = wilson(sum(cell.right for cell in every), len(every))
        pooled = f"{np.mean([c.right for c in every]):.2f} [{low:.2f}, {high:.2f}] {len(every)}"
        tokens = np.mean([cell.said.prompt_tokens for cell in every])
        yield f"| {title} | " + " | ".join(shares) + f" | {pooled} | {tokens:.0f} |"
    yield ""
    for than in ("no examples", "3 random", "3 nearest"):
        served, other = ([cell.right for t in tasks for cell in found[title][t]] for title in ("as served", than))
        mean, low, high = difference(served, other)
        said = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        yield f"- {answers.model}: as served less {than}, paired, n = {len(served)}: {said}"
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ask", metavar="MODEL", choices=MODELS)
    parser.add_argument("--most", type=int, default=UNSEEN_SIZES["test"], help="requests of each task")
    options = parser.parse_args()
    if options.ask is not None:
        with asking(MODELS[options.ask], True) as answers:
            ask(answers, options.most)
    for student in STUDENTS:
        print("\n".join(table(Answers(student.name))))


if __name__ == "__main__":
    main()
