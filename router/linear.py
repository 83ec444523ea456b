"""Policies on linear beliefs: Thompson sampling and upper confidence bounds, both in closed form."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from router.choice import choice_shares
from router.policy import one_hot
from router.regression import Regressions
from router.types import Arm, Matrix, Vector, price_order, request_order

CURIOSITY = 100.0  # feedbacks: at as many, an arm's spread has come down from 1 to 0.71


class Linear(Regressions):
    """What both have in common: their scores.

    The bar is `quality_target` times the dearest arm's expected quality. The load bias moves the bar along with the
    largest bias, that is, every arm gains (the largest bias - its own) against a bar that stands still. Cheaper arms
    gain at least as much as dearer ones, so with every step of load the same arm or a cheaper one is picked: the
    chance of the k cheapest never falls, for any k.
    """

    def scores(self, x: Matrix, arms: Sequence[Arm], load_bias: Vector) -> Vector:
        return np.array(self.believed(x, arms)[0]) - load_bias


def bar(means: Vector | Sequence[float], arms: Sequence[Arm], quality_target: float) -> float:
    """The quality that a cheaper arm has to be expected to keep."""
    return quality_target * min(1.0, max(0.0, float(means[price_order(arms)[-1]])))


class LinearThompson(Linear):
    """Thompson sampling: a score is N(m . x, spread^2 * x^T A^-1 x), the belief about the *mean* quality (`spread` is
    Agrawal and Goyal's v), and arms are chosen by `choice`, the cheapest for this request first."""

    kind = "linear-thompson"

    def __init__(self, *, spread: float = 0.5, **learning: Any) -> None:
        """`learning`: see `Regressions`."""
        if not (math.isfinite(spread) and spread > 0):
            raise ValueError(f"spread must be finite and > 0, not {spread}")
        super().__init__(**learning)
        self.spread = spread

    def probabilities(self, x: Matrix, arms: Sequence[Arm], load_bias: Vector, quality_target: float) -> Vector:
        order = request_order(arms)
        means, sds = self.believed(x, arms)
        biases = load_bias.tolist()
        gains = [max(biases) - bias for bias in biases]
        least = bar(means, arms, quality_target)
        sds = [spread * sd for spread, sd in zip(self._spreads(arms), sds, strict=True)]
        chosen = _chosen(means, sds, gains, order, least)
        for i, share in self._hopeful(arms):
            mean, sd = self.at_first(arms[i], x[i])
            if mean <= means[i]:
                continue  # it is known to be as good by now
            anew = _chosen(_with(means, i, mean), _with(sds, i, sd), gains, order, least)
            chosen = [a + share * (b - a) for a, b in zip(chosen, anew, strict=True)]
        return np.array(chosen)

    def _hopeful(self, arms: Sequence[Arm]) -> list[tuple[int, float]]:
        """Cheaper arms whose poor answers have lately turned out well, with the chance in [0, 1] that is given to their
        being as good as an arm never seen. So that one that recovered need not wait for uniform exploration to show it:
        each good answer brings the next one nearer, and a bad one ends it."""
        dearest = price_order(arms)[-1]
        return [(i, share) for i, share in enumerate(self.hopes(arms)) if share and i != dearest]

    def spreads(self, arms: Sequence[Arm]) -> Vector:
        """(n_arms,) in [`spread`, 1]: 1 before any feedback, `spread` once there is plenty. An arm that bad luck has
        starved stays curious, and one that is known does not waste requests on doubt."""
        return np.array(self._spreads(arms))

    def _spreads(self, arms: Sequence[Arm]) -> list[float]:
        known = [self.statistics_.get(arm.name) for arm in arms]
        return [1.0 if s is None else max(self.spread, math.sqrt(CURIOSITY / (CURIOSITY + s.count))) for s in known]


def _chosen(
    means: Sequence[float], sds: Sequence[float], gains: Sequence[float], order: Sequence[int], least: float
) -> list[float]:
    """(n_arms,), sums to 1, in the order of the arms; `order` is that of preference."""
    shares = choice_shares(tuple([means[i] + gains[i] for i in order]), tuple([sds[i] for i in order]), least)
    chosen = [0.0] * len(order)
    for i, share in zip(order, shares, strict=True):
        chosen[i] = share
    return chosen


def _with(values: Sequence[float], i: int, value: float) -> list[float]:
    return [value if j == i else v for j, v in enumerate(values)]


class LinearUcb(Linear):
    """LinUCB (Li et al. 2010): an arm is judged by what it may well be, m . x + alpha * sqrt(x^T A^-1 x). The cheapest
    for this request whose bound reaches the bar is served, and where there is none, the one with the largest bound.

    The rule itself draws nothing: its distribution is a certainty, and what the Router mixes in is all the chance.
    """

    kind = "linear-ucb"

    def __init__(self, *, alpha: float = 1.0, **learning: Any) -> None:
        """`learning`: see `Regressions`."""
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"alpha must be finite and >= 0, not {alpha}")
        super().__init__(**learning)
        self.alpha = alpha

    def probabilities(self, x: Matrix, arms: Sequence[Arm], load_bias: Vector, quality_target: float) -> Vector:
        means, sds = self.beliefs(x, arms)
        bounds = means + self.alpha * sds + (load_bias.max() - load_bias)
        least = bar(means, arms, quality_target)
        chosen = next((i for i in request_order(arms) if bounds[i] >= least), int(np.argmax(bounds)))
        return one_hot(chosen, len(arms))


class LinearThreshold(LinearUcb):
    """A quality predictor and a threshold, as RouteLLM routes: the cheapest arm whose expected quality reaches the bar
    is served, else the best. It explores nothing by itself."""

    kind = "linear-threshold"

    def __init__(self, **learning: Any) -> None:
        """`learning`: see `Regressions`."""
        super().__init__(alpha=0.0, **learning)
