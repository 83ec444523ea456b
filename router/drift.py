"""Has an arm changed? A broken or upgraded model is noticed within tens of feedbacks, not after its memory fades."""

import math
from typing import Self

GOOD = 0.5  # expected quality from which on an answer can only disappoint
FADES = 0.99  # of a side that a surprise does not move: what is left,
LEAST = 0.01  # and below it nothing


class Cusum:
    """Two-sided cumulative sum (Page 1954) of surprises, each in [-1, 1] and 0 on average while nothing changes.

    A side grows by what a surprise exceeds `slack`, and never falls below 0; above `alarm` it says so and starts
    afresh. Where good was expected only the falling side moves, where poor only the rising one: an arm that is good at
    one kind of request does not hide by it that it became good at another. A model that goes from good to broken is
    noticed in about `alarm / (1 - slack)` feedbacks; fair coin flips that were expected to be one half (surprises of
    +-0.5) alarm about once in ten thousand. `alarm` = inf: never.
    """

    def __init__(
        self,
        slack: float = 0.25,
        alarm: float = 4.0,
        fall: float = 0.0,
        rise: float = 0.0,
        falling: int = 0,
        rising: int = 0,
    ) -> None:
        for name, value in {"slack": slack, "alarm": alarm, "fall": fall, "rise": rise}.items():
            if math.isnan(value) or value < 0:
                raise ValueError(f"{name} must be >= 0, not {value}")
        self.slack = slack
        self.alarm = alarm
        self.fall = fall
        self.rise = rise
        self.falling = falling  # surprises since `fall` was 0
        self.rising = rising

    @property
    def suspects(self) -> int:
        """How many of the last surprises may already be of a change."""
        return max(self.falling, self.rising)

    def observe(self, surprise: float, expected: float | None = None) -> int:
        """0, or when the sum to one side has crossed the alarm, how many of the last surprises, this one included,
        are of the change: those since that sum was 0, which is where the change most likely began. `expected` quality
        in [0, 1]; None moves both sides."""
        may_fall, may_rise = (True, True) if expected is None else (expected >= GOOD, expected < GOOD)
        self.fall = max(0.0, self.fall - surprise - self.slack) if may_fall else _faded(self.fall)
        self.rise = max(0.0, self.rise + surprise - self.slack) if may_rise else _faded(self.rise)
        self.falling = self.falling + 1 if self.fall else 0
        self.rising = self.rising + 1 if self.rise else 0
        if max(self.fall, self.rise) <= self.alarm:
            return 0
        since = self.falling if self.fall > self.rise else self.rising
        self.fall = self.rise = 0.0
        self.falling = self.rising = 0
        return since

    def fresh(self) -> Self:
        return type(self)(self.slack, self.alarm)


def _faded(side: float) -> float:
    return FADES * side if side > LEAST else 0.0
