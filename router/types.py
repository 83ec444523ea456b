"""The words of the router: everyone here imports them, they import nobody."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@dataclass(slots=True, unsafe_hash=True)  # never changed once made: not frozen, since that makes making it slow
class Arm:
    """A candidate backend. `price` is what the request at hand costs there, in any unit >= 0 that is comparable between
    arms; `list_price` says which backend is the dearest in general: the same as `price` unless given."""

    name: str
    price: float
    is_teacher: bool = False
    list_price: float | None = None

    def __post_init__(self) -> None:
        for price in (self.price, self.listed):
            if not (math.isfinite(price) and price >= 0):
                raise ValueError(f"arm {self.name!r}: price must be finite and >= 0, not {price}")

    @property
    def listed(self) -> float:
        return self.price if self.list_price is None else self.list_price


@dataclass(slots=True)
class ExampleSignals:
    """What is known of the examples chosen for one arm. Similarities are cosines, utilities predicted quality gains."""

    count: int
    similarity_max: float
    similarity_mean: float
    utility_max: float
    utility_mean: float
    tokens: int


NO_EXAMPLES = ExampleSignals(0, 0.0, 0.0, 0.0, 0.0, 0)


@dataclass(slots=True, eq=False)
class Signals:
    """What is known of one request before routing."""

    embedding: NDArray[np.float32] | None  # (dim,), unit norm; None when it could not be computed
    tokens: int
    turns: int
    examples: Mapping[str, ExampleSignals]  # by arm name; absent = none
    system: str = ""  # the system prompt, which says much of the kind of request


@dataclass(slots=True, eq=False)
class Decision:
    """The arm that serves, and everything needed to judge and to learn from the choice later."""

    arm: str
    propensity: float  # probability with which `arm` was served, in (0, 1]
    names: tuple[str, ...]
    probabilities: Vector  # (n_arms,), sums to 1: what `preferred` was drawn from
    scores: Vector  # (n_arms,): S_i, expected quality less the load bias
    load_bias: Vector  # (n_arms,), >= 0
    features: Vector  # (n_features,) of `arm`: what is logged and learned from
    preferred: str  # what was drawn; differs from `arm` only in shadow mode
    wanted: str  # what the same draw would have served without the floor
    meant: float = 1.0  # in [0, 1]: the policy's share in the draw of `arm`; the rest is exploration or the hold-out
    held_out: bool = False  # the dearest serves because the request is one of `holdout_share`, whatever the policy says

    @property
    def withheld(self) -> str | None:
        """The arm that would have served but for shadow mode or the floor."""
        would = self.preferred if self.preferred != self.arm else self.wanted
        return would if would != self.arm else None


def price_order(arms: Sequence[Arm]) -> list[int]:
    """Positions of the arms from cheapest to dearest by list price. At one price students come before teachers, then as
    listed, so that the last one is "the dearest" wherever the word is used."""
    if len(arms) == 2:  # as nearly always: what sorting takes apart is two comparisons
        first, second = arms
        swapped = (second.listed, second.is_teacher) < (first.listed, first.is_teacher)
        return [1, 0] if swapped else [0, 1]
    return sorted(range(len(arms)), key=lambda i: (arms[i].listed, arms[i].is_teacher))


def request_order(arms: Sequence[Arm]) -> list[int]:
    """Positions of the arms from cheapest to dearest for the request at hand; ties by `price_order`."""
    if len(arms) == 2 and arms[0].price != arms[1].price:
        return [0, 1] if arms[0].price < arms[1].price else [1, 0]
    return sorted(price_order(arms), key=lambda i: arms[i].price)
