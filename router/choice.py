"""With which probability each arm is chosen, when scores are uncertain and cheap arms are preferred.

One Thompson sample draws a score q_i ~ N(mean_i, sd_i^2) for every arm, independently (Agrawal and Goyal 2013). Going
from the cheapest arm up, the first with q_i >= threshold is taken; when there is none, the one with the largest q_i.
The probability that an arm comes out is computed, not sampled:

    P(i) = P(q_i >= t) * prod_{j cheaper} P(q_j < t)  +  integral_{-inf}^{t} phi_i(q) prod_{j != i} Phi_j(q) dq
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from router.types import Matrix, Vector

MIN_SD = 1e-9  # below it an arm counts as certain to nine digits, and the quadrature stays well scaled
_REACH = 8.0  # standard deviations beyond which a normal density is nothing (6e-16)
_KNOTS = np.array([-8.0, -5.0, -2.5, 0.0, 2.5, 5.0, 8.0])  # pieces on which every normal is nearly a polynomial
_ANGLES, _ANGLE_WEIGHTS = (part.tolist() for part in np.polynomial.legendre.leggauss(8))  # 2e-12 off at most
_UNIT_RULE = [((1.0 + x) / 2.0, w / 2.0) for x, w in zip(_ANGLES, _ANGLE_WEIGHTS, strict=True)]  # on [0, 1]
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(10)


def choice_probabilities(means: Vector, sds: Vector, threshold: float) -> Vector:
    """(n_arms,), sums to 1. `means` and `sds` (n_arms,) are in order of preference, cheapest first.

    Exact to about 1e-8 for any ratio of the standard deviations.
    """
    return np.array(choice_shares(tuple(np.asarray(means).tolist()), tuple(np.asarray(sds).tolist()), float(threshold)))


@lru_cache(maxsize=1024)  # a request that comes again while nothing was learned asks for the very same numbers
def choice_shares(means: tuple[float, ...], sds: tuple[float, ...], threshold: float) -> tuple[float, ...]:
    """`choice_probabilities` of a few arms, whose numbers are not worth an array."""
    if len(means) == 1:
        return (1.0,)
    sds = tuple([max(sd, MIN_SD) for sd in sds])
    shares, all_fail = [], 1.0
    for mean, sd in zip(means, sds, strict=True):
        z = (threshold - mean) / sd * math.sqrt(0.5)
        shares.append(all_fail * 0.5 * math.erfc(z))
        all_fail *= 0.5 * math.erfc(-z)
    if all_fail > 1e-10:
        best = _better_of_two_below(means, sds, threshold) if len(means) == 2 else _best(means, sds, threshold)
        shares = [share + more for share, more in zip(shares, best, strict=True)]
    total = math.fsum(shares)
    return tuple([share / total for share in shares])


def _better_of_two_below(means: Sequence[float], sds: Sequence[float], threshold: float) -> Sequence[float]:
    """`_best_below` for two arms, in a fraction of the time.

    With i the arm of the smaller sd, P(q_i < t, q_j < q_i) is a bivariate normal probability whose correlation
    rho = -sd_i / sqrt(sd_i^2 + sd_j^2) is at most 0.71 in size, where the integral over the angle from independence to
    that correlation (Drezner and Wesolowsky 1990) is smooth:

        P(X < h, Y < k) = Phi(h) Phi(k) + 1 / (2 pi) * integral_0^{asin rho} exp(-e(a)) da
        e(a) = (h^2 + k^2 - 2 h k sin a) / (2 cos^2 a)

    The other arm has what is left of P(both below t) = Phi(z_i) Phi(z_j).
    """
    i = 0 if sds[0] <= sds[1] else 1
    mean, sd, other, other_sd = means[i], sds[i], means[1 - i], sds[1 - i]
    spread = math.hypot(sd, other_sd)
    h, k = (threshold - mean) / sd, (mean - other) / spread
    end = math.asin(-sd / spread)
    total = 0.0
    for angle, weight in _UNIT_RULE:
        sine = math.sin(end * angle)
        total += weight * math.exp(-(h * h + k * k - 2.0 * h * k * sine) / (2.0 * (1.0 - sine * sine)))
    both = _below(h) * _below((threshold - other) / other_sd)
    own = min(max(_below(h) * _below(k) + end * total / (2.0 * math.pi), 0.0), both)
    return (own, both - own) if i == 0 else (both - own, own)


def _below(z: float) -> float:
    """Standard normal distribution function."""
    return 0.5 * math.erfc(-z * math.sqrt(0.5))


def _best(means: Sequence[float], sds: Sequence[float], threshold: float) -> Sequence[float]:
    shares: list[float] = _best_below(np.array(means), np.array(sds), threshold).tolist()
    return shares


def _best_below(means: Vector, sds: Vector, threshold: float) -> Vector:
    """(n_arms,): P(arm i has the largest score, and it is below the threshold)."""
    low = float((means - _REACH * sds).max())  # below it some arm is certain to be larger
    high = min(threshold, float((means + _REACH * sds).max()))
    if low >= high:
        # Not one arm has room below the threshold and above `low`, but for a sliver of measure 1e-15.
        return np.zeros(len(means))
    knots = (means[:, None] + sds[:, None] * _KNOTS).ravel()
    edges = np.unique(np.concatenate(([low, high], knots[(knots > low) & (knots < high)])))
    half = np.diff(edges)[:, None] / 2
    at = ((edges[:-1, None] + half) + half * _NODES).ravel()
    weights = (half * _WEIGHTS).ravel()

    z = (at - means[:, None]) / sds[:, None]  # (n_arms, n_nodes)
    density = np.exp(-0.5 * z * z) / (math.sqrt(2 * math.pi) * sds[:, None])
    integral: Vector = (density * _product_of_others(_cdf(z))) @ weights
    return integral


def _product_of_others(values: Matrix) -> Matrix:
    """Row i: the product of all rows but i, without dividing."""
    if len(values) == 2:
        return values[::-1]
    ones = np.ones((1, values.shape[1]))
    before = np.cumprod(np.concatenate((ones, values[:-1])), axis=0)
    after = np.cumprod(np.concatenate((ones, values[:0:-1])), axis=0)[::-1]
    return np.asarray(before * after)


def _cdf(z: Vector) -> Vector:
    """Standard normal distribution function of any shape of `z`, to 1e-10: cubic between the knots of a table."""
    at = (z.clip(-_REACH, _REACH) + _REACH) / _STEP
    low = np.minimum(at.astype(np.intp), len(_TABLE) - 2)
    u = at - low
    values, slopes = _TABLE[low], _SLOPES[low]
    rise, next_slopes = _TABLE[low + 1] - values, _SLOPES[low + 1]
    return np.asarray(
        values + u * (slopes + u * (3 * rise - 2 * slopes - next_slopes + u * (slopes + next_slopes - 2 * rise)))
    )


def _table() -> tuple[Vector, Vector]:
    """The distribution function at every `_STEP` of a standard deviation, and its rise over one step."""
    z = np.arange(-_REACH, _REACH + _STEP / 2, _STEP)
    values = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in z])
    return values, np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) * _STEP


_STEP = 1 / 64
_TABLE, _SLOPES = _table()
