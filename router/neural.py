"""A small neural policy: a network learns what tells requests apart, regressions on it how good each arm is."""

import base64
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from router.features import NAMES
from router.linear import LinearThompson
from router.policy import pack, unpack
from router.regression import Prior, Statistics, Suspect
from router.reward import checked_quality
from router.types import Arm, Matrix, Vector

FIRST, SECOND = 64, 32  # units of the two hidden layers: 7,840 weights with `NAMES`
CAPACITY = 600  # feedbacks that are remembered
BATCH, STEPS = 32, 4  # feedbacks per step, steps per training
TRAIN_EVERY, REBUILD_EVERY = 8, 32  # feedbacks
RATE, DECAY = 3e-3, 1e-4  # of Adam, and of the weights
PRIORITY, CORRECTION = 0.6, 0.4  # exponents of prioritised replay (Schaul et al. 2016)
LEAST_PRIORITY = 0.02  # so that nothing is forgotten for being known
SHAPES = {"w1": (FIRST, len(NAMES)), "b1": (FIRST,), "w2": (SECOND, FIRST), "b2": (SECOND,)}


def _prior(quality: float) -> Prior:
    """Over the weights of a constant and the second layer: they move quality by about a quarter."""
    mean, sd = np.zeros(1 + SECOND), np.full(1 + SECOND, 0.1)
    mean[0], sd[0] = quality, 0.25
    return Prior(mean, sd)


class Remembered(NamedTuple):
    arm: str
    x: NDArray[np.float32]  # (n_features,)
    quality: float
    priority: float  # the error when it was last looked at


class _Heads(LinearThompson):
    """The last layer, which also says which arms have changed, and since how many feedbacks."""

    changed: dict[str, int]

    def _begin_anew(self, arm: str, changed: Sequence[Suspect]) -> None:
        super()._begin_anew(arm, changed)
        self.changed[arm] = len(changed)


