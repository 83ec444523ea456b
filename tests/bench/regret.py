"""Regret on synthetic worlds whose optimum is known, beside theory and a well-known library (MABWiser).

    pip install '.[bench]' && python -m tests.bench.regret [--runs 10] [--rounds 1000]

Regret is what the best arm's expected quality would have been more, summed over the rounds. *Linear*: three arms whose
quality is linear in five features, noise as large as the policies assume. *Bernoulli*: two arms without features,
answers good with probability .9 and .6; Lai and Robbins (1985): no policy that works everywhere can have less than
log(T) * (mu1 - mu2) / KL(mu2, mu1) in the long run. The exponent is the slope of log regret over log T from T / 4:
1 is linear, 0.5 the guarantee of LinUCB and Thompson sampling but for logarithms (Abbasi-Yadkori et al. 2011).
All are asked for the best arm, so our rule's preference for cheap arms is switched off by a target out of reach.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from router.linear import LinearThompson, LinearUcb
from router.policy import Policy
from router.regression import Prior
from router.types import Arm, Matrix, Vector

OUT_OF_REACH = 1e6  # as quality target: the arm of the largest sample or bound is taken


class Contestant(Protocol):
    def choose(self, x: Vector) -> int: ...

    def learn(self, x: Vector, arm: int, quality: float) -> None: ...


@dataclass(frozen=True)
class LinearWorld:
    """E[quality] of arm k is weights[k] . x, in [0, 1]; noise is normal."""

    weights: Matrix  # (n_arms, n_features)
    noise_sd: float = 0.3

    @classmethod
    def drawn(cls, rng: np.random.Generator, n_arms: int = 3, n_features: int = 5) -> LinearWorld:
        weights = rng.normal(size=(n_arms, n_features)) * 0.15
        weights[:, 0] = 0.5
        return cls(weights)

    @property
    def shape(self) -> tuple[int, int]:
        n_arms, n_features = self.weights.shape
        return n_arms, n_features

    def context(self, rng: np.random.Generator) -> Vector:
        return np.concatenate(([1.0], rng.uniform(-1, 1, size=self.shape[1] - 1)))

    def means(self, x: Vector) -> Vector:
        return np.clip(self.weights @ x, 0, 1)

    def quality(self, rng: np.random.Generator, mean: float) -> float:
        return float(np.clip(rng.normal(mean, self.noise_sd), 0, 1))


@dataclass(frozen=True)
class BernoulliWorld:
    """Two arms, no features."""

    chances: tuple[float, ...] = (0.9, 0.6)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.chances), 1

    def context(self, rng: np.random.Generator) -> Vector:
        return np.ones(1)

    def means(self, x: Vector) -> Vector:
        return np.array(self.chances)

    def quality(self, rng: np.random.Generator, mean: float) -> float:
        return float(rng.random() < mean)

    def least_regret(self, rounds: int) -> float:
        """Lai and Robbins's bound, which holds in the limit."""
        best = max(self.chances)
        return math.log(rounds) * sum((best - p) / divergence(p, best) for p in self.chances if p < best)


World = LinearWorld | BernoulliWorld


def divergence(p: float, q: float) -> float:
    """Kullback-Leibler, of Bernoulli(p) from Bernoulli(q)."""
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


class Ours:
    """One of the router's policies, drawn from as the Router does."""

    def __init__(self, policy: Policy, n_arms: int, rng: np.random.Generator) -> None:
        self.policy, self.rng = policy, rng
        self.arms = [Arm(f"arm {k}", price=1.0 + k, is_teacher=k == n_arms - 1) for k in range(n_arms)]

    def choose(self, x: Vector) -> int:
        rows = np.tile(x, (len(self.arms), 1))
        p = self.policy.probabilities(rows, self.arms, np.zeros(len(self.arms)), OUT_OF_REACH)
        return int(self.rng.choice(len(p), p=p))

    def learn(self, x: Vector, arm: int, quality: float) -> None:
        self.policy.learn(self.arms[arm].name, x, quality)


