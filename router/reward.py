"""What the router learns, and what a backend costs: the one place where quality and cost become numbers to compare.

The reward of an answer is its quality, in [0, 1], alone. Cost enters in two other places only: arms are tried from
the cheapest up (`choice`), and the load bias takes score from an arm in proportion to its relative cost (`load`).
So a price that changes needs no relearning. Latency is no part of it.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from router.types import Arm, Vector, price_order, request_order


def checked_quality(quality: float) -> float:
    """`quality`, or ValueError when it is not a number in [0, 1]."""
    if not 0.0 <= quality <= 1.0:
        raise ValueError(f"quality must be in [0, 1], not {quality}")
    return float(quality)


def load_prices(arms: Sequence[Arm]) -> list[float]:
    """What each arm costs this request, as far as it may count under load: no arm counts for more than one with a
    higher list price, which is where the load is, nor for more than one that costs this request more."""
    prices = [arm.price for arm in arms]
    for order in (price_order(arms), request_order(arms)):
        for cheaper, dearer in pairwise(order):
            prices[dearer] = max(prices[dearer], prices[cheaper])
    return prices


def relative_cost(prices: Sequence[float]) -> Vector:
    """(n_arms,) C_i in [0, 1]: the cheapest 0, the dearest 1, linear between; all 0 when the prices are equal."""
    if not all(math.isfinite(price) and price >= 0 for price in prices):
        raise ValueError(f"prices must be finite and >= 0, not {list(prices)}")
    dearest, cheapest = max(prices, default=0.0), min(prices, default=0.0)
    if dearest == cheapest or cheapest / dearest == 1.0:
        return np.zeros(len(prices))
    least = cheapest / dearest  # first, so that denormal differences do not overflow
    return np.array([(price / dearest - least) / (1.0 - least) for price in prices])
