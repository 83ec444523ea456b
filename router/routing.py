"""Policy + load bias + generator -> Decision."""

import math
import operator
from collections.abc import Mapping, Sequence

import numpy as np

from router.features import feature_rows
from router.floor import NOTHING_KNOWN, Standing
from router.load import load_bias
from router.policy import Policy
from router.reward import load_prices, relative_cost
from router.types import Arm, Decision, Signals, Vector, price_order

RETURNING_SHARE = 0.5


class Router:
    """Draws an arm for each request from exactly the distribution that it logs.

        p = (1 - holdout_share) * ((1 - exploration) * policy + exploration / n_arms) + holdout_share * [dearest]

    `quality_target` in [0, 1] is the share of the dearest arm's expected quality that a cheaper arm must be
    expected to keep to be preferred to it. `theta` (share of capacity), `lambda0` (quality) and `gamma` shape the load
    bias. An arm that the floor holds back keeps `probe_share` of the requests at most, and `RETURNING_SHARE` once its
    answers are promising; what the policy gives it beyond goes to the dearest. With `certify_first` an arm cheaper than
    the dearest is drawn only where the floor has proved it. With `shadow` the dearest arm serves everything, and the
    draw is only noted as `preferred`.
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
        probe_share: float = 0.1,
    ) -> None:
        shares = {
            "exploration": exploration,
            "quality_target": quality_target,
            "holdout_share": holdout_share,
            "probe_share": probe_share,
        }
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
        self.probe_share = probe_share
        self._rng = rng

    def route(
        self,
        signals: Signals,
        arms: Sequence[Arm],
        load: float,
        standing: Mapping[str, Standing] = NOTHING_KNOWN,
        u: float | None = None,
    ) -> Decision:
        """Decide one request among `arms` (any number >= 1, in any order) at the smoothed `load` >= 0. `standing`, by
        arm, is what the floor says of requests like this one. `u` in [0, 1), uniform over requests, is what is drawn
        with, where requests are to be drawn for alike; None: the generator's next."""
        names = tuple(arm.name for arm in arms)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"arms must be at least one, with different names, not {list(names)}")
        x = feature_rows(signals, arms)
        bias = self.load_bias(arms, load)
        dearest = price_order(arms)[-1]
        chosen: list[float] = self.policy.probabilities(x, arms, bias, self.quality_target).tolist()
        left = self._held_back(chosen, self._most(names, dearest, standing), dearest)
        explored = self._explored(left, self._allowed(names, dearest, standing), dearest)
        probabilities = [(1 - self.holdout_share) * share for share in explored]
        probabilities[dearest] += self.holdout_share
        u = float(self._rng.random()) if u is None else u
        held_out = u < self.holdout_share
        preferred = wanted = dearest
        if not held_out:
            u = (u - self.holdout_share) / (1 - self.holdout_share)  # again uniform
            preferred = _drawn(explored, u)
            everything = left is chosen and not self.certify_first  # the floor changes nothing
            wanted = preferred if everything else _drawn(self._explored(chosen, [True] * len(arms), dearest), u)
        served = dearest if self.shadow else preferred
        return Decision(
            arm=names[served],
            propensity=1.0 if self.shadow else probabilities[served],
            names=names,
            probabilities=np.array(probabilities),
            scores=self.policy.scores(x, arms, bias),
            load_bias=bias,
            features=x[served],
            preferred=names[preferred],
            wanted=names[wanted],
            meant=self._meant(left, probabilities, served, dearest),
            held_out=held_out,
        )

    def load_bias(self, arms: Sequence[Arm], load: float) -> Vector:
        """(n_arms,): what `load` takes from each arm's score, in [0, lambda0]."""
        if 0.0 <= load <= self.theta:
            return np.zeros(len(arms))
        costs = relative_cost(load_prices(arms))
        return load_bias(load, costs, self.theta, self.lambda0, self.gamma)

    def learn(self, arm: str, features: Vector, quality: float, previous: float | None = None, *, age: int = 0) -> None:
        """See `Policy.learn`; `features` are those of the decision."""
        self.policy.learn(arm, features, quality, previous, age=age)

    def state(self) -> bytes:
        return self.policy.state()

    def restore(self, state: bytes) -> None:
        self.policy.restore(state)

    def _allowed(self, names: Sequence[str], dearest: int, standing: Mapping[str, Standing]) -> list[bool]:
        """(n_arms,): which arms may be drawn at all. Always the dearest."""
        if not self.certify_first:
            return [True] * len(names)
        return [i == dearest or standing.get(name) is Standing.PROVED for i, name in enumerate(names)]

    def _most(self, names: Sequence[str], dearest: int, standing: Mapping[str, Standing]) -> list[float]:
        """(n_arms,) in [0, 1]: the largest share of requests that the floor leaves to each arm. To the dearest all."""
        if not standing:
            return [1.0] * len(names)
        shares = {Standing.HELD: self.probe_share, Standing.RETURNING: max(RETURNING_SHARE, self.probe_share)}
        most = [shares.get(standing.get(name, Standing.OPEN), 1.0) for name in names]
        most[dearest] = 1.0
        return most

    def _held_back(self, chosen: list[float], most: Sequence[float], dearest: int) -> list[float]:
        """What is left to each arm where some are held back: the dearest takes over what they lose. The very same list
        where none is."""
        if all(map(operator.le, chosen, most)):
            return chosen
        left = list(map(min, chosen, most))
        left[dearest] += math.fsum(chosen) - math.fsum(left)
        return left

    def _meant(self, left: Sequence[float], probabilities: Sequence[float], served: int, dearest: int) -> float:
        """In [0, 1]: the share that what the policy gives the arm has in the probability of its draw. 1 for the
        dearest, to which everything else falls, and so in shadow mode."""
        if served == dearest:
            return 1.0
        own = (1 - self.holdout_share) * (1 - self.exploration) * left[served]
        return float(min(1.0, own / probabilities[served]))

    def _explored(self, chosen: Sequence[float], allowed: Sequence[bool], dearest: int) -> list[float]:
        """The policy's share of what may not be drawn goes to the dearest; exploration stays among what may."""
        each = self.exploration / sum(allowed)
        kept, lost = [0.0] * len(chosen), 0.0
        for i, share in enumerate(chosen):
            if allowed[i]:
                kept[i] = (1 - self.exploration) * share + each
            else:
                lost += share
        kept[dearest] += (1 - self.exploration) * lost
        return kept


def _drawn(shares: Sequence[float], u: float) -> int:
    """The position at `u` in [0, 1), never one of probability 0: u is below the total, and ties go to the right."""
    at, passed, last = u * math.fsum(shares), 0.0, 0
    for position, share in enumerate(shares):
        if share > 0.0:
            last, passed = position, passed + share
            if at < passed:
                break
    return last
