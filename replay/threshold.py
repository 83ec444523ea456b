"""The utility below which examples are not shown, chosen from what they were measured to gain a token.

A small share of the requests is shown one example less than chosen, drawn at random (`selection.leave_out_share`), so
what examples add is a difference between answers and no guess. For a threshold t, over the examples below it,

    gain(t) = sum_f w_f q_f / sum_f w_f - mean_l q_l

f: answers that were shown all their examples, w_f the share of those that lie below t; l: answers of which one below t
was left out; q the quality less the mean of its student and kind of request. As one in len(examples) is left out, w_f
makes f the same mixture of requests as l: gain(t) is the mean effect of one example below t beside the others.
It is weighed against what its tokens cost. Variances are those of a weighted and of a plain mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from iccache.examples.selector import UNMEASURED

LEAST_LEFT_OUT = 20  # answers of which an example below the threshold was left out
SURE = 1.645  # standard errors by which a gain has to be below its price: one-sided 95 %
STEPS = 10  # quantiles of the utilities there were are tried


class Shown(NamedTuple):
    """One scored answer to which several examples of the request's own were chosen."""

    kind: str  # student, tenant and system prompt
    quality: float  # in [0, 1]
    utilities: Sequence[float]  # of those that were chosen, at least two
    left_out: float | None = None  # utility of the one that was not shown after all
    price: float = 0.0  # of the tokens of one example, in quality


class Threshold(NamedTuple):
    """What was chosen, and on which evidence: gains and prices are those of one example below `at`, in quality."""

    at: float
    gain: float = 0.0
    error: float = 0.0  # standard error of the gain
    price: float = 0.0
    left_out: int = 0  # answers that tell the gain

    def state(self) -> bytes:
        return json.dumps(self._asdict()).encode()


def choose(answers: Iterable[Shown]) -> Threshold:
    """The threshold that spares most, price less gain over all examples below it, of those below which examples
    surely gain less than they cost; where there is none, that of nothing measured.
    """
    seen = _Seen([a for a in answers if len(a.utilities) > 1])
    chosen, most = Threshold(UNMEASURED), 0.0
    for at in seen.quantiles():
        tried = seen.measured(at) if at > UNMEASURED else None
        if tried is None or tried.gain + SURE * tried.error >= tried.price:
            continue
        spared = float((seen.utility < at).mean()) * (tried.price - tried.gain)
        if spared > most:
            chosen, most = tried, spared
    return chosen


class _Seen:
    """The answers as columns: one row an answer, and one an example (`utility`, and `owner`, the answer's row)."""

    def __init__(self, answers: Sequence[Shown]) -> None:
        count = np.array([len(a.utilities) for a in answers], np.intp)
        self.count = count
        self.owner = np.repeat(np.arange(len(answers)), count)
        self.utility = np.array([u for a in answers for u in a.utilities], float)
        self.left_out = np.array([math.nan if a.left_out is None else a.left_out for a in answers])
        self.price = np.array([a.price for a in answers])
        self.residual = _less_mean([a.kind for a in answers], np.array([a.quality for a in answers]))

    def quantiles(self) -> list[float]:
        if not len(self.utility):
            return []
        shares = np.linspace(0, 1, STEPS + 1)[1:-1]
        found: list[float] = np.unique(np.quantile(self.utility, shares, method="nearest")).tolist()
        return found

    def measured(self, at: float) -> Threshold | None:
        """What examples below `at` gain; None where too few were left out."""
        below = np.bincount(self.owner, self.utility < at, len(self.count)) / self.count
        whole = np.isnan(self.left_out) & (below > 0)
        without = self.left_out < at  # never where nothing was left out
        if without.sum() < LEAST_LEFT_OUT or not whole.any():
            return None
        w, q, left = below[whole], self.residual[whole], self.residual[without]
        mean = float(w @ q / w.sum())
        variance = float(w**2 @ (q - mean) ** 2) / float(w.sum()) ** 2 + float(left.var(ddof=1)) / len(left)
        price = float(self.price[without].mean())
        return Threshold(at, mean - float(left.mean()), math.sqrt(variance), price, int(without.sum()))


def _less_mean(kinds: Sequence[str], quality: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quality less the mean of its kind."""
    group = np.unique(kinds, return_inverse=True)[1]
    means = np.bincount(group, quality) / np.bincount(group)
    less: NDArray[np.float64] = quality - means[group]
    return less
