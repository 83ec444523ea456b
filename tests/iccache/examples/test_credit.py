from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iccache.examples import credit
from iccache.examples.credit import NO_CREDIT, Credit, Outcome
from iccache.types import ExampleStats

HOUR = 3600.0
quality = st.floats(0, 1)


def outcome(shown: int = 2, offloaded: bool = True, cost: float = 0.5, quality: float | None = 0.8) -> Outcome:
    return Outcome(0.0, tuple(f"e{i}" for i in range(shown)), offloaded, cost, quality)


def test_quality_is_the_weighted_mean_of_its_sources() -> None:
    assert credit.combined_quality({}) is None
    assert credit.combined_quality({"demonstration": None}) is None
    assert credit.combined_quality({"judge": 0.3, "demonstration": None}) == pytest.approx(0.3)
    assert credit.combined_quality({"user": 1.0, "check": 0.0}) == pytest.approx(1 / 1.7)
    assert credit.combined_quality({"user": 0.0, "judge": 1.0}) == pytest.approx(0.5 / 1.5)
    assert credit.combined_quality({"check": 0.0, "something new": 1.0}) == pytest.approx(0.5 / 1.2)


@given(st.dictionaries(st.sampled_from(["user", "check", "judge", "other"]), quality, min_size=1))
def test_quality_lies_between_its_scores(scores: dict[str, float]) -> None:
    combined = credit.combined_quality(scores)
    assert combined is not None
    assert min(scores.values()) - 1e-12 <= combined <= max(scores.values()) + 1e-12


def test_each_of_k_examples_gets_one_kth() -> None:
    assert credit.credit_of(outcome(shown=4)) == Credit(0.25, pytest.approx(0.2), 0.25, pytest.approx(0.1))
    assert credit.credit_of(outcome(quality=None)) == NO_CREDIT
    assert credit.credit_of(outcome(shown=0)) == NO_CREDIT


@pytest.mark.parametrize(
    ("offloaded", "quality", "success"), [(True, 0.5, True), (True, 0.49, False), (False, 1.0, False)]
)
def test_a_successful_offload_is_cheaper_and_good_enough(offloaded: bool, quality: float, success: bool) -> None:
    assert credit.is_success(offloaded, quality) is success
    assert not credit.is_success(offloaded, None)
    assert credit.credit_of(outcome(offloaded=offloaded, quality=quality)).offload == (0.5 if success else 0.0)


def test_offloads_decay_by_time_not_by_event() -> None:
    stats = ExampleStats(offloads=1.0, offloads_at=0.0)
    assert [credit.decayed_offloads(stats, h * HOUR) for h in (0, 1, 2)] == pytest.approx([1.0, 0.9, 0.81], abs=1e-15)
    assert credit.decayed_offloads(stats, HOUR / 2) == pytest.approx(0.9**0.5)
    assert credit.decayed_offloads(stats, -HOUR) == 1.0
    assert credit.decayed_offloads(stats, HOUR, per_hour=0.5) == 0.5
    for _ in range(10):  # events that add nothing do not decay it
        stats = credit.with_first(stats, NO_CREDIT, 0.0)
    assert credit.decayed_offloads(stats, HOUR) == 0.9


@given(st.permutations([(1.0, 0.0), (0.5, HOUR), (0.25, 5 * HOUR), (-0.5, HOUR)]))
def test_a_decaying_sum_does_not_depend_on_the_order(events: list[tuple[float, float]]) -> None:
    value, at = 0.0, 0.0
    for amount, when in events:
        value, at = credit.add_decaying(value, at, amount, when)
    assert at == 5 * HOUR
    assert value == pytest.approx(0.9**5 + 0.25)


@pytest.mark.parametrize(
    ("quality", "cost", "gain"), [(1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (0.0, 1.0, 1.0), (0.75, 0.5, 0.125)]
)
def test_gain(quality: float, cost: float, gain: float) -> None:
    assert credit.gain(quality, cost) == gain


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_gain_is_an_ema_that_accumulates_on_reuse(gains: list[float]) -> None:
    stats = ExampleStats()
    for value in gains:
        stats = credit.with_first(stats, Credit(gain=value), 0.0)
    weighed = sum(credit.gain_weight(len(gains) - 1 - i) * value for i, value in enumerate(gains))
    assert stats.gain == pytest.approx(weighed, abs=1e-12)
    assert credit.with_first(ExampleStats(gain=0.1), Credit(gain=0.5), 0.0).gain > 0.1


@given(st.lists(st.tuples(quality, quality, st.booleans()), min_size=1, max_size=6), st.integers(0, 5), quality)
def test_a_replaced_score_leaves_what_the_new_one_alone_would(
    answers: list[tuple[float, float, bool]], which: int, new: float
) -> None:
    which %= len(answers)
    outcomes = [outcome(3, offloaded, cost, q)._replace(at=i * HOUR) for i, (q, cost, offloaded) in enumerate(answers)]
    changed = [o._replace(quality=new) if i == which else o for i, o in enumerate(outcomes)]
    replaced = credit.with_replaced(
        applied(outcomes),
        credit.credit_of(outcomes[which]),
        credit.credit_of(changed[which]),
        outcomes[which].at,
        len(answers) - 1 - which,
    )
    assert tuple(replaced)[:6] == pytest.approx(tuple(applied(changed))[:6], abs=1e-12)


def applied(outcomes: list[Outcome]) -> ExampleStats:
    stats = ExampleStats()
    for each in outcomes:
        stats = credit.with_first(stats, credit.credit_of(each), each.at)
    return stats
