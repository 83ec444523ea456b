"""The ways to show examples: the posterior against brute force, and synthetic worlds whose best way is known."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iccache.examples import ways as module
from iccache.examples.showing import NOTHING, Offer, draw, price_of, probabilities
from iccache.examples.traits import application
from iccache.examples.ways import (
    APART,
    COMMON,
    NAMES,
    NOISE,
    NOTHING_KNOWN,
    UNTRAINED,
    WAYS,
    Estimate,
    Evidence,
    Prior,
    Shown,
    Way,
    Ways,
    features,
    posterior,
)
from iccache.types import Match, Vector
from tests.factories import make_example

SYSTEM = "Be brief."


def unit(*values: float) -> Vector:
    vector = np.array(values, np.float32)
    return vector / np.float32(np.linalg.norm(vector))


def offer(count: int, price: float = 0.0) -> Offer:
    return Offer(tuple(Match(make_example(f"e{i}"), 0.9, 0.1) for i in range(count)), price)


OFFERS = {Way.NONE: NOTHING, Way.OWN: offer(3), Way.SHARED: offer(8)}


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(-1, 1)), max_size=12))
def test_the_posterior_is_that_of_conditioning_a_gaussian_on_every_answer(answers: list[tuple[int, float]]) -> None:
    n, r = np.zeros(3), np.zeros(3)
    for way, residual in answers:
        n[way] += 1
        r[way] += residual
    mean, covariance = posterior(n, r)

    prior = COMMON * np.ones((3, 3)) + APART * np.eye(3)
    seen = np.array([np.eye(3)[way] for way, _ in answers]).reshape(
        len(answers), 3
    )  # observation = seen @ theta + noise
    gain = prior @ seen.T @ np.linalg.inv(seen @ prior @ seen.T + NOISE * np.eye(len(answers)))
    assert mean == pytest.approx(gain @ np.array([residual for _, residual in answers]), abs=1e-9)
    assert covariance == pytest.approx(prior - gain @ seen @ prior, abs=1e-9)


def test_what_all_ways_have_in_common_moves_all_and_sets_none_apart() -> None:
    mean, _ = posterior(np.array([0.0, 50.0, 0.0]), np.array([0.0, -20.0, 0.0]))
    assert mean[0] == pytest.approx(mean[2])
    assert mean[1] < mean[0] < 0


def test_features_have_a_name_each_and_only_those_of_the_way_taken() -> None:
    shown = Shown([0.5, 0.9], [0.2, 0.4], [1.0, 0.0], [0.0, 1.0], [0.3], [0.4], [0.1, 0.2], [-0.1, 0.3], [0.25, 0.0])
    own = dict(zip(NAMES, features(6, Way.OWN, shown), strict=True))
    assert own == pytest.approx(
        {
            "constant": 1.0,
            "request_length": np.log(7) / 8,
            "own": 1.0,
            "own_count": 0.25,
            "own_similarity_mean": 0.7,
            "own_similarity_max": 0.9,
            "own_overlap": 0.3,
            "own_vote": 0.5,
            "own_other_system": 0.5,
            "own_request_length": 0.3,
            "own_answer_length": 0.4,
            "own_age": 0.15,
            "own_record": 0.1,
            "own_source": 0.125,
            "shared": 0.0,
            "shared_count": 0.0,
            "shared_similarity_mean": 0.0,
            "shared_similarity_max": 0.0,
        }
    )
    assert not features(6, Way.NONE, shown)[2:].any()
    assert not features(6, Way.SHARED, shown)[2 : NAMES.index("shared")].any()


def test_a_prior_survives_its_state_and_refuses_what_is_none() -> None:
    prior = Prior({"": np.arange(len(NAMES)), "small": np.ones(len(NAMES))})
    again = Prior.restored(prior.state())
    assert again.weights.keys() == prior.weights.keys()
    assert all((again.weights[s] == prior.weights[s]).all() for s in prior.weights)
    for state in (b"", b"[]", b"{}", b'{"names": ["x"], "weights": {}}', prior.state().replace(b"1.0", b"NaN")):
        with pytest.raises(ValueError, match="prior"):
            Prior.restored(state)


def test_a_prior_of_fewer_features_goes_on_with_the_untrained_weights_of_the_others() -> None:
    state = json.dumps({"names": ["constant", "own_vote"], "weights": {"": [0.5, 0.2]}}).encode()
    expected = dict(zip(NAMES, UNTRAINED, strict=True)) | {"constant": 0.5, "own_vote": 0.2}
    assert Prior.restored(state).weights[""].tolist() == list(expected.values())


def test_before_anything_was_scored_the_nearest_are_shown_to_everybody() -> None:
    estimate = Ways().estimate(NOTHING_KNOWN, "small", 10, {})
    assert probabilities(estimate, OFFERS, 1.0).tolist() == [0, 1, 0]
    assert probabilities(estimate, {Way.NONE: NOTHING}, 1.0).tolist() == [1, 0, 0]


qualities = st.lists(st.floats(0, 1), min_size=3, max_size=3).map(np.array)


@given(
    qualities, st.lists(st.floats(0.01, 0.5), min_size=3, max_size=3).map(np.array), st.sampled_from([0.0, 0.1, 1.0])
)
def test_probabilities_are_a_distribution_over_what_is_offered(quality: object, sd: object, exploration: float) -> None:
    estimate = Estimate(np.asarray(quality), np.asarray(sd), np.zeros(3), 10.0)
    for offers in (OFFERS, {Way.NONE: NOTHING}, {Way.NONE: NOTHING, Way.SHARED: offer(8)}):
        p = probabilities(estimate, offers, exploration)
        assert p.sum() == pytest.approx(1.0)
        assert (p >= 0).all()
        assert all(p[i] == 0 for i, way in enumerate(WAYS) if way not in offers)


def test_draws_come_as_often_as_is_logged() -> None:
    estimate = Estimate(np.array([0.5, 0.55, 0.5]), np.full(3, 0.1), np.zeros(3), 10.0)
    p = probabilities(estimate, OFFERS, 1.0)
    rng = np.random.default_rng(1)
    taken = [draw(estimate, OFFERS, rng, exploration=1.0, leave_out=0.0)[1] for _ in range(4000)]
    for i, way in enumerate(WAYS):
        drawn = [t for t in taken if t.way == way]
        assert all(t.probability == pytest.approx(p[i]) for t in drawn)
        assert len(drawn) / 4000 == pytest.approx(p[i], abs=0.03)


def test_a_price_can_be_too_high_for_a_gain() -> None:
    estimate = Estimate(np.array([0.50, 0.60, 0.58]), np.full(3, 0.01), np.zeros(3), 10.0)
    dear = {Way.NONE: NOTHING, Way.OWN: offer(3, 0.2), Way.SHARED: offer(8, 0.01)}
    assert probabilities(estimate, OFFERS, 0.0).tolist() == [0, 1, 0]
    assert probabilities(estimate, dear, 0.0).tolist() == [0, 0, 1]
    assert price_of(0.001, 0.01) == pytest.approx(0.1)
    assert (price_of(0.001, 0.0), price_of(1.0, 0.1)) == (0.0, 1.0)


def test_one_example_is_left_out_as_often_as_asked_and_named() -> None:
    estimate = Estimate(np.array([0.1, 0.9, 0.1]), np.full(3, 0.01), np.zeros(3), 10.0)
    rng = np.random.default_rng(2)
    left = []
    for _ in range(2000):
        shown, taken = draw(estimate, OFFERS, rng, exploration=0.0, leave_out=0.2)
        ids = [m.example.id for m in shown]
        assert (taken.left_out is None) == (ids == ["e0", "e1", "e2"])
        if taken.left_out is not None:
            assert sorted([*ids, taken.left_out]) == ["e0", "e1", "e2"]
            left.append(taken.left_out)
    assert len(left) / 2000 == pytest.approx(0.2, abs=0.03)
    assert {left.count(id) > 80 for id in ("e0", "e1", "e2")} == {True}


# ---- evidence


def put(evidence: Evidence, id: str, vector: Vector, way: Way = Way.OWN, residual: float = 1.0, app: int = 1) -> None:
    evidence.put(id, vector, app, 0, way, residual)


def test_a_new_score_replaces_the_old_and_the_newest_answer_the_oldest() -> None:
    evidence = Evidence(2, capacity=3)
    here = unit(1, 0)
    put(evidence, "a", here, residual=1.0)
    put(evidence, "a", here, residual=-1.0)
    n, r = evidence.near(here, 1, 0)
    assert (n[1], r[1]) == (pytest.approx(1.0), pytest.approx(-1.0))
    for id in "bcd":
        put(evidence, id, here, residual=0.5)
    assert sorted(evidence.rows) == ["b", "c", "d"]
    n, r = evidence.near(here, 1, 0)
    assert (n[1], r[1]) == (pytest.approx(3.0), pytest.approx(1.5))


def test_what_is_forgotten_counts_no_more() -> None:
    evidence = Evidence(2, capacity=3)
    for id in "abc":
        put(evidence, id, unit(1, 0))
    evidence.forget("b")
    evidence.forget("nobody")
    assert evidence.near(unit(1, 0), 1, 0)[0][1] == pytest.approx(2.0)
    assert not evidence.vectors[1].any()


def test_one_student_says_nothing_of_another_and_one_tenant_nothing_to_another() -> None:
    ways = Ways()
    for i in range(20):
        ways.learn("t", f"r{i}", "small", unit(1, 0), SYSTEM, Way.OWN, 0.0, 0.5)
    assert ways.near("t", "small", unit(1, 0), SYSTEM).shift[1] < -0.2
    assert ways.near("t", "other", unit(1, 0), SYSTEM) is NOTHING_KNOWN
    assert ways.near("u", "small", unit(1, 0), SYSTEM) is NOTHING_KNOWN


def test_requests_under_one_system_prompt_lend_each_other_some_and_alike_ones_more() -> None:
    evidence = Evidence(2)
    put(evidence, "a", unit(1, 0))
    evidence.usual, evidence.alike = 0.0, 0.9
    near, far = evidence.near(unit(1, 0), 1, 0)[0][1], evidence.near(unit(0, 1), 1, 0)[0][1]
    other = evidence.near(unit(1, 0), 2, 0)[0][1]
    assert near == pytest.approx(1.0)
    assert far == pytest.approx(module.SAME_APPLICATION)
    assert other == pytest.approx(module.OTHER_APPLICATION)


def test_system_prompts_are_compared_but_for_space() -> None:
    assert application(" Be  brief.\n") == application(SYSTEM) != application("Be long.")
    assert application("  ") == 0


@settings(max_examples=20)
@given(st.floats(0.3, 1.0), st.floats(0.0, 0.5))
def test_what_counts_as_alike_follows_the_embedder(scale: float, shift: float) -> None:
    """Cosines squeezed and shifted, as between two embedders: the same answers count as near."""
    rng = np.random.default_rng(3)
    kinds = np.repeat([0, 1], 100)
    cosines = np.where(kinds[:, None] == kinds[None], 0.8, 0.1) + rng.normal(0, 0.02, (200, 200))
    cosines = cosines * scale * (1 - shift) + shift
    usual, alike = np.median(cosines), np.quantile(cosines, 0.98)
    evidence = Evidence(1)
    evidence.usual, evidence.alike = float(usual), max(float(alike), float(usual) + 0.1)
    weights = evidence._nearness(cosines[0].astype(np.float32), np.ones(200, bool), False)
    assert weights[:100].mean() > weights[100:].mean() + 0.3


# ---- a world whose best way is known


def run(best: dict[str, dict[Way, float]], rounds: int, seed: int, systems: bool) -> dict[str, list[Way]]:
    """Serve `rounds` requests of each kind, its quality by way given, and learn from a score for each."""
    rng = np.random.default_rng(seed)
    ways = Ways()
    centres = {kind: rng.normal(size=16) for kind in best}
    taken: dict[str, list[Way]] = {kind: [] for kind in best}
    for i in range(rounds):
        for kind, quality in best.items():
            vector = unit(*(centres[kind] + 0.5 * rng.normal(size=16)))
            system = kind if systems else ""
            seen = {Way.OWN: Shown([0.7] * 3), Way.SHARED: Shown([0.4] * 8)}
            estimate = ways.estimate(ways.near("t", "s", vector, system), "s", 40, seen)
            _, choice = draw(estimate, OFFERS, rng, exploration=0.8, leave_out=0.0)
            way = Way(choice.way)
            score = float(rng.random() < quality[way])
            ways.learn("t", f"{kind}{i}", "s", vector, system, way, score, choice.expected)
            taken[kind].append(way)
    return taken


HELPS = {Way.NONE: 0.1, Way.OWN: 0.7, Way.SHARED: 0.4}
HURTS = {Way.NONE: 0.7, Way.OWN: 0.3, Way.SHARED: 0.5}
SHARES = {Way.NONE: 0.2, Way.OWN: 0.4, Way.SHARED: 0.8}


@pytest.mark.parametrize("systems", [True, False])
def test_each_kind_of_request_finds_its_way(systems: bool) -> None:
    right = {"helps": Way.OWN, "hurts": Way.NONE, "shares": Way.SHARED}
    share = []
    for seed in range(5):
        taken = run({"helps": HELPS, "hurts": HURTS, "shares": SHARES}, 250, seed, systems)
        share += [np.mean([way is right[kind] for way in taken[kind][-60:]]) for kind in right]
    assert np.mean(share) > 0.8
    assert np.median(share) > 0.85
