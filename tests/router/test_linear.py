import json
import math
import time

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from router.features import KIND, NAMES
from router.linear import LinearThompson, LinearUcb
from router.regression import STEP, STUDENT_PRIOR, TEACHER_PRIOR, Prior, Statistics, Traffic
from router.types import Arm
from tests.router.test_choice import by_quadrature
from tests.router.worlds import MIDDLE, STUDENT, TEACHER

D = 4
PRIOR = Prior(np.array([0.5, 0.1, 0.0, -0.1]), np.array([0.3, 0.2, 0.1, 0.5]))


def small(**changes):
    """Four features, nothing forgotten, unless asked for."""
    plain = {"names": list("abcd"), "student_prior": PRIOR, "teacher_prior": PRIOR, "discount": 1.0, "alarm": np.inf}
    return LinearThompson(**plain | changes)


def feedback(rng, n=60, d=D):
    x = rng.normal(size=(n, d))
    x[:, 0] = 1.0
    return x, np.clip(0.5 + 0.2 * x[:, 1] + 0.1 * rng.normal(size=n), 0, 1)


def fed(policy, x, y, arm="student"):
    for row, quality in zip(x, y, strict=True):
        policy.learn(arm, row, quality)
    return policy


def closed_form(prior, x, y, noise_sd, weights=None):
    """Bishop (3.50), (3.51), from all the data at once."""
    w = np.ones(len(y)) if weights is None else weights
    a = np.diag(prior.sd**-2.0) + (x.T * w) @ x / noise_sd**2
    return np.linalg.solve(a, prior.mean / prior.sd**2 + (x.T * w) @ y / noise_sd**2), np.linalg.inv(a)


def test_the_posterior_is_the_closed_form(rng):
    x, y = feedback(rng)
    posterior = fed(small(noise_sd=0.2), x, y).posterior("student")
    mean, covariance = closed_form(PRIOR, x, y, 0.2)
    np.testing.assert_allclose(posterior.mean, mean, atol=1e-12)
    np.testing.assert_allclose(posterior.covariance, covariance, atol=1e-12)


def test_the_posterior_mean_is_ridge_regression(rng):
    """A zero mean and one sd for all weights: scikit-learn's Ridge with alpha = noise^2 / sd^2."""
    x, y = feedback(rng)
    prior = Prior(np.zeros(D), np.full(D, 0.4))
    posterior = fed(small(student_prior=prior, noise_sd=0.2), x, y).posterior("student")
    ridge = Ridge(alpha=0.2**2 / 0.4**2, fit_intercept=False).fit(x, y)
    np.testing.assert_allclose(posterior.mean, ridge.coef_, atol=1e-10)


