"""Three ways to show examples: none, the request's own, or a shared set. A small bandit per student, learned from
feedback.

What an answer's quality will be is estimated twice and put together:

- a linear *prior* over what is known of the request and of the examples, trained offline by replay (`fit`), and
- *evidence*: the scored answers of this tenant to similar requests. Each counts by how similar it is (`_nearness`),
  so "a kind of request" needs no definition: requests under one system prompt lend each other a little, near ones
  much more.

For each way w, theta_w is what the prior is off by there. Prior over (theta_none, theta_own, theta_shared):
N(0, COMMON I 1 1' + APART I), because an unforeseen difficulty is common to all ways; evidence n_w with summed
residuals r_w and noise NOISE gives the posterior in closed form (a Gaussian random-effects model):

    P = (COMMON 1 1' + APART I)^-1 + diag(n) / NOISE,   mean = P^-1 r / NOISE,   covariance = P^-1
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from operator import mul
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from iccache.examples.traits import application
from iccache.types import Vector

PRIOR_STATE = "ways"  # under which the store keeps what `Prior.state` gives
COMMON = 0.06  # variance in quality^2 of what is common to the ways
APART = 0.03  # variance of what sets one way apart
NOISE = 0.15  # variance of one scored answer around its expectation
CAPACITY = 1024  # scored answers remembered per tenant
SAME_APPLICATION = 0.3  # nearness of two requests under one system prompt, however different
OTHER_APPLICATION = 0.5  # nearness of two alike requests under different system prompts, or without one
PAIRS = 128  # remembered answers from which the usual cosine is taken
RECALIBRATE_EVERY = 64

Floats = NDArray[np.float64]


class Way(StrEnum):
    """How examples are shown."""

    NONE = "none"
    OWN = "own"  # chosen for the request
    SHARED = "shared"  # the same for all requests of a kind


WAYS = tuple(Way)
_PLACE = {way: i for i, way in enumerate(WAYS)}

NAMES = (
    "constant",
    "request_length",  # log(1 + characters) / 8
    "own",  # 1 where the request's own examples are shown
    "own_count",  # (count - 1) / 4
    "own_similarity_mean",
    "own_similarity_max",
    "own_overlap",  # mean share of words that request and example have in common
    "own_vote",  # mean share of the recalled examples that have the same answer, the nearer counting for more
    "own_other_system",  # share of the examples that were asked under another system prompt
    "own_request_length",  # mean of log(1 + characters) / 8
    "own_answer_length",  # likewise
    "own_age",  # mean of log(1 + days) / 8
    "own_record",  # mean quality of the answers they were shown for, shrunken, less that of all answers with examples
    "own_source",  # mean quality of their own answers less what is usual; 0 for one of which nothing is known
    "shared",  # 1 where a shared set is shown
    "shared_count",  # (count - 1) / 8
    "shared_similarity_mean",
    "shared_similarity_max",
)


class Shown(NamedTuple):
    """What is known of the examples that one way would show; of a shared set the similarity alone."""

    similarity: Sequence[float]
    overlap: Sequence[float] = ()
    vote: Sequence[float] = ()
    other_system: Sequence[float] = ()
    request_length: Sequence[float] = ()
    answer_length: Sequence[float] = ()
    age: Sequence[float] = ()
    record: Sequence[float] = ()
    source: Sequence[float] = ()


NOTHING_SHOWN = Shown(())


def features(request_chars: int, way: Way, shown: Shown = NOTHING_SHOWN) -> Floats:
    """(len(NAMES),): one request, shown examples one way."""
    return np.array(_row(math.log1p(request_chars) / 8, way, shown))


_NO_OWN, _NO_SHARED = (0.0,) * 12, (0.0,) * 4


def _row(request_length: float, way: Way, shown: Shown) -> tuple[float, ...]:
    count = len(shown.similarity)
    own: tuple[float, ...] = _NO_OWN
    shared: tuple[float, ...] = _NO_SHARED
    if way is Way.OWN and count:
        own = (
            1.0,
            (count - 1) / 4,
            _mean(shown.similarity),
            max(shown.similarity),
            *map(_mean, shown[1:]),
        )
    if way is Way.SHARED and count:
        shared = (1.0, (count - 1) / 8, _mean(shown.similarity), max(shown.similarity))
    return (1.0, request_length, *own, *shared)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


class Prior:
    """Expected quality of an answer, linear in `features`, one set of weights for each student and one for all
    others.
    """

    def __init__(self, weights: Mapping[str, ArrayLike] | None = None) -> None:
        """`weights` (len(NAMES),) by student; under "" those of a student that nothing is known of."""
        self.weights = {student: np.asarray(w, float) for student, w in (weights or {"": UNTRAINED}).items()}
        if "" not in self.weights or any(
            w.shape != (len(NAMES),) or not np.isfinite(w).all() for w in self.weights.values()
        ):
            raise ValueError(f"weights of {len(NAMES)} finite numbers by student, those of unknown ones under ''")
        self._lists: dict[str, list[float]] = {student: w.tolist() for student, w in self.weights.items()}

    def predict(self, X: Floats, student: str) -> Floats:
        """(n,): expected quality. X (n, len(NAMES))."""
        quality: Floats = np.clip(X @ self.weights.get(student, self.weights[""]), 0.0, 1.0)
        return quality

    def of_row(self, row: Sequence[float], student: str) -> float:
        """`predict` for one row, in [0, 1]."""
        weights = self._lists.get(student) or self._lists[""]
        return min(1.0, max(0.0, float(sum(map(mul, row, weights)))))

    def state(self) -> bytes:
        return json.dumps({"names": NAMES, "weights": {s: w.tolist() for s, w in self.weights.items()}}).encode()

    @classmethod
    def restored(cls, state: bytes) -> Self:
        """Raises ValueError for what no `state` has written. A feature it does not know has its untrained weight."""
        try:
            learned = json.loads(state)
            if not set(learned["names"]) <= set(NAMES):
                raise ValueError("learned from other features")
            untrained = dict(zip(NAMES, UNTRAINED, strict=True))
            weights = {
                student: untrained | dict(zip(learned["names"], each, strict=True))
                for student, each in learned["weights"].items()
            }
            return cls({student: list(each.values()) for student, each in weights.items()})
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise ValueError(f"the prior of the ways cannot be read: {exc}") from exc


def _usable(weights: Floats) -> bool:
    return weights.shape == (len(NAMES),) and bool(np.isfinite(weights).all())


class Evidence:
    """The latest scored answers of one tenant. The newest replaces the oldest."""

    def __init__(self, dim: int, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.vectors = np.zeros((capacity, dim), np.float32)
        self.application = np.zeros(capacity, np.uint64)
        self.student = np.zeros(capacity, np.int64)
        self.way = np.zeros(capacity, np.int64)
        self.residual = np.zeros(capacity)  # quality less what the prior had expected
        self.rows: dict[str, int] = {}  # by request id
        self._ids: list[str | None] = [None] * capacity
        self._next = 0
        self.usual, self.alike = 0.0, 0.5  # cosine of any two requests here; of two of one kind
        self._since_calibration = 0

    def __len__(self) -> int:
        return len(self.rows)

    def put(self, request_id: str, vector: Vector, application: int, student: int, way: Way, residual: float) -> None:
        """Remember an answer, or what is known of it by now."""
        row = self.rows.get(request_id)
        if row is None:
            row, self._next = self._next, (self._next + 1) % self.capacity
            self.forget(self._ids[row])
            self.rows[request_id], self._ids[row] = row, request_id
            self._since_calibration += 1
        self.vectors[row] = vector
        self.application[row], self.student[row] = application, student
        self.way[row], self.residual[row] = _PLACE[way], residual
        if self._since_calibration >= RECALIBRATE_EVERY or len(self.rows) == 8:
            self._calibrate()

    def forget(self, request_id: str | None) -> None:
        row = self.rows.pop(request_id, None) if request_id is not None else None
        if row is not None:
            self._ids[row] = None
            self.vectors[row] = 0.0
            self.student[row] = -1

    def near(self, vector: Vector, application: int, student: int) -> tuple[Floats, Floats]:
        """(n, r), each (len(WAYS),): how many answers of `student` speak for each way, and the sum of their
        residuals.
        """
        used = min(len(self.rows), self.capacity) if self._next >= len(self.rows) else self.capacity
        rows = np.flatnonzero(self.student[:used] == student)
        if not len(rows):
            return np.zeros(len(WAYS)), np.zeros(len(WAYS))
        mine = slice(used) if len(rows) == used else rows  # of all a view, where of some it takes a copy
        weights = self._nearness(self.vectors[mine] @ vector, self.application[mine] == application, application != 0)
        ways = self.way[rows]
        n: Floats = np.bincount(ways, weights, len(WAYS)).astype(np.float64)
        r: Floats = np.bincount(ways, weights * self.residual[rows], len(WAYS)).astype(np.float64)
        return n, r

    def _nearness(self, cosines: Vector, same: NDArray[np.bool_], named: bool) -> Floats:
        """(n,) in [0, 1]: how much an answer to one request says about another."""
        alike: Floats = np.clip((cosines.astype(np.float64) - self.usual) / (self.alike - self.usual), 0.0, 1.0)
        least = SAME_APPLICATION if named else 0.0  # without a system prompt, what is asked is all that is known
        nearness: Floats = np.where(same, least + (1 - least) * alike, OTHER_APPLICATION * alike)
        return nearness

    def _calibrate(self) -> None:
        """Cosines mean something else with every embedder: take what is usual among the requests here."""
        self._since_calibration = 0
        rows = np.array(list(self.rows.values()))
        some = self.vectors[rows[:: max(1, len(rows) // PAIRS)]]
        cosines = (some @ some.T)[np.triu_indices(len(some), 1)]
        self.usual = float(np.median(cosines))
        self.alike = max(float(np.quantile(cosines, 0.98)), self.usual + 0.1)


class Local(NamedTuple):
    """What the answers to similar requests say. Arrays (len(WAYS),), in the order of `WAYS`."""

    shift: Floats  # of quality, by way: what the prior is off by here
    sd: Floats  # of what sets the way apart from the others
    answers: float  # scored answers, weighted by how similar their requests were

    @property
    def gain(self) -> float:
        """What a request's own examples gain here beyond what the prior expects."""
        return float(self.shift[1] - self.shift[0])


