"""A short follow-up, put so that it can be understood alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from iccache.dialects import conversation
from iccache.dialects.conversation import Role, Turn

PIECES = st.sampled_from(["a", "word", "and in Italian?", " ", "\n\n", "\t" * 50, " " * 3000, "x" * 700, "語" * 40])
TEXTS = st.lists(PIECES, max_size=12).map("".join)
TURNS = st.lists(st.tuples(st.sampled_from([Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL]), TEXTS), max_size=6)


class Untouched(str):
    """A text that nobody may go through."""

    __slots__ = ()

    def split(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("gone through")


def plainly(turns: Sequence[Turn], asked: str) -> str:
    """`task` of a short follow-up, every text cleared of white space first."""
    said = [(turn.role, " ".join(turn.text.split())) for turn in turns]
    questions: list[str] = []
    for text in [text for role, text in reversed(said) if role is Role.USER and text]:
        questions.insert(0, text)
        enough = conversation.SAYS_SOMETHING_CHARS
        if conversation._length(text, enough) >= enough or len(questions) == conversation.EARLIER_QUESTIONS:
            break
    most = conversation.QUESTION_CHARS
    heads = [q if len(q) <= most else q[: most - 1] + "…" for q in questions]
    lines = [("Then I asked: " if i else "Earlier I asked: ") + head for i, head in enumerate(heads)]
    answer = next((text for role, text in reversed(said) if role is Role.ASSISTANT and text), "")
    most = conversation.ANSWER_CHARS
    if answer:
        lines.append("You answered: " + (answer if len(answer) <= most else "…" + answer[1 - most :]))
    return "\n".join(lines) + f"\n\nNow: {asked}" if lines else asked


@given(TURNS)
def test_what_a_follow_up_refers_to_is_what_was_said(said: list[tuple[Role, str]]) -> None:
    turns = [Turn(role, text) for role, text in said]
    asked = "and in Italian?"
    assert conversation.task([*turns, Turn(Role.USER, asked)]) == plainly(turns, asked)


def test_what_it_does_not_refer_to_is_not_gone_through() -> None:
    """A system prompt of megabytes, and what lies far back, held up everybody else for as long as it took."""
    long = Untouched("word " * 1000)
    turns = [
        Turn(Role.SYSTEM, long),
        Turn(Role.USER, long),
        Turn(Role.ASSISTANT, long),
        Turn(Role.USER, Untouched("What is the capital of France, and how many people live there? " * 1000)[:]),
        Turn(Role.ASSISTANT, "Paris."),
        Turn(Role.USER, "and of Italy?"),
    ]
    assert conversation.task(turns).endswith("You answered: Paris.\n\nNow: and of Italy?")
