from __future__ import annotations

import numpy as np
import pytest

from iccache.quality.duel import is_close, pair


@pytest.mark.parametrize(
    ("confidences", "close"),
    [
        ((0.41, 0.59), True),
        ((0.39, 0.61), False),
        ((0.5, 0.5), True),
        ((0.2, 0.3, 0.5), False),
        ((0.3, 0.33, 0.37), True),
        ((1.0,), False),
    ],
)
def test_close_is_a_standard_deviation_below_a_tenth(confidences: tuple[float, ...], close: bool) -> None:
    assert is_close(np.array(confidences)) is close


def test_the_top_is_always_in_the_pair_and_the_second_is_drawn_by_confidence() -> None:
    rng = np.random.default_rng(1)
    names, confidences = ["a", "b", "c"], np.array([0.3, 0.4, 0.1])
    found = [pair(names, confidences, rng) for _ in range(4000)]
    assert {first for first, _ in found} == {"b"}
    assert np.mean([second == "a" for _, second in found]) == pytest.approx(0.75, abs=0.03)


def test_arms_without_any_confidence_are_drawn_evenly() -> None:
    rng = np.random.default_rng(1)
    found = {pair(["a", "b", "c"], np.array([1.0, 0.0, 0.0]), rng) for _ in range(100)}
    assert found == {("a", "b"), ("a", "c")}
