import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.features import (
    N_PROJECTED,
    N_SYSTEM,
    NAMES,
    PROJECTED_LIMIT,
    feature_rows,
    features,
    project,
    projection,
    sketch,
)
from router.types import Arm, ExampleSignals, Signals
from tests.router.worlds import STUDENT, TEACHER, TwoKinds


def test_one_value_for_each_name_and_the_constant_first(rng):
    x = features(TwoKinds(rng).signals(0), STUDENT)
    assert x.shape == (len(NAMES),) and x.dtype == np.float64
    assert NAMES[0] == "constant" and x[0] == 1.0
    assert len(set(NAMES)) == len(NAMES)


def test_each_signal_has_its_place():
    examples = ExampleSignals(5, 0.9, 0.8, 0.3, -0.2, 4096)
    x = features(Signals(None, tokens=100, turns=1, examples={"student": examples}), STUDENT)
    named = dict(zip(NAMES, x, strict=True))
    assert [named[f"embedding_{i}"] for i in range(N_PROJECTED)] == [0.0] * N_PROJECTED
    assert named["log_tokens"] == pytest.approx(0, abs=1e-12) and named["turns"] == 0.0
    assert (named["examples"], named["similarity_max"], named["similarity_mean"]) == (1.0, 0.9, 0.8)
    assert (named["utility_max"], named["utility_mean"], named["example_tokens"]) == (0.3, -0.2, 1.0)


def test_examples_count_only_for_the_arm_they_were_chosen_for(rng):
    signals = TwoKinds(rng).signals(0)
    shown, plain = features(signals, STUDENT), features(signals, TEACHER)
    first = NAMES.index("examples")
    np.testing.assert_array_equal(shown[:first], plain[:first])
    assert (plain[first:] == 0).all() and (shown[first:] != 0).all()


@settings(deadline=None)
@given(
    embedding=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    tokens=st.integers(0, 10**12),
    turns=st.integers(0, 10**6),
    count=st.integers(0, 1000),
    floats=st.tuples(*[st.floats(-1e9, 1e9)] * 4),
)
def test_every_entry_is_bounded(embedding, tokens, turns, count, floats):
    signals = Signals(
        np.array(embedding, dtype=np.float32), tokens, turns, {"a": ExampleSignals(count, *floats, tokens)}
    )
    x = features(signals, Arm("a", 1.0))
    assert np.abs(x[1 : 1 + N_PROJECTED]).max() <= PROJECTED_LIMIT
    assert np.abs(x[1 + N_PROJECTED :]).max() <= 1.0


@pytest.mark.parametrize(
    "signals",
    [
        Signals(np.array([np.nan, 1.0], dtype=np.float32), 1, 1, {}),
        Signals(np.array([np.inf, 1.0], dtype=np.float32), 1, 1, {}),
        Signals(np.ones((2, 2), dtype=np.float32), 1, 1, {}),
        Signals(np.zeros(0, dtype=np.float32), 1, 1, {}),
        Signals(None, -1, 1, {}),
        Signals(None, 1, -1, {}),
        Signals(None, 1, 1, {"student": ExampleSignals(1, float("nan"), 0.0, 0.0, 0.0, 0)}),
        Signals(None, 1, 1, {"student": ExampleSignals(-1, 0.0, 0.0, 0.0, 0.0, 0)}),
        Signals(None, 1, 1, {"student": ExampleSignals(1, 0.0, 0.0, 0.0, 0.0, -5)}),
    ],
)
def test_signals_that_are_no_numbers_are_refused(signals):
    with pytest.raises(ValueError):
        features(signals, STUDENT)


def test_the_projection_is_the_same_everywhere():
    """Written down: another process, machine or numpy must not change what stored statistics mean."""
    assert "".join("+" if v > 0 else "-" for v in projection(384)[0, :32]) == "+---++--+-+-+------++-----+-----"
    assert "".join("+" if v > 0 else "-" for v in projection(384)[63, -32:]) == "++++----+-+--++-+-+---+---++++++"
    digest = hashlib.sha256(projection(384).astype(np.int8).tobytes()).hexdigest()
    assert digest == "a144d92c4fe77562a8a3a35ab0980c5b018bb670554be5254ca5a4c7da0e1fee"


def test_the_projection_is_balanced_and_depends_on_the_dimension():
    signs = projection(384)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4 / np.sqrt(signs.size)
    correlations = (signs @ signs.T / 384)[~np.eye(N_PROJECTED, dtype=bool)]
    assert np.abs(correlations).max() < 5 / np.sqrt(384)
    assert (projection(383) != signs[:, :383]).any()


def test_unit_vectors_have_unit_variance_and_cosines_survive(rng):
    world = TwoKinds(rng)
    kinds = [np.stack([world.embedding(kind) for _ in range(200)]) for kind in (0, 1)]
    x = [np.stack([project(e) for e in kind]) for kind in kinds]
    assert np.mean(np.concatenate(x) ** 2) == pytest.approx(1.0, abs=0.1)
    for a, b in ((0, 0), (0, 1), (1, 1)):
        assert (x[a] @ x[b].T).mean() / N_PROJECTED == pytest.approx((kinds[a] @ kinds[b].T).mean(), abs=0.12)


def test_rows_are_the_features_of_each_arm(rng):
    signals, arms = TwoKinds(rng).signals(0), [STUDENT, TEACHER]
    np.testing.assert_array_equal(feature_rows(signals, arms), [features(signals, arm) for arm in arms])


def prompt(*, of, lines, dated="Today is Monday."):
    return "\n".join([dated, *(f"Rule {i} of {of}: do as it says" for i in range(lines))])


def test_system_prompts_agree_in_the_share_of_lines_that_they_have_in_common():
    """Places that agree, over many pairs of prompts: (1 + Jaccard) / 2."""

    def agreement(pairs):
        return np.mean([(sketch(a) == sketch(b)).mean() for a, b in pairs])

    unlike = [(prompt(of=f"a{i}", lines=9), prompt(of=f"b{i}", lines=9, dated="Now.")) for i in range(300)]
    assert agreement(unlike) == pytest.approx(0.5, abs=0.03)
    half = [(prompt(of=i, lines=9, dated="A."), prompt(of=i, lines=4, dated="A.")) for i in range(300)]
    assert agreement(half) == pytest.approx(0.75, abs=0.03)  # 5 of 10
    another_day = [(prompt(of=i, lines=9), prompt(of=i, lines=9, dated="Today is Friday.")) for i in range(300)]
    assert agreement(another_day) == pytest.approx((1 + 9 / 11) / 2, abs=0.03)


def test_a_sketch_is_the_same_in_every_process_and_none_is_no_prompt():
    text = "".join("+" if v > 0 else "-" for v in sketch("You are a helpful assistant.\nAnswer in French."))
    assert text == "------+-++-+++++"
    assert sketch("").shape == (N_SYSTEM,)
    first = 1 + N_PROJECTED
    assert (features(Signals(None, 1, 1, {}), STUDENT)[first : first + N_SYSTEM] == 0).all()
    x = features(Signals(None, 1, 1, {}, system="Be brief."), STUDENT)
    np.testing.assert_array_equal(x[first : first + N_SYSTEM], sketch("Be brief."))


@given(st.text(max_size=200))
def test_any_system_prompt_has_a_sketch(text):
    assert set(np.abs(sketch(text))) == {1.0}
