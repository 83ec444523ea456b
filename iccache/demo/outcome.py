"""What the demo measures: one answered request, and what many of them say together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request with its answer, as the client saw it."""

    answer: str
    correct: bool
    backend: str
    examples: int  # that the proxy says it showed
    latency_s: float
    overhead_ms: float
    input_tokens: int
    output_tokens: int
    cost_usd: float
    request_id: str


class Interval(NamedTuple):
    """A share with its 95 % interval."""

    share: float
    low: float
    high: float

    def above(self, other: Interval) -> bool:
        """Whether the whole interval lies above the other."""
        return self.low > other.high


def wilson(successes: int, n: int) -> Interval:
    """Wilson's score interval for `successes` of `n`, at 95 %; for n = 0 nothing is known."""
    if n == 0:
        return Interval(0.0, 0.0, 1.0)
    p, z2 = successes / n, Z * Z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))


def accuracy(outcomes: Sequence[Outcome]) -> Interval:
    return wilson(sum(o.correct for o in outcomes), len(outcomes))


def latency_p50_s(outcomes: Sequence[Outcome]) -> float:
    return statistics.median(o.latency_s for o in outcomes) if outcomes else 0.0


def tokens_each(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Mean input and output tokens of a request."""
    n = max(1, len(outcomes))
    return sum(o.input_tokens for o in outcomes) / n, sum(o.output_tokens for o in outcomes) / n


def cost_usd(outcomes: Sequence[Outcome]) -> float:
    return sum(o.cost_usd for o in outcomes)


def offloaded(outcomes: Sequence[Outcome], teacher: str) -> float:
    """Share that another backend than `teacher` answered."""
    return sum(o.backend != teacher for o in outcomes) / max(1, len(outcomes))
