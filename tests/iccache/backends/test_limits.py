import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iccache import config
from iccache.backends.limits import BURST_S, Bucket, Limits


def backend(**limits: int) -> config.Backend:
    return config.Backend(name="b", base_url="http://127.0.0.1:1/v1", model="m", **limits)


def test_a_backend_without_limits_never_waits() -> None:
    limits = Limits(backend())
    for _ in range(1000):
        limits.asked(0.0)
        limits.used(10**9, 0.0)
    assert limits.wait_s(0.0) == 0.0


@settings(deadline=None)
@given(per_minute=st.integers(1, 6000), gaps=st.lists(st.floats(0, 30), min_size=1, max_size=200))
def test_over_any_span_no_more_is_asked_than_the_rate_and_a_burst(per_minute: int, gaps: list[float]) -> None:
    bucket, asked = Bucket(per_minute), []
    for now in np.cumsum(gaps):
        while not bucket.wait_s(now) and len(asked) < 400:
            bucket.take(1.0, now)
            asked.append(float(now))
    at = np.array(asked)
    most = max(1.0, per_minute * BURST_S / 60)
    for i in range(len(at)):
        spans = at[i:] - at[i]
        assert (np.arange(1, len(spans) + 1) <= most + spans * per_minute / 60 + 1 + 1e-6).all()


def test_it_says_how_long_to_wait_and_then_it_may_be_asked() -> None:
    bucket = Bucket(6)
    bucket.take(1.0, 100.0)
    assert bucket.wait_s(100.0) == pytest.approx(10.0)
    assert bucket.wait_s(104.0) == pytest.approx(6.0)
    assert bucket.wait_s(50.0) == pytest.approx(6.0)  # a clock that steps back stands still
    assert bucket.wait_s(110.0) == pytest.approx(0.0, abs=1e-9)


def test_tokens_are_taken_as_answers_end_and_waited_for() -> None:
    limits = Limits(backend(tokens_per_minute=6000))
    limits.used(1500, 0.0)  # a burst is 1000
    assert limits.wait_s(0.0) == pytest.approx(5.01)
    assert limits.wait_s(5.02) == 0.0


def test_a_new_configuration_does_not_refill() -> None:
    before, after = Limits(backend(requests_per_minute=6)), Limits(backend(requests_per_minute=12))
    before.asked(0.0)
    after.take_over(before)
    assert after.wait_s(0.0) == pytest.approx(5.0)
