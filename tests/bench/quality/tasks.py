"""The tasks of the quality benchmark, fixed before anything was measured: six, from three sources, with exact answers.

    python -m tests.bench.quality.tasks WHEELS     write data/tasks.jsonl.gz and data/unseen.jsonl.gz anew from the
                                                   packages in the folder WHEELS

Each is a data set as an application would send it: one system prompt, one user turn. The answers of the data set score,
and are what a well-kept cache would hold. Requests of the three splits share nothing:

    test    held out: nothing is tuned or trained on it
    train   what the utility model and the choice among the ways of showing learn from
    pool    the examples in the cache

UNSEEN are ten more, chosen and worded before any model was asked, on which nothing is trained or tuned: what an
application looks like that nobody thought of here. They have no train split.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from iccache.demo import tasks as demo

DATA = Path(__file__).with_name("data") / "tasks.jsonl.gz"
UNSEEN_DATA = DATA.with_name("unseen.jsonl.gz")
SEED = 41
SIZES = {"test": 100, "train": 100, "pool": 300}
UNSEEN_SIZES = {"test": 40, "pool": 200}


class Item(NamedTuple):
    """One request with the answers that count as right; the first is the one a cache would hold."""

    task: str
    split: str
    prompt: str
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """One application."""

    name: str
    source: str
    system: str
    max_tokens: int


INTENT, MAPPINGS = demo.TASKS
TASKS = {
    task.name: task
    for task in (
        Task("intent_recognition", "bigbench", INTENT.system, 12),
        Task("linguistic_mappings", "bigbench", MAPPINGS.system, 24),
        Task("qa_wikidata", "bigbench", "Complete the statement. Answer with the missing words alone.", 16),
        Task("object_counting", "bigbench", "Answer with the number alone, in digits.", 8),
        Task(
            "occupations",
            "evals",
            "You are an expert in Standard Occupation Codes. Answer with the title of the class that the job belongs "
            "to, and nothing else.",
            40,
        ),
        Task("family_relationships", "reasoning-gym", "Answer with one word, the relation alone.", 8),
    )
}


UNSEEN = {
    task.name: task
    for task in (
        Task("sentiment", "bigbench", "What is the sentiment of the review? Answer with one word.", 8),
        Task("support", "bigbench", "Label the comment by how it treats the person it is about.", 8),
        Task("implicatures", "bigbench", "Does Speaker 2 mean yes or no?", 6),
        Task("sports", "bigbench", "Say whether the sentence about sports is plausible or implausible.", 8),
        Task(
            "elements", "bigbench", "You answer quizzes on the periodic table, in lower case, with the name alone.", 12
        ),
        Task("dates", "bigbench", "Write the date in our house format.", 20),
        Task("unscrambling", "bigbench", "Unscramble the word. Answer with the word alone.", 10),
        Task("pig_latin", "bigbench", "Translate from Pig Latin to English.", 40),
        Task("colored_objects", "bigbench", "Answer the question about the objects with one word.", 8),
        Task("sorting", "bigbench", "Sort the words alphabetically.", 30),
    )
}
EVERY = TASKS | UNSEEN


def correct(answer: str, item: Item) -> bool:
    """Exact match with one of the targets but for case, white space and a full stop at the end."""
    given = demo.normal(answer)
    return any(given == demo.normal(target) for target in item.targets)


@cache
def items(task: str, split: str) -> tuple[Item, ...]:
    """The requests of one split, in a fixed order."""
    return tuple(item for item in _all() if item.task == task and item.split == split)


@cache
def _all() -> tuple[Item, ...]:
    rows = []
    for data in (DATA, UNSEEN_DATA):
        with gzip.open(data, "rt", encoding="utf-8") as lines:
            rows += [json.loads(line) for line in lines]
    return tuple(Item(row["task"], row["split"], row["prompt"], tuple(row["targets"])) for row in rows)


# ---- making the file


Pairs = Iterable[tuple[str, list[str]]]


def make(folder: Path) -> None:
    """Write the data files from the packages in `folder`."""
    sources: dict[str, Callable[[], Pairs]] = {
        "intent_recognition": lambda: _bigbench_intents(folder),
        "linguistic_mappings": lambda: _bigbench_mappings(folder),
        "qa_wikidata": lambda: _wikidata(folder),
        "object_counting": lambda: _counting(folder),
        "occupations": lambda: _occupations(folder),
        "family_relationships": _families,
    }
    DATA.parent.mkdir(exist_ok=True)
    _write(DATA, (row for name in TASKS for row in _split(name, sources[name](), SIZES)))
    found = {path: content["examples"] for path, content in _bigbench(folder, UNSEEN_PATHS.values())}
    _write(
        UNSEEN_DATA,
        (row for name, path in UNSEEN_PATHS.items() for row in _split(name, _answered(found[path]), UNSEEN_SIZES)),
    )


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with gzip.GzipFile(path, "wb", mtime=0) as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


UNSEEN_PATHS = {
    "sentiment": "multiemo/all_sentence_en",
    "support": "social_support",
    "implicatures": "implicatures",
    "sports": "sports_understanding",
    "elements": "periodic_elements/subtask_1",
    "dates": "unnatural_in_context_learning/dates",
    "unscrambling": "word_unscrambling",
    "pig_latin": "language_games/pig_latin_decode",
    "colored_objects": "reasoning_about_colored_objects",
    "sorting": "word_sorting",
}


def _answered(examples: Iterable[dict[str, Any]]) -> Pairs:
    """The one answer of each example that is right, or those the data set takes."""
    for example in examples:
        scores = example.get("target_scores")
        if scores is not None:
            best = [answer for answer, score in scores.items() if score == 1]
            if len(best) == 1:
                yield example["input"].strip(), best
        else:
            target = example["target"]
            yield example["input"].strip(), [str(each) for each in (target if isinstance(target, list) else [target])]


def _split(name: str, pairs: Pairs, sizes: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Repeated requests dropped, shuffled with a fixed seed, dealt out."""
    unique = list({" ".join(prompt.split()): (prompt, targets) for prompt, targets in pairs}.values())
    random.Random(f"{name} {SEED}").shuffle(unique)
    wanted = [split for split, size in sizes.items() for _ in range(size)]
    if len(unique) < len(wanted):
        raise SystemExit(f"{name} has {len(unique)} requests, not {len(wanted)}")
    for split, (prompt, targets) in zip(wanted, unique, strict=False):
        yield {"task": name, "split": split, "prompt": prompt, "targets": targets}


