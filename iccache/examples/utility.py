"""What showing an example is worth: the expected gain in answer quality, about -1 to 1."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from iccache.examples.traits import USUAL_QUALITY, application, overlap, traits, words
from iccache.examples.ways import ALONE, Prior, Shown
from iccache.types import Example

NAMES = (
    "similarity",  # cosine of request and example, in [-1, 1]
    "same_system",  # 1 when both were asked under the same system prompt, else 0
    "credit",  # answers it has been judged by, each shared among the examples shown for it
    "credited_quality",  # the quality of those answers, shared likewise; at most `credit`
    "own_quality",  # quality of its own answer, in [0, 1], of what is above USUAL_QUALITY a fifth; 0.5 when unknown
    "own_quality_known",  # 1 or 0
    "uses",  # log(1 + answers it was shown for)
    "age",  # log(1 + days)
    "request_length",  # log(1 + characters)
    "answer_length",  # log(1 + characters)
    "overlap",  # share of the words of both requests that they have in common, in [0, 1]
    "vote",  # share of the candidates that have the same answer, the nearer counting for more, in (0, 1]: see `votes`
)
VOTE_SCALE = 0.125  # difference in cosine over which a candidate's say falls to 1/e
_COLUMN = {name: i for i, name in enumerate(NAMES)}

Rows = NDArray[np.float64]  # (n, len(NAMES))


def candidate_rows(
    nearest: Sequence[tuple[Example, float]], *, request: str, system: str, now: float
) -> NDArray[np.float64]:
    """(n, len(NAMES)): what is known of showing each candidate, with its cosine, for `request` asked under `system`."""
    asked, under = words(request), application(system)
    known = [traits(example) for example, _ in nearest]
    vote = votes([similarity for _, similarity in nearest], [each.answer for each in known])
    rows = [
        (
            similarity,
            1.0 if each.application == under else 0.0,
            *each.record,
            math.log1p(max(now - example.at, 0.0) / 86_400),
            each.request_length,
            each.answer_length,
            overlap(asked, each.words),
            share,
        )
        for (example, similarity), each, share in zip(nearest, known, vote, strict=True)
    ]
    return np.array(rows, dtype=np.float64).reshape(len(nearest), len(NAMES))


def votes(similarities: Sequence[float], answers: Sequence[Hashable]) -> list[float]:
    """For each candidate the share of all candidates that have its answer, itself among them, each weighted by
    exp(similarity / VOTE_SCALE): k nearest neighbours, voting.

    Where the answers are labels, those of the likeliest label come first; where no two are the same, the nearest do.
    """
    if not answers:
        return []
    most = max(similarities)
    weights = [math.exp((similarity - most) / VOTE_SCALE) for similarity in similarities]
    total = sum(weights)
    shares = dict.fromkeys(answers, 0.0)
    for answer, weight in zip(answers, weights, strict=True):
        shares[answer] += weight / total
    return [shares[answer] for answer in answers]


def same_system(a: str, b: str) -> bool:
    """Whether two system prompts are the same but for space."""
    return a == b or application(a) == application(b)


class UtilityModel(Protocol):
    """scikit-learn's shape. `student` names the model that is to see the examples; None: no one in particular."""

    def predict(self, X: Rows, student: str | None = None) -> NDArray[np.float64]:
        """(n,): expected gain in quality from showing each candidate, about -1 to 1."""
        ...

    def partial_fit(
        self, X: Rows, y: ArrayLike, sample_weight: ArrayLike | None = None, student: str | None = None
    ) -> Self:
        """Learn from shown examples X (n, len(NAMES)) and y (n,), the quality of the answers they were shown for.

        A negative weight takes back what was learned from a judgement that has been replaced.
        """
        ...

    def seen(self, X: Rows) -> NDArray[np.float64]:
        """(n, len(Shown._fields)): what training is told of each candidate, should it be shown."""
        ...

    def use(self, prior: Prior) -> None:
        """Go on with newly trained weights, where the model has any."""
        ...

    def state(self) -> bytes:
        """What was learned, for `restore`."""
        ...

    def restore(self, state: bytes) -> None:
        """Go on from there. Raises ValueError, changing nothing, for what no `state` has written."""
        ...


