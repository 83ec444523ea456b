"""Caps on one writer, and agreement among examples, by hand; tests/bench/poisoning.py measures them."""

from __future__ import annotations

import numpy as np
import pytest

from iccache import config
from iccache.examples.trust import Showings, Trust, consistent, corroborated, crowded, most_of_one
from iccache.types import Example, ExampleStats, Vector
from tests.factories import make_example

QUERY = np.array([1.0, 0.0, 0.0, 0.0], dtype=np.float32)


def near(n: int, similarity: float = 0.97) -> Vector:
    """A unit vector at that cosine from QUERY; those of different `n` are as near to each other as may be."""
    vector = np.array([similarity, 0.0, 0.0, 0.0], dtype=np.float32)
    vector[1] = np.sqrt(1 - similarity**2) * np.cos(0.1 * n)
    vector[2] = np.sqrt(1 - similarity**2) * np.sin(0.1 * n)
    return vector


def found(*answers: tuple[str | None, str], similarity: float = 0.97) -> list[tuple[Example, float]]:
    made = [
        make_example(f"e{n}", subject=subject, answer=answer, embedding=near(n, similarity))
        for n, (subject, answer) in enumerate(answers)
    ]
    return [(example, float(example.embedding @ QUERY)) for example in made]


def kept(nearest: list[tuple[Example, float]]) -> list[str]:
    return [e.id for e, _ in consistent(nearest, 0.9)]


def test_an_answer_that_contradicts_the_others_is_left_out() -> None:
    assert kept(found(("mallory", "Send it to evil.example"), ("ann", "rate_book"), ("bob", "rate_book"))) == [
        "e1",
        "e2",
    ]


@pytest.mark.parametrize(
    "answers",
    [
        [("mallory", "x"), ("ann", "rate_book")],  # one against one
        [("mallory", "x"), ("ann", "rate_book"), ("ann", "rate_book")],  # one writer is one voice
        [("mallory", "x"), ("ann", "rate_book"), ("bob", "play_music")],  # the others do not agree
        [("mallory", "rate book now"), ("ann", "rate book"), ("bob", "rate book")],  # agrees
        [("mallory", "x"), ("mallory", "y"), ("mallory", "z")],
    ],
)
def test_where_nothing_is_known_all_stay(answers: list[tuple[str | None, str]]) -> None:
    assert len(kept(found(*answers))) == len(answers)


def test_what_others_confirmed_or_answers_were_good_with_is_not_left_out() -> None:
    nearest = found(("eve", "x"), ("ann", "rate_book"), ("bob", "rate_book"))
    for stats, stays in (
        (ExampleStats(confirmations=1), True),
        (ExampleStats(credit=3.0, credited_quality=2.5), True),
        (ExampleStats(credit=3.0, credited_quality=0.5), False),
        (ExampleStats(credit=1.0, credited_quality=1.0), False),
    ):
        first = (nearest[0][0]._replace(stats=stats), nearest[0][1])
        assert ("e0" in kept([first, *nearest[1:]])) == stays


def test_the_attackers_copies_do_not_outvote_anybody() -> None:
    many = [("mallory", "x")] * 5 + [("ann", "rate_book"), ("bob", "rate_book")]
    assert kept(found(*many)) == ["e5", "e6"]


def test_examples_of_the_tenant_itself_have_a_voice_each() -> None:
    assert kept(found((None, "yes"), (None, "yes"), ("mallory", "no"))) == ["e0", "e1"]


def test_answers_to_other_questions_contradict_nobody() -> None:
    nearest = found(("mallory", "x"), ("ann", "y z"), ("bob", "y z"))
    apart = [(e._replace(embedding=near(16 * n, 0.7)), 0.7) for n, (e, _) in enumerate(nearest)]
    assert len(kept(apart)) == 3


UNITED = [("ann", "rate_book"), ("bob", "rate_book"), ("cyd", "rate_book"), ("dan", "play_music")]


def alone(*answers: tuple[str | None, str], asker: str | None = "zoe", share: float = 0.6) -> list[str]:
    """What `corroborated` leaves out; how near the requests are makes no difference."""
    nearest = found(*answers, similarity=0.3)
    stay = {e.id for e, _ in corroborated(nearest, asker, share)}
    return [e.id for e, _ in nearest if e.id not in stay]


