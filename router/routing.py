"""Policy + load bias + generator -> Decision."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from router.features import feature_rows
from router.load import load_bias
from router.policy import Policy, one_hot
from router.reward import load_prices, relative_cost
from router.types import Arm, Decision, Matrix, Signals, Vector, price_order


class Router:
    """Draws an arm for each request from exactly the distribution that it logs.

        p = (1 - holdout_share) * ((1 - exploration) * policy + exploration / n_arms) + holdout_share * [dearest]

    `quality_target` in [0, 1] is the share of the dearest arm's expected quality that a cheaper arm must be
    expected to keep to be preferred to it. `theta` (share of capacity), `lambda0` (quality) and `gamma` shape the load
    bias. With `certify_first` an arm cheaper than the dearest is drawn only where the policy certifies it. With
    `shadow` the dearest arm serves everything, and the draw is only noted as `preferred`.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        exploration: float,
        quality_target: float,
        theta: float,
        lambda0: float,
        gamma: float,
        rng: np.random.Generator,
        holdout_share: float = 0.0,
        shadow: bool = False,
        certify_first: bool = False,
    ) -> None:
        shares = {"exploration": exploration, "quality_target": quality_target, "holdout_share": holdout_share}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {value}")
        for name, value in {"theta": theta, "lambda0": lambda0, "gamma": gamma}.items():
            if not (np.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and >= 0, not {value}")
        self.policy = policy
        self.exploration = exploration
        self.quality_target = quality_target
        self.theta = theta
        self.lambda0 = lambda0
        self.gamma = gamma
        self.holdout_share = holdout_share
        self.shadow = shadow
        self.certify_first = certify_first
        self._rng = rng

    def route(self, signals: Signals, arms: Sequence[Arm], load: float) -> Decision:
        """Decide one request among `arms` (any number >= 1, in any order) at the smoothed `load` >= 0."""
        names = tuple(arm.name for arm in arms)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"arms must be at least one, with different names, not {list(names)}")
        x = feature_rows(signals, arms)
        bias = self.load_bias(arms, load)
        dearest = price_order(arms)[-1]
        chosen = self.policy.probabilities(x, arms, bias, self.quality_target)
        allowed = self._allowed(x, arms, dearest)
        probabilities = self._mixed(chosen, allowed, dearest)
        preferred = self._draw(probabilities)
        served = dearest if self.shadow else preferred
        return Decision(
            arm=names[served],
            propensity=1.0 if self.shadow else float(probabilities[served]),
            names=names,
            probabilities=probabilities,
            scores=self.policy.scores(x, arms, bias),
            load_bias=bias,
            features=x[served],
            preferred=names[preferred],
        )

    def load_bias(self, arms: Sequence[Arm], load: float) -> Vector:
        """(n_arms,): what `load` takes from each arm's score, in [0, lambda0]."""
        costs = relative_cost(load_prices(arms))
        return load_bias(load, costs, self.theta, self.lambda0, self.gamma)

    def learn(self, arm: str, features: Vector, quality: float, previous: float | None = None, *, age: int = 0) -> None:
        """See `Policy.learn`; `features` are those of the decision."""
        self.policy.learn(arm, features, quality, previous, age=age)

    def state(self) -> bytes:
        return self.policy.state()

    def restore(self, state: bytes) -> None:
        self.policy.restore(state)

    def _allowed(self, x: Matrix, arms: Sequence[Arm], dearest: int) -> NDArray[np.bool_]:
        """(n_arms,): which arms may be drawn at all. Always the dearest."""
        if not self.certify_first:
            return np.ones(len(arms), dtype=bool)
        allowed = self.policy.certified(x, arms, self.quality_target)
        allowed[dearest] = True
        return allowed

    def _mixed(self, chosen: Vector, allowed: NDArray[np.bool_], dearest: int) -> Vector:
        """The policy's share of what may not be drawn goes to the dearest; exploration stays among what may."""
        at_dearest = one_hot(dearest, len(chosen))
        kept = np.where(allowed, chosen, 0.0) + chosen[~allowed].sum() * at_dearest
        explored = (1 - self.exploration) * kept + self.exploration * allowed / allowed.sum()
        mixed: Vector = (1 - self.holdout_share) * explored + self.holdout_share * at_dearest
        return mixed

    def _draw(self, probabilities: Vector) -> int:
        """A position, never one of probability 0: u is below the total, and ties go to the right."""
        cumulative = np.cumsum(probabilities)
        u = self._rng.random() * cumulative[-1]
        return min(int(np.searchsorted(cumulative, u, side="right")), int(np.flatnonzero(probabilities)[-1]))
