"""How feedback on answers becomes the record of the examples that were shown for them.

For one scored answer with quality q, made with k examples shown, on a backend of relative cost c:

    weight   1 / k                              summed in `credit`
    quality  q / k                              summed in `credited_quality`
    offload  1 / k if the offload succeeded     summed in `offloads`, a sum that decays by the hour
    gain     G = (1 - q) * c                    averaged in `gain`, an EMA over the example's scored answers

An offload succeeded when a cheaper backend answered and q >= GOOD_ENOUGH; an answer nobody scored is no success yet.

Every statistic is linear in these contributions. A score that is replaced is therefore taken back with the weight it
has today, and what remains is what the new score alone would have left (up to rounding).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from iccache.types import ExampleStats

SOURCE_WEIGHTS = {"user": 1.0, "check": 0.7, "judge": 0.5, "reask": 0.3}
OTHER_WEIGHT = 0.5  # of a source that is not listed
GOOD_ENOUGH = 0.5  # least quality of a successful offload
QUALITY_FLOOR = 0.3  # below it an answer is known to be poor
DECAY_PER_HOUR = 0.9
GAIN_STEP = 0.2  # weight of the newest answer in the EMA of gain
HOUR_S = 3600.0


class Outcome(NamedTuple):
    """What the credit of one answer depends on."""

    at: float
    shown: tuple[str, ...]  # ids of examples
    offloaded: bool
    relative_cost: float  # in [0, 1]
    quality: float | None  # None: not scored
    complete: bool = True


class Credit(NamedTuple):
    """What one answer contributes to each example that was shown for it."""

    weight: float = 0.0
    quality: float = 0.0
    offload: float = 0.0
    gain: float = 0.0


NO_CREDIT = Credit()


def combined_quality(scores: Mapping[str, float | None]) -> float | None:
    """One quality from the scores of all sources: sum(w_s * score_s) / sum(w_s). None when there is no score.

    The weights w_s are SOURCE_WEIGHTS: a user knows best, a check sees one aspect, a judge is a model too,
    and who asks again may have had other reasons.
    """
    weighted = [(SOURCE_WEIGHTS.get(source, OTHER_WEIGHT), score) for source, score in scores.items()]
    total = sum(weight for weight, score in weighted if score is not None)
    if not total:
        return None
    return sum(weight * score for weight, score in weighted if score is not None) / total


def is_success(offloaded: bool, quality: float | None) -> bool:
    """Whether an answer counts as a successful offload."""
    return offloaded and quality is not None and quality >= GOOD_ENOUGH


def gain(quality: float, relative_cost: float) -> float:
    """G = (1 - quality) * relative_cost: what a better answer from this example could have earned."""
    return (1.0 - quality) * relative_cost


def credit_of(outcome: Outcome) -> Credit:
    """The contribution of one answer to each of the k examples shown for it; nothing while it is not scored."""
    if outcome.quality is None or not outcome.shown:
        return NO_CREDIT
    share = 1.0 / len(outcome.shown)
    return Credit(
        weight=share,
        quality=outcome.quality * share,
        offload=share if is_success(outcome.offloaded, outcome.quality) else 0.0,
        gain=gain(outcome.quality, outcome.relative_cost),
    )


def decay(elapsed_s: float, per_hour: float = DECAY_PER_HOUR) -> float:
    """What is left of 1 after `elapsed_s`: per_hour ** hours. Time before the start leaves 1."""
    return float(per_hour ** (max(0.0, elapsed_s) / HOUR_S))


def decayed_offloads(stats: ExampleStats, now: float, per_hour: float = DECAY_PER_HOUR) -> float:
    """The successful offloads of an example as they count at `now`."""
    return stats.offloads * decay(now - stats.offloads_at, per_hour)


def add_decaying(
    value: float, value_at: float, amount: float, at: float, per_hour: float = DECAY_PER_HOUR
) -> tuple[float, float]:
    """Add `amount`, which happened at `at`, to a decaying sum. Returns the sum and the time it is true of.

    An amount older than the sum enters as far as it has decayed, so the order of arrival does not matter.
    """
    if at > value_at:
        return value * decay(at - value_at, per_hour) + amount, at
    return value + amount * decay(value_at - at, per_hour), value_at


def gain_weight(later: int) -> float:
    """The weight in the EMA of the answer after which `later` more were scored: a * (1 - a) ** later, a = GAIN_STEP.

    The EMA starts at 0, so it grows with the number of answers as well as with their G.
    """
    return float(GAIN_STEP * (1.0 - GAIN_STEP) ** later)


def first_gain(ema: float, value: float) -> float:
    """The EMA after one more answer: (1 - a) * ema + a * value."""
    return (1.0 - GAIN_STEP) * ema + GAIN_STEP * value


def with_first(stats: ExampleStats, new: Credit, at: float, per_hour: float = DECAY_PER_HOUR) -> ExampleStats:
    """`stats` after an answer was scored for the first time."""
    offloads, offloads_at = add_decaying(stats.offloads, stats.offloads_at, new.offload, at, per_hour)
    return stats._replace(
        credit=stats.credit + new.weight,
        credited_quality=stats.credited_quality + new.quality,
        offloads=offloads,
        offloads_at=offloads_at,
        gain=first_gain(stats.gain, new.gain),
    )


def with_replaced(
    stats: ExampleStats, old: Credit, new: Credit, at: float, later: int | None, per_hour: float = DECAY_PER_HOUR
) -> ExampleStats:
    """`stats` after the contribution of an answer of time `at` changed from `old` to `new`.

    `later`: how many answers were scored after it; None when it was given with another answer of the example, whose
    record has begun anew since: then it no longer counts, but for the offload, which was earned all the same.
    """
    offloads, offloads_at = add_decaying(stats.offloads, stats.offloads_at, new.offload - old.offload, at, per_hour)
    stats = stats._replace(offloads=offloads, offloads_at=offloads_at)
    if later is None:
        return stats
    return stats._replace(
        credit=stats.credit + new.weight - old.weight,
        credited_quality=stats.credited_quality + new.quality - old.quality,
        gain=stats.gain + gain_weight(later) * (new.gain - old.gain),
    )


def deviation(n: int, mean: float | None, squares: float | None) -> float | None:
    """Standard deviation (of a sample) from a mean and a mean of squares; None where n is below 2."""
    if n < 2 or mean is None or squares is None:
        return None
    return float((max(0.0, squares - mean * mean) * n / (n - 1)) ** 0.5)
