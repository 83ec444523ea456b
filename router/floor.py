"""A floor under quality: where the evidence shows that an arm falls short, its traffic goes back to the dearest.

The promise, for one tenant, one kind of request and one arm: as long as, in every stretch of time, the arm's answers
are of a mean quality of at least `quality_target` times that of the dearest arm's in the same or a longer stretch, the
arm is ever held back with a probability of 1 - `confidence` at most, however the policy adapts (see `confidence`). The
other way round: an arm that falls short is held back as soon as the evidence shows it with that confidence.

Stretches begin every `EVERY` feedbacks and reach to the present, so that a break is seen although much of what came
before was good. The s-th has the share alpha / (s (s + 1)) of alpha = 1 - `confidence`; all together have alpha.

What counts is the policy's choice. An answer that uniform exploration brought about says nothing of where the policy
would have used the arm, so each counts with the share that the policy had in the draw (`weight`).

An arm that is held back gets `probe_share` of the requests at most, and its share of uniform exploration. It comes back
when bets that it keeps the target again have won 1 / (1 - `RETURN_CONFIDENCE`) (a test martingale, Waudby-Smith and
Ramdas 2024, begun anew whenever it is below 1), and is given more requests to show it once they have won
`PROMISING`; the stretches before count no longer then. While it stays below the target, a bet loses on average; coming
back for nothing costs the answers it takes to see it again, and is no part of the promise.

Evidence is whatever quality becomes known: users', checks', comparisons by a judge. While
next to nothing is known of the dearest arm it is presumed to be good, which is no part of the promise: holding a
cheaper arm back is what brings that knowledge.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from router.confidence import Evidence, bounds
from router.reward import checked_quality

VERSION = 2  # of the form of a state
EVERY = 25  # feedbacks from the beginning of one stretch to that of the next
STRETCHES = 12  # that are kept; giving one up costs promptness, never the promise
RETURN_CONFIDENCE = 0.8  # that an arm held back keeps the target again
PROMISING = 1.6  # times the stake: two good answers in a row
STAKE = 0.7  # of what a bet that an answer reaches the bar can lose at most
OWN = 10  # feedbacks on an arm from which on a kind goes by its own evidence
LEDGERS = 500  # of tenants and kinds, that are kept; the longest unheard of goes first
MIN_QUALITY = 0.01  # of the dearest, for a bet to mean something
PRESUMED = 0.9  # quality of the dearest arm while fewer than `OWN` feedbacks say more
REST = ""  # the kind that is all young kinds of a tenant together


class Standing(StrEnum):
    """What the evidence says of an arm, for a tenant and a kind of request."""

    OPEN = "open"  # neither
    PROVED = "proved"  # it keeps the target
    HELD = "held"  # it was shown to fall short, and not to have recovered
    RETURNING = "returning"  # held back, but its last answers are promising


NO_EVIDENCE = Evidence()  # never added to
NOTHING_KNOWN: Mapping[str, Standing] = {}


@dataclass(slots=True)
class Stretch:
    """Evidence by arm on requests that came at or after `since`."""

    since: float  # Unix seconds
    number: int = 1  # 1, 2, ... in order of beginning
    seen: int = 0  # feedbacks
    arms: dict[str, Evidence] = field(default_factory=dict)

    def of(self, arm: str) -> Evidence:
        return self.arms.setdefault(arm, Evidence())

    def take(self, arm: str, quality: float, previous: float | None, weight: float, at: float) -> None:
        if at < self.since:
            return
        if previous is None:
            self.of(arm).add(quality, weight)
            self.seen += 1
        elif arm in self.arms:
            self.arms[arm].replace(previous, quality, weight)


@dataclass(slots=True)
class Shortfall:
    """What is known of an arm that is held back, since it is."""

    since: float  # Unix seconds
    mean: float  # of the arm in the stretch that showed it
    dearest: float  # lower bound of the dearest arm's mean there
    won: float = 0.0  # >= 0: logarithm of what betting on the arm has made of a stake

    def take(self, quality: float, previous: float | None, weight: float, bar: float) -> None:
        """The arm's answer to a request that came since had `quality`, where `bar` > 0 would be good enough."""
        gain = math.log1p(STAKE * weight * (quality - bar) / bar)
        if previous is not None:
            gain -= math.log1p(STAKE * weight * (previous - bar) / bar)
        self.won = max(0.0, self.won + gain)


