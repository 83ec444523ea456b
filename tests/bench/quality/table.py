"""The tables of the quality benchmark, drawn from the answers on file: no model is asked.

    make bench-quality ARGS="--offline"        python -m tests.bench.quality.table

What is not on file is not in the table; n says how many requests a cell stands for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.bench.quality import cold
from tests.bench.quality.answers import DATA, Answers, Said
from tests.bench.quality.conditions import TRIED, Condition, cache_of, examples_for, prompt, taught
from tests.bench.quality.models import LARGE, SMALL, STUDENTS
from tests.bench.quality.prompts import Request, messages, requests
from tests.bench.quality.tasks import TASKS, correct

TIMES = DATA / "timing.json"
LEARNED = "**learned choice of the three ways**"
TITLES = {
    "none": "no examples",
    "random3": "3 random",
    "nearest3": "3 nearest",
    "fixed3": "the nearest 3 of cosine .7 and more",
    "shared": "shared set",
    "utility3": "3 by utility",
    "learned": LEARNED,
}  # the core conditions
COMPARED = (("utility3", "nearest3"), ("learned", "nearest3"), ("learned", "none"), ("shared", "nearest3"))
FRAMINGS = {
    "nearest3": "as turns, the nearest last",
    "first3": "as turns, the nearest first",
    "nearest3@system": "as one block in the system prompt",
    "nearest3@paper": "the paper's order: task, guidance, examples, reminder, task",
}
CACHES = {
    "1%": "1 %",
    "5%": "5 %",
    "25%": "25 %",
    "": "all 300",
    "wrong": "a fifth wrong",
    "other": "another task's only",
    "all": "all six tasks' 1,800",
}
VARIED = 40  # requests a cell where framings and caches are compared
MORE = {"wrong": 100, "all": 100}  # in caches as they are in operation
ORACLE = [f"only{place}" for place in range(1, TRIED + 1)]
SHORT = {"intent_recognition": "intents", "linguistic_mappings": "mappings", "qa_wikidata": "facts"} | {
    "object_counting": "counting",
    "family_relationships": "family",
}


class Cell(NamedTuple):
    """One request under one condition."""

    right: bool
    said: Said


Cells = Mapping[str, Mapping[int, Cell]]  # by task, then by the request's place in the test split


class Student:
    """What one student answered."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.answers = Answers(name)
        self.ways = taught(name, self.answers)

    def cells(self, condition: str, most: int | None = None) -> Cells:
        """As far as the answers are on file."""
        how = Condition.read(condition)
        return {task: self._of(how, task, most) for task in TASKS}

    def _of(self, how: Condition, task: str, most: int | None) -> dict[int, Cell]:
        found = {}
        for request in requests(task, "test", most):
            cell = look(self.answers, prompt(self.ways, self.name, request, how), request)
            if cell is not None:
                found[request.place] = cell
        return found


def look(answers: Answers, asked: list[dict[str, str]], request: Request) -> Cell | None:
    if not answers.knows(asked, request.task.max_tokens):
        return None
    said = answers.get(asked, request.task.max_tokens)
    return Cell(correct(said.text, request.item), said)


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


# ---- the tables


def core(student: Student) -> Iterator[str]:
    found = {c: student.cells(c) for c in TITLES}
    times = timing().get(student.name, {})
    yield _head(student.name, "prompt tokens", "new", "first token, ms", "last")
    for condition, title in TITLES.items():
        every = [cell for by_place in found[condition].values() for cell in by_place.values()]
        if every:
            tokens = np.mean([c.said.prompt_tokens for c in every]), np.mean([c.said.new_tokens for c in every])
            ms = _ms(times.get(condition))
            yield _row(title, _rights(found[condition]), f"{tokens[0]:.0f}", f"{tokens[1]:.0f}", *ms)
    tried = oracle(student, found)
    yield _row(f"oracle: any of {TRIED} tried alone, or of the ways above", tried, "", "", "", "")
    yield _row("semantic cache: the nearest one's answer", semantic(), "0", "0", "0", "0")
    yield _row("teacher, no examples", _rights(teacher()), "", "", *_ms(timing().get(LARGE.name, {}).get("none")))
    yield ""
    for condition, than in COMPARED:
        yield from _paired(f"{student.name}: {TITLES[condition]} less {TITLES[than]}", found[condition], found[than])
    yield from by_task(student, found)
    yield from shown_where_it_helps(student, found, tried)


