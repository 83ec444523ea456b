"""A cache of examples, and the prompts that each way of using it makes of a request."""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from iccache import config
from iccache.examples.embed import Embedder, make_embedder
from iccache.examples.embed.unrelated import unrelated
from iccache.examples.selector import VOTE, Selector
from iccache.examples.shared import build_set
from iccache.examples.traits import plain
from iccache.examples.utility import LearnedUtility, candidate_rows, votes
from iccache.examples.ways import Prior, Shown
from iccache.types import Example, ExampleStats, Matrix, Recalled, Shot, Vector
from tests.bench.quality.answers import DATA
from tests.bench.quality.tasks import EVERY, TASKS, Item, Task, items

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


@cache
def recalled() -> dict[str, Any]:
    """What was recalled when the answers were asked for, so that they stay of use when the default embedder changes:
    {"embedder": its identity, "recall": {"task split": [[[place in the pool, cosine], ...] of each request]}, "shared":
    {task: [place, ...]}}. Written anew by `python -m tests.bench.quality.prompts`."""
    with lzma.open(DATA / "recall.json.xz", "rt") as file:
        found: dict[str, Any] = json.load(file)
    return found


class Request(NamedTuple):
    """One request, ready to be asked."""

    item: Item
    place: int  # in its split: what random choices are seeded with
    vector: Vector

    @property
    def task(self) -> Task:
        return EVERY[self.item.task]

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
    """Examples of one tenant, in the order they came; `places` where they are in the pool of their one task."""

    def __init__(self, examples: Sequence[Example], places: str | None = None) -> None:
        self.examples = list(examples)
        self.places = places
        self.vectors = np.stack([e.embedding for e in examples]) if examples else np.empty((0, 1), np.float32)
        self._sets: dict[str, list[Example]] = {}

    def recall(self, request: Request, k: int = RECALL_K) -> list[tuple[Example, float]]:
        """The nearest with their cosine, best first: as kept where that is known, else by brute force."""
        if self.places is not None and k <= RECALL_K:
            kept = recalled()["recall"].get(f"{request.item.task} {request.item.split}")
            if kept is not None and request.item.task == self.places:
                return [(self.examples[place], cosine) for place, cosine in kept[request.place][:k]]
        if not self.examples:
            return []
        cosines = self.vectors @ request.vector
        best = np.argsort(-cosines, kind="stable")[:k]
        return [(self.examples[i], float(cosines[i])) for i in best]

    def shared(self, system: str) -> list[Example]:
        """The shared set of the kind of request that `system` names."""
        if self.places is not None:
            if TASKS[self.places].system != system:
                return []
            return [self.examples[place] for place in recalled()["shared"][self.places]]
        if system not in self._sets:
            self._sets[system] = build_set([e for e in self.examples if e.system == system])
        return self._sets[system]


def example(task: str, place: int, answer: str | None = None, split: str = "pool") -> Example:
    """An example of one split; `answer`: another one than the data set's."""
    item = items(task, split)[place]
    answer = item.targets[0] if answer is None else answer
    return Example(
        id=f"{task}-{place}",
        tenant="t",
        subject=None,
        request_id=f"r-{task}-{place}",
        at=AT,
        dialect="chat",
        system=EVERY[task].system,
        request=item.prompt,
        answer=answer,
        backend="teacher",
        embedder=embedder().identity,
        embedding=vectors(task, split)[place],
        tokens=(len(item.prompt) + len(answer)) // 4 + 1,
        stats=ExampleStats(),
    )


@cache
def pool(task: str) -> Cache:
    """The cache of one task alone, with the data set's answers."""
    examples = [example(task, i) for i in range(len(items(task, "pool")))]
    return Cache(examples, places=task if task in TASKS else None)


