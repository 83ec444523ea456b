import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.reward import checked_quality, relative_cost

prices = st.lists(st.floats(0, 1e300), min_size=1, max_size=6)


def test_the_cheapest_costs_0_and_the_dearest_1():
    np.testing.assert_allclose(relative_cost([2.0, 1.0, 5.0]), [0.25, 0.0, 1.0])


@pytest.mark.parametrize("equal", [[], [0.0], [3.0], [0.0, 0.0], [2.0, 2.0, 2.0]])
def test_equal_prices_cost_nothing(equal):
    np.testing.assert_array_equal(relative_cost(equal), np.zeros(len(equal)))


@settings(deadline=None)
@given(prices)
def test_costs_keep_the_order_of_prices_and_stay_within_0_and_1(prices):
    costs = relative_cost(prices)
    assert (costs >= 0).all() and (costs <= 1).all()
    assert (np.diff(costs[np.argsort(prices)]) >= 0).all()
    if max(prices) > min(prices) * (1 + 1e-9):
        assert costs[np.argmax(prices)] == 1.0 and costs[np.argmin(prices)] == 0.0


@pytest.mark.parametrize("bad", [[1.0, -1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_prices_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="prices"):
        relative_cost(bad)


def test_quality_is_within_0_and_1():
    assert [checked_quality(q) for q in (0, 0.25, 1)] == [0.0, 0.25, 1.0]
    for bad in (-1e-9, 1.0000001, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="quality"):
            checked_quality(bad)
