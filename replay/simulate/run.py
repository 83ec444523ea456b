"""One policy through half an hour of arrivals, and what it is like at every share of offloading."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from iccache import config
from replay.simulate.engine import Done, Engine, Work
from replay.simulate.world import ARMS, LARGE, SMALL, SPEEDUP, Assumptions, Request, World, win_rate
from router.features import feature_rows
from router.linear import LinearThompson
from router.load import LoadTracker
from router.policy import Always, Policy, Threshold
from router.routing import Router
from router.types import Arm, Signals, Vector

WARM_UP = 500  # requests with feedback before the half hour begins: no policy starts knowing nothing
QUALITY_TARGET = 1.0  # without load, only what is expected to lose nothing is offloaded
TARGETS = (0.0, 0.7, 0.85, 0.95, 1.0)  # of the curve
CURVE_REQUESTS = 400
EQUAL = 0.49  # win rate that counts as the large model's own, which is 0.5


class Kind(NamedTuple):
    """A policy as the report names it."""

    name: str
    examples: bool  # whether the small model is shown any
    load_aware: bool
    make: Callable[["Trained"], Policy]


class Trained(NamedTuple):
    """What a policy may have learned beforehand."""

    predict: Callable[[Arm, Vector], float]
    threshold: float


KINDS = (
    Kind("IC-Cache", True, True, lambda trained: LinearThompson()),
    Kind("load-blind", True, False, lambda trained: LinearThompson()),
    Kind("RouteLLM+", False, True, lambda trained: Threshold(*trained)),
    Kind("small only", False, False, lambda trained: Always(SMALL)),
    Kind("small with examples", True, False, lambda trained: Always(SMALL)),
    Kind("large only", False, False, lambda trained: Always(LARGE)),
)


@dataclass
class Served:
    """What became of every request of one run."""

    at: list[float] = field(default_factory=list)
    offloaded: list[bool] = field(default_factory=list)
    wins: list[float] = field(default_factory=list)
    quality: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    latency: dict[int, float] = field(default_factory=dict)
    finished: float = 0.0


class Simulated(NamedTuple):
    """One policy, one seed."""

    policy: str
    requests: int
    offload: float
    win_rate: float
    quality: float
    p50_s: float
    p99_s: float
    throughput: float  # requests per second, from the first arrival to the last answer
    by_minute: tuple[tuple[float, float, float], ...]  # requests per second, offloaded share, mean load
    correlation: float | None  # of offloaded share and arrivals, over minutes; None where the share never changes


class Point(NamedTuple):
    """At one quality target, load apart."""

    target: float
    offload: float
    win_rate: float

    @property
    def throughput(self) -> float:
        """Against none offloaded, as the paper computes it."""
        return 1.0 / (1.0 - self.offload + self.offload / SPEEDUP)


def make_router(kind: Kind, world: World, seed: int, target: float) -> Router:
    """The real one, with the default configuration but for the quality target."""
    r = config.Routing()
    policy = kind.make(train(world, target))
    learns = isinstance(policy, LinearThompson)
    return Router(
        policy,
        exploration=r.exploration if learns else 0.0,
        quality_target=target,
        theta=r.theta,
        lambda0=r.lambda0 if kind.load_aware else 0.0,
        gamma=r.gamma,
        rng=np.random.default_rng(seed + 1),
    )


def train(world: World, target: float) -> Trained:
    """A quality predictor as RouteLLM has: ridge regression on labelled answers of the small model without examples.
    The bar is `target` times the large model's mean quality."""
    requests = [world.request(0.0) for _ in range(WARM_UP)]
    x = np.array([feature_rows(_bare(r.signals), ARMS[:1])[0] for r in requests])
    y = np.array([r.plain + world.rng.normal(0, world.assumed.noise) for r in requests])
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
    mean = float(np.mean([r.large for r in requests]))
    return Trained(lambda arm, row: float(weights @ row) if arm.name == SMALL else mean, target * mean)


def warm_up(router: Router, kind: Kind, world: World) -> None:
    for _ in range(WARM_UP):
        request = world.request(0.0)
        _decide(router, kind, world, request, 0.0)


def _bare(signals: Signals) -> Signals:
    return Signals(signals.embedding, signals.tokens, signals.turns, {}, signals.system)


def _decide(router: Router, kind: Kind, world: World, request: Request, load: float) -> tuple[str, float]:
    """Whom the request goes to, and the quality of what is answered, which is fed back where there is feedback."""
    signals = request.signals if kind.examples else _bare(request.signals)
    decision = router.route(signals, ARMS, load)
    quality = request.large if decision.arm == LARGE else request.shown if kind.examples else request.plain
    score = world.score(quality)
    if score is not None:
        router.learn(decision.arm, decision.features, score)
    return decision.arm, quality


