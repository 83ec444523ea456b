"""Linear Thompson sampling: one Bayesian linear regression of quality on features for each arm."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from router.choice import choice_probabilities
from router.drift import Cusum
from router.features import N_PROJECTED, NAMES
from router.policy import pack, unpack
from router.reward import checked_quality
from router.types import Arm, Matrix, Vector, price_order, request_order


@dataclass(frozen=True, slots=True, eq=False)
class Prior:
    """What is believed of an arm's weights before any feedback: independent normals."""

    mean: Vector  # (n_features,)
    sd: Vector  # (n_features,), > 0


def _default_prior(quality: float, per_utility: float) -> Prior:
    """Over the weights of `NAMES`: expected quality of a typical request, and what a unit of utility adds to it."""
    mean, sd = np.zeros(len(NAMES)), np.full(len(NAMES), 0.15)
    mean[0], sd[0] = quality, 0.25
    mean[NAMES.index("utility_max")] = per_utility
    sd[1 : 1 + N_PROJECTED] = math.sqrt(0.03 / N_PROJECTED)
    return Prior(mean, sd)


# An arm never seen. A teacher is expected to be right nine times in ten and a student six, each give or take a
# quarter: a student is tried on about a third of the first requests and kept or dropped after a handful of them. The
# embedding's weights together move quality by 0.17, so a kind of request can turn out all good or all bad within some
# tens of feedbacks. Examples that promise a gain are believed in part; a teacher is shown none.
STUDENT_PRIOR = _default_prior(quality=0.6, per_utility=0.25)
TEACHER_PRIOR = _default_prior(quality=0.9, per_utility=0.0)
LEAST_EVIDENCE = 20.0  # feedbacks before an arm can be certified
LOWER_95 = 1.6448536269514722  # standard deviations to the lower 95 % bound of a Gaussian
CURIOSITY = 100.0  # feedbacks: at as many, an arm's spread has come down from 1 to 0.71
LIMIT = 1e15  # of any sum in a state that is read
KEPT_AFTER_ALARM = 0.1  # share of an arm's feedback that still counts once the arm has changed


@dataclass(slots=True, eq=False)
class Statistics:
    """All that one arm's feedback amounts to. Sums over feedbacks, so those of two workers add up to both."""

    gram: Matrix  # (n_features, n_features): sum of x x^T
    response: Vector  # (n_features,): sum of quality * x
    count: float  # number of feedbacks; like the sums, old ones count less when there is a discount

    @classmethod
    def empty(cls, n_features: int) -> Self:
        return cls(np.zeros((n_features, n_features)), np.zeros(n_features), 0.0)

    def fade(self, share: float) -> None:
        """Everything so far counts `share` of what it did."""
        self.gram *= share
        self.response *= share
        self.count *= share

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(self.gram + other.gram, self.response + other.response, self.count + other.count)


@dataclass(frozen=True, slots=True, eq=False)
class Posterior:
    """N(mean, covariance) over an arm's weights."""

    mean: Vector  # (n_features,)
    covariance: Matrix  # (n_features, n_features), symmetric positive definite

    def predict(self, x: Vector) -> tuple[float, float]:
        """Mean and variance of the expected quality at `x` (n_features,)."""
        return float(self.mean @ x), max(0.0, float(x @ self.covariance @ x))


