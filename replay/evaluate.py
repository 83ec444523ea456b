"""`iccache-replay evaluate`: what other policies would have earned on the recorded traffic, and what routing saved.

Only requests that the router drew a backend for are evidence; each has its propensity. The logged scores are what the
router expected of each backend at that time, so a threshold on them is a policy that can be evaluated on the log.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from iccache import config
from iccache.errors import ConfigError
from iccache.quality.kinds import HELD_OUT, KIND
from iccache.types import DecisionKind, Exchange
from replay.estimators import Array, Estimates, Interval, Log, cross_fitted, difference_interval, evaluate

CURVE = tuple(round(0.05 * i, 2) for i in range(21))  # thresholds
BASELINES = ("logged", "teacher", "student", "uniform")
FORMS = f"{', '.join(BASELINES)}, a backend's name, threshold:T or target:Q (T, Q from 0 to 1)"
ALWAYS_SAID = (
    "Requests whose backend was pinned, kept for a session or fallen back to are left out.",
    "Quality is known where there was feedback; where there was none it counts as unknown, never as 0. Assumed: among "
    "the answers of one backend it is chance which ones get feedback.",
    "The cost of a request is what was paid for the answer, examples included.",
)


@dataclass(frozen=True, slots=True)
class Traffic:
    """The evidence in the record, one row for each request that was drawn for. n rows, n_arms backends."""

    names: tuple[str, ...]  # of the backends, cheapest first
    arms: NDArray[np.int64]  # (n,): who answered
    propensities: Array  # (n,)
    probabilities: Array  # (n, n_arms): as logged; 0 for who was no candidate
    believed: Array  # (n, n_arms): expected quality as logged; NaN for who was no candidate
    quality: Array  # (n,): NaN where it is not known
    cost: Array  # (n,), USD
    tokens: Array  # (n,): of the prompt, without examples
    held_out: NDArray[np.bool_]  # (n,): of the randomised hold-out
    marked: NDArray[np.bool_]  # (n,): whether the record still says if it was

    @property
    def n(self) -> int:
        return len(self.arms)

    @property
    def dearest(self) -> NDArray[np.int64]:
        """(n,): the dearest candidate of each row."""
        candidates = ~np.isnan(self.believed)
        return np.asarray(len(self.names) - 1 - candidates[:, ::-1].argmax(axis=1))

    def log(self, rewards: Array) -> Log:
        means = np.where(np.isnan(self.believed), 0.0, self.believed)
        known = ~np.isnan(rewards)
        possible = self.probabilities > 0
        certain = self.propensities >= 1.0  # shadow mode: nobody else could have served
        possible[certain] = np.eye(len(self.names), dtype=bool)[self.arms[certain]]
        return Log(
            self.arms,
            self.propensities,
            possible,
            known,
            np.where(known, rewards, 0.0),
            np.column_stack([means, np.log1p(self.tokens)]),
        )


def traffic(exchanges: Iterable[Exchange], names: Sequence[str]) -> Traffic:
    """What of the record is evidence. Backends that are no longer configured are left out, with their requests."""
    place = {name: i for i, name in enumerate(names)}
    rows = [
        e
        for e in exchanges
        if e.decision is DecisionKind.ROUTED
        and e.propensity
        and e.complete
        and e.backend in {b.name for b in e.backends} <= place.keys()
    ]
    shape = (len(rows), len(names))
    probabilities, believed = np.zeros(shape), np.full(shape, np.nan)
    for i, e in enumerate(rows):
        for b in e.backends:
            probabilities[i, place[b.name]] = b.probability
            believed[i, place[b.name]] = b.score + b.load_bias
    return Traffic(
        names=tuple(names),
        arms=np.array([place[e.backend] for e in rows], dtype=np.int64),
        propensities=np.array([e.propensity for e in rows], dtype=np.float64),
        probabilities=probabilities,
        believed=believed,
        quality=np.array([np.nan if e.quality is None else e.quality for e in rows], dtype=np.float64),
        cost=np.array([e.cost_usd for e in rows], dtype=np.float64),
        tokens=np.array([max(e.usage.input - e.usage.example, 0) for e in rows], dtype=np.float64),
        held_out=np.array([bool(e.extra.get(HELD_OUT)) for e in rows], dtype=bool),
        marked=np.array([KIND in e.extra for e in rows], dtype=bool),
    )


def policy(name: str, seen: Traffic) -> Array:
    """(n, n_arms): what the policy called `name` would have drawn from. Raises ConfigError for what is none."""
    candidates = ~np.isnan(seen.believed)
    dearest = seen.dearest
    if name == "logged":
        certain = seen.propensities >= 1.0
        logged = seen.probabilities.copy()
        logged[certain] = np.eye(len(seen.names))[seen.arms[certain]]
        return logged
    if name == "uniform":
        return np.asarray(candidates / candidates.sum(axis=1, keepdims=True))
    if name in ("teacher", "student", *seen.names):
        if name == "teacher":
            wanted = dearest
        else:
            wanted = np.asarray(candidates.argmax(axis=1) if name == "student" else seen.names.index(name))
        there = candidates[np.arange(seen.n), wanted]
        return np.asarray(np.eye(len(seen.names))[np.where(there, wanted, dearest)])
    form, _, number = name.partition(":")
    if form not in ("threshold", "target"):
        raise ConfigError(f"--policy: {name!r} is none; there are: {FORMS}")
    try:
        at = float(number)
    except ValueError:
        at = math.nan
    if not 0 <= at <= 1:
        raise ConfigError(f"--policy: {name!r}: the number is from 0 to 1")
    rows = np.arange(seen.n)
    bar = np.full(seen.n, at) if form == "threshold" else at * np.clip(seen.believed[rows, dearest], 0.0, 1.0)
    passes = candidates & (np.where(candidates, seen.believed, -np.inf) >= bar[:, None])
    passes[rows, dearest] = True
    return np.asarray(np.eye(len(seen.names))[passes.argmax(axis=1)])


class Evaluated(NamedTuple):
    """One policy on the log."""

    policy: str
    offloaded: float  # share that would not have gone to the dearest
    quality: Estimates | None  # None: nothing is known of any quality
    cost: Estimates  # USD per request
    n: int

    @property
    def trusted(self) -> bool:
        return self.quality is not None and self.quality.overlap(self.n) and self.cost.overlap(self.n)

    def as_json(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "offload_share": self.offloaded,
            "quality": None if self.quality is None else _as_json(self.quality, self.n),
            "cost_usd": _as_json(self.cost, self.n),
        }


def _as_json(e: Estimates, n: int) -> dict[str, Any]:
    return {
        **{name: getattr(e, name).as_json() for name in ("ips", "snips", "dr")},
        "effective_sample_size": e.effective,
        "largest_weight": e.largest_weight,
        "covered": e.covered,
        "overlap": e.overlap(n),
    }


class HoldOut(NamedTuple):
    """The randomised comparison: requests that went to the dearest whatever the policy said, against all others."""

    held_out: int
    others: int
    quality: Interval | None  # of the others less that of the held out; None: too few with feedback
    saved_per_request: Interval | None  # USD, before judging and replay
    saved: float | None  # USD, of all others together
    judging: float  # USD
    replay: float  # USD

    @property
    def net(self) -> float | None:
        return None if self.saved is None else self.saved - self.judging - self.replay

    def as_json(self) -> dict[str, Any]:
        return {
            "held_out": self.held_out,
            "others": self.others,
            "quality_difference": None if self.quality is None else self.quality.as_json(),
            "saved_usd_per_request": None if self.saved_per_request is None else self.saved_per_request.as_json(),
            "saved_usd": self.saved,
            "judging_usd": self.judging,
            "replay_usd": self.replay,
            "net_saved_usd": self.net,
        }


def hold_out(seen: Traffic, judging: float, replay: float) -> HoldOut:
    """What was saved and lost for real. Rows whose mark was erased with their text count on neither side."""
    out, rest = seen.marked & seen.held_out, seen.marked & ~seen.held_out
    rated = ~np.isnan(seen.quality)
    saved = difference_interval(seen.cost[out], seen.cost[rest])
    return HoldOut(
        int(out.sum()),
        int(rest.sum()),
        difference_interval(seen.quality[rest & rated], seen.quality[out & rated]),
        saved,
        None if saved is None else saved.value * int(rest.sum()),
        judging,
        replay,
    )


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that the command has to say."""

    seen: Traffic
    policies: Sequence[Evaluated]
    curve: Sequence[Evaluated]
    hold_out: HoldOut

    def feedback(self) -> list[dict[str, Any]]:
        """By backend: how many answers, and of how many the quality is known."""
        rated = ~np.isnan(self.seen.quality)
        return [
            {
                "backend": name,
                "answers": int((self.seen.arms == i).sum()),
                "with_feedback": int((rated & (self.seen.arms == i)).sum()),
            }
            for i, name in enumerate(self.seen.names)
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "requests": self.seen.n,
            "feedback": self.feedback(),
            "policies": [p.as_json() for p in self.policies],
            "curve": [p.as_json() for p in self.curve],
            "hold_out": self.hold_out.as_json(),
            "assumptions": list(ALWAYS_SAID),
        }

    def as_text(self) -> str:
        lines = [f"{self.seen.n} requests were drawn for"]
        lines += [
            f"  {f['backend']}: {f['answers']} answers, {f['with_feedback']} with feedback" for f in self.feedback()
        ]
        lines += ["", _HEAD, *map(_line, self.policies)]
        lines += ["", "by threshold on the expected quality that was logged", _HEAD, *map(_line, self.curve)]
        lines += ["", *_told(self.hold_out), "", *ALWAYS_SAID]
        return "\n".join(lines)


