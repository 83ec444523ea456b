"""How often, when and after what pause a request goes out once more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iccache.backends.retry import BURST, JITTER_S, LONGEST_WAIT_S, WITHIN_S, Retries, RetryBudget, retry_after_s

NOW = 1_700_000_000.0


# ---- the budget


@given(st.floats(0.01, 1), st.integers(1, 10), st.lists(st.booleans(), max_size=400))
def test_never_more_than_the_share_of_requests(share: float, burst: int, events: list[bool]) -> None:
    """Against a second way of counting: of n requests max(burst, share * n), and burst + share * n in any window."""
    budget = RetryBudget(share, burst)
    spent: list[int] = []  # the number of the request at which each retry was made
    for requests, wanted in enumerate(events, 1):
        budget.earn()
        while wanted and budget.spend():
            spent.append(requests)
        assert len(spent) <= max(burst, share * requests) + 1e-6
    for i, first in enumerate(spent):
        for j, last in enumerate(spent[i:], i):
            assert j - i + 1 <= burst + share * (last - first + 1) + 1e-6


def test_a_new_process_may_retry_at_once_and_pays_for_it_later() -> None:
    budget = RetryBudget(0.1)
    budget.earn()
    assert [budget.spend() for _ in range(BURST + 1)] == [True] * BURST + [False]
    for _ in range(10 * BURST + 8):
        budget.earn()
        assert not budget.spend()
    budget.earn()
    assert budget.spend()


def test_no_share_no_retries() -> None:
    budget = RetryBudget(0.0)
    for _ in range(100):
        budget.earn()
        assert not budget.spend()


# ---- what an upstream asks for


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "3"}, 3.0),
        ({"Retry-After": "0"}, 0.0),
        ({"Retry-After": " 1.5 "}, 1.5),
        ({"Retry-After": "-3"}, 0.0),
        ({"Retry-After-Ms": "250", "Retry-After": "1"}, 0.25),
        ({"Retry-After-Ms": "soon", "Retry-After": "1"}, 1.0),
        ({"Retry-After": format_datetime(datetime.fromtimestamp(NOW + 7, UTC), usegmt=True)}, 7.0),
        ({"Retry-After": format_datetime(datetime.fromtimestamp(NOW - 7, UTC), usegmt=True)}, 0.0),
        ({"Retry-After": "Fri, 31 Dec 9999 23:59:60"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": ""}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers, NOW) == seconds


@given(st.text(max_size=40))
def test_retry_after_takes_anything(text: str) -> None:
    found = retry_after_s({"Retry-After": text, "Retry-After-Ms": text}, NOW)
    assert found is None or found >= 0


# ---- one request


class Time:
    """A clock that sleeping moves on."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def retries(time: Time, share: float = 0.1, draw: float = 0.5) -> Retries:
    return Retries(share, clock=lambda: time.now, sleep=time.sleep, draw=lambda: draw)


async def run(
    retries: Retries, results: list[float | None], took: Callable[[], None] = lambda: None
) -> tuple[int, bool, int]:
    """Results are pauses. (the number of the result that stands, refused by the budget?, attempts)"""
    made = 0

    async def once() -> int:
        nonlocal made
        made += 1
        took()
        return made - 1

    last, refused = await retries.run(once, lambda i: results[i])
    return last, refused, made


async def test_what_stands_is_asked_once() -> None:
    time = Time()
    assert await run(retries(time), [None]) == (0, False, 1)
    assert not time.slept


async def test_a_failure_is_asked_once_more_after_a_jittered_pause() -> None:
    time = Time()
    assert await run(retries(time), [0.0, None]) == (1, False, 2)
    assert time.slept == [JITTER_S / 2]
    assert await run(retries(time, draw=0.0), [1.5, 0.0, None]) == (1, False, 2)
    assert time.slept[1:] == [1.5]


async def test_a_long_wait_that_is_asked_for_is_the_clients() -> None:
    time = Time()
    assert await run(retries(time), [LONGEST_WAIT_S, None]) == (1, False, 2)
    assert await run(retries(time), [LONGEST_WAIT_S + 0.01, None]) == (0, False, 1)


async def test_who_has_waited_long_does_not_wait_again() -> None:
    time = Time()

    def slow() -> None:
        time.now += WITHIN_S

    assert await run(retries(time), [0.0, None], slow) == (0, False, 1)


async def test_the_budget_refuses() -> None:
    time = Time()
    several = retries(time)
    got = [await run(several, [0.0, 0.0]) for _ in range(BURST + 1)]
    assert got == [(1, False, 2)] * BURST + [(0, True, 1)]
    assert await run(retries(time, share=0.0), [0.0, None]) == (0, False, 1)


async def test_what_is_raised_passes() -> None:
    async def once() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await Retries(0.5).run(once, lambda _: 0.0)