def _bigbench(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, content) of single files of the source distribution, which is only read."""
    wanted = {f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}/task.json": name for name in names}
    with tarfile.open(folder / "bigbench-1.0.0.tar.gz") as archive:
        for member in archive:
            if member.name in wanted:
                file = archive.extractfile(member)
                assert file is not None
                yield wanted.pop(member.name), json.load(file)
                if not wanted:
                    return


def _examples(folder: Path, name: str) -> list[dict[str, Any]]:
    return [example for _, content in _bigbench(folder, [name]) for example in content["examples"]]


def _bigbench_intents(folder: Path) -> Pairs:
    for example in _examples(folder, "intent_recognition"):
        best = [label for label, score in example["target_scores"].items() if score == 1]
        if len(best) == 1:
            yield f"Utterance: {example['input'].removeprefix('Utterance: ')}", best


def _bigbench_mappings(folder: Path) -> Pairs:
    kinds = {"past_tense_json": "past_tense", "plural_json": "plural", "sentence_negation_json": "sentence_negation"}
    paths = [f"linguistic_mappings/{kind}" for kind in kinds]
    for path, content in _bigbench(folder, paths):
        rows = content["examples"]
        random.Random(SEED).shuffle(rows)
        template = MAPPINGS.templates[kinds[path.rpartition("/")[2]]]
        for row in rows[:400]:
            yield template.format(row["input"]), [_one(row["target"])]


def _wikidata(folder: Path) -> Pairs:
    for example in _examples(folder, "qa_wikidata"):
        target = example["target"]
        yield example["input"], target if isinstance(target, list) else [target]


def _counting(folder: Path) -> Pairs:
    for example in _examples(folder, "object_counting"):
        digits_first = sorted(example["target"], key=lambda t: not t.isdigit())
        yield example["input"], digits_first


def _evals(folder: Path, name: str) -> Pairs:
    with zipfile.ZipFile(folder / "evals-3.0.1.post1-py3-none-any.whl") as wheel:
        lines = wheel.read(f"evals/registry/data/{name}/samples.jsonl").decode().splitlines()
    for line in filter(None, lines):
        row = json.loads(line)
        yield row["input"][-1]["content"], [_one(row["ideal"]).strip()]


def _occupations(folder: Path) -> Pairs:
    before = "What is the SOC Code for the job title "
    for prompt, targets in _evals(folder, "soc_codes"):
        yield f"Job title: {prompt.removeprefix(before).strip().rstrip(chr(39)).strip()}", targets


def _families() -> Pairs:
    import reasoning_gym  # noqa: PLC0415 - only needed to make the file anew

    for entry in reasoning_gym.create_dataset("family_relationships", size=1500, seed=SEED):
        yield entry["question"], [entry["answer"]]


def _one(target: Any) -> str:
    return str(target[0] if isinstance(target, list) else target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    make(parser.parse_args().wheels)
    for task in TASKS:
        print(task, {split: len(items(task, split)) for split in SIZES}, file=sys.stderr)


if __name__ == "__main__":
    main()
