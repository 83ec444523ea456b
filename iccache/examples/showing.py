"""Which way to show examples for one request: none, its own, or the shared set. Pure: generator and numbers are
handed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from iccache.examples.ways import WAYS, Estimate, Floats, Way
from iccache.types import Match, Taken
from router.choice import choice_probabilities

REACH = 10.0  # standard deviations
ENOUGH = 0.5  # scored answers, weighted by how similar their requests were, before anything but the nearest is tried


class Offer(NamedTuple):
    """What one way would show, and what it takes."""

    shown: tuple[Match, ...]  # in the order to be shown
    price: float = 0.0  # what it costs beyond showing nothing, in quality: see `price_of`


NOTHING = Offer(())


def price_of(usd: float, saved_usd: float) -> float:
    """What `usd` more for a student's prompt is worth in quality: usd / saved_usd, at most 1.

    A gain in quality is worth that much of what an offload saves: at a gain of g the student's answer is g more
    likely to be
    good enough, and each that is saves `saved_usd`, the dearest backend's cost less the student's. 0 where nothing is
    saved.
    """
    return min(1.0, usd / saved_usd) if saved_usd > 0 else 0.0


def probabilities(estimate: Estimate, offers: Mapping[Way, Offer], exploration: float) -> Floats:
    """(len(WAYS),), sums to 1: the way with the best expected quality less its price, and some of the others.

    Before anything was scored near this request, its own examples are shown, the nearest there are. Then
    `exploration` of the requests is answered by a Thompson sample: each way as often as it may be the best.
    """
    open_ways = np.array([way in offers for way in WAYS])
    best = np.zeros(len(WAYS))
    if estimate.answers < ENOUGH:
        best[_at_first(offers)] = 1.0
        return best
    value = np.asarray(estimate.quality) - np.array([offers[way].price if way in offers else 0.0 for way in WAYS])
    best[int(np.argmax(np.where(open_ways, value, -np.inf)))] = 1.0
    if open_ways.sum() < 2 or not exploration:
        return best
    sampled = np.zeros(len(WAYS))
    beyond = float((value + REACH * estimate.sd).max())  # no sample gets there, so the largest is taken
    sampled[open_ways] = choice_probabilities(value[open_ways], estimate.sd[open_ways], beyond)
    mixed: Floats = (1 - exploration) * best + exploration * sampled
    return mixed


def draw(
    estimate: Estimate,
    offers: Mapping[Way, Offer],
    rng: np.random.Generator,
    *,
    exploration: float,
    leave_out: float,
) -> tuple[tuple[Match, ...], Taken]:
    """What to show, and the record of it.

    Where several of the request's own examples would be shown, one of them is left out of `leave_out` of the answers.
    """
    if estimate.answers < ENOUGH:
        return _taken(estimate, offers, _at_first(offers), 1.0)
    p = probabilities(estimate, offers, exploration)
    place = int(rng.choice(len(WAYS), p=p)) if p.max() < 1.0 else int(np.argmax(p))
    way = WAYS[place]
    shown, taken = _taken(estimate, offers, place, float(p[place]))
    if way is Way.OWN and len(shown) > 1 and rng.random() < leave_out:
        gone = int(rng.integers(len(shown)))
        taken = taken._replace(left_out=shown[gone].example.id)
        shown = shown[:gone] + shown[gone + 1 :]
    return shown, taken


def _at_first(offers: Mapping[Way, Offer]) -> int:
    """The place of the way that is taken before anything was scored."""
    return _OWN if Way.OWN in offers else _NONE


_OWN, _NONE = WAYS.index(Way.OWN), WAYS.index(Way.NONE)


def _taken(
    estimate: Estimate, offers: Mapping[Way, Offer], place: int, probability: float
) -> tuple[tuple[Match, ...], Taken]:
    way = WAYS[place]
    gain = float(estimate.quality[place] - estimate.quality[_NONE])
    seen = tuple([round(float(value), 4) for value in estimate.features[place]])
    return offers[way].shown, Taken(way.value, float(estimate.prior[place]), probability, None, gain, seen)