class LinearThompson:
    """Quality of arm i is w_i . x + noise with known `noise_sd`; the posterior of w_i is Bishop's (3.50), (3.51):

        A = diag(1 / prior.sd^2) + gram / noise_sd^2        A m = prior.mean / prior.sd^2 + response / noise_sd^2

    A score is N(m . x, spread^2 * x^T A^-1 x), the belief about the *mean* quality (`spread` is Agrawal and Goyal's v),
    and arms are chosen by `choice`, the cheapest for this request first: the bar is `quality_target` times the dearest
    arm's expected quality. The load bias moves the bar along with the largest bias, that is, every arm gains (the
    largest bias - its own) against a bar that stands still. Cheaper arms gain at least as much as dearer ones, so with
    every step of load each Thompson sample picks the same arm or a cheaper one: the chance of the k cheapest never
    falls, for any k.

    Two ways to forget, of feedback only, never of the prior. `discount` in (0, 1] multiplies an arm's sums before
    each of its feedbacks, so about the last 1 / (1 - discount) count (Russac et al. 2019). And when a `Cusum` over
    the errors of prediction passes `alarm`, the arm has changed, and what was known of it counts a tenth.

    Arms are known by name and come and go freely. What is learned depends on the sequence of each arm's feedbacks
    alone, so processes that follow one log agree.
    """

    kind = "linear-thompson"

    def __init__(
        self,
        *,
        names: Sequence[str] = NAMES,
        student_prior: Prior = STUDENT_PRIOR,
        teacher_prior: Prior = TEACHER_PRIOR,
        noise_sd: float = 0.3,
        spread: float = 0.5,
        discount: float = 0.998,
        alarm: float = 4.0,
    ) -> None:
        for name, value in {"noise_sd": noise_sd, "spread": spread}.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, not {value}")
        if not 0 < discount <= 1:
            raise ValueError(f"discount must be in (0, 1], not {discount}")
        for prior in (student_prior, teacher_prior):
            if prior.mean.shape != (len(names),) or prior.sd.shape != (len(names),):
                raise ValueError(f"a prior needs {len(names)} means and sds, not {prior.mean.size}, {prior.sd.size}")
            if not (np.isfinite(prior.mean).all() and np.isfinite(prior.sd).all() and (prior.sd > 0).all()):
                raise ValueError("a prior's means must be finite and its sds finite and > 0")
        self.names = tuple(names)
        self.student_prior = student_prior
        self.teacher_prior = teacher_prior
        self.noise_sd = noise_sd
        self.spread = spread
        self.discount = discount
        self.statistics_: dict[str, Statistics] = {}
        self.drift_: dict[str, Cusum] = {}
        self._unmoved = Cusum(alarm=alarm)
        self._posteriors: dict[tuple[str, bool], Posterior] = {}

    def probabilities(self, x: Matrix, arms: Sequence[Arm], load_bias: Vector, quality_target: float) -> Vector:
        order, dearest = request_order(arms), price_order(arms)[-1]
        means, sds = self.beliefs(x, arms)
        bar = quality_target * min(1.0, max(0.0, float(means[dearest])))
        gain = load_bias.max() - load_bias
        probabilities = np.empty(len(arms))
        probabilities[order] = choice_probabilities((means + gain)[order], (self.spreads(arms) * sds)[order], bar)
        return probabilities

    def certified(self, x: Matrix, arms: Sequence[Arm], quality_target: float) -> NDArray[np.bool_]:
        """(n_arms,): at least `LEAST_EVIDENCE` feedbacks, and a lower 95 % bound of the posterior at or above the bar.

        It is the bound of one request's posterior under the linear model, not one that holds at all times at once.
        """
        means, sds = self.beliefs(x, arms)
        bar = quality_target * min(1.0, max(0.0, float(means[price_order(arms)[-1]])))
        counts = [self.statistics_[arm.name].count if arm.name in self.statistics_ else 0.0 for arm in arms]
        proved: NDArray[np.bool_] = (np.array(counts) >= LEAST_EVIDENCE) & (means - LOWER_95 * sds >= bar)
        return proved

    def spreads(self, arms: Sequence[Arm]) -> Vector:
        """(n_arms,) in [`spread`, 1]: 1 before any feedback, `spread` once there is plenty. An arm that bad luck has
        starved stays curious, and one that is known does not waste requests on doubt."""
        counts = [self.statistics_[arm.name].count if arm.name in self.statistics_ else 0.0 for arm in arms]
        return np.array([max(self.spread, math.sqrt(CURIOSITY / (CURIOSITY + count))) for count in counts])

    def scores(self, x: Matrix, arms: Sequence[Arm], load_bias: Vector) -> Vector:
        means: Vector = self.beliefs(x, arms)[0] - load_bias
        return means

    def beliefs(self, x: Matrix, arms: Sequence[Arm]) -> tuple[Vector, Vector]:
        """Mean and standard deviation (n_arms,) of each arm's expected quality, before `spread`. `x` is (n_arms,
        n_features)."""
        if x.shape != (len(arms), len(self.names)):
            raise ValueError(f"features have shape {x.shape}, not {(len(arms), len(self.names))}")
        if not np.isfinite(x).all():
            raise ValueError("features are not finite")
        pairs = [self.posterior(arm.name, arm.is_teacher).predict(row) for arm, row in zip(arms, x, strict=True)]
        means, variances = np.array(pairs).T
        return means, np.sqrt(variances)

    def posterior(self, arm: str, is_teacher: bool = False) -> Posterior:
        """The belief about one arm now; its prior when it was never seen. Kept until its next feedback."""
        if (known := self._posteriors.get((arm, is_teacher))) is not None:
            return known
        prior = self.teacher_prior if is_teacher else self.student_prior
        statistics = self.statistics_.get(arm) or Statistics.empty(len(self.names))
        # In units of the prior's sd the precision is at least the identity: well conditioned whatever the prior.
        precision = statistics.gram / self.noise_sd**2 * np.outer(prior.sd, prior.sd)
        precision[np.diag_indices_from(precision)] += 1.0
        inverse = np.linalg.inv(precision)
        covariance = (inverse + inverse.T) / 2 * np.outer(prior.sd, prior.sd)
        mean = covariance @ (prior.mean / prior.sd**2 + statistics.response / self.noise_sd**2)
        posterior = self._posteriors[arm, is_teacher] = Posterior(mean, covariance)
        return posterior

    def surprise(self, arm: str, x: Vector, quality: float) -> float:
        """In [-1, 1]: by how much `quality` differs from what a student with this feedback is expected to reach, as
        far as noise has to explain it. Where little is known, an error is ignorance and no surprise."""
        mean, variance = self.posterior(arm).predict(x)
        error = quality - min(1.0, max(0.0, mean))
        return error * self.noise_sd**2 / (self.noise_sd**2 + variance)

    def learn(self, arm: str, x: Vector, quality: float, previous: float | None = None, *, age: int = 0) -> None:
        """See `Policy.learn`. A replacement leaves `gram` and `count` as they are; it is as if the new value had
        been learned in the first place, exactly so when `age` is right or there is no discount."""
        quality = checked_quality(quality)
        if age < 0:
            raise ValueError(f"age must be >= 0, not {age}")
        if x.shape != (len(self.names),) or not np.isfinite(x).all():
            raise ValueError(f"features must be {len(self.names)} finite numbers, not of shape {x.shape}")
        if previous is None:
            drift = self.drift_.setdefault(arm, self._unmoved.fresh())
            changed = drift.observe(self.surprise(arm, x, quality))
            statistics = self.statistics_.setdefault(arm, Statistics.empty(len(self.names)))
            statistics.fade(self.discount * (KEPT_AFTER_ALARM if changed else 1.0))
            statistics.gram += np.outer(x, x)
            statistics.response += quality * x
            statistics.count += 1.0
        else:
            change = quality - checked_quality(previous)
            if arm not in self.statistics_:
                raise ValueError(f"nothing was learned of {arm!r} that could be replaced")
            self.statistics_[arm].response += self.discount**age * change * x
        self._stale(arm)

    def merge(self, statistics: Mapping[str, Statistics]) -> None:
        """Add what another worker learned (its `statistics_`); each worker's discount has been applied by itself."""
        for arm, other in statistics.items():
            if other.response.shape != (len(self.names),):
                raise ValueError(f"statistics of {arm!r} have {other.response.size} features, not {len(self.names)}")
        for arm, other in statistics.items():
            self.statistics_[arm] = self.statistics_.get(arm, Statistics.empty(len(self.names))) + other
            self._stale(arm)

    def forget(self, arm: str) -> None:
        """Back to the prior: the arm is gone, or another model has taken its name."""
        self.statistics_.pop(arm, None)
        self.drift_.pop(arm, None)
        self._stale(arm)

    def _stale(self, arm: str) -> None:
        for is_teacher in (False, True):
            self._posteriors.pop((arm, is_teacher), None)

    def state(self) -> bytes:
        arms = {
            arm: {
                "count": statistics.count,
                "response": statistics.response.tolist(),
                "gram": statistics.gram[np.tril_indices(len(self.names))].tolist(),
                "drift": [self.drift_[arm].fall, self.drift_[arm].rise] if arm in self.drift_ else [0.0, 0.0],
            }
            for arm, statistics in self.statistics_.items()
        }
        return pack(self.kind, {"features": self.names, "arms": arms})

    def restore(self, state: bytes) -> None:
        learned = unpack(self.kind, state)
        if learned.get("features") != list(self.names):
            raise ValueError("router state was learned from other features")
        arms = learned.get("arms")
        if not isinstance(arms, dict):
            raise ValueError("router state has no arms")
        statistics = {arm: self._statistics(arm, entry) for arm, entry in arms.items()}
        drift = {arm: self._drift(arm, entry) for arm, entry in arms.items()}
        self.statistics_, self.drift_, self._posteriors = statistics, drift, {}

    def _drift(self, arm: str, entry: Any) -> Cusum:
        """One arm's change detector as stored, or ValueError."""
        try:
            fall, rise = (float(value) for value in entry["drift"])
            return Cusum(self._unmoved.slack, self._unmoved.alarm, fall, rise)
        except (KeyError, TypeError, ValueError) as exc:
            raise ValueError(f"router state of arm {arm!r} is malformed: {exc!r}") from exc

    def _statistics(self, arm: str, entry: Any) -> Statistics:
        """One arm's entry of a state, or ValueError."""
        n = len(self.names)
        try:
            count = float(entry["count"])
            response = np.array(entry["response"], dtype=np.float64)
            lower = np.array(entry["gram"], dtype=np.float64)
        except (KeyError, TypeError, ValueError) as exc:
            raise ValueError(f"router state of arm {arm!r} is malformed: {exc!r}") from exc
        if response.shape != (n,) or lower.shape != (n * (n + 1) // 2,):
            raise ValueError(f"router state of arm {arm!r} has the wrong shape for {n} features")
        if not (0 <= count <= LIMIT and np.abs(response).max() <= LIMIT and np.abs(lower).max() <= LIMIT):
            raise ValueError(f"router state of arm {arm!r} is not finite or beyond any real number of feedbacks")
        gram = np.zeros((n, n))
        gram[np.tril_indices(n)] = lower
        gram += np.tril(gram, -1).T
        if np.linalg.eigvalsh(gram)[0] < -1e-9 * max(1.0, float(np.trace(gram))):
            raise ValueError(f"router state of arm {arm!r} is no sum of feedbacks (a negative eigenvalue)")
        return Statistics(gram, response, count)
