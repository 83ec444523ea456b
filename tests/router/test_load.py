import heapq
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.choice import choice_probabilities
from router.load import LoadTracker, load_bias

costs = st.lists(st.floats(0, 1), min_size=1, max_size=5).map(np.array)
shape = st.tuples(st.floats(0, 2), st.floats(0, 3), st.floats(0, 10))  # theta, lambda0, gamma


@settings(deadline=None)
@given(costs, shape, st.floats(0, 1))
def test_no_bias_at_or_below_the_target_load(costs, shape, share):
    theta, lambda0, gamma = shape
    assert (load_bias(theta * share, costs, theta, lambda0, gamma) == 0).all()
    assert (load_bias(theta, costs, theta, lambda0, gamma) == 0).all()


@settings(deadline=None)
@given(costs, shape, st.floats(0, 50), st.floats(0, 50))
def test_bias_grows_with_load_and_cost_and_is_bounded(costs, shape, one, other):
    low, high = sorted((one, other))
    _, lambda0, _ = shape
    less, more = load_bias(low, costs, *shape), load_bias(high, costs, *shape)
    assert (less <= more).all()
    assert (more >= 0).all() and (more <= lambda0 * costs).all()
    assert (np.diff(more[np.argsort(costs)]) >= 0).all()


def test_bias_is_the_formula():
    bias = load_bias(1.3, np.array([0.0, 0.5, 1.0]), theta=0.8, lambda0=0.5, gamma=2.0)
    np.testing.assert_allclose(bias, [0.0, 0.25 * math.tanh(1.0), 0.5 * math.tanh(1.0)])


@pytest.mark.parametrize("load", [-0.1, float("nan"), float("inf")])
def test_a_load_that_is_none_is_refused(load):
    with pytest.raises(ValueError, match="load"):
        load_bias(load, np.ones(2), 0.8, 0.5, 2.0)


def test_load_approaches_what_is_in_flight():
    tracker = LoadTracker({"big": 4}, ["big"], smoothing_s=10.0)
    tracker.begin("big", 0.0)
    tracker.begin("big", 0.0)
    assert tracker.load(0.0) == 0.0
    assert tracker.load(10.0) == pytest.approx(0.5 * (1 - math.exp(-1)))
    assert tracker.load(1000.0) == pytest.approx(0.5)
    tracker.end("big", 1000.0)
    tracker.end("big", 1000.0)
    assert tracker.load(1010.0) == pytest.approx(0.5 * math.exp(-1))


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 5), st.booleans()), max_size=30), st.lists(st.floats(0, 200), max_size=20))
def test_load_is_the_exponential_average_however_often_it_is_asked(events, asked):
    """Against the integral of in-flight requests with weight exp(-age / 10), by hand."""
    plain, busy = LoadTracker({"big": 3}, ["big"]), LoadTracker({"big": 3}, ["big"])
    timeline, now, n = [], 0.0, 0
    for gap, begins in events:
        for at in sorted(a for a in asked if now < a < now + gap):
            busy.load(at)
        now += gap
        for tracker in (plain, busy):
            (tracker.begin if begins else tracker.end)("big", now)
        n = n + 1 if begins else max(0, n - 1)
        timeline.append((now, n))
    until = now + 7.0
    edges = [*(at for at, _ in timeline), until]
    expected = sum(
        n * (math.exp(-(until - b) / 10) - math.exp(-(until - a) / 10))
        for (a, n), b in zip(timeline, edges[1:], strict=True)
    )
    assert plain.load(until) == pytest.approx(expected / 3, abs=1e-9)
    assert busy.load(until) == pytest.approx(expected / 3, abs=1e-9)


def test_queued_requests_take_the_load_above_1():
    tracker = LoadTracker({"big": 2}, ["big"])
    for _ in range(6):
        tracker.begin("big", 0.0)
    assert tracker.load(100.0) == pytest.approx(3.0, abs=1e-3)


def test_only_the_watched_arms_count_together():
    tracker = LoadTracker({"big": 2, "bigger": 6, "small": 1}, ["big", "bigger"])
    for arm in ("big", "big", "small", "small", "unknown"):
        tracker.begin(arm, 0.0)
    assert tracker.load(1e6) == pytest.approx(2 / 8)
    assert tracker.arm_load("small", 1e6) == pytest.approx(2.0)
    assert tracker.arm_load("unknown", 1e6) == 0.0 and tracker.in_flight("unknown") == 1


def test_surplus_ends_and_a_clock_that_steps_back_do_no_harm():
    tracker = LoadTracker({"big": 2}, ["big"])
    tracker.end("big", 5.0)
    tracker.end("never seen", 5.0)
    tracker.begin("big", 5.0)
    assert tracker.in_flight("big") == 1
    before = tracker.load(10.0)
    assert tracker.load(3.0) == before and tracker.load(10.0) == before


