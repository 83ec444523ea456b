"""What should be embedded of a conversation: retrieval with several ways to write its task down, measured.

    python -m tests.bench.multi_turn                 the table of the README, some ten minutes
    python -m tests.bench.multi_turn --json FILE     the same as data too
    python -m tests.bench.multi_turn --extract WHEEL write the data anew from the evals package

The items are real: single questions with answers from 30 folders of the evals registry, 16 of each. They become
conversations by fixed rules, in seven kinds (`KINDS`). Twelve items of each folder are the cache, as conversations of
several kinds; the other four are asked, in every kind. An example is relevant where its last question belongs to the
same folder: the same task. Of follow-ups it is also told how high the first example ranks that makes the *same demand*
of the same task; the wording of a demand is never the same in the cache and in a query. The embedder is the default.
"""

from __future__ import annotations

import argparse
import json
import random
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from iccache import config
from iccache.dialects import conversation
from iccache.dialects.conversation import Role, Turn
from iccache.examples.embed import make_embedder

DATA = Path(__file__).with_name("data") / "multi_turn.jsonl"
FOLDERS, PER_FOLDER, CACHED = 30, 16, 12
SHOWN = 3  # selection.max_examples
SEED = 7
BOOTSTRAP = 2000

DEMANDS = {  # of the answer before: (as it is put in the cache, as it is put in a query, where it is put at length)
    "language": (
        "Say that in Italian.",
        "and in Italian?",
        "Could you translate your last answer into Italian for me?",
    ),
    "shorter": ("Can you make this briefer?", "shorter please", "I would like to have that in half as many words."),
    "why": ("Please give your reasons.", "why?", "How did you come to that conclusion, step by step?"),
    "list": ("Put it as bullet points.", "as a list instead", "Please write the same thing as a list of short points."),
}
KINDS = {
    "single question": "the question alone",
    "follow-up": "question, answer, a demand such as 'shorter please'",
    "long follow-up": "the same, the demand put in some ten words",
    "substitution": "question, answer, 'what about ...?' with another item",
    "third in a row": "two questions of the task and their answers, then the third",
    "topic change": "three questions of another task, then the question",
    "late follow-up": "three questions of another task, the question, then a demand",
}


LONG = "long follow-up"
STORED = [*["single question"] * 4, *["follow-up"] * 4, "substitution", "third in a row", *["topic change"] * 2]


class Item(NamedTuple):
    folder: str
    question: str
    answer: str


class Thread(NamedTuple):
    """A conversation whose last message is to be answered."""

    kind: str
    item: int
    folder: str  # of what is asked last
    demand: str | None
    turns: tuple[Turn, ...]


# ---- ways to write a conversation down


def last_message(turns: Sequence[Turn]) -> str:
    return turns[-1].text


def whole(turns: Sequence[Turn]) -> str:
    return "\n".join(t.text for t in turns)