class Library:
    """MABWiser with its own defaults but for the exploration, which is scaled to the noise as ours is."""

    def __init__(self, policy: str, n_arms: int, n_features: int, seed: int, alpha: float) -> None:
        from mabwiser.mab import MAB, LearningPolicy  # noqa: PLC0415 - only where it is compared with

        known = {"LinTS": LearningPolicy.LinTS, "LinUCB": LearningPolicy.LinUCB}[policy]
        self.mab = MAB(list(range(n_arms)), known(alpha=alpha), seed=seed)
        self.mab.fit(list(range(n_arms)), [0.5] * n_arms, np.zeros((n_arms, n_features)))  # it wants a first fit

    def choose(self, x: Vector) -> int:
        return int(self.mab.predict(x[None, :]))

    def learn(self, x: Vector, arm: int, quality: float) -> None:
        self.mab.partial_fit([arm], [quality], x[None, :])


class Uniform:
    def __init__(self, n_arms: int, rng: np.random.Generator) -> None:
        self.n_arms, self.rng = n_arms, rng

    def choose(self, x: Vector) -> int:
        return int(self.rng.integers(self.n_arms))

    def learn(self, x: Vector, arm: int, quality: float) -> None: ...


def plain(n_features: int) -> dict[str, object]:
    """Wide priors around one half, as the library's around 0, and nothing forgotten."""
    prior = Prior(np.eye(n_features)[0] / 2, np.ones(n_features))
    return {
        "names": [f"x{i}" for i in range(n_features)],
        "student_prior": prior,
        "teacher_prior": prior,
        "discount": 1.0,
        "alarm": math.inf,
    }


def contestants() -> dict[str, Callable[[int, int, int], Contestant]]:
    """By name: from (n_arms, n_features, seed)."""
    rng = np.random.default_rng
    return {
        "linear-thompson": lambda n, d, s: Ours(LinearThompson(**plain(d)), n, rng(s)),  # type: ignore[arg-type]
        "linear-ucb": lambda n, d, s: Ours(LinearUcb(**plain(d)), n, rng(s)),  # type: ignore[arg-type]
        "MABWiser LinTS": lambda n, d, s: Library("LinTS", n, d, s, alpha=0.3),
        "MABWiser LinUCB": lambda n, d, s: Library("LinUCB", n, d, s, alpha=0.3),
        "uniform": lambda n, d, s: Uniform(n, rng(s)),
    }


def regret(world: World, contestant: Contestant, rounds: int, seed: int) -> Vector:
    """(rounds,): regret up to each round. Contexts depend on the seed alone."""
    contexts, noise = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
    lost = np.empty(rounds)
    for i in range(rounds):
        x = world.context(contexts)
        means = world.means(x)
        arm = contestant.choose(x)
        lost[i] = means.max() - means[arm]
        contestant.learn(x, arm, world.quality(noise, float(means[arm])))
    return np.cumsum(lost)


def exponent(mean_regret: Vector) -> float:
    """Slope of log regret over log T from T / 4 on."""
    at = np.unique(np.geomspace(len(mean_regret) / 4, len(mean_regret), 20).astype(int))
    return float(np.polyfit(np.log(at), np.log(np.maximum(mean_regret[at - 1], 1e-9)), 1)[0])


def measured(make: Callable[[int, int, int], Contestant], worlds: Sequence[World], rounds: int) -> Matrix:
    """(n_worlds, rounds)."""
    return np.stack([regret(w, make(*w.shape, seed), rounds, seed) for seed, w in enumerate(worlds)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1000)
    args = parser.parse_args()
    linear = [LinearWorld.drawn(np.random.default_rng(100 + i)) for i in range(args.runs)]
    bernoulli = [BernoulliWorld()] * args.runs
    print(f"| {args.runs} runs of {args.rounds} rounds | linear, regret | exponent | Bernoulli, regret | exponent |")
    print("|---|---|---|---|---|")
    for name, make in contestants().items():
        cells = []
        for worlds in (linear, bernoulli):
            found = measured(make, worlds, args.rounds)
            error = found[:, -1].std(ddof=1) / math.sqrt(len(worlds))
            cells += [f"{found[:, -1].mean():.1f} ± {error:.1f}", f"{exponent(found.mean(axis=0)):.2f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(f"| Lai and Robbins's bound | | | {bernoulli[0].least_regret(args.rounds):.1f} | |")


if __name__ == "__main__":
    main()