def test_nothing_watched_is_no_load():
    assert LoadTracker({}, []).load(1.0) == 0.0


@pytest.mark.parametrize(
    ("capacities", "watched", "smoothing_s", "message"),
    [
        ({"a": 0}, ["a"], 10.0, "capacity of 'a'"),
        ({"a": 1}, ["b"], 10.0, "no capacity is given for b"),
        ({"a": 1}, ["a"], 0.0, "smoothing_s"),
    ],
)
def test_a_tracker_that_cannot_work_is_refused(capacities, watched, smoothing_s, message):
    with pytest.raises(ValueError, match=message):
        LoadTracker(capacities, watched, smoothing_s=smoothing_s)


def test_a_time_that_is_none_is_refused():
    with pytest.raises(ValueError, match="now"):
        LoadTracker({"a": 1}, ["a"]).begin("a", float("nan"))


@pytest.mark.parametrize("doubt", [0.03, 0.1])
def test_the_closed_loop_settles(doubt):
    """Twice the teacher's capacity arrives, service takes 8 s exactly (the worst case for a loop): the load comes to
    rest near the target instead of swinging between empty and full."""
    rng = np.random.default_rng(3)
    tracker, waiting, running, now = LoadTracker({"big": 16}, ["big"]), 0, [], 0.0
    samples, offloaded = [], []
    while now < 600:
        now += rng.exponential(1 / 4.0)
        while running and running[0] <= now:
            over = heapq.heappop(running)
            tracker.end("big", over)
            if waiting:
                waiting -= 1
                heapq.heappush(running, over + 8.0)
        bias = load_bias(tracker.load(now), np.array([0.0, 1.0]), 0.8, 0.5, 2.0)
        p = choice_probabilities(np.array([0.5 + bias[1], 0.9]), np.full(2, doubt), 0.63)
        if rng.random() < p[1]:
            tracker.begin("big", now)
            if len(running) < 16:
                heapq.heappush(running, now + 8.0)
            else:
                waiting += 1
        samples.append((now, tracker.load(now)))
        offloaded.append(p[0])
    at, load = np.array(samples).T
    settled = np.interp(np.arange(150.0, 600.0), at, load)
    assert 0.8 < settled.mean() < 1.1 and settled.std() < 0.15 and settled.max() < 1.5
    deviations = settled - settled.mean()
    period = np.array([deviations[lag:] @ deviations[:-lag] for lag in range(20, 120)]) / (deviations @ deviations)
    assert period.max() < 0.5  # a limit cycle would come near 1
    assert 0.3 < np.mean(offloaded[len(offloaded) // 4 :]) < 0.7


def test_what_a_backend_says_it_has_counts_where_it_is_more():
    tracker = LoadTracker({"big": 4}, ["big"], smoothing_s=1e-6)
    tracker.begin("big", 0.0)
    tracker.report("big", 6.0, 0.0)
    assert tracker.load(1.0) == pytest.approx(1.5)
    tracker.report("big", 0.0, 1.0)
    assert tracker.load(2.0) == pytest.approx(0.25)  # it has not heard of ours yet
    tracker.report("big", 6.0, 2.0)
    tracker.report("big", None, 3.0)
    assert tracker.load(4.0) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="requests"):
        tracker.report("big", float("nan"), 5.0)


def test_an_arm_slow_to_its_first_byte_counts_as_busy_and_recovers():
    tracker = LoadTracker({"large": 8}, ["large"], smoothing_s=10)
    rng = np.random.default_rng(0)
    seen, now = {}, 0.0
    for phase, times in (("usual", 1.0), ("slow", 4.0), ("usual again", 1.0)):
        for _ in range(60):
            now += 1.0
            tracker.first_byte("large", 0.5 * times * rng.lognormal(0, 0.2), now)
        seen[phase] = tracker.load(now)
    assert seen["usual"] < 0.15 and 0.4 < seen["slow"] < 1.4 and seen["usual again"] < 0.15
    tracker.first_byte("large", 50.0, now + 1)
    assert tracker.load(now + 100) < 0.05, "without answers it fades"


def test_slowness_and_requests_are_not_added_up():
    tracker = LoadTracker({"large": 2}, ["large"], smoothing_s=1)
    for i in range(25):
        tracker.first_byte("large", 1.0, float(i))
    for _ in range(4):
        tracker.begin("large", 25.0)
    assert tracker.load(60.0) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="seconds"):
        tracker.first_byte("large", -1.0, 60.0)
