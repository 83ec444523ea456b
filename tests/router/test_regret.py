"""Regret where the optimum is known. `python -m tests.bench.regret` has a table, with a well-known library beside."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.bench.regret import BernoulliWorld, LinearWorld, contestants, divergence, exponent, measured


@pytest.mark.parametrize("name", ["linear-thompson", "linear-ucb"])
def test_regret_grows_far_slower_than_time_and_stays_far_below_chance(name: str) -> None:
    worlds = [LinearWorld.drawn(np.random.default_rng(100 + i)) for i in range(3)]
    found = measured(contestants()[name], worlds, 500)
    chance = measured(contestants()["uniform"], worlds, 500)
    assert found[:, -1].mean() < 0.4 * chance[:, -1].mean()
    assert exponent(found.mean(axis=0)) < 0.8 < exponent(chance.mean(axis=0))


def test_without_features_thompson_sampling_is_near_the_best_possible() -> None:
    world = BernoulliWorld((0.7, 0.4))
    found = measured(contestants()["linear-thompson"], [world] * 4, 400)
    assert found[:, -1].mean() < 6 * world.least_regret(400)


def test_the_least_regret_is_the_formula() -> None:
    assert divergence(0.6, 0.9) == pytest.approx(0.6 * math.log(2 / 3) + 0.4 * math.log(4))
    assert BernoulliWorld().least_regret(1000) == pytest.approx(math.log(1000) * 0.3 / divergence(0.6, 0.9))
