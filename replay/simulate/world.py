"""What is assumed of requests, models and examples. Everything a report says follows from this page and a seed."""

import csv
import math
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from replay.simulate.engine import Rates
from router.types import Arm, ExampleSignals, Signals

SMALL, LARGE = "small", "large"
ARMS = (Arm(SMALL, price=1.0), Arm(LARGE, price=7.17, is_teacher=True))
SPEEDUP = 5.9  # throughput with all offloaded, against none: the paper's figure 13


@dataclass(frozen=True, slots=True)
class Assumptions:
    """One line each in the report. Rates and prices are of the paper's 2B and 27B model at equal numbers of GPUs."""

    scale: float = 0.05  # of arrivals and of slots: the same shape with fewer requests
    small: Rates = Rates(slots=240, prefill_tokens_per_s=4000.0, decode_tokens_per_s=90.0, slowdown=0.35)  # noqa: RUF009 - a value
    large: Rates = Rates(slots=120, prefill_tokens_per_s=1200.0, decode_tokens_per_s=26.0, slowdown=0.35)  # noqa: RUF009 - a value
    prompt_tokens: float = 60.0  # mean, log-normal
    output_tokens: float = 180.0  # mean, log-normal
    example_tokens: float = 500.0  # of five examples
    shorter: float = 0.92  # an answer's length with examples, as a share of that without
    topics: int = 12
    feedback: float = 0.3  # share of answers that are scored
    noise: float = 0.15  # of a score, standard deviation
    judge: float = 0.2  # of the quality of one answer in a comparison, standard deviation

    def lines(self) -> dict[str, Any]:
        return asdict(self)

    def slots(self, rates: Rates) -> Rates:
        return Rates(
            max(1, round(rates.slots * self.scale)),
            rates.prefill_tokens_per_s,
            rates.decode_tokens_per_s,
            rates.slowdown,
        )


class Request(NamedTuple):
    at: float  # s
    signals: Signals
    prompt_tokens: float
    output_tokens: float
    plain: float  # quality of the small model alone
    shown: float  # and with its examples
    large: float


class World:
    """Requests of a dozen topics, some of which the small model cannot do alone and examples help with.

        large   0.80 - 0.10 d
        plain   0.79 - 0.30 d                    d in [0, 1]: how hard the topic is
        shown   plain + (0.03 + 0.22 d) s        s in [0, 1]: how close the examples are

    each with a little noise of the request's own, the same for all three. The router sees an embedding of the topic,
    s with noise as similarity, and the utility that follows from it; it never sees d or a quality.
    """

    def __init__(self, assumed: Assumptions, seed: int) -> None:
        self.assumed = assumed
        self.rng = np.random.default_rng(seed)
        self.hardness = self.rng.permutation(np.linspace(0, 1, assumed.topics))
        self.centres = np.linalg.qr(self.rng.normal(size=(96, assumed.topics)))[0].T

    def request(self, at: float) -> Request:
        rng, a = self.rng, self.assumed
        topic = int(rng.integers(a.topics))
        d, s = float(self.hardness[topic]), float(rng.beta(4, 2))
        own = rng.normal(0, 0.05)
        plain = 0.79 - 0.30 * d + own
        shown = plain + (0.03 + 0.22 * d) * s
        prompt, output = (float(m * rng.lognormal(-0.125, 0.5)) for m in (a.prompt_tokens, a.output_tokens))
        return Request(at, self._signals(topic, s, prompt), prompt, output, plain, shown, 0.80 - 0.10 * d + own)

    def _signals(self, topic: int, s: float, prompt: float) -> Signals:
        rng = self.rng
        vector = math.sqrt(0.5) * self.centres[topic] + math.sqrt(0.5 / 96) * rng.normal(size=96)
        embedding = (vector / np.linalg.norm(vector)).astype(np.float32)
        similarity = min(1.0, max(0.0, s + rng.normal(0, 0.1)))
        examples = ExampleSignals(
            5, similarity, 0.9 * similarity, 0.4 * similarity, 0.35 * similarity, int(self.assumed.example_tokens)
        )
        return Signals(embedding, int(prompt), 1, {SMALL: examples})

    def score(self, quality: float) -> float | None:
        """The feedback that an answer gets, if any, in [0, 1]."""
        if self.rng.random() >= self.assumed.feedback:
            return None
        return float(np.clip(quality + self.rng.normal(0, self.assumed.noise), 0, 1))

    def arrivals(self) -> list[float]:
        """Times in s, ascending: the series, thinned to `scale`."""
        counts = self.rng.binomial(series(), self.assumed.scale)
        times = np.repeat(np.arange(len(counts)), counts) + self.rng.random(counts.sum())
        return [float(t) for t in np.sort(times)]


def series() -> NDArray[np.int64]:
    """(1800,): requests in each second of the paper's half hour."""
    text = resources.files("replay.simulate").joinpath("data/arrivals_30min.csv").read_text(encoding="utf-8")
    return np.array([int(row["requests"]) for row in csv.DictReader(text.splitlines())], dtype=np.int64)


def win_rate(quality: float, large: float, assumed: Assumptions) -> float:
    """The chance that a judge prefers an answer of this quality to the large model's, in [0, 1]."""
    return 0.5 * math.erfc(-(quality - large) / (2.0 * assumed.judge))