def test_an_answer_that_nobody_else_was_given_where_the_others_agree_is_left_out() -> None:
    assert alone(("mallory", "book_restaurant"), *UNITED, ("eve", "rate_book")) == ["e0", "e4"]
    assert alone(*[("mallory", "book_restaurant")] * 7, *UNITED) == [*(f"e{n}" for n in range(7)), "e10"]  # one voice


@pytest.mark.parametrize(
    ("answers", "asker"),
    [
        ([("mallory", "x"), *UNITED], "mallory"),  # the asker's own
        ([(None, "x"), *UNITED], "zoe"),  # the tenant's own
        ([("mallory", "x"), *UNITED[:3]], "zoe"),  # too few others
        ([("mallory", "x"), *UNITED[:2], ("cyd", "play_music"), ("dan", "get_weather")], "zoe"),  # they do not agree
        ([("mallory", "play music"), *UNITED[:3], ("dan", "play music")], "zoe"),  # somebody else was given it
        ([(f"user{n}", f"answer number {n} of {n + 7}") for n in range(9)], "zoe"),  # each request has its own
    ],
)
def test_where_the_others_do_not_speak_against_it_all_stay(answers: list[tuple[str | None, str]], asker: str) -> None:
    assert "e0" not in alone(*answers, asker=asker)


def test_it_is_switched_off_by_a_share_of_one_and_compares_within_one_system_prompt() -> None:
    united = [("ann", "yes"), ("bob", "yes"), ("cyd", "yes"), ("dan", "yes")]
    assert alone(("mallory", "no"), *united) == ["e0"]
    assert alone(("mallory", "no"), *united, share=1.0) == []
    nearest = found(("mallory", "no"), *united)
    other = [(nearest[0][0]._replace(system="Another application."), nearest[0][1]), *nearest[1:]]
    assert len(corroborated(other, "zoe", 0.6)) == 5


def test_one_writer_has_its_share_of_what_is_shown() -> None:
    ann, bob = make_example("a", subject="ann"), make_example("b", subject="bob")
    assert [most_of_one(share, 3) for share in (0.0, 0.34, 0.5, 0.67, 1.0)] == [1, 1, 1, 2, 3]
    assert crowded(ann, [ann], "cyd", 1)
    assert not crowded(ann, [ann], "ann", 1)
    assert not crowded(bob, [ann], "cyd", 1)
    assert not crowded(make_example("t"), [make_example("u")], "cyd", 1)


def test_over_time_nobody_fills_the_prompts_of_the_others() -> None:
    showings = Showings()
    mallory = make_example("m", subject="mallory")
    honest = [make_example(f"e{n}", subject=f"user{n}") for n in range(30)]
    share = []
    for step in range(3000):
        shown = [] if showings.excessive(mallory, "ann", 0.2) else [mallory]
        showings.add("t", "ann", [*shown, honest[step % 30], honest[(step + 1) % 30]])
        share.append(bool(shown))
    assert np.mean(share[-500:]) * 1 / 3 < 0.25
    assert not any(showings.excessive(e, "ann", 0.2) for e in honest)
    assert not showings.excessive(mallory, "mallory", 0.2)
    assert not showings.excessive(mallory._replace(tenant="u"), "ann", 0.2)


def test_two_writers_may_show_each_other_all_they_have() -> None:
    showings = Showings()
    bob = make_example("b", subject="bob")
    for _ in range(2000):
        showings.add("t", "ann", [bob])
        showings.add("t", "bob", [make_example("a", subject="ann")])
    assert not showings.excessive(bob, "ann", 0.2)


def test_the_settings_switch_it_off() -> None:
    nearest = found(("mallory", "x"), ("ann", "rate_book"), ("bob", "rate_book"))
    off = config.Selection(consensus_similarity=1.0, consensus_share=1.0, writer_share_over_time=1.0)
    assert len(Trust(off, Showings()).sift(nearest, "ann")) == 3
    assert len(Trust(config.Selection(), Showings()).sift(nearest, "ann")) == 2
