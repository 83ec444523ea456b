import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from router.features import NAMES, features
from router.floor import Standing
from router.linear import LinearThompson
from router.policy import Always, Uniform
from router.routing import Router
from router.types import Arm, Signals
from tests.router.worlds import MIDDLE, STUDENT, TEACHER, TwoKinds

ARMS = [STUDENT, MIDDLE, TEACHER]
PLAIN = Signals(None, 100, 1, {})


def router(policy=None, seed=0, **changes):
    plain = {"exploration": 0.05, "quality_target": 0.7, "theta": 0.8, "lambda0": 0.5, "gamma": 2.0}
    return Router(policy or LinearThompson(), rng=np.random.default_rng(seed), **plain | changes)


def test_a_decision_holds_what_it_takes_to_judge_it():
    r, signals = router(), TwoKinds(np.random.default_rng(1)).signals(0)
    decision = r.route(signals, ARMS, 1.2)
    assert decision.names == ("student", "middle", "teacher")
    chosen = decision.names.index(decision.arm)
    assert decision.propensity == decision.probabilities[chosen] and decision.preferred == decision.arm
    np.testing.assert_array_equal(decision.features, features(signals, ARMS[chosen]))
    np.testing.assert_array_equal(decision.load_bias, r.load_bias(ARMS, 1.2))
    means, _ = r.policy.beliefs(np.stack([features(signals, arm) for arm in ARMS]), ARMS)
    np.testing.assert_allclose(decision.scores, means - decision.load_bias)


@pytest.mark.parametrize("changes", [{}, {"holdout_share": 0.2}, {"exploration": 0.5}])
def test_arms_are_drawn_as_often_as_logged(changes):
    r = router(**changes)
    decisions = [r.route(PLAIN, ARMS, 1.0) for _ in range(2000)]
    p = decisions[0].probabilities
    counts = [sum(d.arm == name for d in decisions) for name in decisions[0].names]
    assert stats.chisquare(counts, p * len(decisions)).pvalue > 0.001
    assert {d.propensity for d in decisions} <= set(p.tolist())


def test_a_draw_that_is_given_is_the_one_that_is_made():
    r, rng = router(holdout_share=0.1), np.random.default_rng(1)
    for u in rng.random(50).tolist():
        drawn = [r.route(PLAIN, ARMS, 1.0, u=u) for _ in range(2)]
        assert drawn[0].arm == drawn[1].arm and drawn[0].held_out == drawn[1].held_out
    counts = [r.route(PLAIN, ARMS, 1.0, u=(i + 0.5) / 2000).arm for i in range(2000)]
    p = dict(zip(drawn[0].names, drawn[0].probabilities.tolist(), strict=True))
    for name, share in p.items():  # as often as logged, where `u` is uniform
        assert counts.count(name) / 2000 == pytest.approx(share, abs=2e-3)


def test_an_arm_of_probability_0_is_never_drawn():
    class Last:
        def random(self):
            return np.nextafter(1.0, 0.0)

    r = router(Always("student"), exploration=0.0)
    r._rng = Last()
    assert r.route(PLAIN, ARMS, 0.0).arm == "student"
    r._rng = type("First", (), {"random": lambda self: 0.0})()
    assert r.route(PLAIN, ARMS[::-1], 0.0).arm == "student"


@settings(max_examples=40, deadline=None)
@given(
    prices=st.lists(st.floats(0, 10), min_size=1, max_size=5),
    load=st.floats(0, 5),
    exploration=st.floats(0, 1),
    holdout=st.floats(0, 1),
)
def test_probabilities_sum_to_1_and_leave_every_arm_its_share(prices, load, exploration, holdout):
    arms = [Arm(str(i), price, is_teacher=i == 0) for i, price in enumerate(prices)]
    d = router(exploration=exploration, holdout_share=holdout).route(PLAIN, arms, load)
    assert d.probabilities.sum() == pytest.approx(1)
    assert (d.probabilities >= (1 - holdout) * exploration / len(arms) - 1e-12).all()
    assert 0 < d.propensity <= 1 + 1e-12


