"""The circuit, and what holds for every history of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from iccache.backends.circuit import BASE_S, FAILURES, LONGEST_S, Circuit

STEPS = st.lists(st.tuples(st.sampled_from(["ask", "fail", "succeed"]), st.floats(0, 40)), max_size=80)


def opened(now: float = 0.0) -> Circuit:
    circuit = Circuit()
    for _ in range(FAILURES):
        circuit.failed(now)
    return circuit


def test_opens_after_failures_in_a_row() -> None:
    circuit = Circuit()
    for _ in range(FAILURES - 1):
        circuit.failed(0)
    circuit.succeeded(0)
    for _ in range(FAILURES - 1):
        circuit.failed(0)
    assert circuit.allows(0)
    assert circuit.closed
    circuit.failed(0)
    assert not circuit.allows(0)
    assert not circuit.closed


def test_half_open_lets_one_through() -> None:
    circuit = opened()
    assert not circuit.allows(BASE_S - 0.01)
    assert not circuit.is_open(BASE_S)
    assert circuit.allows(BASE_S)
    assert not circuit.allows(BASE_S)
    circuit.succeeded(BASE_S + 1)
    assert circuit.closed
    assert circuit.allows(BASE_S + 1)
    assert circuit.allows(BASE_S + 1)


def test_each_opening_is_longer_up_to_a_limit() -> None:
    circuit, now = opened(), 0.0
    for times in range(1, 20):
        pause = min(LONGEST_S, BASE_S * times)
        assert not circuit.allows(now + pause - 0.01)
        now += pause
        assert circuit.allows(now)
        circuit.failed(now)


def test_a_success_starts_over() -> None:
    circuit = opened()
    assert circuit.allows(5)
    circuit.failed(5)
    assert circuit.allows(15)
    circuit.succeeded(15)
    for _ in range(FAILURES):
        circuit.failed(20)
    assert circuit.allows(20 + BASE_S)


def test_failures_of_requests_sent_before_change_nothing() -> None:
    circuit = opened()
    for _ in range(50):
        circuit.failed(4)
    assert circuit.allows(BASE_S)


def test_a_trial_without_an_outcome_gives_way() -> None:
    circuit = opened()
    assert circuit.allows(5)
    assert not circuit.allows(9.9)
    assert circuit.allows(10)


@given(STEPS)
def test_every_history(steps: list[tuple[str, float]]) -> None:
    circuit, now = Circuit(), 0.0
    row = 0
    allowed_at: float | None = None
    for step, later in steps:
        now += later
        if step == "ask":
            was_open, was_closed = circuit.is_open(now), circuit.closed
            assert circuit.is_open(now) is was_open  # asking changes nothing
            allowed = circuit.allows(now)
            assert allowed is not was_open
            if was_closed:
                assert allowed
            elif allowed:
                assert not circuit.allows(now)  # one at a time
                assert allowed_at is None or now - allowed_at >= BASE_S
                allowed_at = now
        elif step == "fail":
            row += 1
            circuit.failed(now)
            if row >= FAILURES:
                assert not circuit.closed
        else:
            row = 0
            allowed_at = None
            circuit.succeeded(now)
            assert circuit.closed
        if row < FAILURES:
            assert circuit.closed
    assert circuit.allows(now + LONGEST_S)  # never shut for good
