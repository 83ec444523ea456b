import numpy as np
import pytest

from router.drift import Cusum


def feedbacks_until_alarm(cusum, surprises):
    return next((i for i, surprise in enumerate(surprises, 1) if cusum.observe(surprise)), None)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_lasting_surprise_to_either_side_is_noticed_after_a_handful(sign):
    assert feedbacks_until_alarm(Cusum(slack=0.25, alarm=4.0), [sign * 0.9] * 50) == 7  # 7 * 0.65 > 4


def test_a_bias_within_the_slack_never_alarms():
    assert feedbacks_until_alarm(Cusum(), [0.24, 0.25] * 5000) is None


def test_fair_coins_hardly_ever_alarm(rng):
    alarms, cusum = 0, Cusum()
    for surprise in rng.choice([-0.5, 0.5], size=100_000):
        alarms += cusum.observe(surprise) > 0
    assert 1 <= alarms <= 30


def test_after_an_alarm_it_starts_afresh():
    cusum = Cusum()
    assert feedbacks_until_alarm(cusum, [-1.0] * 9) == feedbacks_until_alarm(cusum, [-1.0] * 9)
    assert (cusum.fall, cusum.rise) == (0.0, 0.0)


def test_an_infinite_alarm_is_off():
    assert feedbacks_until_alarm(Cusum(alarm=np.inf), [-1.0] * 1000) is None


@pytest.mark.parametrize("bad", [{"slack": -1}, {"alarm": float("nan")}, {"fall": -0.1}, {"rise": float("nan")}])
def test_values_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Cusum(**bad)


def test_an_alarm_says_since_when():
    cusum = Cusum(slack=0.25, alarm=4.0)
    answers = [cusum.observe(s) for s in [0.3, -0.1, 0.0, *[-0.9] * 7]]
    assert answers == [*[0] * 9, 7]
    assert (cusum.falling, cusum.rising) == (0, 0)


def test_what_was_expected_to_be_good_does_not_hide_that_something_poor_became_good():
    """One probe of the poor kind for ten good answers to another."""
    told, blind = Cusum(), Cusum()
    for i in range(11 * 12):
        surprise, expected = (0.9, 0.05) if i % 11 == 0 else (0.03, 0.95)
        if told.observe(surprise, expected):
            break
        assert not blind.observe(surprise)
    assert 4 * 11 < i <= 10 * 11


def test_a_side_that_is_not_moved_fades_to_nothing():
    cusum = Cusum(rise=2.0, rising=3)
    for _ in range(2000):
        cusum.observe(0.0, 0.9)
    assert (cusum.rise, cusum.rising) == (0.0, 0)