class RecordUtility:
    """Similarity and the example's own record, in one formula:

        utility = similarity_gain * (1 + similarity) / 2 * (1 if same system prompt else other_system)
                + (credited_quality + kappa * m0) / (credit + kappa) - m0
                + own_gain * (own_quality - USUAL_QUALITY)  where that is known

    The first line is what an example of that similarity is expected to add when nothing is known of it: 0 to
    `similarity_gain`, so that without a record the ranking is that of similarity, and an example from under another
    system prompt, which shows another format, ranks below one from under the same. The second is its mean quality
    when shown, shrunk by `kappa` answers' worth towards m0, less m0: above 0 when answers were better with it than
    answers are. The third says little for an answer that is as
    good as a teacher's usually are, and much against one that is not. Below 0 it comes by its record alone, which
    moves with the evidence: one judgement of an answer that three examples were shown for counts less than a
    difference of 0.2 in similarity.

    m0 is the mean quality of all answers that examples were shown for, shrunk by `prior_answers` towards 0.5: a
    weak student's answers do not speak against its examples. It is what `partial_fit` learns; it is the same for
    every student. It is the mean of *answers with examples*: what they gain over none is not measured here.
    """

    def __init__(
        self,
        similarity_gain: float = 0.4,
        other_system: float = 0.5,
        kappa: float = 4.0,
        own_gain: float = 0.75,
        prior_answers: float = 20.0,
    ) -> None:
        self.similarity_gain = similarity_gain
        self.other_system = other_system
        self.kappa = kappa
        self.own_gain = own_gain
        self.prior_answers = prior_answers
        self.quality_ = 0.0  # sum over answers
        self.answers_ = 0.0

    @property
    def mean_(self) -> float:
        """m0, in [0, 1]."""
        mean = (self.quality_ + self.prior_answers * 0.5) / (self.answers_ + self.prior_answers)
        return min(max(mean, 0.0), 1.0)

    def predict(self, X: Rows, student: str | None = None) -> NDArray[np.float64]:
        nearness = self.similarity_gain * (1.0 + _of(X, "similarity")) / 2.0
        total: NDArray[np.float64] = nearness * np.where(_of(X, "same_system") > 0.5, 1.0, self.other_system)
        if _of(X, "credit").any():
            total += self.record(X)
        known = _of(X, "own_quality_known")
        if known.any():
            total += self.own_gain * (_of(X, "own_quality") - USUAL_QUALITY) * known
        return total

    def record(self, X: Rows) -> NDArray[np.float64]:
        """(n,): the second line of the formula, about -1 to 1; 0 for a candidate that no answer has judged."""
        m0 = self.mean_
        return (_of(X, "credited_quality") + self.kappa * m0) / (_of(X, "credit") + self.kappa) - m0

    def seen(self, X: Rows) -> NDArray[np.float64]:
        seen: NDArray[np.float64] = X @ _SEEN
        seen += _SEEN_ALWAYS
        seen[:, _RECORD] = self.record(X)
        return seen

    def partial_fit(
        self, X: Rows, y: ArrayLike, sample_weight: ArrayLike | None = None, student: str | None = None
    ) -> Self:
        quality = np.asarray(y, float)
        weight = np.ones_like(quality) if sample_weight is None else np.asarray(sample_weight, float)
        self.quality_ = max(self.quality_ + float(quality @ weight), 0.0)
        self.answers_ = max(self.answers_ + float(weight.sum()), 0.0)
        return self

    def use(self, prior: Prior) -> None:
        """A formula has no weights to train."""

    def state(self) -> bytes:
        return json.dumps({"quality": self.quality_, "answers": self.answers_}).encode()

    def restore(self, state: bytes) -> None:
        try:
            learned = json.loads(state)
            self.quality_, self.answers_ = float(learned["quality"]), float(learned["answers"])
        except (ValueError, TypeError, KeyError) as exc:
            raise ValueError(f"the utility model's state cannot be read: {exc!r}") from exc


class LearnedUtility(RecordUtility):
    """What the prior of the ways expects an example to add when it is shown alone:

        utility = prior(own, {example}) - prior(none)

    which is linear in what is seen of it (`Shown`), its own shrunken record among that, with weights for each student
    that are trained where nobody waits. They are held to the signs of SIGNS: that an example is nearer, more like the
    others, or was followed by better answers never speaks against it, though the requests that have such examples may
    be harder; that it is older or from under another system prompt never speaks for it.
    """

    def __init__(self, prior: Prior | None = None) -> None:
        super().__init__()
        self.use(prior or Prior())

    def use(self, prior: Prior) -> None:
        """With what one example adds, by student: a constant, and per unit of each column (len(NAMES),), and of its
        record."""
        self.prior = prior
        self._alone = {student: _folded(weights @ ALONE.T) for student, weights in prior.weights.items()}

    def predict(self, X: Rows, student: str | None = None) -> NDArray[np.float64]:
        constant, per_unit, per_record = self._alone.get(student or "") or self._alone[""]
        gain: NDArray[np.float64] = X @ per_unit
        gain += constant
        if per_record and _of(X, "credit").any():
            gain += per_record * self.record(X)
        return gain


SIGNS = {"similarity": 1, "overlap": 1, "vote": 1, "record": 1, "source": 1, "other_system": -1, "age": -1}
_RECORD = Shown._fields.index("record")


def _seen() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(len(NAMES), len(Shown._fields)) and (len(Shown._fields),): what is seen of a candidate is X @ the one + the
    other, but for its record. An own quality that is not known stands as 0.5 in X, so source is linear too."""
    per_column, always = np.zeros((len(NAMES), len(Shown._fields))), np.zeros(len(Shown._fields))

    def put(field: str, column: str, times: float, plus: float = 0.0) -> None:
        per_column[_COLUMN[column], Shown._fields.index(field)] += times
        always[Shown._fields.index(field)] += plus

    for name in ("similarity", "overlap", "vote"):
        put(name, name, 1.0)
    for name in ("request_length", "answer_length", "age"):
        put(name, name, 1 / 8)
    put("other_system", "same_system", -1.0, plus=1.0)
    put("source", "own_quality", 1.0, plus=-0.5)
    put("source", "own_quality_known", 0.5 - USUAL_QUALITY)
    return per_column, always


_SEEN, _SEEN_ALWAYS = _seen()


def _folded(alone: NDArray[np.float64]) -> tuple[float, NDArray[np.float64], float]:
    """(1 + len(Shown._fields),), what an example adds by being there and per unit of what is seen of it -> the same
    per unit of X's columns."""
    per_seen = alone[1:].copy()
    for field, sign in SIGNS.items():
        place = Shown._fields.index(field)
        per_seen[place] = sign * max(sign * per_seen[place], 0.0)
    return float(alone[0] + _SEEN_ALWAYS @ per_seen), _SEEN @ per_seen, float(per_seen[_RECORD])


def _of(X: Rows, name: str) -> NDArray[Any]:
    return X[:, _COLUMN[name]]