_HEAD = (
    f"{'policy':<18} {'offload':>8}  {'quality (doubly robust) [95 %]':<32} {'snips':>6} {'ips':>6}  "
    f"{'USD per 1000':<26} {'ESS':>7}"
)


def _line(e: Evaluated) -> str:
    said = f"{e.policy:<18} {e.offloaded:>8.1%}  "
    if not e.trusted or e.quality is None:
        effective = 0.0 if e.quality is None else e.quality.effective
        covered = 0.0 if e.quality is None else e.quality.covered
        return said + f"too little overlap to say: effective sample size {effective:.0f}, {covered:.0%} covered"
    q, c = e.quality, e.cost.dr
    cost = f"{c.value * 1000:.4f} [{c.low * 1000:.4f}, {c.high * 1000:.4f}]"
    quality = f"{q.dr.value:.3f} [{q.dr.low:.3f}, {q.dr.high:.3f}]"
    return said + f"{quality:<32} {q.snips.value:>6.3f} {q.ips.value:>6.3f}  {cost:<26} {q.effective:>7.0f}"


def _told(h: HoldOut) -> list[str]:
    if h.saved_per_request is None or h.saved is None:
        return ["no hold-out to compare with: routing.holdout_share sends a random share to the teacher"]
    s, q = h.saved_per_request, h.quality
    quality = "unknown: too little feedback" if q is None else f"{q.value:+.3f} [{q.low:+.3f}, {q.high:+.3f}]"
    return [
        f"hold-out: {h.held_out} requests to the teacher at random, against {h.others} others",
        f"  quality of the others less theirs: {quality}",
        f"  saved, USD per 1000 requests: {s.value * 1000:.4f} [{s.low * 1000:.4f}, {s.high * 1000:.4f}]",
        f"  saved {h.saved:.4f} USD; judging {h.judging:.4f} and replay {h.replay:.4f} off: {h.net:.4f} USD net",
    ]


def evaluated(seen: Traffic, names: Sequence[str], judging: float = 0.0, replay: float = 0.0) -> Evaluation:
    """Every policy of `names`, and the curve. Raises ConfigError for a name that is no policy's."""
    logs = seen.log(seen.quality), seen.log(seen.cost)
    guesses = [cross_fitted(log) for log in logs] if seen.n else []

    def one(name: str) -> Evaluated:
        p = policy(name, seen)
        quality, cost = (evaluate(log, p, guess) for log, guess in zip(logs, guesses, strict=True))
        offloaded = 1.0 - float(p[np.arange(seen.n), seen.dearest].mean())
        return Evaluated(name, offloaded, quality if logs[0].known.any() else None, cost, seen.n)

    wanted = list(names)
    curve = [f"threshold:{at:g}" for at in CURVE]
    if not seen.n:
        for name in wanted:
            policy(name, seen)
        wanted = curve = []
    return Evaluation(seen, [one(n) for n in wanted], [one(n) for n in curve], hold_out(seen, judging, replay))


def backend_names(settings: config.Config) -> list[str]:
    return [b.name for b in settings.by_price()]
