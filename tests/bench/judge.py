"""How far a judge is to be believed: its verdicts on pairs of which exactly one answer is right, in both orders.

    python -m tests.bench.judge [--model NAME] [--ask] [--draw 10]

Without `--ask` the table is drawn from the verdicts on file (`data/judge/`), of the pairs that have both; with it, what
is missing is asked of the model on loopback. `--draw` draws the pairs anew, so many of each task: answers that the
students of the quality benchmark gave to the same test request, one right and one wrong by the data set; where no
student was right, the data set's answer is the right one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from scipy import stats

from iccache.backends.judge import VERDICT_TOKENS, BackendJudge, Verdict, position_bias, prompt
from iccache.demo.models import default_folder, fetch
from iccache.demo.servers import model_server
from tests.bench.quality.answers import Answers
from tests.bench.quality.models import LARGE, MODELS, STUDENTS
from tests.bench.quality.prompts import Request, chosen, messages, pool, requests, shots
from tests.bench.quality.tasks import TASKS, correct

VERDICTS = Path(__file__).with_name("data") / "judge"
PAIRS = VERDICTS / "pairs.jsonl"
WAYS = ("none", "nearest3", "shared", "random3")
TRUSTED_BIAS = 0.5  # as in `iccache/quality/judging.py`


@dataclass(frozen=True)
class Pair:
    """Two answers to one request; `right_first`: which of them is right, drawn so that the place says nothing."""

    task: str
    request: str  # as a judge is shown it: the system prompt, then the task
    right: str
    wrong: str
    right_first: bool
    made_up: bool  # the right one is the data set's


def kept() -> list[Pair]:
    return [Pair(**json.loads(line)) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def drawn(per_task: int) -> Iterator[Pair]:
    """The first `per_task` test requests of each task of which some student's answer on file is wrong, task after task
    in turn."""
    answers = {model.name: Answers(model.name) for model in STUDENTS}
    of_tasks = [(_pair(request, answers) for request in requests(task, "test")) for task in TASKS]
    for _ in range(per_task):
        for of_task in of_tasks:
            if (pair := next(filter(None, of_task), None)) is not None:
                yield pair


def _pair(request: Request, answers: dict[str, Answers]) -> Pair | None:
    given = dict.fromkeys(_answers(request, answers))
    right = [text for text in given if correct(text, request.item)]
    wrong = [text for text in given if text.strip() and not correct(text, request.item)]
    if not wrong:
        return None
    rng = random.Random(f"judge {request.seed}")
    chosen_right = rng.choice(right) if right else request.item.targets[0]
    shown = f"{request.task.system}\n\n{request.item.prompt}"
    return Pair(request.item.task, shown, chosen_right, rng.choice(wrong), rng.random() < 0.5, not right)


def _answers(request: Request, answers: dict[str, Answers]) -> Iterator[str]:
    """What the students said, whichever examples they were shown."""
    for known in answers.values():
        for way in WAYS:
            asked = messages(request, shots(chosen(pool(request.item.task), request, way)))
            if known.knows(asked, request.task.max_tokens):
                yield known.get(asked, request.task.max_tokens).text


@contextlib.contextmanager
def verdicts(name: str, ask: bool) -> Iterator[Answers]:
    """The judge's words, by prompt."""
    if not ask:
        yield Answers(name, folder=VERDICTS)
        return
    model = MODELS[name]
    path = fetch(default_folder(), print, [model])[name]
    with tempfile.TemporaryDirectory() as logs, model_server(model, path, Path(logs)) as url:
        answers = Answers(name, url, folder=VERDICTS)
        yield answers
        answers.pack()


def judged(known: Answers, found: list[Pair], ask: bool) -> tuple[list[Pair], list[float], Counter[Verdict]]:
    """The pairs with both verdicts, P(the right one is better) of each, and what was said. Without `ask`, pairs that
    were never judged are left out."""
    tally: Counter[Verdict] = Counter()

    async def said(prompt: str) -> str:
        return known.get([{"role": "user", "content": prompt}], VERDICT_TOKENS).text

    async def each() -> list[tuple[Pair, float]]:
        judge, done = BackendJudge(said, tally), []
        for pair in found:
            a, b = (pair.right, pair.wrong) if pair.right_first else (pair.wrong, pair.right)
            both = [[{"role": "user", "content": prompt(pair.request, *two)}] for two in ((a, b), (b, a))]
            if ask or all(known.knows(asked, VERDICT_TOKENS) for asked in both):
                p = await judge.prefer(pair.request, a, b)
                done.append((pair, p if pair.right_first else 1 - p))
        return done

    done = asyncio.run(each())
    return [pair for pair, _ in done], [p for _, p in done], tally


def lines(name: str, found: list[Pair], preferred: list[float], tally: Counter[Verdict]) -> Iterator[str]:
    """The table, then what the judge says of places."""
    yield f"| {name} | pairs | for the right one | for the wrong one | undecided | right, of those decided |"
    yield "|---|---|---|---|---|---|"
    for task in (*TASKS, "all"):
        of = [p for pair, p in zip(found, preferred, strict=True) if task in ("all", pair.task)]
        if not of:
            continue
        right, wrong = sum(p > 0.5 for p in of), sum(p < 0.5 for p in of)
        yield f"| {task} | {len(of)} | {right} | {wrong} | {len(of) - right - wrong} | {_share(right, right + wrong)} |"
    right_scores = sum(min(1.0, 2 * p) for p in preferred) / len(preferred)
    wrong_scores = sum(min(1.0, 2 * (1 - p)) for p in preferred) / len(preferred)
    bias = position_bias(tally)
    yield ""
    yield f"- verdicts: {', '.join(f'{v.value} {tally[v]}' for v in Verdict)}"
    yield (
        f"- position bias: {'none decided' if bias is None else f'{bias:+.2f}'}; "
        f"{'believed' if bias is not None and abs(bias) <= TRUSTED_BIAS else 'not believed by the proxy (beyond 0.5)'}"
    )
    yield f"- score that would be learned: {right_scores:.2f} for a right answer, {wrong_scores:.2f} for a wrong one"
    yield f"- the data set's answer stands for the right one in {sum(p.made_up for p in found)} pairs"


def _share(right: int, n: int) -> str:
    if not n:
        return ""
    low, high = stats.binomtest(right, n).proportion_ci(method="wilson")
    return f"{right / n:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=LARGE.name)
    parser.add_argument("--ask", action="store_true", help="ask the model for what is not on file")
    parser.add_argument("--draw", type=int, default=0, metavar="N", help="draw N pairs of each task anew")
    options = parser.parse_args()
    VERDICTS.mkdir(parents=True, exist_ok=True)
    if options.draw:
        rows = [json.dumps(asdict(pair), ensure_ascii=False) for pair in drawn(options.draw)]
        PAIRS.write_text("\n".join(rows) + "\n", encoding="utf-8")
    with verdicts(options.model, options.ask) as known:
        found, preferred, tally = judged(known, kept(), options.ask)
    print("\n".join(lines(options.model, found, preferred, tally)) if found else "no pair was judged")


if __name__ == "__main__":
    main()