def test_the_mixture_is_the_formula():
    d = router(Always("student"), exploration=0.3, holdout_share=0.5).route(PLAIN, ARMS, 0.0)
    np.testing.assert_allclose(d.probabilities, [0.5 * (0.7 + 0.1), 0.5 * 0.1, 0.5 * 0.1 + 0.5])


@settings(max_examples=40, deadline=None)
@given(
    prices=st.lists(st.floats(0, 10), min_size=2, max_size=5),
    loads=st.tuples(st.floats(0, 3), st.floats(0, 3)),
    seed=st.integers(0, 100),
    target=st.floats(0, 1),
)
def test_as_load_rises_the_cheapest_are_never_less_likely_and_nothing_is_unlearned(prices, loads, seed, target):
    rng = np.random.default_rng(seed)
    arms = [Arm(str(i), price) for i, price in enumerate(prices)]
    r = router(quality_target=target)
    for arm in arms:
        quality = rng.random()
        for _ in range(rng.integers(0, 20)):
            r.learn(arm.name, features(PLAIN, arm), quality)
    before = r.state()
    low, high = (r.route(PLAIN, arms, load) for load in sorted(loads))
    by_price = sorted(range(len(arms)), key=lambda i: arms[i].price)
    less, more = (np.cumsum(d.probabilities[by_price]) for d in (low, high))
    assert (more >= less - 1e-9).all()
    assert r.state() == before


def test_up_to_the_target_load_nothing_changes():
    r = router()
    idle, busy = r.route(PLAIN, ARMS, 0.0), r.route(PLAIN, ARMS, 0.8)
    np.testing.assert_array_equal(idle.probabilities, busy.probabilities)
    np.testing.assert_array_equal(busy.load_bias, np.zeros(3))
    assert r.route(PLAIN, ARMS, 0.9).load_bias[2] > 0


def test_in_the_shadow_the_dearest_serves_and_the_draw_is_noted():
    shadow, live = router(Uniform(), shadow=True), router(Uniform())
    noted = [shadow.route(PLAIN, ARMS, 0.0) for _ in range(200)]
    drawn = [live.route(PLAIN, ARMS, 0.0) for _ in range(200)]
    assert {d.arm for d in noted} == {"teacher"} and {d.propensity for d in noted} == {1.0}
    assert [d.preferred for d in noted] == [d.arm for d in drawn]
    np.testing.assert_array_equal(noted[0].features, features(PLAIN, TEACHER))


def test_the_candidates_may_differ_from_request_to_request():
    r = router()
    for arms in ([TEACHER], [STUDENT, TEACHER], [MIDDLE, STUDENT], ARMS, [Arm("new", 0.2), *ARMS]):
        d = r.route(PLAIN, arms, 0.5)
        assert d.names == tuple(arm.name for arm in arms)
        r.learn(d.arm, d.features, 0.7)


@pytest.mark.parametrize("arms", [[], [STUDENT, STUDENT]])
def test_no_arms_or_the_same_twice_are_refused(arms):
    with pytest.raises(ValueError, match="arms"):
        router().route(PLAIN, arms, 0.0)


@pytest.mark.parametrize("load", [-1.0, float("nan")])
def test_a_load_that_is_none_is_refused(load):
    with pytest.raises(ValueError, match="load"):
        router().route(PLAIN, ARMS, load)


@pytest.mark.parametrize(
    "bad",
    [
        {"exploration": -0.1},
        {"exploration": 1.1},
        {"quality_target": float("nan")},
        {"holdout_share": 2.0},
        {"theta": -1.0},
        {"lambda0": float("inf")},
        {"gamma": float("nan")},
    ],
)
def test_parameters_out_of_range_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        router(**bad)


