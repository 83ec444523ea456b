"""The router, its load bias and the engines in a closed loop: nothing oscillates."""

from __future__ import annotations

import numpy as np
import pytest

from replay.simulate.run import KINDS, Simulated, simulate
from replay.simulate.world import Assumptions, World

MINUTE = 60.0
LOW, HIGH = 0.7, 1.8  # requests a second: below and far above what the large model can take
STEADY, STEPS = [(HIGH, 10)], [(LOW, 5), (HIGH, 6), (LOW, 6)]  # (requests a second, minutes)


def run(monkeypatch: pytest.MonkeyPatch, phases: list[tuple[float, int]], seed: int) -> Simulated:
    """IC-Cache with Poisson arrivals whose rate is as in `phases`."""

    def arrivals(self: World) -> list[float]:
        begin, times = 0.0, []
        for rate, minutes in phases:
            count = self.rng.poisson(rate * minutes * MINUTE)
            times += sorted(begin + self.rng.random(count) * minutes * MINUTE)
            begin += minutes * MINUTE
        return [float(t) for t in times]

    monkeypatch.setattr(World, "arrivals", arrivals)
    return simulate(KINDS[0], Assumptions(), seed)


def shares(found: Simulated) -> np.ndarray:
    return np.array([share for _, share, _ in found.by_minute])


def test_under_constant_load_the_offloaded_share_settles(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the fourth minute on it wanders as little as a coin of the same bias, give or take a half, and what is above
    the mean in one minute is not below it in the next as a rule."""
    settled = shares(run(monkeypatch, STEADY, 11))[3:10]
    chance = np.sqrt(settled.mean() * (1 - settled.mean()) / (HIGH * MINUTE))
    assert settled.std(ddof=1) < 2.0 * chance
    ups = settled - settled.mean()
    assert (ups[1:] * ups[:-1]).sum() / (ups**2).sum() > -0.7
    assert settled.mean() > 0.6


def test_the_share_follows_a_step_of_load_up_and_down_within_two_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shares(run(monkeypatch, STEPS, 21))
    before, high, after = found[2:5].mean(), found[7:11].mean(), found[13:17].mean()
    assert high > before + 0.1
    assert after == pytest.approx(before, abs=0.12)
    assert found[7:11].min() > before, "from the third minute of high load on it stays up"
    assert found[13:17].max() < high, "and from the third minute of low load on it stays down"