def earlier_now(turns: Sequence[Turn]) -> str:
    """Questions and the end of the last answer, up to 800 characters of them: the first version of iccache."""
    lines: list[str] = []
    room, answered = max(200, min(800, 1600 - len(turns[-1].text))), False
    for said in reversed(turns[:-1]):
        text = " ".join(said.text.split())
        if answered and said.role is Role.ASSISTANT:
            continue
        if said.role is Role.ASSISTANT:
            answered, line = True, "Assistant: " + _tail(text, min(240, room // 2))
        else:
            line = "User: " + _head(text, min(240, room))
        if len(line) > room:
            break
        room -= len(line) + 1
        lines.append(line)
    context = "\n".join(reversed(lines))
    return f"Earlier:\n{context}\n\nNow:\n{turns[-1].text}" if context else turns[-1].text


def user_turns(count: int, chars: int) -> Callable[[Sequence[Turn]], str]:
    """The last message after the beginnings of the `count` user messages before it."""

    def written(turns: Sequence[Turn]) -> str:
        asked = [t.text for t in turns if t.role is Role.USER]
        return "\n".join([*(_head(" ".join(t.split()), chars) for t in asked[-1 - count : -1]), asked[-1]])

    return written


def since_a_question(chars: int) -> Callable[[Sequence[Turn]], str]:
    """From the last user message of at least `chars` characters on."""

    def written(turns: Sequence[Turn]) -> str:
        asked = [t.text for t in turns if t.role is Role.USER]
        first = next((i for i in range(len(asked) - 1, -1, -1) if len(asked[i]) >= chars), 0)
        return "\n".join([*(_head(" ".join(t.split()), 240) for t in asked[first:-1]), asked[-1]])

    return written


def without_answers(turns: Sequence[Turn]) -> str:
    return conversation.task([t for t in turns if t.role is not Role.ASSISTANT])


def twice(turns: Sequence[Turn]) -> str:
    """The last two user messages, the last one twice: weights, as far as text can have them."""
    asked = [t.text for t in turns if t.role is Role.USER]
    return asked[0] if len(asked) == 1 else "\n".join([_head(asked[-2], 240), asked[-1], asked[-1]])


WAYS: Mapping[str, Callable[[Sequence[Turn]], str]] = {
    "last message only": last_message,
    "whole conversation": whole,
    "all questions, 800 characters (the first version)": earlier_now,
    "last 3 user messages": user_turns(2, 240),
    "last 2 user messages": user_turns(1, 240),
    "last 2, the last one twice": twice,
    "since a message of 30 characters": since_a_question(30),
    "since a message of 60 characters": since_a_question(60),
    "since a message of 90 characters": since_a_question(90),
    "iccache, but without the answer": without_answers,
    "iccache": conversation.task,
}


def _head(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[: chars - 1] + "…"


def _tail(text: str, chars: int) -> str:
    return text if len(text) <= chars else "…" + text[1 - chars :]


# ---- data


def extract(wheel: Path) -> None:
    """Short single questions with their answers, from folders drawn at random."""
    rng = random.Random(SEED)
    found: dict[str, list[Item]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            folder = name.removeprefix("evals/registry/data/").split("/")[0]
            if name.endswith(".jsonl") and folder not in found and len(items := _items(archive, name, folder)) >= 24:
                found[folder] = items
    chosen = rng.sample(sorted(found), FOLDERS)
    rows = [item for folder in sorted(chosen) for item in rng.sample(found[folder], PER_FOLDER)]
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text("".join(json.dumps(i._asdict(), ensure_ascii=False) + "\n" for i in rows), encoding="utf-8")


def _items(archive: zipfile.ZipFile, name: str, folder: str) -> list[Item]:
    items: dict[str, Item] = {}
    for line in archive.read(name).decode("utf-8", "replace").split("\n")[:400]:
        try:
            row = json.loads(line)
            *before, last = row["input"]
            ideal = row["ideal"][0] if isinstance(row["ideal"], list) else row["ideal"]
            question = last["content"].strip()
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            continue
        plain = all(m.get("role") == "system" for m in before) and last.get("role") == "user"
        if plain and isinstance(ideal, str) and 20 <= len(question) <= 300 and len(ideal) <= 200:
            items[question] = Item(folder, question, ideal.strip("[]{} ") or ideal)
    return list(items.values())


def load() -> list[Item]:
    return [Item(**json.loads(line)) for line in DATA.read_text(encoding="utf-8").split("\n") if line]


# ---- conversations


def threads(items: Sequence[Item]) -> tuple[list[Thread], list[Thread]]:
    """The cache and the queries."""
    rng = random.Random(SEED)
    by_folder: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        by_folder.setdefault(item.folder, []).append(i)
    cache, queries = [], []
    for own in by_folder.values():
        kept, asked = own[:CACHED], own[CACHED:]
        demands = iter(DEMANDS)
        for at, i in enumerate(kept):
            demand = next(demands) if STORED[at] == "follow-up" else None
            cache.append(_thread(STORED[at], i, kept, items, by_folder, demand, 0, rng))
        for at, i in enumerate(asked):
            demand = list(DEMANDS)[at % len(DEMANDS)]
            queries += [_thread(kind, i, asked, items, by_folder, demand, 1 + (kind == LONG), rng) for kind in KINDS]
    return cache, queries


def _thread(
    kind: str,
    i: int,
    own: Sequence[int],
    items: Sequence[Item],
    by_folder: Mapping[str, Sequence[int]],
    demand: str | None,
    wording: int,
    rng: random.Random,
) -> Thread:
    """A conversation about item `i`; what else it needs of the same folder comes from `own`."""
    item = items[i]
    others = [items[j] for j in rng.sample([j for j in own if j != i], 2)]
    where = slice(0, CACHED) if wording == 0 else slice(CACHED, None)
    strange = rng.choice([f for f in by_folder if f != item.folder])
    distant = [items[j] for j in rng.sample(list(by_folder[strange][where]), 3)]
    demanded = demand if "follow-up" in kind else None
    before: list[Item] = {
        "substitution": others[:1],
        "third in a row": others,
        "topic change": distant,
        "late follow-up": distant,
    }.get(kind, [])
    turns = [t for e in before for t in (Turn(Role.USER, e.question), Turn(Role.ASSISTANT, e.answer))]
    if demanded:
        turns += [Turn(Role.USER, item.question), Turn(Role.ASSISTANT, item.answer)]
        turns.append(Turn(Role.USER, DEMANDS[demanded][wording]))
    elif kind == "substitution":
        rest = _without_what_is_common(item.question, others[0].question)
        turns.append(Turn(Role.USER, ("And for this: " if wording == 0 else "what about ") + rest))
    else:
        turns.append(Turn(Role.USER, item.question))
    return Thread(kind, i, item.folder, demanded, tuple(turns))


def _without_what_is_common(text: str, other: str) -> str:
    """`text` less the words with which both begin and end, as one would leave them out in talking."""
    words, others = text.split(), other.split()
    start = 0
    while start < min(len(words), len(others)) - 1 and words[start] == others[start]:
        start += 1
    end = 0
    while end < min(len(words), len(others)) - start - 1 and words[-1 - end] == others[-1 - end]:
        end += 1
    return " ".join(words[start : len(words) - end])


# ---- measuring


class Scores(NamedTuple):
    """Of one way, a row per query."""

    precision: NDArray[np.float64]  # share of the `SHOWN` nearest that are relevant
    reciprocal: NDArray[np.float64]  # 1 / rank of the first relevant one
    demand: NDArray[np.float64]  # 1 / rank of the first with the same demand of the same task; NaN where none is made


def score(way: Callable[[Sequence[Turn]], str], cache: Sequence[Thread], queries: Sequence[Thread]) -> Scores:
    embedder = make_embedder(config.Embedder(cache_entries=10_000))
    stored = embedder.embed([way(t.turns) for t in cache])
    asked = embedder.embed([way(t.turns) for t in queries])
    order = np.argsort(-(asked @ stored.T), axis=1, kind="stable")
    folders = np.array([t.folder for t in cache])
    demands = np.array([t.demand or "" for t in cache])
    relevant = folders[order] == np.array([q.folder for q in queries])[:, None]
    same = relevant & (demands[order] == np.array([q.demand or "-" for q in queries])[:, None])
    made = np.array([q.demand is not None for q in queries])
    return Scores(
        relevant[:, :SHOWN].mean(axis=1),
        1.0 / (1 + relevant.argmax(axis=1)),
        np.where(made, 1.0 / (1 + same.argmax(axis=1)), np.nan),
    )


def interval(values: NDArray[np.float64], items: Sequence[int]) -> tuple[float, float, float]:
    """Mean and its 95 % interval, by a bootstrap over items: the kinds of one item are not independent."""
    rng = np.random.default_rng(SEED)
    known = ~np.isnan(values)
    names = sorted(set(items))
    place = {name: at for at, name in enumerate(names)}
    at = np.array([place[i] for i in items])
    sums = np.bincount(at[known], values[known], len(names))
    counts = np.bincount(at[known], minlength=len(names)).astype(float)
    draws = rng.integers(len(names), size=(BOOTSTRAP, len(names)))
    means = sums[draws].sum(axis=1) / np.maximum(counts[draws].sum(axis=1), 1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values[known].mean()), float(low), float(high)


def rows(ways: Mapping[str, Callable[[Sequence[Turn]], str]]) -> Iterator[dict[str, object]]:
    cache, queries = threads(load())
    for name, way in ways.items():
        scores = score(way, cache, queries)
        row: dict[str, object] = {"way": name}
        several = np.array([q.kind != "single question" for q in queries])
        parts = {kind: np.array([q.kind == kind for q in queries]) for kind in KINDS}
        for kind, mask in {**parts, "all but single": several}.items():
            items = [q.item for q, m in zip(queries, mask, strict=True) if m]
            row[kind] = {
                measure: interval(getattr(scores, measure)[mask], items)
                for measure in Scores._fields
                if not np.isnan(getattr(scores, measure)[mask]).all()
            }
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--extract", type=Path, metavar="WHEEL")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    if given.extract:
        extract(given.extract)
        return
    columns = [*KINDS, "all but single"]
    print("| embedded | " + " | ".join(columns) + " | MRR | same demand |")
    print("|---" * (len(columns) + 3) + "|")
    data = []
    for row in rows(WAYS):
        data.append(row)
        cells = [_cell(row[kind]["precision"]) for kind in columns]  # type: ignore[index]
        together = row["all but single"]
        cells += [_cell(together[m]) for m in ("reciprocal", "demand")]  # type: ignore[index]
        print(f"| {row['way']} | " + " | ".join(cells) + " |", flush=True)
    if given.json:
        given.json.write_text(json.dumps(data, indent=1) + "\n")


def _cell(value: tuple[float, float, float]) -> str:
    mean, low, high = value
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