def test_with_a_discount_old_feedback_counts_less_and_the_prior_in_full(rng):
    x, y = feedback(rng)
    policy = fed(small(discount=0.9, noise_sd=0.2), x, y)
    weights = 0.9 ** (STEP * (len(y) // STEP - np.arange(len(y)) // STEP))  # whole steps since
    mean, covariance = closed_form(PRIOR, x, y, 0.2, weights)
    np.testing.assert_allclose(policy.posterior("student").mean, mean, atol=1e-10)
    np.testing.assert_allclose(policy.posterior("student").covariance, covariance, atol=1e-10)
    assert policy.statistics_["student"].count == pytest.approx(weights.sum())


def test_an_arm_never_seen_has_its_prior():
    policy = LinearThompson()
    x = np.eye(1, len(NAMES))[[0, 0]]
    means, sds = policy.beliefs(x, [STUDENT, TEACHER])
    np.testing.assert_allclose(means, [0.6, 0.9])
    np.testing.assert_allclose(sds, 0.25)
    np.testing.assert_allclose(policy.posterior("new", is_teacher=True).mean, TEACHER_PRIOR.mean)
    np.testing.assert_allclose(policy.posterior("new").mean, STUDENT_PRIOR.mean)


def test_examples_that_promise_a_gain_raise_what_is_expected_of_a_student():
    x = np.eye(1, len(NAMES))[[0, 0]]
    x[1, NAMES.index("utility_max")] = 0.4
    means, _ = LinearThompson().beliefs(x, [STUDENT, STUDENT])
    assert means[1] - means[0] == pytest.approx(0.1)


def test_a_replaced_feedback_is_as_if_only_the_new_one_had_been_given(rng):
    x, y = feedback(rng)
    replaced = fed(small(), x, y)
    replaced.learn("student", x[7], 0.05, previous=y[7])
    y[7] = 0.05
    once = fed(small(), x, y)
    np.testing.assert_allclose(replaced.posterior("student").mean, once.posterior("student").mean, atol=1e-12)
    np.testing.assert_array_equal(replaced.statistics_["student"].gram, once.statistics_["student"].gram)
    assert replaced.statistics_["student"].count == len(y)


def test_with_a_discount_a_replacement_needs_its_age(rng):
    x, y = feedback(rng)
    replaced = fed(small(discount=0.95), x, y)
    replaced.learn("student", x[7], 0.05, previous=y[7], age=len(y) - 1 - 7)
    y[7] = 0.05
    once = fed(small(discount=0.95), x, y)
    np.testing.assert_allclose(replaced.posterior("student").mean, once.posterior("student").mean, atol=1e-12)


def test_what_two_workers_learned_adds_up(rng):
    x, y = feedback(rng)
    one, two, both = fed(small(), x[:20], y[:20]), fed(small(), x[20:], y[20:]), fed(small(), x, y)
    fed(two, x[:5], y[:5], arm="other")
    one.merge(two.statistics_)
    np.testing.assert_allclose(one.posterior("student").mean, both.posterior("student").mean, atol=1e-12)
    assert one.statistics_["student"].count == 60 and one.statistics_["other"].count == 5
    with pytest.raises(ValueError, match="3 features, not 4"):
        one.merge({"student": Statistics.empty(3)})


def test_merging_leaves_the_other_worker_as_it_was(rng):
    x, y = feedback(rng)
    one, two = small(), fed(small(), x, y)
    one.merge(two.statistics_)
    before = two.state()
    fed(one, x, y)
    assert two.state() == before


def test_probabilities_are_those_of_quadrature(rng):
    x, y = feedback(rng)
    policy = fed(small(), x, y)
    fed(policy, x[:10], y[10:20], arm="middle")
    arms, row = [TEACHER, STUDENT, MIDDLE], np.array([1.0, 0.3, -0.2, 0.1])
    bias = np.array([0.2, 0.0, 0.08])
    means, sds = policy.beliefs(np.stack([row] * 3), arms)
    by_price = [1, 2, 0]
    # The rule as the class states it, in terms of S_i: everything, the bar too, lies lower by the dearest's bias.
    expected = by_quadrature((means - bias)[by_price], (policy.spreads(arms) * sds)[by_price], 0.8 * means[0] - bias[0])
    p = policy.probabilities(np.stack([row] * 3), arms, bias, 0.8)
    np.testing.assert_allclose(p[by_price], expected, atol=1e-6)


def test_a_decision_between_three_arms_takes_microseconds(rng):
    policy, arms = LinearThompson(), [STUDENT, MIDDLE, TEACHER]
    x = np.clip(rng.normal(size=(3, len(NAMES))), -1, 1)
    took = []
    for _ in range(200):
        started = time.process_time()
        policy.probabilities(x, arms, np.zeros(3), 0.8)
        took.append(time.process_time() - started)
    assert sorted(took)[20] < 1e-3  # about 0.1 ms on a quiet machine; the bound is for busy ones


def certain(policy, **qualities):
    for arm, quality in qualities.items():
        for _ in range(300):
            policy.learn(arm, np.array([1.0, 0, 0, 0]), quality)
    return policy


@pytest.mark.parametrize(
    ("student", "middle", "target", "expected"),
    [
        (0.90, 0.90, 0.9, "student"),  # all keep the target: the cheapest
        (0.60, 0.90, 0.9, "middle"),  # the cheapest falls short
        (0.60, 0.70, 0.9, "teacher"),  # both do
        (0.60, 0.70, 0.6, "student"),  # a lower target lets it through
        (0.60, 0.90, 0.0, "student"),  # no target: price alone
    ],
)
def test_where_several_keep_the_target_the_cheapest_is_preferred(student, middle, target, expected):
    policy = certain(small(noise_sd=0.1, discount=0.99), student=student, middle=middle, teacher=0.9)
    x = np.stack([np.array([1.0, 0, 0, 0])] * 3)
    arms = [TEACHER, STUDENT, MIDDLE]
    p = policy.probabilities(x, arms, np.zeros(3), target)
    assert arms[int(np.argmax(p))].name == expected and p.max() > 0.95


def test_the_target_is_a_share_of_the_dearest_arms_quality():
    policy = certain(small(noise_sd=0.1, discount=0.99), student=0.4, teacher=0.45)
    x = np.stack([np.array([1.0, 0, 0, 0])] * 2)
    assert policy.probabilities(x, [STUDENT, TEACHER], np.zeros(2), 0.7)[0] > 0.99


def test_load_moves_requests_to_cheaper_arms_and_leaves_what_was_learned(rng):
    x, y = feedback(rng)
    policy = fed(fed(fed(small(), x, y), x, y, arm="middle"), x, np.minimum(y + 0.3, 1), arm="teacher")
    before, rows = policy.state(), np.stack([x[0]] * 3)
    arms, costs = [STUDENT, MIDDLE, TEACHER], np.array([0.0, 0.3, 1.0])
    p = np.array([policy.probabilities(rows, arms, b * costs, 0.95) for b in np.linspace(0, 0.5, 26)])
    assert (np.diff(np.cumsum(p, axis=1), axis=0) >= -1e-9).all()
    assert p[-1, 2] < p[0, 2] - 0.1
    assert policy.state() == before


def test_the_preference_flips_after_the_reward_does():
    policy, x = small(alarm=4.0, discount=0.998), np.array([1.0, 0, 0, 0])
    certain(policy, student=0.9, teacher=0.9)
    arms, rows = [STUDENT, TEACHER], np.stack([x] * 2)
    assert policy.probabilities(rows, arms, np.zeros(2), 0.8)[0] > 0.99
    n = 0
    while policy.probabilities(rows, arms, np.zeros(2), 0.8)[0] > 0.1:
        policy.learn("student", x, 0.0)
        n += 1
        assert n <= 15


def test_an_arm_that_changes_is_relearned_from_little_and_only_that_arm():
    policy, x = small(alarm=4.0), np.array([1.0, 0, 0, 0])
    certain(policy, student=0.9, teacher=0.9)
    n = 0
    while policy.statistics_["student"].count > 100:
        policy.learn("student", x, 0.0)
        n += 1
    assert 4 <= n <= 10
    assert policy.statistics_["teacher"].count == 300
    assert policy.posterior("student").covariance[0, 0] > 5 * policy.posterior("teacher").covariance[0, 0]


def test_good_answers_of_an_arm_known_as_poor_bring_the_next_ones_nearer():
    policy, x = small(alarm=4.0), np.array([1.0, 0, 0, 0])
    certain(policy, student=0.1, teacher=0.9)
    arms, rows = [STUDENT, TEACHER], np.stack([x] * 2)
    shares = [float(policy.probabilities(rows, arms, np.zeros(2), 0.7)[0])]
    for quality in (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0):
        policy.learn("student", x, quality)
        shares.append(float(policy.probabilities(rows, arms, np.zeros(2), 0.7)[0]))
    assert shares[0] < 0.01 < 0.1 < shares[1] < shares[2] < shares[3]
    assert shares[-1] < 0.01, "and bad ones end it"


def test_an_error_where_little_is_known_is_no_surprise():
    policy, x = small(), np.array([1.0, 0.0, 0, 0])
    certain(policy, student=0.9)
    assert policy.surprise("student", x, 0.0) == pytest.approx(-0.9, abs=0.02)
    unknown = np.array([1.0, 0.0, 0.0, 4.0])
    assert abs(policy.surprise("student", unknown, 0.0)) < 0.05


def test_a_starved_arm_is_more_curious_than_a_known_one():
    policy = LinearThompson(spread=0.5)
    x = np.eye(1, len(NAMES))[0]
    for _ in range(100):
        policy.learn("middle", x, 0.5)
    for _ in range(3000):
        policy.learn("teacher", x, 0.5)
    spreads = policy.spreads([STUDENT, MIDDLE, TEACHER])
    np.testing.assert_allclose(spreads, [1.0, math.sqrt(0.5), 0.5], atol=0.03)


def test_thousands_of_updates_leave_a_posterior_that_is_one(rng):
    policy = LinearThompson()
    for _ in range(4000):
        x = np.clip(rng.normal(size=len(NAMES)) * rng.choice([1e-3, 1.0, 4.0]), -4, 4)
        policy.learn("student", x, rng.random())
    covariance = policy.posterior("student").covariance
    np.testing.assert_array_equal(covariance, covariance.T)
    eigenvalues = np.linalg.eigvalsh(covariance)
    assert eigenvalues[0] > 0 and eigenvalues[-1] <= STUDENT_PRIOR.sd.max() ** 2 * (1 + 1e-9)
    gram = policy.statistics_["student"].gram
    np.testing.assert_array_equal(gram, gram.T)


def test_arms_come_and_go_by_name():
    policy = certain(small(noise_sd=0.1), student=0.9, teacher=0.9)
    x = np.array([1.0, 0, 0, 0])
    arms = [STUDENT, MIDDLE, TEACHER, Arm("new", 0.05)]
    p = policy.probabilities(np.stack([x] * 4), arms, np.zeros(4), 0.8)
    assert 0.05 < p[3] < 0.95 and p[0] > 0.05  # cheapest and unknown: tried, not trusted
    p = policy.probabilities(np.stack([x] * 2), [TEACHER, STUDENT], np.zeros(2), 0.8)
    assert p[1] > 0.95
    policy.forget("student")
    np.testing.assert_allclose(policy.posterior("student").mean, PRIOR.mean)
    assert policy.statistics_.keys() == {"teacher"}


def test_what_is_learned_does_not_depend_on_what_was_routed_meanwhile(rng):
    x, y = feedback(rng, d=len(NAMES))
    watched, alone = LinearThompson(), LinearThompson()
    for row, quality in zip(x, y, strict=True):
        watched.probabilities(np.stack([row, row]), [STUDENT, TEACHER], np.zeros(2), 0.8)
        for policy in (watched, alone):
            policy.learn("teacher", row, quality)
    assert watched.state() == alone.state()


def test_learning_goes_on_after_a_restore_as_if_nothing_had_happened(rng):
    x, y = feedback(rng)
    one, two = fed(small(alarm=4.0), x[:30], y[:30]), small(alarm=4.0)
    two.restore(one.state())
    assert two.drift_["student"].fall == one.drift_["student"].fall
    fed(one, x[30:], y[30:])
    fed(two, x[30:], y[30:])
    np.testing.assert_array_equal(one.statistics_["student"].gram, two.statistics_["student"].gram)
    np.testing.assert_allclose(one.posterior("student").mean, two.posterior("student").mean, atol=1e-10)
    assert two.drift_["student"].fall == pytest.approx(one.drift_["student"].fall, abs=1e-10)


def edited(state, **changes):
    learned = json.loads(state)
    learned["arms"]["student"] |= changes
    return json.dumps(learned).encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response": [1.0]}, "wrong shape"),
        ({"gram": [1.0]}, "wrong shape"),
        ({"gram": [-1.0] * 10}, "negative eigenvalue"),
        ({"gram": [1e300] * 10}, "not finite or beyond"),
        ({"count": -1.0}, "not finite or beyond"),
        ({"count": float("nan")}, "not finite or beyond"),
        ({"response": [float("inf")] * 4}, "not finite or beyond"),
        ({"response": "no"}, "malformed"),
        ({"response": None}, "malformed|wrong shape"),
        ({"gram": [[1.0], [1.0, 2.0]]}, "malformed"),
        ({"gram": "no base64"}, "malformed"),
        ({"gram": "AAAA"}, "malformed"),
        ({"gram": "AAAAAAAAAAA="}, "wrong shape"),
        ({"drift": [1.0]}, "malformed"),
        ({"drift": [-1.0, 0.0]}, "malformed"),
        ({"drift": None}, "malformed"),
    ],
)
def test_a_state_with_impossible_statistics_is_refused(rng, changes, message):
    policy = fed(small(), *feedback(rng))
    before = policy.state()
    with pytest.raises(ValueError, match=message):
        policy.restore(edited(before, **changes))
    assert policy.state() == before


