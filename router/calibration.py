"""What an arm's quality turned out to be where a given quality was predicted.

Quality by kind of request is more like a step than like a line. A linear model spreads its predictions around the
step's two levels, and a request predicted to reach 0.65 may belong to a kind whose answers are known to reach 0.9. So
each prediction is kept, made before its answer's quality was known, with that quality.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from router.types import Matrix, Vector

KNOTS = 26  # on [0, 1]
WIDTH = 0.06  # standard deviation of the kernel, in predicted quality
MISFIT = 0.15


def _kernel() -> Matrix:
    at = np.linspace(0, 1, KNOTS)
    return np.asarray(np.exp(-0.5 * ((at[:, None] - at) / WIDTH) ** 2))


_KERNEL = _kernel()  # (KNOTS, KNOTS)


@dataclass(slots=True, eq=False)
class Calibration:
    """Sums over feedbacks, so those of two workers add up to both."""

    counts: Vector = field(default_factory=lambda: np.zeros(KNOTS))
    sums: Vector = field(default_factory=lambda: np.zeros(KNOTS))  # of quality
    _smooth: tuple[list[float], list[float]] | None = None

    @classmethod
    def of(cls, counts: Sequence[float], sums: Sequence[float]) -> Self:
        """As stored. ValueError where they are not that."""
        known = cls(np.array(counts, dtype=np.float64), np.array(sums, dtype=np.float64))
        if known.counts.shape != (KNOTS,) or known.sums.shape != (KNOTS,):
            raise ValueError(f"a calibration has {KNOTS} counts and sums, not {known.counts.size}, {known.sums.size}")
        if not (np.isfinite(known.counts).all() and np.isfinite(known.sums).all()):
            raise ValueError("a calibration's sums must be finite")
        return known

    def add(self, predicted: float, quality: float, weight: float = 1.0) -> None:
        low, share = _place(predicted)
        for knot, part in ((low, 1.0 - share), (low + 1, share)):
            self.counts[knot] += weight * part
            self.sums[knot] += weight * part * quality
        self._smooth = None

    def amend(self, predicted: float, change: float) -> None:
        """A quality that is in the sums is another by `change`."""
        low, share = _place(predicted)
        self.sums[low] += (1.0 - share) * change
        self.sums[low + 1] += share * change
        self._smooth = None

    def fade(self, share: float) -> None:
        self.counts *= share
        self.sums *= share
        self._smooth = None

    def __add__(self, other: Self) -> Self:
        return type(self)(self.counts + other.counts, self.sums + other.sums)

    def calibrated(self, mean: float, variance: float, noise_sd: float) -> tuple[float, float]:
        """Mean and variance of the expected quality where N(mean, variance) is predicted.

        The quality there is believed to be N(mean, variance + MISFIT^2) until n feedbacks near it, weighted by a
        kernel, have averaged y; then the two are weighed by their precisions. What is peculiar to the request at
        hand is as uncertain as before.
        """
        if self._smooth is None:
            self._smooth = (_KERNEL @ self.counts).tolist(), (_KERNEL @ self.sums).tolist()
        low, share = _place(mean)
        n, total = ((1.0 - share) * s[low] + share * s[low + 1] for s in self._smooth)
        own, seen = 1.0 / (variance + MISFIT**2), 1.0 / noise_sd**2
        n = max(0.0, n)
        return (own * mean + seen * min(n, max(0.0, total))) / (own + n * seen), variance


def sureness(variance: float) -> float:
    """In (0, 1]: the weight of a prediction. One that was unsure says little of how wrong predictions are."""
    return 1.0 / (1.0 + variance / MISFIT**2) ** 2


def _place(predicted: float) -> tuple[int, float]:
    """The knot at or below, and how far it is to the next, in [0, 1]."""
    at = min(1.0, max(0.0, predicted)) * (KNOTS - 1)
    low = min(int(at), KNOTS - 2)
    return low, at - low
