"""What a linear policy knows: one Bayesian linear regression of quality on features for each arm."""

import base64
import math
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np

from router.calibration import Calibration, sureness
from router.drift import Cusum
from router.features import KIND, N_PROJECTED, N_SYSTEM, NAMES
from router.policy import pack, unpack
from router.reward import checked_quality
from router.types import Arm, Matrix, Vector


@dataclass(frozen=True, slots=True, eq=False)
class Prior:
    """What is believed of an arm's weights before any feedback: independent normals."""

    mean: Vector  # (n_features,)
    sd: Vector  # (n_features,), > 0


KIND_VARIANCE = 0.03  # of quality, by the kind of request, before any traffic was seen


def _default_prior(quality: float, per_utility: float) -> Prior:
    """Over the weights of `NAMES`: expected quality of a typical request, and what a unit of utility adds to it."""
    mean, sd = np.zeros(len(NAMES)), np.full(len(NAMES), 0.15)
    mean[0], sd[0] = quality, 0.25
    mean[NAMES.index("utility_max")] = per_utility
    sd[KIND] = math.sqrt(KIND_VARIANCE / (N_PROJECTED + N_SYSTEM))
    return Prior(mean, sd)


# An arm never seen. A teacher is expected to be right nine times in ten and a student six, each give or take a
# quarter: a student is tried on about a third of the first requests and kept or dropped after a handful of them.
# Examples that promise a gain are believed in part; a teacher is shown none.
STUDENT_PRIOR = _default_prior(quality=0.6, per_utility=0.25)
TEACHER_PRIOR = _default_prior(quality=0.9, per_utility=0.0)

STEP = 25  # feedbacks of an arm between two fadings of its sums
KEPT_AFTER_CHANGE = 0.1  # share of an arm's older feedback that still counts once the arm has changed,
KEPT_COUNT = 3.0  # but no more than so many feedbacks' worth
SUSPECTS = 50  # feedbacks kept one by one, in case the arm is found to have changed
ADAPT_FIRST, ADAPT_GROWTH, ADAPT_EVERY = 40, 1.25, 1000  # feedbacks of all arms between two looks at the traffic
LEAST_SPREAD = 0.1  # of a feature, in variance: keeps columns that hardly vary from being trusted with much
UNKNOWN = ""  # no arm has this name
LIMIT = 1e15  # of any sum in a state that is read
BELIEVED = 256  # requests of which the beliefs are kept, 3 KB each


class Traffic(NamedTuple):
    """How much quality may differ by kind of request, a priori: variances over the columns of `KIND`.

        M = even * I / tr(C) + along * C / tr(C^2)

    C is the covariance of those columns among the requests seen so far. Requests of one kind lie together, so the
    directions in which traffic varies most are those that tell kinds apart: weights along them are believed to be
    large, the rest (what is peculiar to a single text) small. In either term quality varies, over this traffic, with
    the variance in front.
    """

    even: float
    along: float

    def covariance(self, gram: Matrix) -> Matrix:
        """(n_kind, n_kind): M, from the sum of x x^T over requests (n_features, n_features)."""
        n = gram[0, 0]
        mean = gram[0, KIND] / n
        c = gram[KIND, KIND] / n - np.outer(mean, mean)
        c = (c + c.T) / 2
        c[np.diag_indices_from(c)] += LEAST_SPREAD
        m: Matrix = c * (self.along / (c * c).sum())
        m[np.diag_indices_from(m)] += self.even / np.trace(c)
        return m


@dataclass(slots=True, eq=False)
class Statistics:
    """All that one arm's feedback amounts to. Sums over feedbacks, so those of two workers add up to both."""

    gram: Matrix  # (n_features, n_features): sum of x x^T
    response: Vector  # (n_features,): sum of quality * x
    count: float  # number of feedbacks; like the sums, old ones count less when there is a discount
    seen: int = 0  # feedbacks ever
    calibration: Calibration = field(default_factory=Calibration)

    @classmethod
    def empty(cls, n_features: int) -> Self:
        return cls(np.zeros((n_features, n_features)), np.zeros(n_features), 0.0)

    def add(self, x: Vector, quality: float, weight: float = 1.0) -> None:
        self.gram += np.outer(weight * x, x)
        self.response += weight * quality * x
        self.count += weight

    def fade(self, share: float) -> None:
        """Everything so far counts `share` of what it did."""
        self.gram *= share
        self.response *= share
        self.count *= share
        self.calibration.fade(share)

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            self.gram + other.gram,
            self.response + other.response,
            self.count + other.count,
            self.seen + other.seen,
            self.calibration + other.calibration,
        )


