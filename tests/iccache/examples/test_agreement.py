from __future__ import annotations

import pytest

from iccache.examples.agreement import SAME, agree, agreement


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("yes", "Yes."),
        ("Paris", " paris\n"),
        ("The train leaves at 9:30 from Berlin.", "the train leaves at 9:30 from Berlin"),
        ("", ""),
        ("⟨⟩", "⟨⟩"),
        ("Don\u2019t open it.", "Don't open it!"),
    ],
)
def test_what_agrees(a: str, b: str) -> None:
    assert agree(a, b)
    assert agree(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("yes", "no"),
        ("Take it for 7 days, with water and after a meal.", "Take it for 70 days, with water and after a meal."),
        ("You should open the file that came with it today.", "You should not open the file that came with it today."),
        ("Paris is the capital of France", "Lyon is a large city in France"),
        ("+", "-"),
        ("", "anything"),
    ],
)
def test_what_does_not(a: str, b: str) -> None:
    assert not agree(a, b)
    assert not agree(b, a)


def test_agreement_is_the_f1_of_their_words() -> None:
    assert agreement("a b c d", "a b") == pytest.approx(2 * 2 / 6)
    assert agreement("a a", "a") == pytest.approx(2 / 3)
    assert agreement("x", "y") == 0.0
    assert agreement("same", "same") == 1.0 > SAME