class NeuralThompson:
    """Neural-linear Thompson sampling (Riquelme et al. 2018): z = [1, tanh(W2 tanh(W1 x + b1) + b2)], trained to
    predict quality by one weight vector for each arm, on batches drawn from the last feedbacks in proportion to their
    errors; on z, each arm has the Bayesian regression and the choice of `LinearThompson`, over all that is
    remembered, worked out anew as the network moves. So the distribution is exact here too.

    Everything follows from the seed and the sequence of feedbacks. An arm that has changed is remembered only since.
    """

    kind = "neural-thompson"

    def __init__(self, *, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self.weights_: dict[str, NDArray[np.float64]] = {
            "w1": self._rng.normal(0, 1 / np.sqrt(len(NAMES)), SHAPES["w1"]),
            "b1": np.zeros(FIRST),
            "w2": self._rng.normal(0, 1 / np.sqrt(FIRST), SHAPES["w2"]),
            "b2": np.zeros(SECOND),
        }
        self.memory_: list[Remembered] = []
        self.seen_ = 0
        self.heads_ = self._heads()
        self._moments: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        self._steps = 0

    @staticmethod
    def _heads() -> _Heads:
        names = ["constant", *(f"hidden_{i}" for i in range(SECOND))]
        heads = _Heads(names=names, student_prior=_prior(0.6), teacher_prior=_prior(0.9))
        heads.changed = {}
        return heads

    @property
    def n_weights(self) -> int:
        return sum(w.size for w in self.weights_.values())

    def probabilities(self, x: Matrix, arms: Sequence[Arm], load_bias: Vector, quality_target: float) -> Vector:
        return self.heads_.probabilities(self.hidden(x), arms, load_bias, quality_target)

    def scores(self, x: Matrix, arms: Sequence[Arm], load_bias: Vector) -> Vector:
        return self.heads_.scores(self.hidden(x), arms, load_bias)

    def hidden(self, x: Matrix) -> Matrix:
        """(n, n_features) -> (n, 1 + SECOND)."""
        return self._forward(x)[1]

    def _forward(self, x: Matrix) -> tuple[Matrix, Matrix]:
        w = self.weights_
        first = np.tanh(x @ w["w1"].T + w["b1"])
        z = np.ones((len(x), 1 + SECOND))
        z[:, 1:] = np.tanh(first @ w["w2"].T + w["b2"])
        return first, z

    def learn(self, arm: str, x: Vector, quality: float, previous: float | None = None, *, age: int = 0) -> None:
        quality = checked_quality(quality)
        if x.shape != (len(NAMES),) or not np.isfinite(x).all():
            raise ValueError(f"features must be {len(NAMES)} finite numbers, not of shape {x.shape}")
        row = x.astype(np.float32)
        self.heads_.learn(arm, self.hidden(row[None].astype(np.float64))[0], quality, previous, age=age)
        if previous is not None:
            self._amend(arm, row, quality)
            return
        self.memory_.append(Remembered(arm, row, quality, max((m.priority for m in self.memory_), default=1.0)))
        if (since := self.heads_.changed.pop(arm, 0)) > 0:
            self._forget_before(arm, since)
        del self.memory_[:-CAPACITY]
        self.seen_ += 1
        if self.seen_ % TRAIN_EVERY == 0:
            for _ in range(STEPS):
                self._train()
        if self.seen_ % REBUILD_EVERY == 0:
            self._rebuild()

    def _amend(self, arm: str, x: NDArray[np.float32], quality: float) -> None:
        for i in range(len(self.memory_) - 1, -1, -1):
            if self.memory_[i].arm == arm and np.array_equal(self.memory_[i].x, x):
                self.memory_[i] = self.memory_[i]._replace(quality=quality)
                return

    def _forget_before(self, arm: str, since: int) -> None:
        own = [i for i, m in enumerate(self.memory_) if m.arm == arm]
        gone = set(own[:-since])
        self.memory_ = [m for i, m in enumerate(self.memory_) if i not in gone]

    def _train(self) -> None:
        """One step of Adam on a batch drawn by priority; each error counts as if the draw had been uniform."""
        priorities = np.array([m.priority for m in self.memory_]) ** PRIORITY
        shares = priorities / priorities.sum()
        drawn = self._rng.choice(len(shares), size=min(BATCH, len(shares)), p=shares)
        batch = [self.memory_[i] for i in drawn]
        x = np.array([m.x for m in batch], dtype=np.float64)
        first, z = self._forward(x)
        heads = np.array([self._head(m.arm) for m in batch])
        error = (heads * z).sum(axis=1) - np.array([m.quality for m in batch])
        for i, e in zip(drawn, error, strict=True):
            self.memory_[i] = self.memory_[i]._replace(priority=float(abs(e)) + LEAST_PRIORITY)
        weight = (len(shares) * shares[drawn]) ** -CORRECTION
        pull = (error * weight / weight.max() / len(batch))[:, None]
        back2 = pull * heads[:, 1:] * (1 - z[:, 1:] ** 2)
        back1 = back2 @ self.weights_["w2"] * (1 - first**2)
        self._step({"w1": back1.T @ x, "b1": back1.sum(axis=0), "w2": back2.T @ first, "b2": back2.sum(axis=0)})
        for arm in sorted({m.arm for m in batch}):
            mine = np.array([m.arm == arm for m in batch])
            self._step({f"head {arm}": (pull[mine] * z[mine]).sum(axis=0)})

    def _head(self, arm: str) -> Vector:
        """The weights that the network is trained with. They begin small but not at 0, or nothing below would learn."""
        name = f"head {arm}"
        if name not in self.weights_:
            self.weights_[name] = np.concatenate(([0.6], 0.1 * self._rng.normal(size=SECOND)))
        return self.weights_[name]

    def _step(self, gradients: dict[str, NDArray[np.float64]]) -> None:
        self._steps += "w1" in gradients
        for name, gradient in gradients.items():
            m, v = self._moments.get(name, (np.zeros_like(gradient), np.zeros_like(gradient)))
            m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
            self._moments[name] = m, v
            t = max(1, self._steps)
            rise = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
            self.weights_[name] = self.weights_[name] * (1 - DECAY) - RATE * rise

    def _rebuild(self) -> None:
        """Every arm's regression over what is remembered of it, on the network as it is now."""
        z = self.hidden(np.array([m.x for m in self.memory_], dtype=np.float64))
        for arm in list(self.heads_.statistics_):
            known, mine = self.heads_.statistics_[arm], [i for i, m in enumerate(self.memory_) if m.arm == arm]
            rows, quality = z[mine], np.array([self.memory_[i].quality for i in mine])
            fresh = Statistics(rows.T @ rows, quality @ rows, float(len(mine)), known.seen, known.calibration)
            self.heads_.statistics_[arm] = fresh
            self.heads_._refresh(arm)

    def state(self) -> bytes:
        return pack(
            self.kind,
            {
                "features": NAMES,
                "weights": {name: w.ravel().tolist() for name, w in self.weights_.items()},
                "moments": {name: [m.ravel().tolist(), v.ravel().tolist()] for name, (m, v) in self._moments.items()},
                "steps": self._steps,
                "seen": self.seen_,
                "memory": [
                    [m.arm, m.quality, m.priority, base64.b64encode(m.x.astype("<f4").tobytes()).decode()]
                    for m in self.memory_
                ],
                "heads": json.loads(self.heads_.state()),
                "generator": self._rng.bit_generator.state,
            },
        )

    def restore(self, state: bytes) -> None:
        learned = unpack(self.kind, state)
        if learned.get("features") != list(NAMES):
            raise ValueError("router state was learned from other features")
        heads, rng = self._heads(), np.random.default_rng(0)
        try:
            heads.restore(json.dumps(learned["heads"]).encode())
            weights = {name: _array(w, name) for name, w in learned["weights"].items()}
            moments = {name: (_array(m, name), _array(v, name)) for name, (m, v) in learned["moments"].items()}
            memory = [self._row(*row) for row in learned["memory"]]
            steps, seen = int(learned["steps"]), int(learned["seen"])
            rng.bit_generator.state = learned["generator"]
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as exc:
            raise ValueError(f"router state is malformed: {exc!r}") from exc
        if missing := SHAPES.keys() - weights.keys():
            raise ValueError(f"router state has no weights {', '.join(sorted(missing))}")
        self.heads_, self.weights_, self._moments, self.memory_ = heads, weights, moments, memory
        self._steps, self.seen_, self._rng = steps, seen, rng

    @staticmethod
    def _row(arm: Any, quality: Any, priority: Any, x: Any) -> Remembered:
        row = np.frombuffer(base64.b64decode(x, validate=True), dtype="<f4").astype(np.float32)
        if row.shape != (len(NAMES),) or not np.isfinite(row).all() or not 0 < float(priority) < np.inf:
            raise ValueError("a remembered feedback is none")
        return Remembered(str(arm), row, checked_quality(float(quality)), float(priority))


def _array(values: Any, name: str) -> NDArray[np.float64]:
    array = np.array(values, dtype=np.float64).reshape(SHAPES.get(name, (1 + SECOND,)))
    if not np.isfinite(array).all():
        raise ValueError(f"{name} is not finite")
    return array
