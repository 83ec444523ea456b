"""Which answers are worth comparing: where the router is of two minds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

CLOSE = 0.1  # population standard deviation of the confidences: of two arms, 0.4 < p < 0.6


def is_close(confidences: NDArray[np.float64]) -> bool:
    """Whether the arms' probabilities (n_arms,), n_arms >= 2, are nearly the same."""
    return len(confidences) >= 2 and float(np.std(confidences)) < CLOSE


def pair(names: Sequence[str], confidences: NDArray[np.float64], rng: np.random.Generator) -> tuple[str, str]:
    """The arm of the highest confidence, and another that is drawn by the others' confidences."""
    top = int(np.argmax(confidences))
    others = [i for i in range(len(names)) if i != top]
    weights = np.array([max(float(confidences[i]), 0.0) for i in others])
    shares = weights / weights.sum() if weights.sum() > 0 else np.full(len(others), 1 / len(others))
    return names[top], names[others[int(rng.choice(len(others), p=shares))]]