class Estimate(NamedTuple):
    """What is expected of each way, in the order of `WAYS`."""

    quality: Sequence[float]  # in [0, 1]
    sd: Floats  # (len(WAYS),), of what sets the way apart from the others
    prior: Sequence[float]  # what the prior alone expects
    answers: float  # as in Local
    features: Sequence[Sequence[float]] = ((0.0,) * len(NAMES),) * len(WAYS)  # what the prior saw


class Ways:
    """Prior and evidence, put together. Holds no text; evidence never crosses tenants.

    One thread learns. Others may ask meanwhile: a row that is just being replaced counts with some of its old values.
    """

    def __init__(self, prior: Prior | None = None) -> None:
        self.prior = prior or Prior()
        self.evidence: dict[str, Evidence] = {}  # by tenant
        self.revision = 0  # grows with all that is learned or forgotten
        self._students: dict[str, int] = {}

    def near(self, tenant: str, student: str, vector: Vector, system: str) -> Local:
        """What is known of requests like this one: `vector` (dim,), unit norm, asked under `system`."""
        evidence = self.evidence.get(tenant)
        if evidence is None or evidence.vectors.shape[1] != len(vector):
            return NOTHING_KNOWN
        n, r = evidence.near(vector, application(system), self._number(student))
        if not n.any():
            return NOTHING_KNOWN
        mean, covariance = posterior(n, r)
        return Local(mean, _apart(covariance), float(n.sum()))

    def estimate(self, local: Local, student: str, request_chars: int, shown: Mapping[Way, Shown]) -> Estimate:
        """What to expect of each way for one request. A way that is not in `shown` shows nothing."""
        length = math.log1p(request_chars) / 8
        rows = [_row(length, way, shown.get(way, NOTHING_SHOWN)) for way in WAYS]
        expected = [self.prior.of_row(row, student) for row in rows]
        shift = _NO_SHIFT if local is NOTHING_KNOWN else local.shift.tolist()
        quality = [min(1.0, max(0.0, e + s)) for e, s in zip(expected, shift, strict=True)]
        return Estimate(quality, local.sd, expected, local.answers, rows)

    def learn(
        self,
        tenant: str,
        request_id: str,
        student: str,
        vector: Vector,
        system: str,
        way: Way,
        quality: float,
        expected: float,
    ) -> None:
        """An answer was scored: `quality` in [0, 1]; `expected` by the prior for the way it was shown examples."""
        evidence = self.evidence.get(tenant)
        if evidence is None or evidence.vectors.shape[1] != len(vector):
            evidence = self.evidence[tenant] = Evidence(len(vector))
        evidence.put(request_id, vector, application(system), self._number(student), way, quality - expected)
        self.revision += 1

    def forget(self) -> None:
        """All evidence."""
        self.evidence = {}
        self.revision += 1

    def take_over(self, other: Ways) -> None:
        """Have the evidence of `other` in the place of one's own."""
        self.evidence, self._students = other.evidence, other._students
        self.revision += 1

    def _number(self, student: str) -> int:
        return self._students.setdefault(student, len(self._students))


