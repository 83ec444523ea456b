"""Decisions by numbers that are kept are those that arrays, worked out anew each time, would give."""

import numpy as np
import pytest

from router.choice import choice_probabilities, choice_shares
from router.features import (
    KIND,
    N_PROJECTED,
    NAMES,
    SKETCHED_CHARS,
    feature_rows,
    features,
    project,
    sketch,
)
from router.floor import Standing
from router.linear import LinearThompson
from router.load import load_bias
from router.policy import one_hot
from router.regression import BELIEVED
from router.reward import load_prices, relative_cost
from router.routing import RETURNING_SHARE, Router
from router.types import Arm, ExampleSignals, Signals, price_order, request_order

ARMS = [Arm("small", 0.2), Arm("middle", 0.5), Arm("large", 3.0, is_teacher=True)]


def signals(rng: np.random.Generator) -> Signals:
    vector = rng.normal(size=64).astype(np.float32)
    examples = {"small": ExampleSignals(2, 0.9, float(rng.random()), 0.3, 0.2, 150)}
    return Signals(vector / np.linalg.norm(vector), 40, 1, examples, "Be brief.")


def plainly(policy: LinearThompson, x: np.ndarray, arms: list[Arm], bias: np.ndarray, target: float):
    """Scores and probabilities, by arrays, from the posterior as it is now."""
    pairs = []
    for arm, row in zip(arms, x, strict=True):
        posterior = policy.posterior(arm.name, arm.is_teacher)
        mean, variance = float(posterior.mean @ row), float(row @ posterior.covariance @ row)
        known = policy.statistics_.get(arm.name)
        pairs.append(known.calibration.calibrated(mean, variance, policy.noise_sd) if known else (mean, variance))
    means, sds = np.array(pairs).T[0], np.sqrt(np.array(pairs).T[1]) * policy.spreads(arms)
    order, gain = request_order(arms), bias.max() - bias
    least = target * float(np.clip(means[price_order(arms)[-1]], 0, 1))
    chosen = choice_probabilities((means + gain)[order], sds[order], least)
    for i, share in policy._hopeful(arms):
        mean, sd = policy.at_first(arms[i], x[i])
        if mean > means[i]:
            others = np.arange(len(arms)) != i
            anew = np.where(others, means, mean) + gain, np.where(others, sds, sd)
            chosen = chosen + share * (choice_probabilities(anew[0][order], anew[1][order], least) - chosen)
    probabilities = np.empty(len(arms))
    probabilities[order] = chosen
    return means - bias, probabilities


@pytest.mark.parametrize("n_arms", [2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_a_request_that_comes_again_is_decided_by_what_was_learned_meanwhile(n_arms: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arms, standing = ARMS[-n_arms:], {"middle": Standing.RETURNING, "small": Standing.HELD}
    router = Router(
        LinearThompson(), rng=rng, exploration=0.1, quality_target=0.8, theta=0.5, lambda0=0.4, gamma=2.0,
        holdout_share=0.05,
    )  # fmt: skip
    asked = [signals(rng) for _ in range(3)]
    for step in range(45):
        request, load = asked[step % 3], float(rng.choice([0.2, 1.5]))
        known = standing if step % 4 == 0 else {}
        decision = router.route(request, arms, load, known)
        x = np.stack([features(request, arm) for arm in arms])
        bias = load_bias(load, relative_cost(load_prices(arms)), 0.5, 0.4, 2.0)
        scores, chosen = plainly(router.policy, x, arms, bias, 0.8)
        most = np.array(
            [{Standing.HELD: 0.1, Standing.RETURNING: RETURNING_SHARE}.get(known.get(a.name), 1.0) for a in arms]
        )
        dearest = len(arms) - 1
        most[dearest] = 1.0
        left = np.minimum(chosen, most)
        left[dearest] += (chosen - left).sum()
        expected = 0.95 * (0.9 * left + 0.1 / len(arms)) + 0.05 * one_hot(dearest, len(arms))
        np.testing.assert_allclose(decision.scores, scores, atol=1e-12)
        np.testing.assert_allclose(decision.probabilities, expected, atol=1e-11)
        assert decision.propensity == decision.probabilities[decision.names.index(decision.arm)]
        quality = float(rng.random() < (0.9 if decision.arm == "large" else 0.3))
        router.learn(decision.arm, decision.features, quality)
        if step % 10 == 9:
            router.learn(decision.arm, decision.features, 1.0 - quality, quality)


def test_what_is_kept_is_bounded_and_numbers_do_not_take_their_neighbours_place(rng: np.random.Generator) -> None:
    policy = LinearThompson()
    for _ in range(BELIEVED + 20):
        request = signals(rng)
        x = np.stack([features(request, arm) for arm in ARMS])
        means, _ = policy.beliefs(x, ARMS)
        assert policy.beliefs(x, ARMS)[0].tolist() == means.tolist()
        assert policy.beliefs(x, [*ARMS[:2], ARMS[1]])[0].tolist() != means.tolist()
    assert len(policy._believed) == BELIEVED
    assert choice_shares.cache_info().maxsize is not None


def test_a_restored_policy_believes_what_it_was_given(rng: np.random.Generator) -> None:
    request = signals(rng)
    x = np.stack([features(request, arm) for arm in ARMS])
    taught, fresh = LinearThompson(), LinearThompson()
    for _ in range(10):
        taught.learn("small", x[0], 0.0)
    before = fresh.beliefs(x, ARMS)[0]
    fresh.restore(taught.state())
    np.testing.assert_allclose(fresh.beliefs(x, ARMS)[0], taught.beliefs(x, ARMS)[0], atol=1e-9)
    assert fresh.beliefs(x, ARMS)[0][0] < before[0] - 0.1
    fresh.forget("small")
    assert fresh.beliefs(x, ARMS)[0][0] > before[0] - 0.1


def test_features_that_are_kept_are_those_of_their_parts(rng: np.random.Generator) -> None:
    vectors = [rng.normal(size=64).astype(np.float32) for _ in range(3)]
    for _ in range(2):
        for vector in (*vectors, vectors[0].astype(np.float64), None):
            for system in ("", "Be brief.", "Be long.", "x" * SKETCHED_CHARS + "y"):
                for tokens in (3, 4000):
                    x = feature_rows(Signals(vector, tokens, 1, {}, system), ARMS)
                    assert x.shape == (3, len(NAMES)) and (x[:, 0] == 1).all() and (x == x[0]).all()
                    kind = np.zeros(N_PROJECTED) if vector is None else project(vector)
                    told = sketch(system) if system else np.zeros(KIND.stop - 1 - N_PROJECTED)
                    np.testing.assert_array_equal(x[0, KIND], np.concatenate([kind, told]))
                    assert x[0, KIND.stop] == pytest.approx(np.log((1 + tokens) / 101) / 5)
                    x[:] = 7.0  # whoever gets it may write to it