def test_the_same_seed_and_feedback_give_the_same_decisions():
    def run():
        world, r, arms = TwoKinds(np.random.default_rng(5)), router(seed=9), []
        for i in range(60):
            d = r.route(world.signals(i % 2), ARMS, 0.9)
            r.learn(d.arm, d.features, 0.5)
            arms.append(d.arm)
        return arms, r.state()

    assert run() == run()


def test_a_restored_router_decides_alike():
    one, two = router(), router()
    for _ in range(20):
        one.learn("student", features(PLAIN, STUDENT), 0.9)
    two.restore(one.state())
    np.testing.assert_array_equal(one.route(PLAIN, ARMS, 1.0).probabilities, two.route(PLAIN, ARMS, 1.0).probabilities)


def served(r, world, n, quality, arms=(STUDENT, TEACHER)):
    """n requests of two kinds with feedback for each: (kind, served by the student) of every one."""
    log = []
    for _ in range(n):
        kind = int(world.rng.integers(2))
        d = r.route(world.signals(kind), arms, 0.0)
        r.learn(d.arm, d.features, quality(d.arm, kind))
        log.append((kind, d.arm == "student"))
    return np.array(log)


def last(log, kind, n=60):
    return log[log[:, 0] == kind][-n:, 1].mean()


@pytest.mark.parametrize("seed", range(6))
def test_two_kinds_of_request_are_told_apart_and_a_student_that_breaks_is_dropped(seed):
    world, r = TwoKinds(np.random.default_rng(seed)), router(seed=seed + 100)
    log = served(r, world, 700, lambda arm, kind: float(arm == "teacher" or kind == 0))
    assert last(log, 0) >= 0.8 and last(log, 1) <= 0.15
    log = served(r, world, 140, lambda arm, kind: float(arm == "teacher"))
    assert log[80:, 1].mean() <= 0.15


def test_noisy_quality_is_told_apart_too():
    shares = []
    for seed in range(4):
        world, r = TwoKinds(np.random.default_rng(seed)), router(seed=seed + 100)
        chance = {("student", 0): 0.9, ("student", 1): 0.15}
        log = served(
            r, world, 700, lambda arm, kind, w=world, c=chance: float(w.rng.random() < c.get((arm, kind), 1.0))
        )
        shares.append((last(log, 0), last(log, 1)))
    good, bad = np.mean(shares, axis=0)
    assert good >= 0.8 and bad <= 0.15


def test_a_student_that_is_repaired_comes_back():
    world, r = TwoKinds(np.random.default_rng(2)), router(seed=4)
    served(r, world, 200, lambda arm, kind: 1.0)
    broken = served(r, world, 150, lambda arm, kind: float(arm == "teacher"))
    repaired = served(r, world, 400, lambda arm, kind: 1.0)
    assert broken[-60:, 1].mean() <= 0.15
    assert repaired[-100:, 1].mean() >= 0.8


def test_among_three_each_kind_goes_to_the_cheapest_that_masters_it():
    world, r = TwoKinds(np.random.default_rng(1)), router(seed=1)
    able = {("student", 0), ("middle", 0), ("middle", 1), ("teacher", 0), ("teacher", 1)}
    tally = {}
    for i in range(900):
        kind = i % 2
        d = r.route(world.signals(kind), ARMS, 0.0)
        r.learn(d.arm, d.features, float((d.arm, kind) in able))
        if i >= 700:
            tally[d.arm, kind] = tally.get((d.arm, kind), 0) + 1
    assert tally["student", 0] >= 75 and tally["middle", 1] >= 70
    assert tally.get(("student", 1), 0) <= 15


def test_features_and_names_agree_with_the_policy():
    assert LinearThompson().names == NAMES


HELD = {"student": Standing.HELD}


