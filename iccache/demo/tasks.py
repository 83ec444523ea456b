"""The two tasks of the demo: shipped requests with known answers, the application's prompt, the check.

An application's prompt is the same for whichever model answers. The answers are used for scoring alone: what the cache
holds comes from the teacher's live answers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

DATA = Path(__file__).with_name("data")
SEED = 2024


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of a data file."""

    input: str
    target: str
    kind: str = ""


class Item(NamedTuple):
    """One request of the application's users, with the data set's answer."""

    prompt: str
    target: str


class Split(NamedTuple):
    """Requests that share nothing."""

    warm_up: list[Item]
    held_out: list[Item]
    routed: list[Item]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Requests per task."""

    warm_up: int
    held_out: int
    routed: int


QUICK = Sizes(warm_up=80, held_out=40, routed=36)
FULL = Sizes(warm_up=160, held_out=100, routed=100)


@dataclass(frozen=True, slots=True)
class Task:
    """One data set as an application would send it."""

    name: str
    system: str
    templates: Mapping[str, str]  # by the kind of row
    max_tokens: int

    def items(self) -> list[Item]:
        """Everything that is shipped, in the order of the file."""
        lines = (DATA / f"{self.name}.jsonl").read_bytes().splitlines()
        rows = [msgspec.json.decode(line, type=Row) for line in lines]
        return [Item(self.templates[row.kind].format(row.input), row.target) for row in rows]

    def split(self, sizes: Sizes, seed: int = SEED) -> Split:
        """Three disjoint lists, drawn with `seed`."""
        items = self.items()
        random.Random(f"{self.name} {seed}").shuffle(items)
        a, b, c = sizes.held_out, sizes.held_out + sizes.routed, sizes.held_out + sizes.routed + sizes.warm_up
        if len(items) < c:
            raise ValueError(f"{self.name} has {len(items)} items, not {c}")
        return Split(warm_up=items[b:c], held_out=items[:a], routed=items[a:b])


def correct(answer: str, item: Item) -> bool:
    """Exact match but for case, white space and a full stop at the end."""
    return normal(answer) == normal(item.target)


def normal(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


TASKS = (
    Task(
        name="intent_recognition",
        system=(
            "Classify the utterance. Intents:\n"
            "add_to_playlist: put music on a playlist\n"
            "book_restaurant: reserve a table\n"
            "get_weather: ask for a forecast\n"
            "play_music: hear a song, artist or genre\n"
            "search_screening_event: when and where films are shown\n"
            "search_creative_work: find a work by its title\n"
            "rate_book: give a book points or stars\n"
            "Answer with the intent alone."
        ),
        templates={"": "Utterance: {}"},
        max_tokens=12,
    ),
    Task(
        name="linguistic_mappings",
        system=(
            "Rewrite English as asked. Keep every other word. "
            "Answer in lower case with the result alone, without punctuation."
        ),
        templates={
            "past_tense": "Past tense of the verb: {}",
            "plural": "Plural of the noun: {}",
            "sentence_negation": "Negation of the sentence: {}",
        },
        max_tokens=24,
    ),
)
