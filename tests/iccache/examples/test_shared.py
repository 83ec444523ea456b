"""Shared sets: who stands for many, the same in any order, and never what is gone."""

import random

import numpy as np
import pytest

from iccache.examples.shared import LONGEST_TOKENS, SetOf, SharedSets, build_set, pack, unpack
from iccache.examples.traits import application
from iccache.types import Change, ChangeKind, Example, ExampleStats, Vector
from tests.factories import make_example

NOWHERE = np.zeros(8, np.float32)


def near(kind: int, rng: np.random.Generator) -> Vector:
    vector = np.zeros(8, np.float32)
    vector[kind] = 1.0
    vector += rng.normal(0, 0.1, 8).astype(np.float32)
    return vector / np.float32(np.linalg.norm(vector))


def examples(answer: str, kinds: int = 3, each: int = 20, **other: object) -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        make_example(f"{kind}-{i}", answer=answer.format(kind=kind, i=i), embedding=near(kind, rng), **other)
        for kind in range(kinds)
        for i in range(each)
    ]


def test_labels_are_represented_once_each_the_most_frequent_last() -> None:
    some = examples("label {kind}") + examples("label 7", kinds=1, each=30)
    assert [e.answer for e in build_set(some)][-1] == "label 7"
    assert sorted(e.answer for e in build_set(some)) == ["label 0", "label 1", "label 2", "label 7"]


def test_where_answers_are_no_labels_every_kind_of_request_is_represented() -> None:
    chosen = build_set(examples("answer {kind} {i}"), size=3)
    assert sorted(e.id[0] for e in chosen) == ["0", "1", "2"]


def test_the_order_in_which_examples_come_changes_nothing() -> None:
    some = examples("answer {kind} {i}")
    want = build_set(some)
    random.Random(1).shuffle(some)
    assert build_set(some) == want


@pytest.mark.parametrize("spoiled", [{"stats": ExampleStats(own_quality=0.1)}, {"tokens": LONGEST_TOKENS + 1}])
def test_bad_and_long_examples_stand_for_nobody(spoiled: dict[str, object]) -> None:
    good = examples("label {kind}", kinds=2)
    bad = [e._replace(id=f"bad {e.id}", answer="bad") for e in examples("", kinds=2, **spoiled)]
    assert {e.answer for e in build_set(good + bad)} == {"label 0", "label 1"}
    assert build_set(bad) == []
    assert build_set(good[:1]) == []


class Shelf:
    def __init__(self, examples: list[Example]) -> None:
        self.kept = {e.id: e for e in examples}

    def examples(self, ids: object) -> list[Example]:
        return [self.kept[id] for id in ids if id in self.kept]  # type: ignore[attr-defined]


def test_sets_survive_their_state_and_follow_the_store() -> None:
    shelf = Shelf([make_example("a"), make_example("b"), make_example("c", tenant="u")])
    name = application("Be brief.")
    sets = SharedSets()
    sets.load(unpack(pack([SetOf("t", f"{name:016x}", ["b", "gone", "a", "c"])])), shelf)
    assert [e.id for e in sets.of("t", name, NOWHERE)] == ["b", "a"]
    assert sets.of("u", name, NOWHERE) == ()
    shelf.kept["b"] = shelf.kept["b"]._replace(answer="better")
    del shelf.kept["a"]
    sets.apply([Change(1, ChangeKind.EXAMPLE, "b"), Change(2, ChangeKind.EXAMPLE, "a")], shelf)
    assert [e.answer for e in sets.of("t", name, NOWHERE)] == ["better"]


def test_what_is_no_state_of_sets_is_refused() -> None:
    for state in (b"", b"{}", b'[{"tenant": 1}]'):
        with pytest.raises(ValueError, match=r"."):
            unpack(state)
