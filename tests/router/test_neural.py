import json

import numpy as np
import pytest

from router.features import NAMES
from router.neural import CAPACITY, REBUILD_EVERY, SECOND, NeuralThompson
from tests.router.worlds import STUDENT, TEACHER


def rows(rng, n):
    x = np.clip(rng.normal(size=(n, len(NAMES))), -1, 1)
    x[:, 0] = 1.0
    return x


def test_it_is_small():
    assert NeuralThompson().n_weights <= 500_000


def test_it_learns_what_no_line_can_fit(rng):
    """Quality is an exclusive or of two features: of mean 1/2 along every line."""
    policy, x = NeuralThompson(seed=1), rows(rng, 900)
    quality = ((x[:, 1] > 0) != (x[:, 2] > 0)).astype(float)
    x[:, 3:] *= 0.1
    for row, y in zip(x[:800], quality, strict=False):
        policy.learn("student", row, y)
    predicted = policy.scores(x[800:], [STUDENT] * 100, np.zeros(100))
    assert np.corrcoef(predicted, quality[800:])[0, 1] > 0.5


def test_the_heads_are_regressions_over_all_that_is_remembered(rng):
    policy = NeuralThompson()
    for row in rows(rng, REBUILD_EVERY):
        policy.learn("student", row, rng.random())
    z = policy.hidden(np.array([m.x for m in policy.memory_], dtype=np.float64))
    y = np.array([m.quality for m in policy.memory_])
    prior = policy.heads_.student_prior
    precision = np.diag(prior.sd**-2) + z.T @ z / 0.3**2
    mean = np.linalg.solve(precision, prior.mean / prior.sd**2 + y @ z / 0.3**2)
    np.testing.assert_allclose(policy.heads_.posterior("student").mean, mean, atol=1e-8)


def test_the_gradient_is_the_derivative(rng):
    """One training step, against differences of the loss that it descends."""
    policy = NeuralThompson()
    for row in rows(rng, 7):
        policy.learn("student", row, rng.random())
    gradients = {}
    policy._step = gradients.update
    policy._rng = np.random.default_rng(5)
    before = [m.priority for m in policy.memory_]
    policy._train()
    shares = np.array(before) ** 0.6 / (np.array(before) ** 0.6).sum()
    drawn = np.random.default_rng(5).choice(7, size=7, p=shares)
    weight = (7 * shares[drawn]) ** -0.4
    x = np.array([policy.memory_[i].x for i in drawn], dtype=np.float64)
    y = np.array([policy.memory_[i].quality for i in drawn])

    def loss():
        error = policy.hidden(x) @ policy.weights_["head student"] - y
        return float((weight / weight.max() * error**2).sum() / 14)

    for name, place in (("w1", (3, 5)), ("b1", (2,)), ("w2", (4, 6)), ("b2", (1,)), ("head student", (SECOND,))):
        kept = policy.weights_[name][place]
        around = []
        for step in (1e-5, -1e-5):
            policy.weights_[name][place] = kept + step
            around.append(loss())
        policy.weights_[name][place] = kept
        assert gradients[name][place] == pytest.approx((around[0] - around[1]) / 2e-5, rel=1e-4, abs=1e-9)


def test_an_arm_that_breaks_is_remembered_only_since(rng):
    policy, x = NeuralThompson(), rows(rng, 400)
    for row in x[:300]:
        policy.learn("student", row, 0.9)
        policy.learn("teacher", row, 0.95)
    arms, n = [STUDENT, TEACHER], 0
    while policy.probabilities(x[[300, 300]], arms, np.zeros(2), 0.7)[0] > 0.2:
        policy.learn("student", x[300 + n], 0.0)
        n += 1
        assert n <= 40
    assert all(m.quality == 0.0 for m in policy.memory_ if m.arm == "student")


def test_it_goes_on_after_a_restore_as_if_nothing_had_happened(rng):
    one, two, x, y = NeuralThompson(seed=3), NeuralThompson(seed=4), rows(rng, 90), rng.random(90)
    for i in range(50):
        one.learn("student", x[i], y[i])
    two.restore(one.state())
    for policy in (one, two):
        for i in range(50, 90):
            policy.learn("student", x[i], y[i])
    np.testing.assert_allclose(two.hidden(x), one.hidden(x), atol=1e-9)
    assert len(one.memory_) <= CAPACITY


@pytest.mark.parametrize(
    "change", [{"weights": {}}, {"memory": [["a", 2.0, 1.0, ""]]}, {"heads": 3}, {"generator": {}}]
)
def test_a_state_that_is_none_is_refused(rng, change):
    policy = NeuralThompson()
    policy.learn("student", rows(rng, 1)[0], 0.5)
    before = policy.state()
    broken = json.dumps(json.loads(before) | change).encode()
    with pytest.raises(ValueError):
        policy.restore(broken)
    assert policy.state() == before
