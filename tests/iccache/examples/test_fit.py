"""Which examples have the form that a request asks for; what becomes of JSON is in e2e/test_kinds.py."""

from __future__ import annotations

import pytest

from iccache.examples.fit import INSTRUCTIONS, fits
from iccache.types import Ask
from tests.factories import make_example

MATERIAL = "Answer from this: " + "the router has two lamps. " * 40


def ask(system: str) -> Ask:
    return Ask("chat", b"", "auto", False, "question", system=system)


@pytest.mark.parametrize(
    ("then", "now", "fit"),
    [
        ("You translate to Spanish.", "You translate to Spanish.", True),
        ("You translate to Spanish.", "  You translate\nto Spanish. ", True),
        ("You translate to Spanish.", "You translate to Italian.", False),
        ("You translate to Spanish.", "", False),
        ("", "You translate to Italian.", True),
        ("", "", True),
        ("Be brief. Today is Friday, 27 November 2026.", "Be brief. Today is Monday, 4 May 2027.", True),
        ("Be brief. Today is Friday, 27 November 2026.", "Be long. Today is Friday, 27 November 2026.", False),
        (MATERIAL, MATERIAL + "It rings at noon.", True),
        (MATERIAL, "You translate to Italian.", False),
    ],
)
def test_an_answer_under_other_instructions_is_not_shown(then: str, now: str, fit: bool) -> None:
    assert len(MATERIAL) > INSTRUCTIONS
    assert fits(make_example(system=then), ask(now)) is fit
