"""The first estimate of utility, against its formula and against what it must rank."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iccache.examples.utility import (
    NAMES,
    VOTE_SCALE,
    LearnedUtility,
    RecordUtility,
    Rows,
    candidate_rows,
    same_system,
    votes,
)
from iccache.examples.ways import NAMES as WEIGHTS
from iccache.examples.ways import Prior
from iccache.types import Example, ExampleStats

NOW = 1_000_000.0
SHARE = st.floats(0, 1)


def example(system: str = "", at: float = NOW, **stats: Any) -> Example:
    return Example(
        "e", "t", None, "r", at, "chat", system, "request", "answer", "b", "m", np.zeros(2, np.float32), 5,
        ExampleStats(**stats),
    )  # fmt: skip


def row(similarity: float = 0.8, system: str = "", **stats: Any) -> Rows:
    return candidate_rows([(example(**stats), similarity)], request="a request", system=system, now=NOW)


def utility(*args: Any, **kwargs: Any) -> float:
    return float(RecordUtility().predict(row(*args, **kwargs))[0])


def test_features_have_a_name_each() -> None:
    one = example("be brief", NOW - 86_400, uses=3, credit=2.0, credited_quality=1.5, own_quality=0.25)
    others = [one._replace(answer=answer) for answer in ("Answer", "another", "a third")]
    rows = candidate_rows([(e, 0.5) for e in (one, *others)], request="my request", system=" be  brief\n", now=NOW)
    assert rows.shape == (4, len(NAMES))
    assert dict(zip(NAMES, rows[0].tolist(), strict=True)) == pytest.approx(
        {
            "similarity": 0.5,
            "same_system": 1.0,
            "credit": 2.0,
            "credited_quality": 1.5,
            "own_quality": 0.25,
            "own_quality_known": 1.0,
            "uses": np.log(4),
            "age": np.log(2),
            "request_length": np.log(8),
            "answer_length": np.log(7),
            "overlap": 0.5,
            "vote": 0.5,
        }
    )


def test_the_nearer_have_more_of_the_vote_and_the_same_answers_one_between_them() -> None:
    near = [0.9, 0.8, 0.7, 0.6]
    z = np.exp(np.array(near) / VOTE_SCALE)
    assert votes(near, ["a", "b", "c", "d"]) == pytest.approx((z / z.sum()).tolist())
    a, b = (z[0] + z[3]) / z.sum(), (z[1] + z[2]) / z.sum()
    assert votes(near, ["a", "b", "b", "a"]) == pytest.approx([a, b, b, a])
    assert votes([], []) == []


@given(near=st.lists(st.floats(-1, 1), min_size=1, max_size=16), data=st.data())
def test_votes_are_shares(near: list[float], data: Any) -> None:
    answers = data.draw(st.lists(st.sampled_from("abc"), min_size=len(near), max_size=len(near)))
    got = votes(near, answers)
    assert sum(dict(zip(answers, got, strict=True)).values()) == pytest.approx(1.0)
    assert min(got) > 0


def test_a_clock_that_went_back_makes_no_negative_age() -> None:
    assert np.isfinite(candidate_rows([(example(at=NOW + 9e9), 0.5)], request="", system="", now=NOW)).all()


def test_equally_similar_examples_rank_differently_after_opposite_feedback() -> None:
    none = utility()
    assert utility(credit=1 / 3, credited_quality=1 / 3) > none + 0.03
    assert utility(credit=1 / 3, credited_quality=0.0) < none - 0.03
    assert none + 0.03 < utility(own_quality=1.0) < none + 0.05  # that it is good makes it no nearer
    assert utility(own_quality=0.0) < none - 0.05


@given(a=st.floats(-1, 1), b=st.floats(-1, 1))
def test_without_a_record_the_ranking_is_that_of_similarity(a: float, b: float) -> None:
    assert (utility(a) > utility(b)) == (a > b) or abs(a - b) < 1e-12
    assert utility(a) >= 0.0


@given(similarity=st.floats(-1, 1), credit=st.floats(0, 1000), mean=SHARE, own=st.none() | SHARE, system=st.booleans())
def test_it_is_the_formula_and_stays_within_one(
    similarity: float, credit: float, mean: float, own: float | None, system: bool
) -> None:
    got = utility(similarity, "" if system else "other", credit=credit, credited_quality=mean * credit, own_quality=own)
    expected = 0.4 * (1 + similarity) / 2 * (1.0 if system else 0.5)
    expected += (mean * credit + 4 * 0.5) / (credit + 4) - 0.5
    expected += 0.0 if own is None else 0.75 * (own - 0.75) * (1.0 if own < 0.75 else 0.2)
    assert got == pytest.approx(expected, abs=1e-9)
    assert -1.1 <= got <= 1.2


def test_more_evidence_says_more_and_a_single_judgement_little() -> None:
    few, many = utility(credit=1, credited_quality=1), utility(credit=50, credited_quality=50)
    assert utility() < few < many
    assert few - utility() < 0.2


def test_an_example_from_under_another_system_prompt_ranks_below_one_from_under_the_same() -> None:
    assert utility(0.9, "You are a judge.") < utility(0.5, "")
    assert utility(0.9, "You are a judge.") >= 0.0


def test_system_prompts_are_compared_but_for_space() -> None:
    assert same_system("a  b\n", "a b")
    assert not same_system("a b", "ab")
    assert not same_system("", "a")


def test_a_weak_students_answers_do_not_speak_against_its_examples() -> None:
    record = row(0.0, credit=60, credited_quality=12)  # a fifth of the answers were good
    model = RecordUtility()
    assert model.predict(record)[0] < 0
    model.partial_fit(np.repeat(record, 500, 0), [1.0, 0.0, 0.0, 0.0, 0.0] * 100)
    assert model.mean_ == pytest.approx((100 + 10) / 520)
    assert model.predict(record)[0] == pytest.approx(model.predict(row(0.0))[0], abs=0.02)


def test_a_judgement_can_be_taken_back() -> None:
    model = RecordUtility().partial_fit(row(), [0.75])
    before = model.mean_
    model.partial_fit(row(), [0.1]).partial_fit(row(), [0.1], sample_weight=[-1.0])
    assert model.mean_ == pytest.approx(before)


def test_all_candidates_are_predicted_at_once_for_any_student() -> None:
    rows = np.concatenate([row(s) for s in (0.1, 0.5, 0.9)])
    assert RecordUtility().predict(rows, "small").shape == (3,)
    assert RecordUtility().predict(np.empty((0, len(NAMES)))).shape == (0,)


def weights(**given: float) -> list[float]:
    return [given.get(name, 0.0) for name in WEIGHTS]


def learned(*weights_of: float) -> LearnedUtility:
    return LearnedUtility(Prior({"": list(weights_of)}))


def test_what_was_learned_ranks_by_what_it_learned_from() -> None:
    by_vote = learned(*weights(own=0.1, own_vote=0.5))
    rows = np.concatenate([row(0.9), row(0.5)])
    rows[:, NAMES.index("vote")] = 0.0, 1.0
    assert by_vote.predict(rows).tolist() == pytest.approx([0.1, 0.6])
    assert RecordUtility().predict(rows)[0] > RecordUtility().predict(rows)[1]


def test_that_an_example_is_nearer_never_speaks_against_it() -> None:
    model = learned(*weights(own=0.1, own_similarity_mean=-0.5, own_overlap=-0.5, own_vote=-0.5))
    assert model.predict(row(0.9)).tolist() == model.predict(row(0.1)).tolist() == [pytest.approx(0.1)]


def test_an_example_alone_is_its_own_mean_and_maximum() -> None:
    model = learned(*weights(own=0.1, own_similarity_mean=0.2, own_similarity_max=0.3))
    assert model.predict(row(0.5))[0] == pytest.approx(0.1 + 0.5 * 0.5)


@pytest.mark.parametrize("weight", [0.5, -0.5])
def test_another_system_prompt_or_age_never_speaks_for_an_example(weight: float) -> None:
    model = learned(*weights(own=0.1, own_other_system=weight, own_age=weight))
    nearest = [(example("be brief"), 0.5), (example("be long"), 0.5), (example("be brief", at=NOW - 9e8), 0.5)]
    same, other, old = model.predict(candidate_rows(nearest, request="x", system="be brief", now=NOW))
    if weight > 0:
        assert other == old == same
    else:
        assert same - other == pytest.approx(0.5)
        assert 0.1 < same - old < 1


def test_before_training_the_record_and_source_quality_count_as_in_the_formula() -> None:
    rows = np.concatenate([row(), row(credit=4.0, credited_quality=4.0), row(own_quality=0.25)])
    gains = LearnedUtility().predict(rows) - LearnedUtility().predict(row())
    assert gains.tolist() == pytest.approx([0.0, 0.25, 0.75 * -0.5])


def test_long_answers_may_speak_for_an_example_or_against_it() -> None:
    rows = np.concatenate([row(), row()])
    rows[:, NAMES.index("answer_length")] = 1.0, 5.0
    for weight in (0.4, -0.4):
        short, long = learned(*weights(own_answer_length=weight)).predict(rows)
        assert long - short == pytest.approx(weight / 2)


def test_new_weights_are_in_force_at_once_and_records_still_count() -> None:
    model = learned(*weights(own_record=1.0))
    assert model.predict(row(credit=10.0, credited_quality=0.0))[0] < 0
    model.use(Prior({"": weights(own=1.0), "small": weights(own=2.0)}))
    assert (model.predict(row())[0], model.predict(row(), "small")[0]) == pytest.approx((1.0, 2.0))
