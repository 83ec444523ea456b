"""Which examples are shown: within every limit, whole, worth it, different, best last."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iccache.config import Selection as Limits
from iccache.examples.selector import PAIR_TOKENS, Selection, Selector, example_tokens, same
from iccache.examples.utility import RecordUtility, Rows, candidate_rows
from iccache.types import Example, ExampleStats, Recalled, Vector

NOW = 1_000_000.0
ROOMY: dict[str, Any] = {
    "student_window_tokens": 100_000,
    "request_tokens": 10,
    "reply_tokens": 100,
    "cap": None,
    "system": "",
    "now": NOW,
}


def direction(i: int) -> Vector:
    vector = np.zeros(64, np.float32)
    vector[i % 64] = 1.0
    return vector


def example(i: int, tokens: int = 20, **other: Any) -> Example:
    fields: dict[str, Any] = {
        "id": f"e{i}",
        "tenant": "t",
        "subject": None,
        "request_id": f"r{i}",
        "at": NOW,
        "dialect": "chat",
        "system": "",
        "request": f"request {i}",
        "answer": f"answer {i}",
        "backend": "large",
        "embedder": "m",
        "embedding": direction(i),
        "tokens": tokens,
        "stats": ExampleStats(),
    }
    return Example(**(fields | other))


def recalled(*pairs: tuple[Example, float]) -> Recalled:
    return Recalled(direction(0), sorted(pairs, key=lambda pair: -pair[1]))


def select(found: Recalled, limits: Limits | None = None, auto: float | None = None, **other: Any) -> Selection:
    selector = Selector(RecordUtility(), limits or Limits(), auto)
    return selector.select(found, **(ROOMY | other))


def shown(selection: Selection) -> list[str]:
    return [m.example.id for m in selection.shown]


FIVE = recalled(*((example(i), 0.9 - 0.1 * i) for i in range(5)))


def test_nothing_recalled_is_nothing_shown() -> None:
    assert select(recalled()) == Selection((), (), 0)


def test_the_best_stands_last_and_all_are_considered() -> None:
    selection = select(FIVE)
    assert shown(selection) == ["e2", "e1", "e0"]
    assert [m.example.id for m in selection.considered] == ["e0", "e1", "e2", "e3", "e4"]
    assert selection.tokens == 3 * (20 + PAIR_TOKENS)


def test_what_is_known_of_the_shown_ones_is_theirs() -> None:
    found = recalled(*((example(i, request=f"ask {i}", answer="ab"[i % 2]), 0.9 - 0.1 * i) for i in range(5)))
    selection = select(found, request="ask 1 now")
    assert shown(selection) == ["e2", "e1", "e0"]
    similarity, overlaps, vote, *_ = (dict(zip(("e0", "e1", "e2"), values, strict=True)) for values in selection.seen)
    assert similarity == pytest.approx({"e0": 0.9, "e1": 0.8, "e2": 0.7})
    assert overlaps == pytest.approx({"e0": 1 / 4, "e1": 2 / 3, "e2": 1 / 4})
    assert vote["e0"] == vote["e2"] > vote["e1"] > 0


@pytest.mark.parametrize(
    ("asked_under", "shown_ids"),
    [("", ["near"]), ("be brief", ["near", "far, same"]), ("  be   brief ", ["near", "far, same"]), ("x", ["near"])],
)
def test_what_is_no_nearer_than_anything_is_shown_under_its_own_system_prompt_alone(
    asked_under: str, shown_ids: list[str]
) -> None:
    found = recalled(
        (example(0, id="near"), 0.41),
        (example(1, id="far"), 0.4),
        (example(2, id="far, same", system="be brief"), 0.1),
    )
    selector = Selector(RecordUtility(), Limits())
    selector.unrelated = 0.4
    selection = selector.select(found, **(ROOMY | {"system": asked_under}))
    assert sorted(m.example.id for m in selection.shown) == sorted(shown_ids)
    assert len(selection.considered) == 3
    helped = selector.select(found, **(ROOMY | {"system": asked_under, "local": 0.5}))
    assert len(helped.shown) == 3  # where answers have shown that examples help, far ones are tried


@pytest.mark.parametrize(("cap", "count"), [(None, 3), (0, 0), (1, 1), (2, 2), (50, 3)])
def test_the_client_may_ask_for_fewer(cap: int | None, count: int) -> None:
    selection = select(FIVE, cap=cap)
    assert len(selection.shown) == count
    assert len(selection.considered) == 5


def test_a_pair_that_does_not_fit_is_left_out_whole_and_the_next_is_tried() -> None:
    found = recalled((example(0, 500), 0.9), (example(1, 20), 0.8), (example(2, 400), 0.7), (example(3, 20), 0.6))
    assert shown(select(found, Limits(max_tokens=100))) == ["e3", "e1"]


def test_the_window_keeps_room_for_request_and_reply() -> None:
    one = 20 + PAIR_TOKENS
    for room in range(5 * one):
        selection = select(FIVE, Limits(max_examples=5), student_window_tokens=300 + room, request_tokens=200)
        assert len(selection.shown) == room // one
    assert shown(select(FIVE, student_window_tokens=50, request_tokens=200)) == []


def test_below_the_threshold_nothing_is_shown() -> None:
    utilities = [m.utility for m in select(FIVE).considered]
    assert shown(select(FIVE, Limits(threshold=utilities[1]))) == ["e1", "e0"]
    assert shown(select(FIVE, Limits(threshold=utilities[0] + 0.01))) == []
    assert len(select(FIVE, Limits(threshold=-5)).shown) == 3


def test_the_automatic_threshold_is_the_one_handed_in() -> None:
    utilities = [m.utility for m in select(FIVE).considered]
    assert shown(select(FIVE, auto=utilities[1])) == ["e1", "e0"]
    assert len(select(FIVE, Limits(threshold=-1.0), auto=utilities[1]).shown) == 3


def test_before_anything_is_measured_the_nearest_are_let_through_unless_their_record_speaks_against_them() -> None:
    far = recalled((example(0), 0.05), (example(1), -0.9))
    assert shown(select(far)) == ["e1", "e0"]
    bad = example(2, stats=ExampleStats(uses=90, credit=30.0, credited_quality=0.0))
    disliked = example(3, stats=ExampleStats(own_quality=0.0))
    assert shown(select(recalled((bad, 0.9), (disliked, 0.9), (example(0), 0.1)))) == ["e0"]


def test_opposite_feedback_turns_the_ranking() -> None:
    liked = example(1, stats=ExampleStats(uses=3, credit=1.0, credited_quality=1.0))
    disliked = example(2, stats=ExampleStats(uses=3, credit=1.0, credited_quality=0.0))
    for pairs in ([(liked, 0.8), (disliked, 0.8)], [(disliked, 0.8), (liked, 0.8)]):
        assert shown(select(recalled(*pairs), Limits(max_examples=1))) == ["e1"]


def test_examples_of_the_same_system_prompt_are_preferred() -> None:
    found = recalled((example(0, system="Answer in French."), 0.95), (example(1, system="Answer in JSON."), 0.6))
    assert shown(select(found, Limits(max_examples=1), system="Answer in JSON.")) == ["e1"]


def test_of_near_duplicates_the_more_useful_is_shown() -> None:
    better = ExampleStats(credit=2.0, credited_quality=2.0)
    same_text = recalled((example(0), 0.9), (example(1, request=" request 0\n", stats=better), 0.9))
    assert shown(select(same_text)) == ["e1"]
    near = recalled((example(0), 0.9), (example(64, answer="answer 0", stats=better), 0.9))
    assert shown(select(near)) == ["e64"]


def test_near_requests_with_different_answers_are_both_shown() -> None:
    assert len(select(recalled((example(0), 0.9), (example(64), 0.9))).shown) == 2
    assert len(select(recalled((example(0, answer="yes"), 0.9), (example(1, answer="yes"), 0.9))).shown) == 2


def test_a_duplicate_that_fits_stands_in_for_one_that_does_not() -> None:
    found = recalled((example(0, 5000), 0.9), (example(1, 20, request="request 0"), 0.8))
    assert shown(select(found)) == ["e1"]


def test_the_request_itself_may_be_shown() -> None:
    assert shown(select(recalled((example(0), 1.0)))) == ["e0"]


def test_equal_utility_is_decided_by_age_then_id() -> None:
    found = recalled((example(3), 0.8), (example(1), 0.8), (example(2, at=NOW - 9), 0.8))
    assert shown(select(found)) == ["e2", "e3", "e1"]


class Broken(RecordUtility):
    def predict(self, X: Rows, student: str | None = None) -> Any:
        return np.full(len(X), np.nan)


def test_a_utility_that_is_no_number_shows_nothing() -> None:
    assert Selector(Broken(), Limits(threshold=-9.0)).select(FIVE, **ROOMY).shown == ()


class PerStudent(RecordUtility):
    def predict(self, X: Rows, student: str | None = None) -> Any:
        return super().predict(X) * (-1 if student == "contrary" else 1)


def test_ranking_is_for_a_student() -> None:
    selector = Selector(PerStudent(), Limits(threshold=-9.0, max_examples=1))
    assert shown(selector.select(FIVE, student="agreeable", **ROOMY)) == ["e0"]
    assert shown(selector.select(FIVE, student="contrary", **ROOMY)) == ["e4"]


candidates = st.lists(
    st.tuples(
        st.integers(0, 400),  # tokens
        st.floats(-1, 1),  # similarity
        st.integers(0, 5),  # text
        st.booleans(),  # same system prompt
        st.floats(0, 1),  # quality when shown
    ),
    max_size=16,
)


@settings(max_examples=300, deadline=None)
@given(
    rows=candidates,
    limits=st.builds(
        Limits,
        max_examples=st.integers(0, 8),
        max_tokens=st.integers(0, 1000),
        threshold=st.just("auto") | st.floats(-1, 1),
    ),
    cap=st.none() | st.integers(0, 8),
    window=st.integers(1, 2000),
    request=st.integers(0, 1000),
)
def test_every_limit_holds(rows: Any, limits: Limits, cap: int | None, window: int, request: int) -> None:
    pairs = [
        (
            example(i, tokens, request=f"r{text}", system="" if system else "x", stats=ExampleStats(2, 1.0, quality)),
            similarity,
        )
        for i, (tokens, similarity, text, system, quality) in enumerate(rows)
    ]
    selector = Selector(RecordUtility(), limits)
    arguments = ROOMY | {"cap": cap, "student_window_tokens": window, "request_tokens": request}
    selection = selector.select(recalled(*pairs), **arguments)
    utilities = [m.utility for m in selection.considered]
    chosen = [m.utility for m in selection.shown]
    assert sorted(m.example.id for m in selection.considered) == sorted(e.id for e, _ in pairs)
    assert utilities == sorted(utilities, reverse=True)
    assert chosen == sorted(chosen)
    assert set(shown(selection)) <= {e.id for e, _ in pairs}
    assert all(m in selection.considered for m in selection.shown)
    assert len(chosen) <= min(limits.max_examples, 8 if cap is None else cap)
    assert selection.tokens == sum(example_tokens(m.example) for m in selection.shown) <= limits.max_tokens
    assert not selection.shown or request + selection.tokens + 100 <= window
    assert all(u >= selector.threshold for u in chosen)
    assert len({m.example.request for m in selection.shown}) == len(chosen)


def test_what_is_known_of_the_candidates_is_taken_where_it_is_given() -> None:
    rows = candidate_rows(FIVE.nearest, request="request 4", system="", now=NOW)
    assert select(FIVE, request="another", rows=rows).seen == select(FIVE, request="request 4").seen
    assert select(FIVE, request="another").seen != select(FIVE, request="request 4").seen


@pytest.mark.parametrize(
    ("other", "said_before"),
    [
        ({"request": "please book a table for five in Rome tonight"}, True),
        ({"request": "book a table for five in Rome, tonight!"}, True),
        ({"request": "book a flight from Paris to Oslo for two tomorrow"}, False),
        ({"request": "please book a table for five in Rome tonight", "answer": "another"}, False),
        ({"request": "réserver", "embedding": direction(0)}, True),  # the embedder says so
    ],
)
def test_the_same_request_put_otherwise_is_shown_once_whatever_the_embedder(
    other: dict[str, Any], said_before: bool
) -> None:
    first = example(0, request="Book a table for five in Rome tonight.", answer="booking")
    second = example(1, **({"answer": "booking"} | other))
    assert same(first, second) is said_before
    assert same(second, first) is said_before


def test_all_tell_one_answer_only_where_the_majority_does() -> None:
    # Six recalled: x has 3 of 6 nearest, y and z the rest. How near they are decides who has the majority.
    def found(others: float) -> Recalled:
        answers = ["x", "x", "x", "x", "y", "z"]
        nearness = [0.9, 0.9, 0.9, 0.9, others, others]
        pairs = zip(answers, nearness, strict=True)
        return recalled(*((example(i, answer=answer), near) for i, (answer, near) in enumerate(pairs)))

    assert shown(select(found(0.5))) == ["e2", "e1", "e0"]  # y and z far away: x has .96
    many = Recalled(
        direction(0), [*found(0.89).nearest[:4], *((example(i, answer=f"a{i}"), 0.89) for i in range(9, 15))]
    )
    assert shown(select(many)) == ["e10", "e1", "e0"]  # x has .42: the next answer takes the last place
    assert shown(select(many, Limits(max_examples=2))) == ["e1", "e0"]  # of two, both may
    none_other = Recalled(
        direction(0), [*many.nearest[:4], *((example(i, 10**6, answer=f"a{i}"), 0.89) for i in range(9, 15))]
    )
    assert shown(select(none_other)) == ["e2", "e1", "e0"]  # no other fits