def test_a_state_of_other_features_is_refused(rng):
    state = fed(small(), *feedback(rng)).state()
    with pytest.raises(ValueError, match="other features"):
        LinearThompson().restore(state)
    with pytest.raises(ValueError, match="no arms"):
        small().restore(json.dumps(json.loads(state) | {"arms": [1]}).encode())
    with pytest.raises(ValueError, match="malformed"):
        small().restore(json.dumps(json.loads(state) | {"arms": {"student": 3}}).encode())


@pytest.mark.parametrize(
    "x", [np.ones(D + 1), np.array([1, np.nan, 0, 0]), np.array([1, np.inf, 0, 0]), np.ones((1, D))]
)
def test_features_that_are_no_numbers_are_refused(x):
    policy = small()
    with pytest.raises(ValueError, match="features"):
        policy.learn("student", x, 0.5)
    assert not policy.statistics_
    with pytest.raises(ValueError, match="features"):
        policy.beliefs(x if x.ndim == 2 and x.shape == (2, D) else x[None], [STUDENT])


def test_replacing_what_never_was_is_refused():
    with pytest.raises(ValueError, match="nothing was learned"):
        small().learn("student", np.ones(D), 0.5, previous=0.4)
    policy = small()
    policy.learn("student", np.ones(D), 0.5)
    for bad in ({"previous": 1.5}, {"previous": 0.5, "age": -1}):
        with pytest.raises(ValueError, match=r"quality|age"):
            policy.learn("student", np.ones(D), 0.5, **bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"noise_sd": 0.0},
        {"spread": float("nan")},
        {"discount": 0.0},
        {"discount": 1.1},
        {"student_prior": Prior(np.zeros(3), np.ones(3))},
        {"teacher_prior": Prior(np.zeros(D), np.array([1, 1, 0, 1.0]))},
        {"alarm": float("nan")},
    ],
)
def test_parameters_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError):
        small(**bad)


