"""A policy gives each arm a probability and learns from the quality that came of it. The Router draws."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from router.reward import checked_quality
from router.types import Arm, Matrix, Vector, price_order, request_order

VERSION = 1  # of the form of a state


class Policy(Protocol):
    def probabilities(self, x: Matrix, arms: Sequence[Arm], load_bias: Vector, quality_target: float) -> Vector:
        """(n_arms,), sums to 1. `x` (n_arms, n_features) and `load_bias` (n_arms,) are in the order of `arms`;
        `quality_target` in [0, 1] is the share of the dearest arm's quality that an answer should keep."""
        ...

    def scores(self, x: Matrix, arms: Sequence[Arm], load_bias: Vector) -> Vector:
        """(n_arms,): S_i, expected quality less the load bias."""
        ...

    def learn(self, arm: str, x: Vector, quality: float, previous: float | None = None, *, age: int = 0) -> None:
        """The answer of `arm` to a request with features `x` (n_features,) had `quality` in [0, 1]. With `previous`
        it replaces that value, learned `age` feedbacks of this arm ago."""
        ...

    def state(self) -> bytes:
        """Everything learned, as JSON."""
        ...

    def restore(self, state: bytes) -> None:
        """Replace everything learned by `state`; ValueError, and nothing changed, when it does not fit."""
        ...


class Fixed:
    """A policy that learns nothing. Of an arm's quality it knows nothing either: scores are the load bias alone."""

    kind: str

    def scores(self, x: Matrix, arms: Sequence[Arm], load_bias: Vector) -> Vector:
        return np.negative(load_bias)

    def learn(self, arm: str, x: Vector, quality: float, previous: float | None = None, *, age: int = 0) -> None:
        checked_quality(quality)

    def state(self) -> bytes:
        return pack(self.kind, {})

    def restore(self, state: bytes) -> None:
        unpack(self.kind, state)


class Always(Fixed):
    """Serves one arm; where it is no candidate, the dearest."""

    kind = "always"

    def __init__(self, name: str) -> None:
        self.name = name

    def probabilities(self, x: Matrix, arms: Sequence[Arm], load_bias: Vector, quality_target: float) -> Vector:
        names = [arm.name for arm in arms]
        chosen = names.index(self.name) if self.name in names else price_order(arms)[-1]
        return one_hot(chosen, len(arms))


class Uniform(Fixed):
    """Serves every arm equally often."""

    kind = "uniform"

    def probabilities(self, x: Matrix, arms: Sequence[Arm], load_bias: Vector, quality_target: float) -> Vector:
        return np.full(len(arms), 1.0 / len(arms))


class Threshold(Fixed):
    """Serves the cheapest arm whose predicted quality reaches `threshold`, else the dearest (as RouteLLM does).

    `predict` maps an arm and its features (n_features,) to a quality in [0, 1]. The load bias counts relative to
    the dearest arm's, so cheap arms pass more easily under load; give a bias of 0 for a threshold blind to it.
    """

    kind = "threshold"

    def __init__(self, predict: Callable[[Arm, Vector], float], threshold: float) -> None:
        self.predict = predict
        self.threshold = threshold

    def scores(self, x: Matrix, arms: Sequence[Arm], load_bias: Vector) -> Vector:
        predicted = [self.predict(arm, row) for arm, row in zip(arms, x, strict=True)]
        return np.array(predicted, dtype=np.float64) - load_bias

    def probabilities(self, x: Matrix, arms: Sequence[Arm], load_bias: Vector, quality_target: float) -> Vector:
        dearest = price_order(arms)[-1]
        scores = self.scores(x, arms, load_bias) + load_bias.max()
        chosen = next((i for i in request_order(arms) if i == dearest or scores[i] >= self.threshold), dearest)
        return one_hot(chosen, len(arms))


def one_hot(chosen: int, n_arms: int) -> Vector:
    probabilities = np.zeros(n_arms)
    probabilities[chosen] = 1.0
    return probabilities


def pack(kind: str, learned: dict[str, Any]) -> bytes:
    """A state: what was learned, with the policy that did and the version of the form."""
    return json.dumps({"version": VERSION, "policy": kind, **learned}, allow_nan=False).encode()


def unpack(kind: str, state: bytes) -> dict[str, Any]:
    """What `pack` was given, or ValueError that says what is wrong."""
    try:
        learned = json.loads(state)
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"router state is not JSON: {exc}") from exc
    if not isinstance(learned, dict):
        raise ValueError(f"router state is not a JSON object but {type(learned).__name__}")
    if learned.get("version") != VERSION:
        raise ValueError(f"router state has version {learned.get('version')!r}, this one reads {VERSION}")
    if learned.get("policy") != kind:
        raise ValueError(f"router state is of policy {learned.get('policy')!r}, not {kind!r}")
    return learned
