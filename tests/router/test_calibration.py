import numpy as np
import pytest

from router.calibration import KNOTS, MISFIT, WIDTH, Calibration, sureness


def by_hand(pairs, mean, variance, noise_sd):
    """The formula, from the feedbacks themselves, each at the knots beside its prediction."""
    knots = np.linspace(0, 1, KNOTS)

    def spread(predicted):
        return np.clip(1 - np.abs(knots - np.clip(predicted, 0, 1)) * (KNOTS - 1), 0, 1)

    near = spread(mean) @ np.exp(-0.5 * ((knots[:, None] - knots) / WIDTH) ** 2)
    n = sum(weight * (near @ spread(p)) for p, _, weight in pairs)
    total = sum(weight * quality * (near @ spread(p)) for p, quality, weight in pairs)
    own = 1 / (variance + MISFIT**2)
    return (own * mean + total / noise_sd**2) / (own + n / noise_sd**2)


def test_what_was_seen_near_a_prediction_and_the_prediction_are_weighed_by_their_precisions(rng):
    calibration, pairs = Calibration(), []
    for _ in range(40):
        pair = rng.uniform(-0.2, 1.2), rng.random(), rng.random()
        pairs.append(pair)
        calibration.add(*pair)
    for mean in (-0.1, 0.0, 0.31, 0.5, 0.999, 1.0, 1.3):
        got, variance = calibration.calibrated(mean, 0.02, 0.3)
        assert got == pytest.approx(by_hand(pairs, mean, 0.02, 0.3)) and variance == 0.02


def test_nothing_seen_changes_nothing():
    assert Calibration().calibrated(0.4, 0.01, 0.3) == (pytest.approx(0.4), 0.01)


def test_a_step_is_found_where_a_line_was_fitted(rng):
    """Truth: 0.9 above a predicted 0.5, 0.1 below."""
    calibration = Calibration()
    for predicted in rng.random(2000):
        calibration.add(predicted, float(rng.random() < (0.9 if predicted > 0.5 else 0.1)))
    for predicted, truth in ((0.65, 0.9), (0.8, 0.9), (0.35, 0.1)):
        assert calibration.calibrated(predicted, 0.002, 0.3)[0] == pytest.approx(truth, abs=0.06)


def test_sums_add_fade_and_are_amended(rng):
    one, two, both = Calibration(), Calibration(), Calibration()
    for i, (predicted, quality) in enumerate(rng.random((20, 2))):
        (one if i % 2 else two).add(predicted, quality)
        both.add(predicted, quality)
    added = one + two
    np.testing.assert_allclose(added.counts, both.counts)
    np.testing.assert_allclose(added.sums, both.sums)
    both.fade(0.5)
    np.testing.assert_allclose(both.counts, added.counts / 2)
    one = Calibration()
    one.add(0.33, 0.2)
    one.amend(0.33, 0.5)
    two = Calibration()
    two.add(0.33, 0.7)
    np.testing.assert_allclose(one.sums, two.sums)
    assert one.calibrated(0.33, 0.01, 0.3) == pytest.approx(two.calibrated(0.33, 0.01, 0.3))


def test_a_prediction_that_was_unsure_counts_less():
    assert sureness(0.0) == 1.0
    assert sureness(0.1) < sureness(0.01) < 1.0


@pytest.mark.parametrize(("counts", "sums"), [([1.0], [1.0]), ([np.nan] * KNOTS, [0.0] * KNOTS), (["x"], [1.0])])
def test_what_is_no_calibration_is_refused(counts, sums):
    with pytest.raises(ValueError):
        Calibration.of(counts, sums)