def test_an_upper_confidence_bound_is_the_closed_form(rng):
    x, y = feedback(rng)
    learning = {"names": list("abcd"), "student_prior": PRIOR, "teacher_prior": PRIOR, "discount": 1.0}
    policy = fed(fed(LinearUcb(alpha=1.5, **learning), x, y), x, np.ones(len(x)), arm="teacher")
    arms, row = [STUDENT, TEACHER], np.array([1.0, 0.3, -0.2, 0.1])
    rows = np.stack([row] * 2)
    means, sds = policy.beliefs(rows, arms)
    assert sds[0] == pytest.approx(math.sqrt(row @ closed_form(PRIOR, x, y, 0.3)[1] @ row))
    bound, certain_of = means[0] + 1.5 * sds[0], min(1.0, means[1])
    assert bound < certain_of
    for target, expected in ((bound / certain_of - 1e-6, [1, 0]), (bound / certain_of + 1e-6, [0, 1])):
        np.testing.assert_array_equal(policy.probabilities(rows, arms, np.zeros(2), target), expected)


def test_feedback_added_one_by_one_is_as_good_as_all_at_once(rng):
    x, y = feedback(rng, n=24)
    policy = small()
    policy.posterior("student")  # in use, so kept up to date from here on
    fed(policy, x, y)
    mean, covariance = closed_form(PRIOR, x, y, 0.3)
    np.testing.assert_allclose(policy.posterior("student").mean, mean, atol=1e-10)
    np.testing.assert_allclose(policy.posterior("student").covariance, covariance, atol=1e-10)