def posterior(n: Floats, r: Floats) -> tuple[Floats, Floats]:
    """Mean (k,) and covariance (k, k) of what the prior is off by. `n`, `r` (k,) as in `Evidence.near`.

    (COMMON 1 1' + APART I)^-1 is (I - c 1 1') / APART with c = COMMON / (APART + k COMMON), so P is D - c / APART 1 1'
    with D diagonal, and by Sherman and Morrison (1950) P^-1 is D^-1 and a multiple of D^-1 1 1' D^-1.
    """
    common = COMMON / (APART + len(n) * COMMON) / APART
    alone = 1.0 / (1.0 / APART + n / NOISE)
    covariance: Floats = np.diag(alone) + (common / (1.0 - common * alone.sum())) * np.outer(alone, alone)
    mean: Floats = covariance @ (r / NOISE)
    return mean, covariance


def _apart(covariance: Floats) -> Floats:
    """(k,): standard deviation of each component less the mean of all: what they have in common decides nothing."""
    k = len(covariance)
    rows = covariance.sum(axis=1)
    variance: Floats = covariance.diagonal() - (2 / k) * rows + rows.sum() / k**2
    return np.sqrt(np.maximum(variance, 0.0))


_NO_SHIFT = (0.0,) * len(WAYS)
NOTHING_KNOWN = Local(np.zeros(len(WAYS)), _apart(posterior(np.zeros(len(WAYS)), np.zeros(len(WAYS)))[1]), 0.0)