def simulate(kind: Kind, assumed: Assumptions, seed: int, target: float = QUALITY_TARGET) -> Simulated:
    """Half an hour. Every policy sees the same requests at the same times for one seed."""
    world = World(assumed, seed)
    router = make_router(kind, world, seed, target)
    warm_up(router, kind, world)
    requests = _requests(World(assumed, seed), world)
    engines = {SMALL: Engine(assumed.slots(assumed.small)), LARGE: Engine(assumed.slots(assumed.large))}
    tracker = LoadTracker({name: engine.rates.slots for name, engine in engines.items()}, [LARGE])
    served = Served()
    for i, request in enumerate(requests):
        for done in _ended(engines, request.at):
            _end(served, tracker, *done)
        load = tracker.load(request.at)
        arm, quality = _decide(router, kind, world, request, load)
        shown = kind.examples and arm == SMALL
        prompt = request.prompt_tokens + (assumed.example_tokens if shown else 0.0)
        output = request.output_tokens * (assumed.shorter if shown else 1.0)
        tracker.begin(arm, request.at)
        engines[arm].submit(Work(i, request.at, prompt, output))
        served.at.append(request.at)
        served.offloaded.append(arm == SMALL)
        served.quality.append(quality)
        served.wins.append(win_rate(quality, request.large, assumed))
        served.load.append(load)
    for done in _ended(engines, float("inf")):
        _end(served, tracker, *done)
    return _summed(kind.name, served)


def _requests(fresh: World, world: World) -> list[Request]:
    """Of a world that is the same but for its generator, so that what a policy drew before changes nothing."""
    fresh.hardness, fresh.centres = world.hardness, world.centres
    return [fresh.request(at) for at in fresh.arrivals()]


def _ended(engines: dict[str, Engine], now: float) -> Iterator[tuple[str, Done]]:
    ended = [(done.at, name, done) for name, engine in engines.items() for done in engine.until(now)]
    for _, name, done in sorted(ended, key=lambda e: e[0]):
        yield name, done


def _end(served: Served, tracker: LoadTracker, name: str, done: Done) -> None:
    tracker.end(name, done.at)
    served.latency[done.work.id] = done.at - done.work.at
    served.finished = max(served.finished, done.at)


def _summed(name: str, served: Served) -> Simulated:
    at, offloaded = np.array(served.at), np.array(served.offloaded, dtype=float)
    latency = np.array([served.latency[i] for i in range(len(at))])
    minutes = _by_minute(at, offloaded, np.array(served.load))
    rate, share = np.array(minutes)[:, :2].T
    return Simulated(
        policy=name,
        requests=len(at),
        offload=float(offloaded.mean()),
        win_rate=float(np.mean(served.wins)),
        quality=float(np.mean(served.quality)),
        p50_s=float(np.quantile(latency, 0.5)),
        p99_s=float(np.quantile(latency, 0.99)),
        throughput=len(at) / (served.finished - served.at[0]),
        by_minute=tuple(minutes),
        correlation=float(np.corrcoef(rate, share)[0, 1]) if share.std() > 1e-9 else None,
    )


def _by_minute(
    at: NDArray[np.float64], offloaded: NDArray[np.float64], load: NDArray[np.float64]
) -> list[tuple[float, float, float]]:
    found = []
    for minute in range(int(at[-1] // 60) + 1):
        inside = at // 60 == minute
        if inside.any():
            found.append((float(inside.sum()) / 60, float(offloaded[inside].mean()), float(load[inside].mean())))
    return found


def curve(kind: Kind, assumed: Assumptions, seed: int) -> list[Point]:
    """Offloaded share and win rate at each of `TARGETS`, without any load: every backend as fast as it is asked."""
    points = []
    for target in TARGETS:
        world = World(assumed, seed)
        router = make_router(kind, world, seed, target)
        warm_up(router, kind, world)
        answers = []
        for _ in range(CURVE_REQUESTS):
            request = world.request(0.0)
            arm, quality = _decide(router, kind, world, request, 0.0)
            answers.append((arm == SMALL, win_rate(quality, request.large, assumed)))
        offload, wins = np.mean(answers, axis=0)
        points.append(Point(target, float(offload), float(wins)))
    return points


def at_equal_quality(points: list[Point]) -> float:
    """The largest throughput whose win rate is at least `EQUAL`, linear between the points; with none offloaded it
    is 1, at a win rate of one half."""
    best = 1.0
    for one, two in pairwise([Point(1.0, 0.0, 0.5), *sorted(points, key=lambda p: p.offload)]):
        if two.win_rate >= EQUAL:
            best = max(best, two.throughput)
        elif one.win_rate >= EQUAL:
            share = (one.win_rate - EQUAL) / (one.win_rate - two.win_rate)
            best = max(best, Point(0.0, one.offload + share * (two.offload - one.offload), EQUAL).throughput)
    return best
