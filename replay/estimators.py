"""What another policy would have earned on logged decisions: estimates of its value, with intervals.

For request i the log has the backend a_i that was drawn with the probability p_i (its propensity), and the value r_i
that came of it. A policy under evaluation would have drawn a_i with the probability pi_i. With w_i = pi_i / p_i:

    IPS    sum(w r) / n              unbiased (Horvitz and Thompson 1952), wide where weights are large
    SNIPS  sum(w r) / sum(w)         self-normalised (Swaminathan and Joachims 2015): biased by O(1/n), steadier
    DR     sum(m + w (r - q)) / n    doubly robust (Dudik, Langford and Li 2011): q_i is a model's guess of r_i, m_i its
                                     guess of the policy's value; right where either model or propensities are

Intervals are normal: the standard error of the terms (for SNIPS by linearisation), 1.96 of them to each side at 95 %.
They mean something where the effective sample size, sum(w)^2 / sum(w^2), is not small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEAST_EFFECTIVE = 50.0  # effective sample size below which nothing is said
LEAST_SHARE = 0.01  # of the rows, as well
LEAST_COVERED = 0.95
FOLDS = 5
RIDGE = 1.0
FLAT = 1e-9
FAR = 8.0  # standard deviations from what was seen beyond which a line is not followed


class Interval(NamedTuple):
    """An estimate and what it lies between."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        return dict(self._asdict())


class Log(NamedTuple):
    """Decisions, one row each. The reward of a row that is not `known` is not 0 but unknown."""

    arms: NDArray[np.int64]  # (n,): which arm was drawn
    propensities: Array  # (n,), in (0, 1]
    possible: NDArray[np.bool_]  # (n, n_arms): which arms could have been drawn
    known: NDArray[np.bool_]  # (n,)
    rewards: Array  # (n,); anything where it is not known
    context: Array  # (n, n_features): what was known before the draw, for the model

    @property
    def n(self) -> int:
        return len(self.arms)

    def shares(self) -> Array:
        """(n_arms,): of how many of each arm's answers the reward is known, in [0, 1]."""
        n_arms = self.possible.shape[1]
        drawn = np.bincount(self.arms, minlength=n_arms)
        known = np.bincount(self.arms[self.known], minlength=n_arms)
        return np.asarray(known / np.maximum(drawn, 1))


class Estimates(NamedTuple):
    """One policy's value by each estimator."""

    ips: Interval
    snips: Interval
    dr: Interval
    effective: float  # sample size
    largest_weight: float
    covered: float  # of what the policy would do, the share that the log could show

    def overlap(self, n: int) -> bool:
        """Whether log and policy have enough in common for the estimates to mean anything."""
        return self.covered >= LEAST_COVERED and self.effective >= max(LEAST_EFFECTIVE, LEAST_SHARE * n)


def evaluate(log: Log, policy: Array, guesses: Array, level: float = 0.95) -> Estimates:
    """`policy` (n, n_arms): its probabilities; `guesses` (n, n_arms): a model's of the reward, made without row i's own
    reward (see `cross_fitted`). `log` has at least one row.

    A row whose reward is not known has the weight 0, and the others of its arm weigh more, by one over the share of the
    arm's answers whose reward is known: right where, among one arm's answers, it is chance which are known.
    """
    rows, shares = np.arange(log.n), log.shares()
    weights = np.zeros(log.n)
    known = log.known
    weights[known] = (policy[rows, log.arms] / log.propensities)[known] / shares[log.arms[known]]
    rewards = np.where(known, log.rewards, 0.0)
    squares = float((weights**2).sum())
    guessed = guesses[rows, log.arms]
    return Estimates(
        ips=mean_interval(weights * rewards, level),
        snips=ratio_interval(weights, rewards, level),
        dr=mean_interval((policy * guesses).sum(axis=1) + weights * (rewards - guessed), level),
        effective=float(weights.sum()) ** 2 / squares if squares else 0.0,
        largest_weight=float(weights.max()),
        covered=float((policy * (log.possible & (shares > 0))).sum() / log.n),
    )


def mean_interval(terms: Array, level: float = 0.95) -> Interval:
    """The mean of independent terms (n,), n >= 1."""
    mean = float(terms.mean())
    error = float(terms.std(ddof=1)) / math.sqrt(len(terms)) if len(terms) > 1 else math.inf
    return _around(mean, error, level)


def ratio_interval(weights: Array, values: Array, level: float = 0.95) -> Interval:
    """sum(w v) / sum(w), its error by linearisation: sqrt(sum(w^2 (v - ratio)^2)) / sum(w)."""
    total = float(weights.sum())
    if not total:
        return Interval(math.nan, -math.inf, math.inf)
    ratio = float((weights * values).sum()) / total
    error = math.sqrt(float((weights**2 * (values - ratio) ** 2).sum())) / total
    return _around(ratio, error, level)


def difference_interval(a: Array, b: Array, level: float = 0.95) -> Interval | None:
    """mean(a) - mean(b) of two independent groups (Welch); None where one has fewer than two."""
    if len(a) < 2 or len(b) < 2:
        return None
    error = math.sqrt(float(a.var(ddof=1)) / len(a) + float(b.var(ddof=1)) / len(b))
    return _around(float(a.mean() - b.mean()), error, level)


def _around(value: float, error: float, level: float) -> Interval:
    reach = NormalDist().inv_cdf(0.5 + level / 2) * error
    return Interval(value, value - reach, value + reach)


def cross_fitted(log: Log, seed: int = 0) -> Array:
    """(n, n_arms): guesses of the reward by one ridge regression per arm, each row's from the other folds alone."""
    fold = np.random.default_rng(seed).integers(FOLDS, size=log.n)
    known = log.rewards[log.known]
    guesses = np.zeros((log.n, log.possible.shape[1]))
    if not len(known):
        return guesses
    for k in range(FOLDS):
        held = fold == k
        for arm in range(guesses.shape[1]):
            learned = ~held & log.known & (log.arms == arm)
            predict = ridge(log.context[learned], log.rewards[learned], float(known.mean()))
            guesses[held, arm] = predict(log.context[held])
    return np.clip(guesses, known.min(), known.max())


def ridge(x: Array, y: Array, otherwise: float) -> Callable[[Array], Array]:
    """Least squares with a penalty on all but the mean; `otherwise` where there is nothing to learn from."""
    if not len(y):
        return lambda rows: np.full(len(rows), otherwise)
    centre, mean, spread = x.mean(axis=0), float(y.mean()), x.std(axis=0)
    scale = np.where(spread > FLAT, spread, math.inf)  # what never varies says nothing
    z = (x - centre) / scale
    weights = np.linalg.solve(z.T @ z + RIDGE * math.sqrt(len(y)) * np.eye(x.shape[1]), z.T @ (y - mean))

    def predict(rows: Array) -> Array:
        return np.asarray(mean + np.clip((rows - centre) / scale, -FAR, FAR) @ weights)

    return predict
