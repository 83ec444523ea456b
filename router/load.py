"""How busy the dear backends are, and what that takes from their scores."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from router.types import Vector


def load_bias(load: float, costs: Vector, theta: float, lambda0: float, gamma: float) -> Vector:
    """(n_arms,): `lambda0 * tanh(gamma * max(0, load - theta)) * C_i`, to be taken from the scores.

    IC-Cache (SOSP 2025), section 4.2 and theorem 4. Exactly 0 at or below `theta`, never above `lambda0 * C_i`.
    `load` and `theta` are shares of capacity (1 = full, more = queueing), `costs` C_i in [0, 1].
    """
    if not (math.isfinite(load) and load >= 0):
        raise ValueError(f"load must be finite and >= 0, not {load}")
    bias: Vector = lambda0 * math.tanh(gamma * max(0.0, load - theta)) * np.asarray(costs, dtype=np.float64)
    return bias


FULL_AT = 4.0  # times its usual time to the first byte, at which an arm counts as full
KNOWN_AFTER = 20  # answers, before which nothing is usual
USUAL_STEP = 0.02  # of the logarithm of what is usual, at most for each answer, and not more than
USUAL_S = 600.0  # a factor of e in so many seconds


@dataclass(slots=True)
class FirstBytes:
    """How long an arm takes to its first byte, against what is usual for it: a queue that is not seen otherwise."""

    answers: int = 0
    usual: float = 0.0  # logarithm of seconds: the median, followed by single steps, so that no outlier moves it
    excess: float = 0.0  # logarithm of how many times the usual it took lately
    seen: float = 0.0

    def take(self, seconds: float, now: float, smoothing_s: float) -> None:
        taken = math.log(max(seconds, 1e-4))
        self.answers += 1
        elapsed = max(0.0, now - self.seen) if self.answers > 1 else 0.0
        if self.answers <= KNOWN_AFTER:
            self.usual += (taken - self.usual) / self.answers
        else:
            self.usual += math.copysign(min(USUAL_STEP, elapsed / USUAL_S), taken - self.usual)
        self.excess += (taken - self.usual - self.excess) * -math.expm1(-elapsed / smoothing_s)
        self.seen = max(now, self.seen)

    def load(self, now: float, smoothing_s: float) -> float:
        """>= 0, a share of capacity: 0 at the usual time or below, 1 at `FULL_AT` times it. Fades without answers."""
        if self.answers <= KNOWN_AFTER:
            return 0.0
        lately = self.excess * math.exp(-max(0.0, now - self.seen) / smoothing_s)
        return max(0.0, math.expm1(min(lately, 5.0)) / (FULL_AT - 1.0))


class LoadTracker:
    """Requests in flight on each arm, smoothed over time, as a share of capacity.

    `capacities` is requests at once per arm (`max_in_flight`), `watched` the arms whose load counts (the dearest).
    A request counts from `begin` to `end`, also while it queues, so load can exceed 1. Where a backend says itself how
    many it has, others' included, and it is more than was begun here, that counts (`report`). The average is
    exponential in time with time constant `smoothing_s`, exact for any spacing of events. An arm that is slower to its
    first byte than usual counts as busier, if that is more than its requests say. `now` is in seconds, from
    any clock; one that steps back counts as standing still. Every call is O(1) in the number of requests.
    """

    def __init__(self, capacities: Mapping[str, float], watched: Iterable[str], *, smoothing_s: float = 10.0) -> None:
        self.capacities = dict(capacities)
        self.watched = tuple(dict.fromkeys(watched))
        self.smoothing_s = smoothing_s
        for name, capacity in self.capacities.items():
            if not capacity > 0:
                raise ValueError(f"capacity of {name!r} must be > 0, not {capacity}")
        if unknown := [name for name in self.watched if name not in self.capacities]:
            raise ValueError(f"no capacity is given for {', '.join(unknown)}")
        if not smoothing_s > 0:
            raise ValueError(f"smoothing_s must be > 0, not {smoothing_s}")
        self._in_flight: dict[str, int] = {}
        self._reported: dict[str, float] = {}
        self._average: dict[str, float] = {}
        self._seen: dict[str, float] = {}
        self._first_bytes: dict[str, FirstBytes] = {}

    def begin(self, arm: str, now: float) -> None:
        """A request goes to `arm` (known or not)."""
        self._advance(arm, now)
        self._in_flight[arm] = self.in_flight(arm) + 1

    def end(self, arm: str, now: float) -> None:
        """A request of `arm` is over; without a matching `begin` nothing happens."""
        self._advance(arm, now)
        self._in_flight[arm] = max(0, self.in_flight(arm) - 1)

    def report(self, arm: str, requests: float | None, now: float) -> None:
        """`arm` says that it has so many requests, running or waiting; None: it no longer says."""
        if requests is not None and not (math.isfinite(requests) and requests >= 0):
            raise ValueError(f"requests must be finite and >= 0, not {requests}")
        self._advance(arm, now)
        if requests is None:
            self._reported.pop(arm, None)
        else:
            self._reported[arm] = requests

    def first_byte(self, arm: str, seconds: float, now: float) -> None:
        """A stream of `arm` began `seconds` >= 0 after it was asked for."""
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"seconds must be finite and >= 0, not {seconds}")
        self._first_bytes.setdefault(arm, FirstBytes()).take(seconds, now, self.smoothing_s)

    def in_flight(self, arm: str) -> int:
        return self._in_flight.get(arm, 0)

    def arm_load(self, arm: str, now: float) -> float:
        """Smoothed load of one arm, a share of its capacity; 0 for an arm without one."""
        self._advance(arm, now)
        capacity = self.capacities.get(arm)
        return self._busy(arm, now) / capacity if capacity else 0.0

    def load(self, now: float) -> float:
        """Smoothed load of the watched arms together, a share of their joint capacity."""
        if not self.watched:
            return 0.0
        for arm in self.watched:
            self._advance(arm, now)
        busy = sum(self._busy(arm, now) for arm in self.watched)
        return busy / sum(self.capacities[arm] for arm in self.watched)

    def _busy(self, arm: str, now: float) -> float:
        """Requests, or as many as its slowness stands for."""
        slow = self._first_bytes.get(arm)
        if slow is None:
            return self._average[arm]
        return max(self._average[arm], slow.load(now, self.smoothing_s) * self.capacities.get(arm, 0.0))

    def _advance(self, arm: str, now: float) -> None:
        if not math.isfinite(now):
            raise ValueError(f"now must be finite, not {now}")
        elapsed = max(0.0, now - self._seen.get(arm, now))
        average = self._average.get(arm, 0.0)
        share = -math.expm1(-elapsed / self.smoothing_s)
        self._average[arm] = average + (max(self.in_flight(arm), self._reported.get(arm, 0.0)) - average) * share
        self._seen[arm] = max(now, self._seen.get(arm, now))