# Until replay has trained on the tenant's own traffic. Overlap and vote as `make bench-quality` found them on six
# tasks and two students, taken down a little; there similarity told nothing within one kind of request, but the
# examples of its tasks were all near, so here a nearer one still counts for more.
# Of lengths nothing is believed, of age neither: what is stale depends on what is asked.
_BELIEVED = {
    "constant": 0.3,
    "own": 0.1,
    "own_similarity_mean": 0.1,
    "own_similarity_max": 0.1,
    "own_overlap": 0.15,
    "own_vote": 0.4,
    "own_other_system": -0.15,
    "own_record": 1.0,
    "own_source": 0.75,
    "shared": 0.1,
    "shared_similarity_max": 0.1,
}
UNTRAINED = tuple(_BELIEVED.get(name, 0.0) for name in NAMES)

# What one example alone adds to the features of a request: a row for its being there, and one for each of `Shown`.
_alone = np.zeros((1 + len(Shown._fields), len(NAMES)))
_alone[0, NAMES.index("own")] = 1.0
_alone[1, [NAMES.index("own_similarity_mean"), NAMES.index("own_similarity_max")]] = 1.0
for _row_of, _field in enumerate(Shown._fields[1:], 2):
    _alone[_row_of, NAMES.index(f"own_{_field}")] = 1.0
ALONE = _alone
