"""What every policy promises, each a parameter, and what the baselines are."""

import json

import numpy as np
import pytest

from router.features import NAMES
from router.linear import LinearThompson, LinearThreshold, LinearUcb
from router.neural import NeuralThompson
from router.policy import Always, Threshold, Uniform
from router.types import Arm
from tests.router.worlds import MIDDLE, STUDENT, TEACHER

ARMS = [STUDENT, MIDDLE, TEACHER]
NO_BIAS = np.zeros(3)
X = np.tile(np.eye(1, len(NAMES)), (3, 1))


def predicted(arm, x):
    return {"student": 0.3, "middle": 0.6, "teacher": 0.9}[arm.name]


policies = pytest.mark.parametrize(
    "make",
    [
        lambda: Always("student"),
        Uniform,
        lambda: Threshold(predicted, 0.5),
        LinearThompson,
        LinearUcb,
        NeuralThompson,
        LinearThreshold,
    ],
    ids=["always", "uniform", "threshold", "linear", "ucb", "neural", "linear-threshold"],
)


@policies
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_policy_gives_a_distribution_over_any_arms_in_any_order(make, n):
    policy = make()
    p = policy.probabilities(X[:n], ARMS[:n], NO_BIAS[:n], 0.8)
    assert p.shape == (n,) and (p >= 0).all() and p.sum() == pytest.approx(1)
    backwards = policy.probabilities(X[:n], ARMS[:n][::-1], NO_BIAS[:n], 0.8)
    np.testing.assert_allclose(backwards[::-1], p, atol=1e-12)
    assert policy.scores(X[:n], ARMS[:n], NO_BIAS[:n]).shape == (n,)


@policies
def test_the_load_bias_comes_off_the_scores(make):
    bias = np.array([0.0, 0.1, 0.3])
    policy = make()
    np.testing.assert_allclose(policy.scores(X, ARMS, bias), policy.scores(X, ARMS, NO_BIAS) - bias)


@policies
def test_under_load_the_cheapest_is_never_less_likely(make):
    policy = make()
    p = [policy.probabilities(X, ARMS, load * np.array([0, 0.4, 1.0]), 0.8)[0] for load in np.linspace(0, 0.6, 13)]
    assert (np.diff(p) >= -1e-12).all()


@policies
def test_what_was_learned_survives_a_round_trip(make, rng):
    policy, other = make(), make()
    for _ in range(30):
        policy.learn("student", rng.normal(size=len(NAMES)), rng.random())
    other.restore(policy.state())
    assert other.state() == policy.state()
    np.testing.assert_allclose(
        other.probabilities(X, ARMS, NO_BIAS, 0.8), policy.probabilities(X, ARMS, NO_BIAS, 0.8), atol=1e-12
    )


@policies
@pytest.mark.parametrize("quality", [-0.1, 1.1, float("nan")])
def test_a_quality_outside_0_and_1_is_refused(make, quality):
    with pytest.raises(ValueError, match="quality"):
        make().learn("student", X[0], quality)


@policies
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: b"", "not JSON"),
        (lambda state: b"\x80\x04N.", "not JSON"),
        (lambda state: b"[" * 100_000, "not JSON"),
        (lambda state: b"[1]", "not a JSON object"),
        (lambda state: json.dumps(json.loads(state) | {"version": 99}).encode(), "version 99"),
        (lambda state: json.dumps(json.loads(state) | {"policy": "other"}).encode(), "policy 'other'"),
        (lambda state: state[:-3], "not JSON"),
    ],
    ids=["empty", "pickle", "deep", "list", "version", "policy", "cut"],
)
def test_a_state_that_does_not_fit_is_refused(make, change, message):
    policy = make()
    before = policy.state()
    with pytest.raises(ValueError, match=message):
        policy.restore(change(before))
    assert policy.state() == before


def test_always_serves_its_arm_or_else_the_dearest():
    np.testing.assert_array_equal(Always("middle").probabilities(X, ARMS, NO_BIAS, 0.8), [0, 1, 0])
    np.testing.assert_array_equal(Always("gone").probabilities(X, ARMS, NO_BIAS, 0.8), [0, 0, 1])


def test_uniform_serves_all_alike():
    np.testing.assert_allclose(Uniform().probabilities(X, ARMS, NO_BIAS, 0.8), [1 / 3] * 3)


def test_threshold_serves_the_cheapest_that_reaches_it():
    chosen = [
        ARMS[int(np.argmax(Threshold(predicted, t).probabilities(X, ARMS, NO_BIAS, 0.8)))].name
        for t in (0.0, 0.3, 0.31, 0.6, 0.61, 0.95)
    ]
    assert chosen == ["student", "student", "middle", "middle", "teacher", "teacher"]


def test_a_threshold_sweeps_the_offloaded_share_from_all_to_none(rng):
    qualities = rng.random(300)
    x = np.zeros((2, 1))
    shares = []
    for t in np.linspace(-0.01, 1.01, 21):
        policy = Threshold(lambda arm, row: float(row[0]), t)
        served = 0.0
        for quality in qualities:
            x[:] = quality
            served += policy.probabilities(x, [STUDENT, TEACHER], np.zeros(2), 0.8)[0]
        shares.append(served / len(qualities))
    assert shares[0] == 1.0 and shares[-1] == 0.0
    assert (np.diff(shares) <= 0).all()


def test_a_threshold_is_easier_to_reach_under_load():
    policy = Threshold(predicted, 0.5)
    bias = np.array([0.0, 0.1, 0.25])
    np.testing.assert_array_equal(policy.probabilities(X, ARMS, bias, 0.8), [1, 0, 0])


def test_an_arm_alone_is_served():
    for policy in (Always("x"), Uniform(), Threshold(lambda arm, x: 0.0, 0.5), LinearThompson()):
        np.testing.assert_array_equal(policy.probabilities(X[:1], [Arm("only", 0.0)], np.zeros(1), 0.8), [1.0])