def test_an_arm_held_back_keeps_a_share_of_the_requests_at_most():
    r = router(Always("student"), exploration=0.3, probe_share=0.2)
    d = r.route(PLAIN, ARMS, 0.0, HELD)
    np.testing.assert_allclose(d.probabilities, [0.7 * 0.2 + 0.1, 0.1, 0.7 * 0.8 + 0.1])
    assert d.propensity == d.probabilities[d.names.index(d.arm)]
    d = r.route(PLAIN, ARMS, 0.0, {"teacher": Standing.HELD})
    np.testing.assert_allclose(d.probabilities, [0.7 + 0.1, 0.1, 0.1], err_msg="the dearest is what all fall back to")


def test_the_hold_out_is_drawn_at_random_and_noted():
    r = router(Always("student"), exploration=0.0, holdout_share=0.25)
    decisions = [r.route(PLAIN, ARMS, 0.0) for _ in range(800)]
    assert {(d.arm, d.held_out, d.wanted, d.withheld) for d in decisions} == {
        ("teacher", True, "teacher", None),
        ("student", False, "student", None),
    }
    assert np.mean([d.held_out for d in decisions]) == pytest.approx(0.25, abs=0.06)
    assert {d.propensity for d in decisions} == {0.25, 0.75}
    assert all(d.arm == "teacher" for d in (router(holdout_share=1.0).route(PLAIN, ARMS, 0.0) for _ in range(5)))


def test_an_arm_that_is_returning_keeps_half_and_one_that_is_hardly_wanted_what_it_has():
    r = router(Always("student"), exploration=0.0, probe_share=0.2)
    p = r.route(PLAIN, ARMS, 0.0, {"student": Standing.RETURNING}).probabilities
    assert p == pytest.approx([0.5, 0, 0.5])
    r = router(Always("teacher"), exploration=0.3, probe_share=0.2)
    assert r.route(PLAIN, ARMS, 0.0, HELD).probabilities == pytest.approx([0.1, 0.1, 0.8])


def test_how_far_the_policy_meant_the_arm_that_was_drawn_is_noted():
    r = router(Always("student"), exploration=0.3, probe_share=0.2)
    decisions = [r.route(PLAIN, ARMS, 0.0, HELD) for _ in range(60)]
    assert {d.arm: d.meant for d in decisions} == pytest.approx(
        {"student": 0.7 * 0.2 / 0.24, "middle": 0.0, "teacher": 1.0}
    )


def test_what_the_policy_wanted_is_noted():
    r = router(Always("student"), exploration=0.0, probe_share=0.1)
    decisions = [r.route(PLAIN, ARMS, 0.0, HELD) for _ in range(300)]
    assert {d.wanted for d in decisions} == {"student"}
    assert {d.arm for d in decisions} == {"student", "teacher"}
    assert all(d.preferred == d.arm for d in decisions)
    assert np.mean([d.arm == "student" for d in decisions]) == pytest.approx(0.1, abs=0.06)


def test_held_back_arms_are_drawn_as_often_as_logged():
    r = router(holdout_share=0.1)
    decisions = [r.route(PLAIN, ARMS, 1.0, HELD) for _ in range(500)]
    p = decisions[0].probabilities
    counts = [sum(d.arm == name for d in decisions) for name in decisions[0].names]
    assert stats.chisquare(counts, p * len(decisions)).pvalue > 0.001


def test_certify_first_waits_for_proof():
    r = router(certify_first=True, exploration=0.2)
    for standing in ({}, {"student": Standing.OPEN}, HELD):
        d = r.route(PLAIN, ARMS, 5.0, standing)
        assert d.probabilities == pytest.approx([0, 0, 1]), "not even load or exploration offload"
        assert (d.arm, d.propensity) == ("teacher", pytest.approx(1))
    proved = router(Always("student"), certify_first=True, exploration=0.2)
    p = proved.route(PLAIN, ARMS, 0.0, {"student": Standing.PROVED}).probabilities
    assert p == pytest.approx([0.9, 0, 0.1]), "of the middle one nothing is proved yet"
