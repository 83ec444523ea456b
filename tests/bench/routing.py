"""Does the router keep its promise? Two kinds of request, one of which the student masters, in many worlds.

    python -m tests.bench.routing [--runs 200] [--embedder hash] [--worlds NAME ...] [--policy linear-thompson]

A run is 700 requests with a score fed back for each, then the student breaks, and 140 more. It holds when at least 80 %
of the last 60 requests of the mastered kind and at most 15 % of the last 60 of the other went to the student, and at
most 15 % of the 60 that come 80 requests after it broke. The texts are real, and so are their embeddings; examples are
the nearest texts that the teacher answered. Everything is drawn from seeds; the worlds of `HELD_OUT` were looked at
only after the router's constants had been chosen.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from iccache import config
from iccache.demo.tasks import TASKS
from iccache.examples.embed import Embedder, make_embedder
from iccache.quality.kinds import kind_of
from router.floor import Floor
from router.policy import Policy
from router.routing import Router
from router.types import Arm, ExampleSignals, Signals

REQUESTS, BROKEN, LAST, PATIENCE = 700, 140, 60, 80
STUDENT = Arm("student", price=0.1)
MIDDLE = Arm("middle", price=0.4)
TEACHER = Arm("teacher", price=1.0, is_teacher=True)
CONVERSATIONS = Path(__file__).with_name("data") / "multi_turn.jsonl"

Score = Callable[[np.random.Generator, float], float]


@dataclass(frozen=True)
class Kind:
    """Requests of one kind, all under one system prompt."""

    texts: tuple[str, ...]
    system: str = ""


def bernoulli(rng: np.random.Generator, quality: float) -> float:
    return float(rng.random() < quality)


def exact(rng: np.random.Generator, quality: float) -> float:
    return quality


def noisy(rng: np.random.Generator, quality: float) -> float:
    return float(np.clip(rng.normal(quality, 0.2), 0, 1))


def stars(rng: np.random.Generator, quality: float) -> float:
    """One to five of them, as a person gives them, brought to 0..1."""
    return float(np.clip(np.round(rng.normal(1 + 4 * quality, 0.8)), 1, 5) - 1) / 4


@dataclass(frozen=True)
class World:
    """What there is, and what nobody tells the router."""

    mastered: Kind
    other: Kind
    score: Score = bernoulli
    good: float = 0.9  # the student's quality where it masters the kind
    bad: float = 0.1
    teacher: float = 1.0
    share: float = 0.5  # of the mastered kind among requests
    delay: int = 0  # requests until a score arrives
    block: int = 1  # requests of one kind in a row
    middle: float | None = None  # a third backend, of this quality for both kinds

    @property
    def arms(self) -> list[Arm]:
        return [STUDENT, TEACHER] if self.middle is None else [STUDENT, MIDDLE, TEACHER]

    def quality(self, arm: str, mastered: bool, broken: bool) -> float:
        """Expected, of an answer."""
        if arm == "student":
            return min(self.bad, 0.1) if broken else self.good if mastered else self.bad
        return self.teacher if arm == "teacher" or self.middle is None else self.middle


def _rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def _kinds() -> dict[str, Kind]:
    """Everything there are texts of, by name."""
    intents, mappings = TASKS
    found = {
        "intents": Kind(tuple(i.prompt for i in intents.items()), intents.system),
        "mappings": Kind(tuple(i.prompt for i in mappings.items()), mappings.system),
    }
    for item in intents.items():
        text = item.prompt.removeprefix("Utterance: ")
        found[item.target] = Kind((*found.get(item.target, Kind(())).texts, text))
    for prefix in ("Past tense", "Plural", "Negation"):
        found[prefix] = Kind(tuple(t for t in found["mappings"].texts if t.startswith(prefix)))
    for row in _rows(str(CONVERSATIONS)):
        found[row["folder"]] = Kind((*found.get(row["folder"], Kind(())).texts, row["question"]))
    found["numbered"] = Kind(tuple(f"Question {i} of the kind that is easy" for i in range(400)))
    found["numbered hard"] = Kind(tuple(f"Question {i} of the kind that is hard" for i in range(400)))
    return found


def _under(kind: Kind, system: str) -> Kind:
    return Kind(kind.texts, system)


def worlds() -> dict[str, World]:
    """Those that the constants were chosen on, then those that they were not."""
    k = _kinds()
    apart = (k["intents"], k["mappings"])
    text = (k["book_restaurant"], k["get_weather"])
    close = (k["add_to_playlist"], k["play_music"])
    same = (_under(k["intents"], "Be brief."), _under(k["mappings"], "Be brief."))
    return {
        "plain": World(*apart, score=exact, good=1.0, bad=0.0),
        "bernoulli": World(*apart),
        "bernoulli, text alone": World(*text),
        "noisy": World(*same, score=noisy, good=0.85, bad=0.3),
        "shared words": World(*close),
        "late": World(*same, delay=20),
        "three": World(*same, middle=0.95),
        # held out
        "hex or beams": World(k["convert-hex-hsl-lightness"], k["beam_analysis"]),
        "films or books": World(k["search_screening_event"], k["search_creative_work"]),
        "plural or past": World(_under(k["Plural"], "Answer."), _under(k["Past tense"], "Answer.")),
        "numbered": World(k["numbered"], k["numbered hard"]),
        "stars": World(*text, score=stars, good=0.85, bad=0.3, teacher=0.95),
        "teacher 0.8": World(*same, good=0.78, bad=0.1, teacher=0.8),
        "mastered kind rare": World(*same, share=0.15),
        "other kind rare": World(*same, share=0.85),
        "three, late, text alone": World(k["rate_book"], k["get_weather"], middle=0.95, delay=20),
        "two prompts, one text": World(_under(k["intents"], "Classify."), _under(k["intents"], "Answer the user.")),
        "noisy 0.8 to 0.4": World(*text, score=noisy, good=0.8, bad=0.4),
    }


HELD_OUT = tuple(worlds())[7:]


class Texts:
    """Embeddings of everything, once."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        self.known: dict[str, NDArray[np.float32]] = {}

    def embed(self, texts: Sequence[str]) -> None:
        missing = [t for t in dict.fromkeys(texts) if t not in self.known]
        self.known.update(zip(missing, self.embedder.embed(missing), strict=True))