class Suspect(NamedTuple):
    """A feedback that may be the first of a changed arm."""

    x: Vector
    quality: float
    predicted: float
    sure: float  # in (0, 1]: the weight of that prediction
    weight: float  # with which it is in the sums


@dataclass(slots=True, eq=False)
class Posterior:
    """N(mean, covariance) over an arm's weights."""

    mean: Vector  # (n_features,)
    covariance: Matrix  # (n_features, n_features), symmetric positive definite

    def predict(self, x: Vector) -> tuple[float, float]:
        """Mean and variance of the expected quality at `x` (n_features,)."""
        return float(self.mean @ x), max(0.0, float(x @ self.covariance @ x))

    def add(self, x: Vector, quality: float, noise_sd: float) -> None:
        """One more feedback (Sherman and Morrison 1950): as if it had been in the sums from the beginning."""
        reach = self.covariance @ x
        share = 1.0 / (noise_sd**2 + float(x @ reach))
        self.mean = self.mean + reach * ((quality - float(self.mean @ x)) * share)
        self.covariance = self.covariance - np.outer(reach * share, reach)

    def replace(self, x: Vector, change: float, noise_sd: float) -> None:
        """A quality that is in the sums is another by `change`."""
        self.mean = self.mean + self.covariance @ x * (change / noise_sd**2)


