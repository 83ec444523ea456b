from __future__ import annotations

import pytest

from replay.best import LEAST_PEERS, Agreed, Form, Vote, agreement, form_of


@pytest.mark.parametrize(
    ("new", "old", "wanted", "expected"),
    [
        (["a", "A.", " a "], None, 3, Agreed("a", 1.0)),
        (["a", "b", "a"], None, 3, Agreed("a", 2 / 3)),
        (["a", "b", "c"], None, 3, None),
        (["a", "a"], None, 3, Agreed("a", 1.0)),  # the third cannot change it
        (["a", "a"], None, 0, None),  # two votes prove nothing
        (["a", "a"], "b", 3, None),  # two of four
        (["a", "a", "a"], "b", 3, Agreed("a", 0.75)),
        (["a", "b"], "a", 2, Agreed("a", 2 / 3)),
        (["a"], None, 5, None),
        ([], None, 3, None),
        ([], None, 0, None),
    ],
)
def test_more_than_half_of_the_votes_agree(new: list[str], old: str | None, wanted: int, expected: object) -> None:
    assert agreement(new, [] if old is None else [Vote(old, 1.0)], wanted=wanted) == expected


@pytest.mark.parametrize(
    ("new", "others", "expected"),
    [
        (["a", "a"], [Vote("b", 0.9)], "a"),  # two of 3.9, whatever the third says
        (["a", "a"], [Vote("b", 1.0)], None),
        (["a", "a", "a"], [Vote("b", 0.9), Vote("b", 0.8)], "a"),
        (["a", "a", "b"], [Vote("b", 0.9), Vote("b", 0.8)], "b"),  # 2.7 of 4.7
        (["a", "a", "b"], [Vote("b", 0.1)], "a"),
        (["a", "b", "c"], [Vote("a", 0.9), Vote("A", 0.9)], "a"),  # 2.8 of 4.8
        (["a", "a"], [Vote("b", 0.1), Vote("a", 0.5)], "a"),  # 2.5 of 3.6
        (["c", "d", "e"], [Vote("a", 0.99), Vote("a", 0.99)], None),  # those who were asked have to agree
    ],
)
def test_an_old_answer_counts_as_far_as_it_is_trusted_and_so_do_the_neighbours(
    new: list[str], others: list[Vote], expected: str | None
) -> None:
    agreed = agreement(new, others, wanted=3)
    assert (None if agreed is None else agreed.answer) == expected


def test_one_sample_and_what_is_on_file_decide_nothing() -> None:
    assert agreement(["a"], [Vote("a", 0.9), Vote("a", 0.9)], wanted=1) is None


def test_a_closed_set_of_labels_is_a_form() -> None:
    form = form_of(["yes"] * 12 + ["no"] * 12 + ["Maybe not, it depends on the weather."])
    assert form is not None and form.labels == {"yes", "no"}
    assert form.met_by("Yes.") and form.met_by(" no ")
    assert not form.met_by("I think yes") and not form.met_by("")


def test_a_label_seen_once_is_no_label() -> None:
    form = form_of(["yes"] * 12 + ["no"] * 12 + ["yse"])
    assert form is not None and not form.met_by("yse")


def test_json_with_common_keys_is_a_form() -> None:
    form = form_of(['{"a": 1, "b": 2}'] * 20 + ['{"a": 1, "b": 2, "c": 3}'] * 2 + ["sorry"])
    assert form is not None and form.keys == {"a", "b"}
    assert form.met_by('{"b": 0, "a": null, "d": 1}')
    for answer in ('{"a": 1}', "[1]", '{"a": 1, "b": ', "a b", "{}"):
        assert not form.met_by(answer), answer


@pytest.mark.parametrize(
    "answers",
    [
        [],
        ["yes"] * (LEAST_PEERS - 1),  # too few
        [f"answer {n}" for n in range(100)],  # free text
        ["yes"] * 10 + [f"answer {n}" for n in range(10)],
        ["x" * 200] * 30,  # too long for a label
        [f"label {n // 2}" for n in range(40)],  # each twice: 20 labels are no closed set of 40
    ],
)
def test_no_form_where_the_peers_show_none(answers: list[str]) -> None:
    assert form_of(answers) is None


def test_a_form_without_labels_or_keys_asks_for_an_object() -> None:
    assert Form(keys=frozenset()).met_by("{}") and not Form(keys=frozenset()).met_by("no")
