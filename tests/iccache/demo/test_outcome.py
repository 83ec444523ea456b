import math

import pytest
from scipy import optimize, stats

from iccache.demo.outcome import Interval, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 30), (1, 30), (15, 30), (29, 30), (30, 30), (77, 100), (1, 1)])
def test_wilson_is_the_score_interval_of_scipy(successes: int, n: int) -> None:
    known = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")

    interval = wilson(successes, n)

    assert interval.share == successes / n
    assert interval.low == pytest.approx(known.low, abs=1e-12)
    assert interval.high == pytest.approx(known.high, abs=1e-12)


def test_the_bounds_are_where_the_score_test_just_rejects() -> None:
    """By definition: |p_hat - p| = z sqrt(p (1 - p) / n)."""
    z, p_hat, n = stats.norm.ppf(0.975), 12 / 40, 40

    def rejects_by(p: float) -> float:
        return abs(p_hat - p) - z * math.sqrt(p * (1 - p) / n)

    assert wilson(12, 40).low == pytest.approx(optimize.brentq(rejects_by, 1e-9, p_hat), abs=1e-9)
    assert wilson(12, 40).high == pytest.approx(optimize.brentq(rejects_by, p_hat, 1 - 1e-9), abs=1e-9)


def test_without_requests_nothing_is_known() -> None:
    assert wilson(0, 0) == Interval(0.0, 0.0, 1.0)


def test_above_means_that_the_intervals_do_not_overlap() -> None:
    assert wilson(23, 30).above(wilson(8, 30))
    assert not wilson(18, 30).above(wilson(10, 30))
    assert not wilson(8, 30).above(wilson(23, 30))