class Examples:
    """What the teacher answered, and which three of it come nearest."""

    def __init__(self, dim: int) -> None:
        self.rows = np.empty((REQUESTS + BROKEN, dim), np.float32)
        self.count = 0

    def add(self, embedding: NDArray[np.float32]) -> None:
        self.rows[self.count] = embedding
        self.count += 1

    def signals(self, embedding: NDArray[np.float32]) -> ExampleSignals | None:
        if not self.count:
            return None
        nearest = np.sort(self.rows[: self.count] @ embedding)[-3:]
        utility = 0.4 * (1 + nearest) / 2
        return ExampleSignals(
            len(nearest), float(nearest[-1]), float(nearest.mean()), float(utility[-1]), float(utility.mean()), 60
        )


def run(world: World, texts: Texts, policy: Policy, seed: int, broken: int = BROKEN) -> tuple[float, float, float]:
    """Shares that went to the student: of the last of the mastered kind, of the other, and after it broke (`broken`
    requests; 0: it does not, and the share is 0)."""
    rng = np.random.default_rng(seed)
    router, floor = default_router(policy, np.random.default_rng(seed + 10_000)), default_floor("teacher")
    examples, waiting, log = Examples(texts.embedder.dim), [], []
    mastered = False
    for i in range(REQUESTS + broken):
        if i % world.block == 0:
            mastered = bool(rng.random() < world.share)
        kind = world.mastered if mastered else world.other
        name = kind_of(kind.system)
        text = kind.texts[rng.integers(len(kind.texts))]
        embedding = texts.known[text]
        near = examples.signals(embedding)
        signals = Signals(
            embedding, len(text) // 4, 1, {a.name: near for a in world.arms[:-1]} if near else {}, system=kind.system
        )
        decision = router.route(signals, world.arms, 0.0, floor.standing("tenant", name))
        if decision.arm == "teacher":
            examples.add(embedding)
        score = world.score(rng, world.quality(decision.arm, mastered, broken=i >= REQUESTS))
        waiting.append((decision, name, score, float(i)))
        if len(waiting) > world.delay:
            known, of, score, at = waiting.pop(0)
            router.learn(known.arm, known.features, score)
            floor.learn("tenant", of, known.arm, score, at=at, weight=known.meant)
        log.append((mastered, decision.arm == "student"))
    kinds, student = np.array(log).T
    before, after = slice(REQUESTS), slice(REQUESTS + PATIENCE, None)
    return (
        float(student[before][kinds[before]][-LAST:].mean()),
        float(student[before][~kinds[before]][-LAST:].mean()),
        float(student[after].mean()) if broken else 0.0,
    )


def default_router(policy: Policy, rng: np.random.Generator) -> Router:
    """As the default configuration makes it."""
    r = config.Routing()
    return Router(
        policy,
        exploration=r.exploration,
        quality_target=r.quality_target,
        theta=r.theta,
        lambda0=r.lambda0,
        gamma=r.gamma,
        rng=rng,
        probe_share=r.probe_share,
    )


def default_floor(dearest: str) -> Floor:
    r = config.Routing()
    return Floor(dearest, quality_target=r.quality_target, confidence=r.confidence)


def holds(shares: tuple[float, float, float]) -> tuple[bool, bool, bool]:
    mastered, other, broken = shares
    return mastered >= 0.8, other <= 0.15, broken <= 0.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--embedder", default="hash", choices=["hash", "sentence-transformers", "default"])
    parser.add_argument("--worlds", nargs="*", default=None)
    args = parser.parse_args()
    from router.linear import LinearThompson  # noqa: PLC0415

    settings = config.Embedder() if args.embedder == "default" else config.Embedder(backend=args.embedder)
    texts = Texts(make_embedder(settings))
    print(f"{'world':28s} mastered  other  broken   all held  [95 %]        mean shares")
    for name, world in worlds().items():
        if args.worlds and name not in args.worlds:
            continue
        texts.embed([*world.mastered.texts, *world.other.texts])
        first = args.first + zlib.crc32(name.encode()) % 1000 * 1000
        shares = [run(world, texts, LinearThompson(), first + i) for i in range(args.runs)]
        held = np.array([holds(s) for s in shares])
        everything = held.all(axis=1)
        low, high = stats.binomtest(int(everything.sum()), args.runs).proportion_ci(method="wilson")
        means = " ".join(f"{m:.2f}" for m in np.mean(shares, axis=0))
        print(
            f"{name:28s} {held[:, 0].mean():8.3f} {held[:, 1].mean():6.3f} {held[:, 2].mean():7.3f} "
            f"{everything.mean():10.3f}  [{low:.3f}, {high:.3f}]  {means}",
            flush=True,
        )


if __name__ == "__main__":
    main()
