"""Which examples have the form that a request asks for; what becomes of JSON is in e2e/test_kinds.py."""

from __future__ import annotations

import pytest

from iccache.examples.fit import INSTRUCTIONS, VARIED, fits, fitting
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


def test_a_name_in_the_system_prompt_makes_no_other_instructions() -> None:
    """Where nearly every request has a system prompt of its own; a few prompts that come again are what they say."""

    def shown(systems: list[str], now: str) -> int:
        recalled = [(make_example(id=f"e{i}", system=system), 0.9) for i, system in enumerate(systems)]
        return len(fitting(recalled, ask(now)))

    users = ["Ada", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus"]
    personal = "You are the assistant of {}. Answer in one word."
    assert len(users) > VARIED
    assert shown([personal.format(user) for user in users], personal.format("Hal")) == len(users)
    assert shown([personal.format(user) for user in users], "Summarise in Dutch what you are told.") == 0
    languages = ["Spanish", "French", "Dutch"]
    assert shown([f"You translate to {one}." for one in 5 * languages], "You translate to Italian.") == 0
    assert shown([f"You translate to {one}." for one in languages], "You translate to Italian.") == 0