class Regressions:
    """Quality of arm i is w_i . x + noise with known `noise_sd`; the posterior of w_i is Bishop's (3.50), (3.51):

        A = P^-1 + gram / noise_sd^2        A m = P^-1 prior.mean + response / noise_sd^2

    P is diag(prior.sd^2), and once there has been traffic, `Traffic` says what stands in the block of the columns
    `KIND`. Between two fadings feedbacks are added to the posterior one by one.

    Two ways to forget, of feedback only, never of the prior. `discount` in (0, 1]: every `STEP` feedbacks of an arm
    its sums are multiplied by discount^STEP, so about the last 1 / (1 - discount) count (Russac et al. 2019). And
    when a `Cusum` over the errors of prediction passes `alarm`, the arm has changed: what came since the change counts
    in full, and what was known before hardly.

    Arms are known by name and come and go freely. What is learned depends on the sequence of feedbacks alone, so
    processes that follow one log agree.
    """

    kind: str

    def __init__(
        self,
        *,
        names: Sequence[str] = NAMES,
        student_prior: Prior = STUDENT_PRIOR,
        teacher_prior: Prior = TEACHER_PRIOR,
        traffic: Traffic | None = Traffic(even=0.02, along=0.08),  # noqa: B008 - a value
        noise_sd: float = 0.3,
        discount: float = 0.9995,
        alarm: float = 4.0,
    ) -> None:
        if not (math.isfinite(noise_sd) and noise_sd > 0):
            raise ValueError(f"noise_sd must be finite and > 0, not {noise_sd}")
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
        self.traffic = traffic if self.names == NAMES else None
        self.noise_sd = noise_sd
        self.discount = discount
        self.statistics_: dict[str, Statistics] = {}
        self.drift_: dict[str, Cusum] = {}
        self.kinds_: Matrix | None = None  # (n_kind, n_kind): M of `Traffic` at the last look
        self.adapted_ = 0  # feedbacks of all arms at that look
        self._suspects: dict[str, deque[Suspect]] = {}
        self._unmoved = Cusum(alarm=alarm)
        self._posteriors: dict[tuple[str, bool], Posterior] = {}
        self._roots: dict[bool, Matrix] = {}
        self._believed: OrderedDict[tuple[Any, ...], tuple[list[float], list[float]]] = OrderedDict()

    def counts(self, arms: Sequence[Arm]) -> Vector:
        """(n_arms,): feedbacks of each, old ones counting less."""
        known = self.statistics_
        return np.array([known[arm.name].count if arm.name in known else 0.0 for arm in arms])

    def beliefs(self, x: Matrix, arms: Sequence[Arm]) -> tuple[Vector, Vector]:
        """Mean and standard deviation (n_arms,) of each arm's expected quality. `x` is (n_arms, n_features)."""
        means, sds = self.believed(x, arms)
        return np.array(means), np.array(sds)

    def believed(self, x: Matrix, arms: Sequence[Arm]) -> tuple[Sequence[float], Sequence[float]]:
        """`beliefs` as numbers. Kept by what is asked until something is learned: one decision asks twice, and the
        request may come again."""
        if x.shape != (len(arms), len(self.names)):
            raise ValueError(f"features have shape {x.shape}, not {(len(arms), len(self.names))}")
        key = (x.tobytes(), *[(arm.name, arm.is_teacher) for arm in arms])
        known = self._believed.get(key)
        if known is None:
            known = self._worked_out(x, arms)
            self._believed[key] = known
            if len(self._believed) > BELIEVED:
                self._believed.popitem(last=False)
        return known

    def _worked_out(self, x: Matrix, arms: Sequence[Arm]) -> tuple[list[float], list[float]]:
        if not math.isfinite(x.sum()):
            raise ValueError("features are not finite")
        pairs = [self._belief(arm, row) for arm, row in zip(arms, x, strict=True)]
        return [mean for mean, _ in pairs], [math.sqrt(variance) for _, variance in pairs]

    def _belief(self, arm: Arm, x: Vector) -> tuple[float, float]:
        return self._calibrated(arm.name, *self.posterior(arm.name, arm.is_teacher).predict(x))

    def _calibrated(self, arm: str, mean: float, variance: float) -> tuple[float, float]:
        known = self.statistics_.get(arm)
        return known.calibration.calibrated(mean, variance, self.noise_sd) if known else (mean, variance)

    def hopes(self, arms: Sequence[Arm]) -> list[float]:
        """(n_arms,) in [0, 1]: how much an arm's answers speak for its being better than was known; 1 at the alarm, and
        0.4 after the first good answer where none was expected."""
        known = [self.drift_.get(arm.name) for arm in arms]
        return [min(1.0, math.sqrt(d.rise / d.alarm)) if d is not None and d.rise else 0.0 for d in known]

    def at_first(self, arm: Arm, x: Vector) -> tuple[float, float]:
        """Mean and standard deviation of the arm's expected quality at `x`, as if nothing was known of it."""
        mean, variance = self.posterior(UNKNOWN, arm.is_teacher).predict(x)
        return mean, math.sqrt(variance)

    def posterior(self, arm: str, is_teacher: bool = False) -> Posterior:
        """The belief about one arm now; its prior when it was never seen."""
        if (known := self._posteriors.get((arm, is_teacher))) is None:
            known = self._posteriors[arm, is_teacher] = self._fresh(arm, is_teacher)
        return known

    def _fresh(self, arm: str, is_teacher: bool) -> Posterior:
        """From the sums, in units of the prior: there the precision is at least the identity, so well conditioned."""
        mean = (self.teacher_prior if is_teacher else self.student_prior).mean
        statistics, root = self.statistics_.get(arm) or Statistics.empty(len(self.names)), self._root(is_teacher)
        precision = root.T @ statistics.gram @ root / self.noise_sd**2
        precision[np.diag_indices_from(precision)] += 1.0
        covariance = root @ np.linalg.inv(precision) @ root.T
        covariance = (covariance + covariance.T) / 2
        error = statistics.response - statistics.gram @ mean
        return Posterior(mean + covariance @ error / self.noise_sd**2, covariance)

    def _root(self, is_teacher: bool) -> Matrix:
        """(n_features, n_features): P = root root^T."""
        if (known := self._roots.get(is_teacher)) is None:
            known = np.diag((self.teacher_prior if is_teacher else self.student_prior).sd)
            if self.kinds_ is not None:
                known[KIND, KIND] = np.linalg.cholesky(self.kinds_)
            self._roots[is_teacher] = known
        return known

    def surprise(self, arm: str, x: Vector, quality: float) -> float:
        """In [-1, 1]: by how much `quality` differs from what a student with this feedback is expected to reach, as
        far as noise has to explain it. Where little is known, an error is ignorance and no surprise."""
        mean, variance = self._calibrated(arm, *self.posterior(arm).predict(x))
        return self._unexplained(quality, mean, variance)

    def _unexplained(self, quality: float, mean: float, variance: float) -> float:
        error = quality - min(1.0, max(0.0, mean))
        return error * self.noise_sd**2 / (self.noise_sd**2 + variance)

    def learn(self, arm: str, x: Vector, quality: float, previous: float | None = None, *, age: int = 0) -> None:
        """See `Policy.learn`. A replacement leaves `gram` and `count` as they are; to the posterior it is as if the
        new value had been learned in the first place, exactly so when `age` is right or there is no discount. The
        calibration takes it in where the request would be predicted now."""
        quality = checked_quality(quality)
        if age < 0:
            raise ValueError(f"age must be >= 0, not {age}")
        if x.shape != (len(self.names),) or not np.isfinite(x).all():
            raise ValueError(f"features must be {len(self.names)} finite numbers, not of shape {x.shape}")
        self._believed.clear()
        if previous is None:
            self._add(arm, x, quality)
        else:
            self._replace(arm, x, quality - checked_quality(previous), age)

    def _add(self, arm: str, x: Vector, quality: float) -> None:
        drift = self.drift_.setdefault(arm, self._unmoved.fresh())
        predicted, variance = self.posterior(arm).predict(x)
        expected, doubt = self._calibrated(arm, predicted, variance)
        since = drift.observe(self._unexplained(quality, expected, doubt), expected)
        suspects = self._suspects.setdefault(arm, deque(maxlen=SUSPECTS))
        sure = sureness(variance)
        suspects.append(Suspect(x, quality, predicted, sure, 1.0))
        statistics = self.statistics_.setdefault(arm, Statistics.empty(len(self.names)))
        statistics.add(x, quality)
        statistics.seen += 1
        statistics.calibration.add(predicted, quality, sure)
        if since:
            self._begin_anew(arm, list(suspects)[-since:])
        while len(suspects) > drift.suspects:
            suspects.popleft()
        if statistics.seen % STEP == 0:
            self._fade(arm, self.discount**STEP)
        if since or statistics.seen % STEP == 0:
            self._refresh(arm)
        else:
            for is_teacher in (False, True):
                if (known := self._posteriors.get((arm, is_teacher))) is not None:
                    known.add(x, quality, self.noise_sd)
        self._look_at_traffic()

    def _replace(self, arm: str, x: Vector, change: float, age: int) -> None:
        if arm not in self.statistics_:
            raise ValueError(f"nothing was learned of {arm!r} that could be replaced")
        statistics = self.statistics_[arm]
        fadings = statistics.seen // STEP - max(0, statistics.seen - 1 - age) // STEP
        change *= self.discount ** (STEP * fadings)
        statistics.response += change * x
        predicted, variance = self.posterior(arm).predict(x)
        statistics.calibration.amend(predicted, change * sureness(variance))
        for is_teacher in (False, True):
            if (known := self._posteriors.get((arm, is_teacher))) is not None:
                known.replace(x, change, self.noise_sd)

    def _begin_anew(self, arm: str, changed: Sequence[Suspect]) -> None:
        """An arm has changed: what it was before counts little, and `changed`, its last feedbacks, in full."""
        statistics = self.statistics_[arm]
        for x, quality, predicted, sure, weight in changed:
            statistics.add(x, quality, -weight)
            statistics.calibration.add(predicted, quality, -weight * sure)
        statistics.count = max(0.0, statistics.count)
        share = min(KEPT_AFTER_CHANGE, KEPT_COUNT / max(1.0, statistics.count))
        statistics.fade(share)
        for x, quality, *_ in changed:
            statistics.add(x, quality)

    def _fade(self, arm: str, share: float) -> None:
        self.statistics_[arm].fade(share)
        suspects = self._suspects[arm]
        self._suspects[arm] = deque((s._replace(weight=s.weight * share) for s in suspects), maxlen=SUSPECTS)

    def _look_at_traffic(self) -> None:
        if self.traffic is None:
            return
        seen = sum(s.seen for s in self.statistics_.values())
        if seen >= max(ADAPT_FIRST, min(self.adapted_ * ADAPT_GROWTH, self.adapted_ + ADAPT_EVERY)):
            self.adapt()

    def adapt(self) -> None:
        """Choose the prior over kinds of request by the traffic so far."""
        total = sum((s.gram for s in self.statistics_.values()), np.zeros((len(self.names), len(self.names))))
        if self.traffic is None or total[0, 0] < 1.0:
            return
        self.kinds_ = self.traffic.covariance(total)
        self.adapted_ = sum(s.seen for s in self.statistics_.values())
        self._roots = {}
        for arm in {name for name, _ in self._posteriors}:
            self._refresh(arm)

    def merge(self, statistics: Mapping[str, Statistics]) -> None:
        """Add what another worker learned (its `statistics_`); each worker's discount has been applied by itself."""
        for arm, other in statistics.items():
            if other.response.shape != (len(self.names),):
                raise ValueError(f"statistics of {arm!r} have {other.response.size} features, not {len(self.names)}")
        for arm, other in statistics.items():
            self.statistics_[arm] = self.statistics_.get(arm, Statistics.empty(len(self.names))) + other
            self._refresh(arm)

    def forget(self, arm: str) -> None:
        """Back to the prior: the arm is gone, or another model has taken its name."""
        self.statistics_.pop(arm, None)
        self.drift_.pop(arm, None)
        self._suspects.pop(arm, None)
        self._refresh(arm)

    def _refresh(self, arm: str) -> None:
        """Beliefs that were in use are worked out anew here, so that no request waits for it."""
        self._believed.clear()
        for is_teacher in (False, True):
            if (arm, is_teacher) in self._posteriors:
                self._posteriors[arm, is_teacher] = self._fresh(arm, is_teacher)

    def state(self) -> bytes:
        lower = np.tril_indices(len(self.names))
        arms = {
            arm: {
                "count": statistics.count,
                "seen": statistics.seen,
                "response": statistics.response.tolist(),
                "gram": _text(statistics.gram[lower]),
                "calibration": [statistics.calibration.counts.tolist(), statistics.calibration.sums.tolist()],
                "drift": self._drift_state(arm),
                "suspects": [[*s[1:], *s.x.tolist()] for s in self._suspects.get(arm, ())],
            }
            for arm, statistics in self.statistics_.items()
        }
        kinds = None if self.kinds_ is None else self.kinds_[np.tril_indices(len(self.kinds_))].tolist()
        return pack(self.kind, {"features": self.names, "arms": arms, "kinds": kinds, "adapted": self.adapted_})

    def _drift_state(self, arm: str) -> list[float]:
        drift = self.drift_.get(arm, self._unmoved)
        return [drift.fall, drift.rise, drift.falling, drift.rising]

    def restore(self, state: bytes) -> None:
        learned = unpack(self.kind, state)
        if learned.get("features") != list(self.names):
            raise ValueError("router state was learned from other features")
        arms = learned.get("arms")
        if not isinstance(arms, dict):
            raise ValueError("router state has no arms")
        statistics = {arm: self._statistics(arm, entry) for arm, entry in arms.items()}
        drift = {arm: self._drift(arm, entry) for arm, entry in arms.items()}
        suspects = {arm: self._suspected(arm, entry) for arm, entry in arms.items()}
        kinds, adapted = self._kinds(learned)
        self.statistics_, self.drift_, self._suspects, self.kinds_ = statistics, drift, suspects, kinds
        self.adapted_, self._posteriors, self._roots = adapted, {}, {}
        self._believed.clear()

    def _kinds(self, learned: Mapping[str, Any]) -> tuple[Matrix | None, int]:
        """The prior over kinds as stored, or ValueError."""
        try:
            adapted = int(learned["adapted"])
            if learned["kinds"] is None:
                return None, adapted
            kinds = _symmetric(learned["kinds"], KIND.stop - KIND.start)
            np.linalg.cholesky(kinds)
        except (KeyError, TypeError, ValueError, OverflowError, np.linalg.LinAlgError) as exc:
            raise ValueError(f"router state has no prior over kinds of request: {exc!r}") from exc
        if self.traffic is None or np.abs(kinds).max() > LIMIT:
            raise ValueError("router state has a prior over kinds of request that does not fit")
        return kinds, adapted

    def _drift(self, arm: str, entry: Any) -> Cusum:
        """One arm's change detector as stored, or ValueError."""
        try:
            fall, rise, falling, rising = entry["drift"]
            return Cusum(self._unmoved.slack, self._unmoved.alarm, float(fall), float(rise), int(falling), int(rising))
        except (KeyError, TypeError, ValueError, OverflowError) as exc:
            raise ValueError(f"router state of arm {arm!r} is malformed: {exc!r}") from exc

    def _suspected(self, arm: str, entry: Any) -> deque[Suspect]:
        """One arm's last feedbacks as stored, or ValueError."""
        try:
            rows = np.array(entry["suspects"], dtype=np.float64).reshape(-1, 4 + len(self.names))
        except (KeyError, TypeError, ValueError) as exc:
            raise ValueError(f"router state of arm {arm!r} is malformed: {exc!r}") from exc
        shares = rows[:, [0, 2, 3]]
        if not (np.isfinite(rows).all() and (shares >= 0).all() and (shares <= 1).all()):
            raise ValueError(f"router state of arm {arm!r} has a last feedback that is none")
        return deque((Suspect(row[4:], *map(float, row[:4])) for row in rows), maxlen=SUSPECTS)

    def _statistics(self, arm: str, entry: Any) -> Statistics:
        """One arm's entry of a state, or ValueError."""
        n = len(self.names)
        try:
            count, seen = float(entry["count"]), int(entry["seen"])
            response = np.array(entry["response"], dtype=np.float64)
            lower = _numbers(entry["gram"])
            calibration = Calibration.of(*entry["calibration"])
        except (KeyError, TypeError, ValueError, OverflowError) as exc:
            raise ValueError(f"router state of arm {arm!r} is malformed: {exc!r}") from exc
        if response.shape != (n,) or lower.shape != (n * (n + 1) // 2,):
            raise ValueError(f"router state of arm {arm!r} has the wrong shape for {n} features")
        limits = 0 <= count <= LIMIT and 0 <= seen <= LIMIT
        if not (limits and np.abs(response).max() <= LIMIT and np.abs(lower).max() <= LIMIT):
            raise ValueError(f"router state of arm {arm!r} is not finite or beyond any real number of feedbacks")
        gram = _symmetric(lower, n)
        if np.linalg.eigvalsh(gram)[0] < -1e-9 * max(1.0, float(np.trace(gram))):
            raise ValueError(f"router state of arm {arm!r} is no sum of feedbacks (a negative eigenvalue)")
        return Statistics(gram, response, count, seen, calibration)


def _text(numbers: Vector) -> str:
    """(n,) as base64 of their eight bytes each: writing out 12,000 numbers would hold up requests for 10 ms."""
    return base64.b64encode(np.ascontiguousarray(numbers, "<f8").tobytes()).decode()


def _numbers(given: Any) -> Vector:
    """(n,), from what `_text` gave or from a list. ValueError where it is neither."""
    if isinstance(given, str):
        return np.frombuffer(base64.b64decode(given, validate=True), "<f8").astype(np.float64)
    return np.array(given, dtype=np.float64)


def _symmetric(lower: Any, n: int) -> Matrix:
    """(n, n), from its lower triangle in rows. ValueError where those are not its numbers."""
    values = np.array(lower, dtype=np.float64)
    if values.shape != (n * (n + 1) // 2,) or not np.isfinite(values).all():
        raise ValueError(f"{values.size} numbers are no lower triangle of {n} rows")
    matrix = np.zeros((n, n))
    matrix[np.tril_indices(n)] = values
    matrix += np.tril(matrix, -1).T
    return matrix