def _ms(took: Mapping[str, float] | None) -> tuple[str, str]:
    return ("", "") if took is None else (f"{took['first_ms']:.0f}", f"{took['last_ms']:.0f}")


def timing() -> dict[str, Any]:
    """By student and condition, as `timing.py` measured it; empty where it has not."""
    if not TIMES.exists():
        return {}
    times: dict[str, Any] = json.loads(TIMES.read_text())["times"]
    return times


def oracle(student: Student, found: Mapping[str, Cells]) -> dict[str, list[bool]]:
    """Whether any way of showing was right, for the requests of which all were tried."""
    alone = [student.cells(name) for name in ORACLE]
    whole = [*alone, *(found[c] for c in ("none", "nearest3", "shared"))]
    return {task: [any(c[task][i].right for c in whole) for i in _common(whole, task)] for task in TASKS}


def semantic() -> dict[str, list[bool]]:
    """Whether the nearest example's own answer is right."""
    return {
        task: [correct(cache_of(task, "").recall(r, 1)[0][0].answer, r.item) for r in requests(task, "test")]
        for task in TASKS
    }


def teacher() -> Cells:
    answers = Answers(LARGE.name)
    return {
        task: {r.place: cell for r in requests(task, "test") if (cell := look(answers, messages(r), r)) is not None}
        for task in TASKS
    }


def by_task(student: Student, found: Mapping[str, Cells]) -> Iterator[str]:
    """The learned choice is to lose nothing anywhere."""
    bounds = []
    for task in TASKS:
        both = _common([found["learned"], found["none"]], task)
        if both:
            mean, low, _ = difference(*([found[c][task][i].right for i in both] for c in ("learned", "none")))
            bounds.append(f"{_name(task)} {mean:+.2f} (from {low:+.2f})")
    if bounds:
        yield f"- {student.name}: {LEARNED} less no examples by task, with the lower 95 % bound: {', '.join(bounds)}"


def shown_where_it_helps(
    student: Student, found: Mapping[str, Cells], tried: Mapping[str, list[bool]]
) -> Iterator[str]:
    """On which share of the requests that some example helps the learned choice shows examples."""
    helped = shown = 0
    alone = [student.cells(name) for name in ORACLE]
    whole = [*alone, *(found[c] for c in ("none", "nearest3", "shared"))]
    for task in TASKS:
        for i, best in zip(_common(whole, task), tried[task], strict=True):
            if best and not found["none"][task][i].right:
                helped += 1
                request = requests(task, "test")[i]
                shown += bool(examples_for(student.ways, student.name, request, Condition("learned")))
    if helped:
        yield f"- {student.name}: of {helped} requests on which the oracle gains, examples are shown on {shown}"


def framings(student: Student) -> Iterator[str]:
    """On the same requests: those that were asked in every framing."""
    found = {f: student.cells(f, VARIED) for f in FRAMINGS}
    same = {task: _common(list(found.values()), task) for task in TASKS}
    if not any(same.values()):
        return
    yield _head(f"{student.name}, 3 nearest", "prompt tokens")
    for framing, title in FRAMINGS.items():
        cells = {task: {i: found[framing][task][i] for i in same[task]} for task in TASKS}
        yield _row(title, _rights(cells), f"{np.mean([c.said.prompt_tokens for c in _every(cells)]):.0f}")
    yield ""
    for framing in list(FRAMINGS)[1:]:
        yield from _paired(f"{student.name}: {FRAMINGS[framing]}, less nearest last", found[framing], found["nearest3"])