def messages(request: Request, shots: Sequence[Shot] = (), framing: str = "turns") -> list[dict[str, str]]:
    """The client's messages with examples: as "turns" behind the system prompt; as one block at the end of the
    "system" prompt; or in the user's turn in the "paper"'s order, the task before and after them.
    """
    system, asked = request.task.system, request.item.prompt
    if shots and framing == "system":
        system = f"{system}\n\n{BLOCK}\n\n{_block(shots)}"
    if shots and framing == "paper":
        asked = f"{asked}\n\n{GUIDANCE}\n\n{_block(shots)}\n\n{REMINDER}\n\n{asked}"
    made = [{"role": "system", "content": system}]
    for shot in shots if framing == "turns" else ():
        made.append({"role": "user", "content": shot.request})
        made.append({"role": "assistant", "content": shot.answer})
    made.append({"role": "user", "content": asked})
    return made


BLOCK = "Earlier requests and how they were answered:"
GUIDANCE = (
    "Below are earlier requests with their answers. Look first whether they are of this kind; leave them aside where "
    "they are not. Where they are good, answer in their form and style, and use what they tell."
)
REMINDER = "What is asked comes first. The answers above are no templates, unless one was to nearly the same request."


def _block(shots: Sequence[Shot]) -> str:
    return "\n\n".join(f"Request: {shot.request}\nAnswer: {shot.answer}" for shot in shots)


# ---- which examples: in the order shown, the best last


def chosen(cache: Cache, request: Request, way: str) -> list[Example]:
    """The examples that `way` shows: none, random3, nearestN, shared, recalled3, recalled1."""
    if way == "none":
        return []
    if way == "shared":
        return cache.shared(request.task.system)
    if way == "random3":
        return random.Random(f"random {request.seed}").sample(cache.examples, NEAREST)
    if way.startswith("nearest"):
        return [e for e, _ in cache.recall(request, int(way.removeprefix("nearest")))][::-1]
    near = [e for e, _ in cache.recall(request)]
    drawn = random.Random(f"{way} {request.seed}").sample(range(len(near)), int(way.removeprefix("recalled")))
    return [near[i] for i in sorted(drawn, reverse=True)]


def shots(examples: Sequence[Example]) -> list[Shot]:
    return [Shot(e.request, e.answer) for e in examples]


def described(cache: Cache, request: Request, shown: Sequence[Example]) -> Shown:
    """What the prior of the ways looks at, as serving has it; of what was not recalled, the vote is 0."""
    if not shown:
        return Shown(())
    near = cache.recall(request)
    vote = votes([cosine for _, cosine in near], [plain(e.answer) for e, _ in near])
    voted = {e.id: share for (e, _), share in zip(near, vote, strict=True)}
    cosines = {e.id: s for e, s in near}
    rows = candidate_rows(
        [(e, cosines.get(e.id, float(e.embedding @ request.vector))) for e in shown],
        request=request.item.prompt,
        system=request.task.system,
        now=AT,
    )
    rows[:, VOTE] = [voted.get(e.id, 0.0) for e in shown]
    return Shown(*LearnedUtility().seen(rows).T.tolist())


def by_utility(cache: Cache, request: Request, prior: Prior, student: str, count: int = NEAREST) -> list[Example]:
    """The request's own examples as serving chooses them with trained weights, the best last."""
    selector = Selector(LearnedUtility(prior), config.Selection(max_examples=count))
    selector.unrelated = unrelated_cosine()
    selection = selector.select(
        Recalled(request.vector, cache.recall(request)),
        student_window_tokens=8192,
        request_tokens=0,
        reply_tokens=0,
        cap=None,
        request=request.item.prompt,
        system=request.task.system,
        now=AT,
        student=student,
    )
    return [match.example for match in selection.shown]


@cache
def unrelated_cosine() -> float:
    return unrelated(embedder())


def main() -> None:
    """Write what is recalled with the default embedder."""
    kept: dict[str, Any] = {"embedder": embedder().identity, "recall": {}, "shared": {}}
    for task in TASKS:
        cache = Cache(pool(task).examples)
        place = {e.id: i for i, e in enumerate(cache.examples)}
        for split in ("test", "train"):
            kept["recall"][f"{task} {split}"] = [
                [[place[e.id], round(cosine, 4)] for e, cosine in cache.recall(request)]
                for request in requests(task, split)
            ]
        kept["shared"][task] = [place[e.id] for e in cache.shared(TASKS[task].system)]
    with lzma.open(DATA / "recall.json.xz", "wt") as file:
        json.dump(kept, file)


if __name__ == "__main__":
    main()
