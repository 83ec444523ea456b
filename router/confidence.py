"""A mean of qualities and bounds on it that hold at all times at once, although what is asked depends on what was seen.

Let x_i in [0, 1] have the mean mu_i given all that came before, and let p_i in [0, 1] be any guess of x_i made before
it is seen. For every rate l in (0, 1)

    exp(l * sum(x_i - mu_i) - psi(l) * V),    psi(l) = -log(1 - l) - l,    V = sum((x_i - p_i)^2)

is a supermartingale that starts at 1 (Fan, Grama and Liu 2015; Howard, Ramdas, McAuliffe and Sekhon 2021, theorem 4),
and so is the mean of several rates. With weights w_i in [0, 1], known before x_i is, the same holds of w_i x_i,
w_i mu_i and w_i p_i, which bounds weighted means. By Ville's inequality it ever reaches 1 / alpha with a probability
of alpha at most, so that, at all times t at once,

    mean of the mu_i up to t  >=  mean of the x_i up to t  -  boundary(V, alpha) / t

and in the same way from above. The mu_i need not be equal nor the x_i independent: the policy may adapt to all it saw.
"""

import math
from dataclasses import dataclass

import numpy as np

from router.types import Vector

# Many feedbacks want a small rate, few a large one. 0.01 serves some 50,000; 0.9 the first dozens.
_RATES = np.geomspace(0.01, 0.9, 12)
_PSI = -np.log1p(-_RATES) - _RATES
_LOG_WEIGHTS = np.log(_RATES / _RATES.sum())  # more on the large ones: a decision early is worth more than one late
_STEPS = 4


@dataclass(slots=True)
class Evidence:
    """What the qualities of some answers amount to, each with a weight in [0, 1]."""

    count: float = 0.0  # sum of the weights
    total: float = 0.0
    spread: float = 0.0  # V: squared errors of guessing each quality by those before

    @property
    def mean(self) -> float:
        """In [0, 1]; one half while there is none."""
        return self.total / self.count if self.count else 0.5

    def add(self, quality: float, weight: float = 1.0) -> None:
        guess = (0.5 + self.total) / (1 + self.count)
        self.spread += (weight * (quality - guess)) ** 2
        self.total += weight * quality
        self.count += weight

    def replace(self, old: float, new: float, weight: float = 1.0) -> None:
        """One of the qualities was another: `spread` grows by the most that this can make of it, whatever the guess."""
        self.total = min(self.count, max(0.0, self.total + weight * (new - old)))
        self.spread += weight**2 * abs(new - old) * max(old + new, 2.0 - old - new)


def boundary(spread: Vector, alpha: Vector) -> Vector:
    """(n,): what the sum of x_i - mu_i ever exceeds with a probability of `alpha` (n,) at most, at `spread` (n,) >= 0.

    The root s of  sum_k w_k exp(l_k s - psi(l_k) V) = 1 / alpha,  by Newton's method from the right: the left side's
    logarithm is convex in s, so every step stays at or above the root and the bound valid however few there are.
    """
    costs = _PSI * spread[:, None] - _LOG_WEIGHTS  # (n, n_rates)
    wanted = -np.log(alpha)[:, None]
    s = ((costs + wanted) / _RATES).min(axis=1)  # where the best of the rates alone reaches it
    for _ in range(_STEPS):
        exponents = _RATES * s[:, None] - costs
        top = exponents.max(axis=1, keepdims=True)
        terms = np.exp(exponents - top)
        total = terms.sum(axis=1)
        excess = top[:, 0] + np.log(total) - wanted[:, 0]
        s = s - np.maximum(excess, 0.0) * total / (terms @ _RATES)
    result: Vector = s
    return result


def bounds(evidence: list[Evidence], alphas: list[float]) -> tuple[Vector, Vector]:
    """Lower and upper bounds (n,) in [0, 1] on the mean of each one's expected qualities.

    Each of the two fails, at any time from the first quality on, with a probability of its `alphas` (n,) at most.
    Where there is no quality: 0 and 1.
    """
    counts = np.array([e.count for e in evidence], dtype=np.float64)
    means = np.array([e.mean for e in evidence])
    beyond = boundary(np.array([e.spread for e in evidence]), np.array(alphas, dtype=np.float64))
    radius = np.divide(beyond, counts, out=np.full(len(counts), math.inf), where=counts > 0)
    return np.clip(means - radius, 0.0, 1.0), np.clip(means + radius, 0.0, 1.0)
