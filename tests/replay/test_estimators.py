"""Against the truth, on synthetic logs of which every policy's value is known."""

import numpy as np
import pytest

from replay.estimators import Log, cross_fitted, difference_interval, evaluate, mean_interval, ratio_interval

RUNS = 200


class Bandit:
    """Two arms, one number of context x in [0, 1]: arm 0 is good where x is large, arm 1 everywhere at 0.8."""

    def __init__(self, seed: int, n: int, *, feedback=(1.0, 1.0), explore=0.3):
        rng = np.random.default_rng(seed)
        self.x = rng.random(n)
        p0 = np.where(self.x > 0.5, 1 - explore / 2, explore / 2)
        self.logged = np.column_stack([p0, 1 - p0])
        arms = (rng.random(n) >= p0).astype(np.int64)
        self.means = self.expected(self.x)
        rewards = (rng.random(n) < self.means[np.arange(n), arms]).astype(float)
        known = rng.random(n) < np.array(feedback)[arms]
        self.log = Log(
            arms,
            self.logged[np.arange(n), arms],
            np.ones((n, 2), dtype=bool),
            known,
            np.where(known, rewards, 0.0),
            self.x[:, None],
        )

    @staticmethod
    def expected(x):
        return np.column_stack([0.2 + 0.7 * x, np.full(len(x), 0.8)])


def threshold(x, at):
    return np.column_stack([x >= at, x < at]).astype(float)


def truth(policy):
    """By brute force over a fine grid of x."""
    x = (np.arange(100_000) + 0.5) / 100_000
    return float((policy(x) * Bandit.expected(x)).sum(axis=1).mean())


POLICIES = {
    "the teacher": lambda x: np.tile([0.0, 1.0], (len(x), 1)),
    "a threshold": lambda x: threshold(x, 0.7),
    "uniform": lambda x: np.full((len(x), 2), 0.5),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("feedback", [(1.0, 1.0), (0.8, 0.3)])
def test_the_estimates_are_right_and_their_intervals_cover_the_truth(name, feedback):
    """Also where one arm's answers get feedback more often than the other's."""
    value = truth(POLICIES[name])
    found = {"ips": [], "snips": [], "dr": []}
    for seed in range(RUNS):
        world = Bandit(seed, 1200, feedback=feedback)
        estimates = evaluate(world.log, POLICIES[name](world.x), cross_fitted(world.log))
        assert estimates.overlap(world.log.n)
        for kind in found:
            found[kind].append(getattr(estimates, kind))
    for kind, intervals in found.items():
        values, low, high = np.array(intervals).T
        error = values.std() / np.sqrt(RUNS)
        assert abs(values.mean() - value) < 4 * error + 0.004, kind
        covered = ((low <= value) & (value <= high)).mean()
        assert 0.90 <= covered <= 0.995, (kind, covered)
    widths = {kind: np.mean([i.high - i.low for i in intervals]) for kind, intervals in found.items()}
    assert widths["dr"] < widths["ips"], "a model that knows something narrows the interval"


def test_a_wrong_propensity_is_seen():
    """The test above can fail: the same with propensities that are not those that were drawn from."""
    world = Bandit(1, 20_000)
    lied = world.log._replace(propensities=np.full(world.log.n, 0.5))
    policy = POLICIES["a threshold"](world.x)
    value = truth(POLICIES["a threshold"])
    assert abs(evaluate(world.log, policy, cross_fitted(world.log)).ips.value - value) < 0.03
    assert abs(evaluate(lied, policy, cross_fitted(lied)).ips.value - value) > 0.05


def test_doubly_robust_is_right_where_the_model_is_wrong():
    values = []
    for seed in range(100):
        world = Bandit(seed, 800)
        nonsense = np.tile([0.9, 0.1], (world.log.n, 1))
        values.append(evaluate(world.log, POLICIES["a threshold"](world.x), nonsense).dr.value)
    assert np.mean(values) == pytest.approx(truth(POLICIES["a threshold"]), abs=4 * np.std(values) / 10 + 0.004)


def test_the_logged_policy_has_the_value_that_was_seen():
    world = Bandit(3, 5000)
    estimates = evaluate(world.log, world.logged, cross_fitted(world.log))
    assert estimates.ips.value == pytest.approx(world.log.rewards.mean(), abs=1e-12)
    assert estimates.snips.value == pytest.approx(world.log.rewards.mean(), abs=1e-12)
    assert estimates.effective == pytest.approx(world.log.n) and estimates.covered == 1.0


def test_thin_overlap_is_said():
    world = Bandit(4, 400, explore=0.001)
    against = np.column_stack([world.x < 0.5, world.x >= 0.5]).astype(float)  # what the log hardly ever did
    assert not evaluate(world.log, against, cross_fitted(world.log)).overlap(world.log.n)
    never = world.log._replace(possible=np.tile([True, False], (world.log.n, 1)))
    found = evaluate(never, POLICIES["the teacher"](world.x), cross_fitted(world.log))
    assert found.covered == 0.0 and not found.overlap(world.log.n)
    unrated = Bandit(4, 4000, feedback=(1.0, 0.0)).log
    found = evaluate(unrated, np.tile([0.0, 1.0], (4000, 1)), cross_fitted(unrated))
    assert not found.overlap(4000), "no answer of the teacher has feedback: nothing can be said of it"


def test_unknown_is_not_zero():
    world = Bandit(5, 4000, feedback=(0.3, 0.3))
    estimates = evaluate(world.log, world.logged, cross_fitted(world.log))
    assert estimates.ips.value == pytest.approx((world.logged * world.means).sum(axis=1).mean(), abs=0.05)


def test_intervals_of_nothing_and_of_one():
    assert mean_interval(np.array([0.3])).high == np.inf
    assert np.isnan(ratio_interval(np.zeros(3), np.ones(3)).value)
    assert difference_interval(np.array([1.0]), np.ones(5)) is None
    found = difference_interval(np.array([1.0, 0.8, 0.9]), np.array([0.4, 0.6]))
    assert found is not None and found.value == pytest.approx(0.4) and found.low < 0.4 < found.high
