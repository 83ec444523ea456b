import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import logsumexp

from router import confidence
from router.confidence import Evidence, boundary, bounds

ALPHA = 0.05


def collected(qualities):
    evidence = Evidence()
    for quality in qualities:
        evidence.add(quality)
    return evidence


@pytest.mark.parametrize("spread", [0.0, 0.4, 3.0, 80.0, 20_000.0])
@pytest.mark.parametrize("alpha", [0.5, 0.05, 1e-6])
def test_the_boundary_is_the_root_of_the_mixture_or_a_little_above(spread, alpha):
    def log_wealth(s):
        return logsumexp(confidence._RATES * s - confidence._PSI * spread + confidence._LOG_WEIGHTS) + np.log(alpha)

    root = brentq(log_wealth, -1e6, 1e6)
    found = boundary(np.array([spread]), np.array([alpha]))[0]
    assert root - 1e-9 * max(1.0, abs(root)) <= found <= root * 1.001 + 1e-6


def adaptive(rng, runs, times):
    """(runs, times) of means and outcomes: what comes next depends on what came before, as under a policy that
    learns. Outcomes are 0, 1 or in between."""
    means, outcomes = np.empty((2, runs, times))
    run_of_luck = np.zeros(runs)
    for t in range(times):
        means[:, t] = np.clip(0.6 + 0.35 * np.sin(run_of_luck), 0.05, 0.95)
        coin = rng.random(runs) < means[:, t]
        exact = np.clip(means[:, t] + rng.uniform(-0.05, 0.05, runs), 0.0, 1.0)
        outcomes[:, t] = np.where(t % 3, coin, exact)
        run_of_luck += outcomes[:, t] - 0.5
    return means, outcomes


@pytest.mark.parametrize("level", [0.5, 0.95, "adaptive"])
def test_the_bounds_hold_at_all_times_at_once(level):
    """Of 2000 runs of 300 qualities each, at most `ALPHA` ever leave a bound; they are looked at after every fifth."""
    rng, runs, times = np.random.default_rng(7), 2000, 300
    if level == "adaptive":
        means, outcomes = adaptive(rng, runs, times)
    else:
        means, outcomes = np.full((runs, times), level), (rng.random((runs, times)) < level).astype(float)
    counts = np.arange(1, times + 1)
    totals = outcomes.cumsum(axis=1)
    guesses = (0.5 + totals - outcomes) / counts
    spread = ((outcomes - guesses) ** 2).cumsum(axis=1)
    error = (outcomes - means).cumsum(axis=1)
    left = {"above": np.zeros(runs, dtype=bool), "below": np.zeros(runs, dtype=bool)}
    for t in range(0, times, 5):
        beyond = boundary(spread[:, t], np.full(runs, ALPHA))
        left["above"] |= error[:, t] > beyond
        left["below"] |= -error[:, t] > beyond
    for side, ever in left.items():
        assert ever.mean() <= ALPHA, side
    assert any(ever.any() for ever in left.values()), "a bound that never fails is needlessly wide"


def test_a_look_at_every_time_needs_more_than_a_bound_for_one_time():
    """The second way of knowing: the usual 95 % bound, looked at after every quality, is left far too often."""
    rng = np.random.default_rng(7)
    outcomes = (rng.random((2000, 400)) < 0.5).astype(float)
    counts = np.arange(1, 401)
    error = np.abs((outcomes - 0.5).cumsum(axis=1)) / counts
    usual = 1.96 * 0.5 / np.sqrt(counts)
    assert (error > usual)[:, 20:].any(axis=1).mean() > 0.25


def test_more_evidence_is_narrower_and_less_noise_too():
    few, many = collected([0.0, 1.0] * 20), collected([0.0, 1.0] * 400)
    calm = collected([0.45, 0.55] * 20)
    (low, high) = bounds([few, many, calm], [ALPHA] * 3)
    assert high[0] - low[0] > high[1] - low[1] > 0
    assert high[0] - low[0] > high[2] - low[2]


def test_nothing_known_is_everything_possible():
    low, high = bounds([Evidence()], [ALPHA])
    assert (low[0], high[0]) == (0.0, 1.0)


def test_a_replaced_quality_moves_the_mean_and_never_narrows():
    rng = np.random.default_rng(1)
    for _ in range(200):
        old, new, others = rng.random(), rng.random(), rng.random(5).tolist()
        place = int(rng.integers(6))
        replaced = collected([*others[:place], old, *others[place:]])
        replaced.replace(old, new)
        plain = [*others[:place], new, *others[place:]]
        assert replaced.total == pytest.approx(sum(plain))
        # the guesses before it are the same; those after it were made from the old value, which is still a guess
        guesses = [
            (0.5 + sum(seen[:i])) / (i + 1) for seen in [[*others[:place], old, *others[place:]]] for i in range(6)
        ]
        assert replaced.spread >= sum((x - g) ** 2 for x, g in zip(plain, guesses, strict=True)) - 1e-12


def test_bounds_on_weighted_means_hold_although_the_weights_follow_what_was_seen():
    """The weight of the next quality grows after bad luck. At 80 %, one run in five may ever be out of bounds."""
    rng, out = np.random.default_rng(11), 0
    for _ in range(150):
        evidence, weighted, weights, missed = Evidence(), 0.0, 0.0, False
        for i in range(60):
            weight, mean = (0.9 if evidence.mean < 0.5 else 0.2), 0.3 + 0.4 * (i % 2)
            evidence.add(float(rng.random() < mean), weight)
            weighted, weights = weighted + weight * mean, weights + weight
            if i % 10 == 9:
                low, high = bounds([evidence], [0.1])
                missed = missed or not low[0] <= weighted / weights <= high[0]
        assert evidence.count == pytest.approx(weights)
        out += missed
    assert out <= 30
