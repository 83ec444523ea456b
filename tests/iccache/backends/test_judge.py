from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iccache.backends.judge import BackendJudge, Verdict, parse, position_bias, prompt


class Scripted:
    """Says one verdict after the other, and remembers what it was asked."""

    def __init__(self, *said: str) -> None:
        self.said = list(said)
        self.asked: list[str] = []

    async def __call__(self, question: str) -> str:
        self.asked.append(question)
        return self.said[len(self.asked) - 1]


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        ("A", "B", 1.0),  # a, wherever it stands
        ("B", "A", 0.0),
        ("A", "A", 0.5),  # the first, whichever it is
        ("B", "B", 0.5),
        ("tie", "tie", 0.5),
        ("A", "tie", 0.75),
        ("tie", "A", 0.25),
        ("junk", "", 0.5),
    ],
)
async def test_both_orders_are_asked_and_averaged(forward: str, backward: str, expected: float) -> None:
    scripted = Scripted(forward, backward)
    assert await BackendJudge(scripted).prefer("the request", "one", "two") == expected
    first, second = scripted.asked
    assert first.index("one\n--- answer B") < first.index("two\n--- end")
    assert second.index("two\n--- answer B") < second.index("one\n--- end")


async def test_equal_answers_need_no_judge() -> None:
    scripted = Scripted()
    assert await BackendJudge(scripted).prefer("r", "same", "same") == 0.5
    assert not scripted.asked


@pytest.mark.parametrize(
    "said", ["A", "a", " A.\n", "**A**", "Answer: A", "answer A", "Verdict: **A**", "\nA\nbecause"]
)
def test_a_verdict_is_read(said: str) -> None:
    assert parse(said) is Verdict.FIRST


@pytest.mark.parametrize(
    "said",
    ["", "AB", "A or B", "A is better", "Both", "C", "A good question", "not A", "The answer is B, no, A", "ties"],
)
def test_anything_else_is_unreadable(said: str) -> None:
    assert parse(said) is Verdict.UNREADABLE


@given(st.text())
def test_reading_never_fails(said: str) -> None:
    assert parse(said) in Verdict


@given(st.text(), st.text(), st.text())
def test_no_text_contains_the_marks_that_keep_them_apart(request: str, first: str, second: str) -> None:
    asked = prompt(request, first, second)
    mark = asked.split("mark ", 1)[1][:12]
    assert asked.count(f" {mark}\n") == 4
    assert f"--- answer A {mark}\n{first}\n--- answer B {mark}\n{second}\n--- end {mark}" in asked


async def test_position_bias_is_measured() -> None:
    tally: Counter[Verdict] = Counter()
    assert position_bias(tally) is None
    for said in ("A", "A"), ("A", "B"):
        await BackendJudge(Scripted(*said), tally).prefer("r", "x", "y")
    assert tally == {Verdict.FIRST: 3, Verdict.SECOND: 1}
    assert position_bias(tally) == 0.5
