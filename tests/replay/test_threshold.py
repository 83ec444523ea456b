"""The threshold of utility, against worlds in which the effect of every example is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from replay.threshold import LEAST_LEFT_OUT, Shown, Threshold, choose

Effect = Callable[[float], float]  # utility -> what showing an example of it truly adds


def world(n: int, effect: Effect, seed: int = 0, price: float = 0.0, share: float = 0.2) -> list[Shown]:
    """Answers to requests of a hard and an easy kind, whose chance to be right is the sum of what was shown.

    Hard requests have examples of low utility: that those are shown where answers are bad says nothing about them.
    """
    rng = np.random.default_rng(seed)
    answers = []
    for i in range(n):
        hard = i % 2
        utilities = np.sort(rng.uniform(0.0, 0.4 if hard else 0.6, 3))
        out = int(rng.integers(3)) if rng.random() < share else None
        chance = (0.2 if hard else 0.5) + sum(effect(u) for j, u in enumerate(utilities) if j != out)
        left = None if out is None else float(utilities[out])
        answers.append(Shown(str(hard), float(rng.random() < chance), utilities.tolist(), left, price))
    return answers


def useless_below(at: float) -> Effect:
    return lambda u: 0.14 if u >= at else 0.0


def test_examples_that_add_nothing_are_left_out_from_where_they_cost_more_than_they_bring() -> None:
    found = [choose(world(12_000, useless_below(0.2), seed, price=0.07)) for seed in range(6)]
    assert all(0.14 <= t.at <= 0.26 for t in found)  # the best is .2, and tenths of all utilities are tried
    for t in found:
        assert abs(t.gain - _true_gain(t.at, useless_below(0.2))) < 3.5 * t.error


def _true_gain(at: float, effect: Effect) -> float:
    """Mean effect of an example below `at`: brute force over what examples the world has."""
    rng = np.random.default_rng(99)
    drawn = np.concatenate([rng.uniform(0, top, 100_000) for top in (0.4, 0.6)])
    return float(np.mean([effect(u) for u in drawn[drawn < at]]))


def test_the_interval_of_the_gain_covers_the_truth_as_often_as_it_says() -> None:
    inside = total = 0
    for seed in range(60):
        t = choose(world(1500, lambda u: 0.05, seed, price=1.0))  # a price that always chooses the highest
        assert t.at > 0.3
        inside += abs(t.gain - 0.05) < 1.96 * t.error
        total += 1
    assert 0.85 <= inside / total <= 1.0


@pytest.mark.parametrize("price", [0.0, 0.05])
def test_what_helps_is_not_left_out(price: float) -> None:
    raised = [choose(world(4000, lambda u: 0.1, seed, price)).at for seed in range(40)]
    assert sum(at > 0 for at in raised) <= 4


def test_free_examples_that_neither_help_nor_harm_are_mostly_left_alone() -> None:
    raised = [choose(world(4000, lambda u: 0.0, seed)).at for seed in range(60)]
    assert sum(at > 0 for at in raised) <= 18  # the tries share their answers: 5 % each, not 5 % in all


def test_without_enough_answers_nothing_is_measured() -> None:
    assert choose([]) == Threshold(0.0)
    few = world(4000, lambda u: -0.2)
    kept, count = [], 0
    for answer in few:
        count += answer.left_out is not None
        if answer.left_out is None or count < LEAST_LEFT_OUT:
            kept.append(answer)
    assert choose(kept) == Threshold(0.0)
    assert choose(few).at > 0


def test_single_examples_tell_nothing_of_leaving_one_out() -> None:
    assert choose([Shown("k", 1.0, [0.1])] * 500) == Threshold(0.0)
