"""The prior of the ways, trained on scored answers where nobody waits (scikit-learn; serving only multiplies).

Requests of different kinds differ in how hard they are and in what their examples look like at once, so weights are
learned from differences within a kind: answers and features less the mean of their kind (a fixed-effects regression).
A ridge keeps the weights of all students near those there were, and those of one student near those of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from iccache.examples.ways import NAMES, UNTRAINED, Floats, Prior

RIDGE = 8.0  # answers' worth of belief in the weights there were
STUDENT_RIDGE = 24.0  # and in those of all students together
LEAST_ANSWERS = 40  # of a student, before it has weights of its own
BINS = 5


class Scored(NamedTuple):
    """One scored answer of a student."""

    student: str
    kind: str  # of request: tenant and system prompt
    x: Sequence[float]  # (len(NAMES),), `ways.features` of how it was shown examples
    quality: float  # in [0, 1]


class Calibration(NamedTuple):
    """How far expectations were off, on answers of kinds that were not learned from."""

    answers: int
    brier: float  # mean squared error, lower is better
    brier_of_mean: float  # of always expecting the mean
    bins: list[tuple[float, float, int]]  # mean expected, mean quality, answers: by rising expectation


def fit(answers: Sequence[Scored], before: Prior | None = None) -> Prior:
    """New weights. Raises ValueError where there is nothing to learn from."""
    if len(answers) < 2:
        raise ValueError("two scored answers at least are needed to learn from")
    start = (before or Prior()).weights.get("", np.array(UNTRAINED))
    everyone = _fit(answers, start, RIDGE)
    weights = {"": everyone}
    for student, count in Counter(a.student for a in answers).items():
        if count >= LEAST_ANSWERS:
            weights[student] = _fit([a for a in answers if a.student == student], everyone, STUDENT_RIDGE)
    return Prior(weights)


def _fit(answers: Sequence[Scored], start: Floats, ridge: float) -> Floats:
    """Slopes from differences within each kind and student, then the constant from all answers."""
    from sklearn.linear_model import Ridge  # noqa: PLC0415 - takes a second: only those wait who train

    X = np.array([a.x for a in answers], float).reshape(len(answers), len(NAMES))
    y = np.array([a.quality for a in answers], float)
    groups = _groups([f"{a.student}\n{a.kind}" for a in answers])
    slopes = Ridge(alpha=ridge, fit_intercept=False)
    slopes.fit(_centred(X, groups), _centred((y - X @ start)[:, None], groups)[:, 0])
    weights: Floats = start + slopes.coef_
    weights[0] = start[0] + float(np.mean(y - (X @ weights - weights[0]) - start[0]))
    return weights


def _groups(names: Sequence[str]) -> NDArray[np.intp]:
    return np.unique(names, return_inverse=True)[1].astype(np.intp)


def _centred(values: Floats, groups: NDArray[np.intp]) -> Floats:
    sums = np.zeros((groups.max() + 1, values.shape[1]))
    np.add.at(sums, groups, values)
    centred: Floats = values - (sums / np.bincount(groups)[:, None])[groups]
    return centred


def calibration(answers: Sequence[Scored], before: Prior | None = None, folds: int = 5) -> Calibration:
    """Expectations for answers whose kind was left out of the training, against what came.

    Where there are fewer kinds than folds, single answers are left out instead.
    """
    kinds = sorted({a.kind for a in answers})
    fold = {kind: i % folds for i, kind in enumerate(kinds)}
    parts = [fold[a.kind] if len(kinds) >= folds else i % folds for i, a in enumerate(answers)]
    expected = np.zeros(len(answers))
    for part in range(folds):
        inside = [a for a, p in zip(answers, parts, strict=True) if p != part]
        if len(inside) < 2:
            continue
        prior = fit(inside, before)
        for i, (a, p) in enumerate(zip(answers, parts, strict=True)):
            if p == part:
                expected[i] = prior.predict(np.array([a.x], float), a.student)[0]
    quality = np.array([a.quality for a in answers])
    order = np.array_split(np.argsort(expected, kind="stable"), BINS)
    return Calibration(
        len(answers),
        float(np.mean((expected - quality) ** 2)),
        float(np.mean((quality.mean() - quality) ** 2)),
        [(float(expected[i].mean()), float(quality[i].mean()), len(i)) for i in order if len(i)],
    )
