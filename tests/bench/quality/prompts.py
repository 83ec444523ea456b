"""A cache of examples, and the prompts that each way of using it makes of a request."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from iccache import config
from iccache.examples.embed import Embedder, make_embedder
from iccache.examples.shared import build_set
from iccache.types import Example, ExampleStats, Matrix, Shot, Vector
from tests.bench.quality.tasks import TASKS, Item, Task, items

RECALL_K = 16
NEAREST = 3
AT = 1_700_000_000.0


@cache
def embedder() -> Embedder:
    """The default one."""
    return make_embedder(config.Embedder())


@cache
def vectors(task: str, split: str) -> Matrix:
    """(n, dim), unit rows: the embeddings of all requests of one split."""
    return embedder().embed([item.prompt for item in items(task, split)])


class Request(NamedTuple):
    """One request, ready to be asked."""

    item: Item
    place: int  # in its split: what random choices are seeded with
    vector: Vector

    @property
    def task(self) -> Task:
        return TASKS[self.item.task]

    @property
    def seed(self) -> str:
        return f"{self.item.task} {self.item.split} {self.place}"


def requests(task: str, split: str, n: int | None = None) -> list[Request]:
    """The first `n` requests of a split."""
    return [
        Request(item, i, vector)
        for i, (item, vector) in enumerate(zip(items(task, split)[:n], vectors(task, split), strict=False))
    ]


class Cache:
    """Examples of one tenant, in the order they came."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)
        self.vectors = np.stack([e.embedding for e in examples]) if examples else np.empty((0, 1), np.float32)
        self._sets: dict[str, list[Example]] = {}

    def recall(self, request: Request, k: int = RECALL_K) -> list[tuple[Example, float]]:
        """The nearest with their cosine, best first, by brute force."""
        if not self.examples:
            return []
        cosines = self.vectors @ request.vector
        best = np.argsort(-cosines, kind="stable")[:k]
        return [(self.examples[i], float(cosines[i])) for i in best]

    def shared(self, system: str) -> list[Example]:
        """The shared set of the kind of request that `system` names."""
        if system not in self._sets:
            self._sets[system] = build_set([e for e in self.examples if e.system == system])
        return self._sets[system]


def example(task: str, place: int, answer: str | None = None) -> Example:
    """An example of the pool; `answer`: another one than the data set's."""
    item = items(task, "pool")[place]
    answer = item.targets[0] if answer is None else answer
    return Example(
        id=f"{task}-{place}",
        tenant="t",
        subject=None,
        request_id=f"r-{task}-{place}",
        at=AT,
        dialect="chat",
        system=TASKS[task].system,
        request=item.prompt,
        answer=answer,
        backend="teacher",
        embedder=embedder().identity,
        embedding=vectors(task, "pool")[place],
        tokens=(len(item.prompt) + len(answer)) // 4 + 1,
        stats=ExampleStats(),
    )


@cache
def pool(task: str) -> Cache:
    """The cache of one task alone, with the data set's answers."""
    return Cache([example(task, i) for i in range(len(items(task, "pool")))])


def messages(request: Request, shots: Sequence[Shot] = ()) -> list[dict[str, str]]:
    """The client's messages with examples as turns behind the system prompt, as `selection.framing = "turns"` has
    it.
    """
    made = [{"role": "system", "content": request.task.system}]
    for shot in shots:
        made.append({"role": "user", "content": shot.request})
        made.append({"role": "assistant", "content": shot.answer})
    made.append({"role": "user", "content": request.item.prompt})
    return made


# ---- which examples: in the order shown, the best last


def chosen(cache: Cache, request: Request, way: str) -> list[Example]:
    """The examples that `way` shows: none, random3, nearestN, shared, recalled3, recalled1."""
    if way == "none":
        return []
    if way == "shared":
        return cache.shared(request.task.system)
    if way.startswith("both"):
        near = [e for e, _ in cache.recall(request, int(way.removeprefix("both")))][::-1]
        return [e for e in cache.shared(request.task.system) if e.id not in {n.id for n in near}] + near
    if way == "random3":
        return random.Random(f"random {request.seed}").sample(cache.examples, NEAREST)
    if way.startswith("nearest"):
        return [e for e, _ in cache.recall(request, int(way.removeprefix("nearest")))][::-1]
    recalled = [e for e, _ in cache.recall(request)]
    drawn = random.Random(f"{way} {request.seed}").sample(range(len(recalled)), int(way.removeprefix("recalled")))
    return [recalled[i] for i in sorted(drawn, reverse=True)]


def shots(examples: Sequence[Example]) -> list[Shot]:
    return [Shot(e.request, e.answer) for e in examples]