def test_the_prior_over_kinds_follows_the_traffic(rng):
    """Two kinds of request that differ along one direction: a weight along it is believed to be larger than others."""
    policy = LinearThompson(traffic=Traffic(even=0.02, along=0.08), discount=1.0)
    direction = np.zeros(len(NAMES))
    direction[KIND] = rng.choice([-1.0, 1.0], size=KIND.stop - KIND.start)
    rows = np.array([rng.choice([-0.5, 0.5]) * direction for _ in range(400)])
    rows[:, KIND] += 0.5 * rng.normal(size=rows[:, KIND].shape)
    rows[:, 0] = 1.0
    for row in rows:
        policy.learn("teacher", row, 1.0)
    policy.adapt()
    c = np.cov(rows[:, KIND].T, bias=True) + 0.1 * np.eye(KIND.stop - KIND.start)
    np.testing.assert_allclose(policy.kinds_, 0.02 * np.eye(len(c)) / np.trace(c) + 0.08 * c / np.trace(c @ c))
    assert np.trace(policy.kinds_ @ c) == pytest.approx(0.1)  # quality varies so much over the traffic, a priori
    along, across = direction[KIND] / np.linalg.norm(direction), np.linalg.qr(rng.normal(size=(len(c), 2)))[0].T
    across = across[0] - (across[0] @ along) * along
    assert along @ policy.kinds_ @ along > 5 * across @ policy.kinds_ @ across / (across @ across)
    other = LinearThompson(traffic=Traffic(even=0.02, along=0.08))
    other.restore(policy.state())
    np.testing.assert_array_equal(other.kinds_, policy.kinds_)


def test_shards_of_a_log_merge_into_what_one_learns_from_all_of_it(rng):
    """Also the prior over kinds, which is chosen by what all have seen."""
    rows = np.clip(rng.normal(size=(90, len(NAMES))), -1, 1)
    y = rng.random(90)
    one = fed(LinearThompson(discount=1.0, alarm=np.inf), rows, y)
    shards = [fed(LinearThompson(discount=1.0, alarm=np.inf), rows[i::3], y[i::3]) for i in range(3)]
    merged = LinearThompson(discount=1.0, alarm=np.inf)
    for shard in shards:
        merged.merge(shard.statistics_)
    for policy in (one, merged):
        policy.adapt()
    got, wanted = merged.statistics_["student"], one.statistics_["student"]
    np.testing.assert_allclose(got.gram, wanted.gram)
    np.testing.assert_allclose(got.response, wanted.response)
    assert (got.count, got.seen) == (wanted.count, wanted.seen) == (90, 90)
    np.testing.assert_allclose(merged.posterior("student").mean, one.posterior("student").mean, atol=1e-10)
    np.testing.assert_allclose(merged.posterior("student").covariance, one.posterior("student").covariance, atol=1e-10)