@dataclass(slots=True)
class Ledger:
    """The evidence on one tenant's requests of one kind, and what follows from it."""

    stretches: list[Stretch] = field(default_factory=list)  # oldest first
    counts: dict[str, int] = field(default_factory=dict)  # feedbacks ever, by arm
    held: dict[str, Shortfall] = field(default_factory=dict)
    fresh_from: dict[str, int] = field(default_factory=dict)  # number of the first stretch that counts for an arm
    standing: dict[str, Standing] = field(default_factory=dict)

    def begin(self, at: float) -> Stretch:
        stretch = Stretch(at, self.stretches[-1].number + 1 if self.stretches else 1)
        self.stretches.append(stretch)
        if len(self.stretches) > STRETCHES:
            del self.stretches[self._needless()]
        return stretch

    def _needless(self) -> int:
        """The stretch, neither the oldest nor new, whose neighbours are the closest in length."""
        seen = [max(1, s.seen) for s in self.stretches]
        return max(range(1, len(seen) - 3), key=lambda i: seen[i + 1] / seen[i - 1])

    def take(self, arm: str, quality: float, previous: float | None, weight: float, at: float) -> None:
        if not self.stretches:
            self.begin(0.0)  # all there ever was
        elif previous is None and self.stretches[-1].seen >= EVERY:
            self.begin(at)
        for stretch in self.stretches:
            stretch.take(arm, quality, previous, weight, at)
        if previous is None:
            self.counts[arm] = self.counts.get(arm, 0) + 1

    def lately(self, arm: str) -> float | None:
        """The arm's mean in the last stretch that has `OWN` of its answers; None where none has."""
        for stretch in reversed(self.stretches):
            if (found := stretch.arms.get(arm)) is not None and found.count >= OWN:
                return found.mean
        return None