def caches(student: Student) -> Iterator[str]:
    ways = ("nearest3", "learned")
    yield f"| {student.name}, cache | " + " | ".join(TITLES[way] for way in ways) + " | learned less nearest |"
    yield "|---" * (len(ways) + 2) + "|"
    empty = _share([c.right for c in _every(student.cells("none", VARIED))])
    yield f"| empty | {empty} | {empty} | |"
    for cache_, title in CACHES.items():
        asked = {way: student.cells(f"{way}/{cache_}", MORE.get(cache_, VARIED)) for way in ways}
        same = {task: _common(list(asked.values()), task) for task in TASKS}
        found = {way: {task: {i: asked[way][task][i] for i in same[task]} for task in TASKS} for way in ways}
        shares = [_share([c.right for c in _every(found[way])]) for way in ways]
        pairs = _pairs(found["learned"], found["nearest3"])
        yield f"| {title} | {' | '.join(shares)} | {_signed(pairs)} |" if any(shares) else f"| {title} | | | |"


def _head(title: str, *more: str) -> str:
    columns = [title, *map(_name, TASKS), "all", *more]
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def _name(task: str) -> str:
    return SHORT.get(task, task)


def _row(title: str, rights: Mapping[str, Sequence[bool]], *more: str) -> str:
    shares = [_share(rights[task]) for task in TASKS]
    return f"| {' | '.join([title, *shares, _share([r for task in TASKS for r in rights[task]]), *more])} |"


def _rights(cells: Cells) -> dict[str, list[bool]]:
    return {task: [cell.right for cell in by_place.values()] for task, by_place in cells.items()}


def _every(cells: Cells) -> list[Cell]:
    return [cell for by_place in cells.values() for cell in by_place.values()]


def _common(conditions: Sequence[Cells], task: str) -> list[int]:
    return sorted(set.intersection(*(set(cells[task]) for cells in conditions)))


def _pairs(a: Cells, b: Cells) -> list[tuple[bool, bool]]:
    return [(a[task][i].right, b[task][i].right) for task in TASKS for i in _common([a, b], task)]


def _paired(what: str, a: Cells, b: Cells) -> Iterator[str]:
    pairs = _pairs(a, b)
    if pairs:
        yield f"- {what}, paired, n = {len(pairs)}: {_signed(pairs)}"


def _signed(pairs: Sequence[tuple[bool, bool]]) -> str:
    if not pairs:
        return ""
    mean, low, high = difference(*zip(*pairs, strict=True))
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _share(right: Sequence[bool]) -> str:
    if not right:
        return ""
    low, high = wilson(sum(right), len(right))
    return f"{_short(float(np.mean(right)))} [{_short(low)}, {_short(high)}] {len(right)}"


def _short(share: float) -> str:
    return f"{abs(share):.2f}".removeprefix("0") if share < 1 else "1"


def together(students: Sequence[Student]) -> Iterator[str]:
    """All answers of all students."""
    pairs = [p for s in students for p in _pairs(s.cells("learned"), s.cells("nearest3"))]
    tokens = {way: np.mean([c.said.prompt_tokens for s in students for c in _every(s.cells(way))]) for way in TITLES}
    yield (
        f"- both students: {LEARNED} less 3 nearest, paired, n = {len(pairs)}: {_signed(pairs)}, "
        f"at {tokens['learned']:.0f} against {tokens['nearest3']:.0f} prompt tokens"
    )


def main() -> None:
    students = [Student(model.name) for model in STUDENTS]
    for student in students:
        print("\n".join(core(student)))
        print()
    print("\n".join(together(students)))
    print()
    for student in students:
        print("\n".join(framings(student)))
        print()
    for student in students:
        if student.name == SMALL.name:
            print("\n".join(caches(student)))
            print()
            print("\n".join(cold.table(student.answers)))


if __name__ == "__main__":
    main()
