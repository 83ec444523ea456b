"""Synthetic traffic with the geometry of real sentence embeddings, for the tests of the router."""

import numpy as np
from numpy.typing import NDArray

from router.types import Arm, ExampleSignals, Signals

DIM = 384
STUDENT = Arm("student", price=0.1)
MIDDLE = Arm("middle", price=0.4)
TEACHER = Arm("teacher", price=1.0, is_teacher=True)


class TwoKinds:
    """Requests of two kinds: cosine about 0.4 within a kind and 0.08 between, as MiniLM gives for two tasks of short
    texts. Within a kind texts differ along a few dozen directions, not evenly along all."""

    def __init__(self, rng: np.random.Generator, *, within: float = 0.4, between: float = 0.08) -> None:
        self.rng = rng
        shared, first, second = np.linalg.qr(rng.normal(size=(DIM, 3)))[0].T
        self.centres = [np.sqrt(between) * shared + np.sqrt(within - between) * own for own in (first, second)]
        self.scatter = rng.normal(size=(DIM, 48)) * np.linspace(1.0, 0.2, 48)
        self.spread = np.sqrt(1 - within)

    def embedding(self, kind: int) -> NDArray[np.float32]:
        noise = self.scatter @ self.rng.normal(size=48)
        vector = self.centres[kind] + self.spread * noise / np.linalg.norm(noise)
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    def signals(self, kind: int) -> Signals:
        similarity, utility = self.rng.uniform(0.5, 0.8), self.rng.uniform(0.0, 0.3)
        examples = ExampleSignals(3, similarity, similarity - 0.05, utility, utility / 2, 300)
        return Signals(self.embedding(kind), int(self.rng.integers(20, 200)), 1, {"student": examples})