class Floor:
    """What the evidence allows, by tenant and kind of request. Learns as the router does: from the same feedback, in
    the same order, so that processes that follow one log agree.

    `quality_target` in [0, 1] is the share of the dearest arm's mean quality that others have to keep; at 0 nothing is
    ever held back. `dearest` names that arm.
    """

    def __init__(self, dearest: str, *, quality_target: float, confidence: float = 0.95) -> None:
        if not 0 <= quality_target <= 1:
            raise ValueError(f"quality_target must be in [0, 1], not {quality_target}")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), not {confidence}")
        self.dearest = dearest
        self.quality_target = quality_target
        self.confidence = confidence
        self.ledgers_: OrderedDict[tuple[str, str], Ledger] = OrderedDict()

    def standing(self, tenant: str, kind: str) -> Mapping[str, Standing]:
        """By arm; one that is not named is open. A kind that is young goes by the tenant's other young ones, except
        that nothing is proved of it."""
        own, rest = self.ledgers_.get((tenant, kind)), self.ledgers_.get((tenant, REST))
        found: dict[str, Standing] = {}
        if rest is not None:
            found.update({arm: s for arm, s in rest.standing.items() if arm in rest.held or kind == REST})
        if own is not None and own is not rest:
            found.update({arm: s for arm, s in own.standing.items() if own.counts.get(arm, 0) >= OWN})
        return found

    def learn(
        self,
        tenant: str,
        kind: str,
        arm: str,
        quality: float,
        previous: float | None = None,
        *,
        at: float,
        weight: float = 1.0,
    ) -> None:
        """The answer of `arm` to a request of `tenant` and `kind` that came at `at` (Unix seconds) had `quality` in
        [0, 1]; with `previous` it replaces that value. `weight` in [0, 1] is the policy's share in the choice."""
        quality = checked_quality(quality)
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be in [0, 1], not {weight}")
        if previous is not None:
            previous = checked_quality(previous)
        kinds = [kind]
        own = self.ledgers_.get((tenant, kind))
        if kind != REST and (own is None or own.counts.get(arm, 0) < OWN):
            kinds.append(REST)
        for each in kinds:
            ledger = self.ledgers_.setdefault((tenant, each), Ledger())
            self.ledgers_.move_to_end((tenant, each))
            ledger.take(arm, quality, previous, weight, at)
            self._bet(ledger, arm, quality, previous, weight, at)
            for judged in list(ledger.counts) if arm == self.dearest else [arm]:
                if judged != self.dearest:
                    self._judge(ledger, judged, at)
        while len(self.ledgers_) > LEDGERS:
            self.ledgers_.popitem(last=False)

    def _bet(self, ledger: Ledger, arm: str, quality: float, previous: float | None, weight: float, at: float) -> None:
        """Where the arm is held back: that it keeps the target again."""
        held = ledger.held.get(arm)
        if held is None or at < held.since:
            return
        dearest = ledger.lately(self.dearest)
        bar = self.quality_target * max(PRESUMED if dearest is None else dearest, MIN_QUALITY)
        held.take(quality, previous, weight, bar)
        if held.won >= math.log(1 / (1 - RETURN_CONFIDENCE)):
            del ledger.held[arm]
            ledger.fresh_from[arm] = ledger.begin(at).number
            ledger.standing[arm] = Standing.OPEN
        else:
            promising = held.won >= math.log(PROMISING)
            ledger.standing[arm] = Standing.RETURNING if promising else Standing.HELD

    def _judge(self, ledger: Ledger, arm: str, at: float) -> None:
        """Hold the arm back, or not; one that is held back is judged by bets."""
        if arm in ledger.held:
            return
        proved = False
        for low, high, least, most, mean in self._compared(ledger, arm):
            if high < self.quality_target * least:
                ledger.held[arm] = Shortfall(at, mean, least)
                ledger.standing[arm] = Standing.HELD
                return
            proved = proved or low >= self.quality_target * most
        ledger.standing[arm] = Standing.PROVED if proved else Standing.OPEN

    def _compared(self, ledger: Ledger, arm: str) -> Iterator[tuple[float, float, float, float, float]]:
        """For each stretch that counts for the arm: bounds on its mean there, bounds on the dearest arm's in the same
        or a longer stretch, and the arm's mean as it was seen."""
        n, fresh_from = len(ledger.stretches), ledger.fresh_from.get(arm, 0)
        alphas = [(1 - self.confidence) / (s.number * (s.number + 1)) / 2 for s in ledger.stretches]
        evidence = [s.arms.get(name) or NO_EVIDENCE for name in (arm, self.dearest) for s in ledger.stretches]
        low, high = bounds(evidence, alphas + alphas)
        least = PRESUMED if ledger.counts.get(self.dearest, 0) < OWN else 0.0
        most = 1.0
        for i, stretch in enumerate(ledger.stretches):
            least, most = max(least, float(low[n + i])), min(most, float(high[n + i]))
            if stretch.number >= fresh_from and evidence[i].count:
                yield float(low[i]), float(high[i]), least, most, evidence[i].mean

    def held(self) -> dict[str, int]:
        """By arm, for how many tenants and kinds it is held back."""
        counts: dict[str, int] = {}
        for ledger in self.ledgers_.values():
            for arm in ledger.held:
                counts[arm] = counts.get(arm, 0) + 1
        return counts

    def state(self) -> bytes:
        """Everything learned, as JSON."""
        ledgers = [[tenant, kind, asdict(ledger)] for (tenant, kind), ledger in self.ledgers_.items()]
        return json.dumps({"version": VERSION, "ledgers": ledgers}, allow_nan=False).encode()

    def restore(self, state: bytes) -> None:
        """Replace everything learned by `state`; ValueError, and nothing changed, when it does not fit."""
        try:
            learned = json.loads(state)
            if learned["version"] != VERSION:
                raise ValueError(f"version {learned['version']!r}, this one reads {VERSION}")
            ledgers = OrderedDict(((str(t), str(k)), _ledger(entry)) for t, k, entry in learned["ledgers"])
        except (ValueError, TypeError, KeyError, RecursionError) as exc:
            raise ValueError(f"the state of the floor does not fit: {exc!r}") from exc
        self.ledgers_ = ledgers


def _ledger(entry: dict[str, Any]) -> Ledger:
    return Ledger(
        [_stretch(s) for s in entry["stretches"]],
        {arm: int(count) for arm, count in entry["counts"].items()},
        {
            arm: Shortfall(float(h["since"]), float(h["mean"]), float(h["dearest"]), float(h["won"]))
            for arm, h in entry["held"].items()
        },
        {arm: int(number) for arm, number in entry["fresh_from"].items()},
        {arm: Standing(standing) for arm, standing in entry["standing"].items()},
    )


def _stretch(entry: dict[str, Any]) -> Stretch:
    arms = {arm: Evidence(float(e["count"]), float(e["total"]), float(e["spread"])) for arm, e in entry["arms"].items()}
    return Stretch(float(entry["since"]), int(entry["number"]), int(entry["seen"]), arms)
