"""Has an arm changed? A broken or upgraded model is noticed within tens of feedbacks, not after its memory fades."""

import math
from typing import Self


class Cusum:
    """Two-sided cumulative sum (Page 1954) of surprises, each in [-1, 1] and 0 on average while nothing changes.

    A side grows by what a surprise exceeds `slack`, and never falls below 0; above `alarm` it says so and starts
    afresh. A model that goes from good to broken is noticed in about `alarm / (1 - slack)` feedbacks; fair coin flips
    that were expected to be one half (surprises of +-0.5) alarm about once in ten thousand. `alarm` = inf: never.
    """

    def __init__(self, slack: float = 0.25, alarm: float = 4.0, fall: float = 0.0, rise: float = 0.0) -> None:
        for name, value in {"slack": slack, "alarm": alarm, "fall": fall, "rise": rise}.items():
            if math.isnan(value) or value < 0:
                raise ValueError(f"{name} must be >= 0, not {value}")
        self.slack = slack
        self.alarm = alarm
        self.fall = fall
        self.rise = rise

    def observe(self, surprise: float) -> bool:
        """True when the sum of surprises to one side has crossed the alarm."""
        self.fall = max(0.0, self.fall - surprise - self.slack)
        self.rise = max(0.0, self.rise + surprise - self.slack)
        if max(self.fall, self.rise) <= self.alarm:
            return False
        self.fall = self.rise = 0.0
        return True

    def fresh(self) -> Self:
        return type(self)(self.slack, self.alarm)
