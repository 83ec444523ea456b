from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from router.choice import choice_probabilities

mean = st.floats(-0.5, 1.5)
sd = st.floats(-4, 0.5).map(lambda exponent: 10.0**exponent)
arms = st.integers(2, 5).flatmap(
    lambda n: st.tuples(st.lists(mean, min_size=n, max_size=n), st.lists(sd, min_size=n, max_size=n))
)


def by_quadrature(means, sds, threshold):
    """The definition, one arm at a time, by an adaptive integrator that is told where to look."""
    n, answer = len(means), []
    for i in range(n):
        passes = stats.norm.sf(threshold, means[i], sds[i])
        passes *= np.prod([stats.norm.cdf(threshold, means[j], sds[j]) for j in range(i)])
        others = [j for j in range(n) if j != i]

        def density(q, i=i, others=others):
            return stats.norm.pdf(q, means[i], sds[i]) * stats.norm.cdf(q, means[others], sds[others]).prod()

        low, high = means[i] - 10 * sds[i], min(threshold, means[i] + 10 * sds[i])
        inside = {means[j] + k * sds[j] for j in range(n) for k in (-5, -2, 0, 2, 5)}
        edges = [low, *sorted(p for p in inside if low < p < high), high] if low < high else []
        best = sum(integrate.quad(density, a, b, epsabs=1e-10)[0] for a, b in pairwise(edges))
        answer.append(passes + best)
    return np.array(answer)


def by_sampling(means, sds, threshold, n, rng):
    q = rng.normal(means, sds, size=(n, len(means)))
    passes = q >= threshold
    chosen = np.where(passes.any(axis=1), passes.argmax(axis=1), q.argmax(axis=1))
    return np.bincount(chosen, minlength=len(means)) / n


CASES = [
    ([0.6, 0.9], [0.3, 0.25], 0.7),
    ([0.9, 0.9], [0.05, 0.05], 0.95),
    ([0.2, 0.5, 0.9], [0.4, 0.2, 0.01], 0.85),
    ([0.8, 0.8, 0.8, 0.8], [1e-4, 1.0, 1e-2, 0.3], 0.8),
    ([0.1, 0.1, 0.1], [0.1, 0.1, 0.1], 2.0),
    ([0.1, 0.2, 0.3], [1e-4, 2.0, 1e-3], -1.0),
    ([0.5] * 12, list(np.linspace(0.01, 0.5, 12)), 0.9),
]


@pytest.mark.parametrize(("means", "sds", "threshold"), CASES)
def test_probabilities_are_those_of_quadrature_and_of_sampling(means, sds, threshold, rng):
    means, sds = np.array(means), np.array(sds)
    p = choice_probabilities(means, sds, threshold)
    np.testing.assert_allclose(p, by_quadrature(means, sds, threshold), atol=1e-8)
    n = 200_000
    np.testing.assert_allclose(p, by_sampling(means, sds, threshold, n, rng), atol=5 * np.sqrt(0.25 / n))


def test_random_cases_agree_with_quadrature(rng):
    for _ in range(15):
        n = rng.integers(2, 5)
        means, sds = rng.uniform(-0.2, 1.2, n), 10 ** rng.uniform(-3.5, 0.3, n)
        threshold = rng.uniform(0, 1)
        p = choice_probabilities(means, sds, threshold)
        np.testing.assert_allclose(p, by_quadrature(means, sds, threshold), atol=1e-6)


@settings(deadline=None)
@given(arms, st.floats(-1, 2))
def test_probabilities_sum_to_1_and_none_is_negative(arms, threshold):
    p = choice_probabilities(np.array(arms[0]), np.array(arms[1]), threshold)
    assert (p >= 0).all() and p.sum() == pytest.approx(1, abs=1e-12)


def test_without_a_bar_within_reach_it_is_plain_thompson_sampling():
    """Two normals: P(first larger) = Phi((m1 - m2) / sqrt(s1^2 + s2^2)), in closed form."""
    p = choice_probabilities(np.array([0.6, 0.9]), np.array([0.3, 0.1]), 50.0)
    assert p[0] == pytest.approx(stats.norm.cdf(-0.3 / np.hypot(0.3, 0.1)), abs=1e-10)


def test_the_cheapest_that_is_sure_to_pass_is_taken_whatever_the_rest_promise():
    assert choice_probabilities(np.array([0.8, 0.95, 0.99]), np.full(3, 0.001), 0.7)[0] > 1 - 1e-9
    assert choice_probabilities(np.array([0.6, 0.95, 0.99]), np.full(3, 0.001), 0.7)[1] > 1 - 1e-9


def test_one_arm_is_certain_and_certain_arms_are_no_problem():
    np.testing.assert_array_equal(choice_probabilities(np.array([0.1]), np.array([0.2]), 0.9), [1.0])
    p = choice_probabilities(np.array([0.3, 0.5, 0.4]), np.zeros(3), 0.9)
    np.testing.assert_allclose(p, [0, 1, 0], atol=1e-12)


@settings(deadline=None)
@given(arms, st.floats(0, 1), st.lists(st.floats(0, 0.5), min_size=5, max_size=5), st.floats(0, 1))
def test_gains_that_fall_with_price_only_move_the_choice_down_in_price(arms, threshold, gains, share):
    """Why the load bias is safe for any number of arms: the chance of the k cheapest never falls, for any k."""
    means, sds = np.array(arms[0]), np.array(arms[1])
    gains = np.sort(gains[: len(means)])[::-1]
    gains[-1] = 0.0
    less = choice_probabilities(means + share * gains, sds, threshold)
    more = choice_probabilities(means + gains, sds, threshold)
    assert (np.cumsum(more) >= np.cumsum(less) - 1e-9).all()
