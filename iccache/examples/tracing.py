"""Outcomes that got worse since an example is shown, traced to it. Pure: from the record to a list of suspects.

For every scored answer with example e among those shown, its quality q is compared with b, the quality of answers
without e to requests of the same kind: those that had a nearest example in common with this one, at the same backend.
The null hypothesis, that answers with e are not worse than b by more than `TOLERANCE`, is tested by betting against
it, from a wealth of 1, with three stakes at once, of which the mean counts:

    wealth *= 1 + stake * (b - TOLERANCE - q) / (1 - b + TOLERANCE)

Under the null hypothesis the wealth is a supermartingale with values above 0, so by Ville's inequality it ever reaches
1 / ALPHA with a probability of at most ALPHA, however often one looks (Waudby-Smith and Ramdas 2024, Shafer 2021). b is
an estimate: it enters one standard error lower, and lower by what the backend has lost with everybody of late, so that
a model that got worse is blamed on nobody. The bound is checked by simulation, since an estimate is no expectation.

Of examples shown together, when one reaches the bound, the newest of those near it is the suspect: before it, answers
were good. The answers it was shown for then count against nobody else, and the test is done anew without them.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

ALPHA = 1e-3  # chance that a harmless example is ever suspected
TOLERANCE = 0.1  # quality that an example may cost before it counts as harm
STAKES = (0.1, 0.3, 0.6)
CONTROLS = 8  # answers without the example that a comparison needs
KEPT = 24  # latest outcomes remembered for each example that was considered
KIND = 4  # nearest examples that make the kind of a request
DRIFT_STEP = 0.05  # weight of the newest answer in what the backend has lost of late
SHARED = 0.1  # of the bound: so near it, an example shown beside the one that reached it may be the cause as well
SUSPECTS = 20  # found at one time


class Traced(NamedTuple):
    """A scored answer."""

    backend: str
    at: float
    quality: float
    shown: tuple[str, ...]
    nearest: tuple[str, ...]  # considered, best first


class Standing(NamedTuple):
    """What is known of an example beside its outcomes."""

    order: int  # its place among the examples by when they appeared
    writer: str | None  # the end user whose request it came from
    since: float = 0.0  # the time from which on it is to be judged: it may have been cleared, or bettered


def held_for(outcomes: Sequence[Traced], standings: Mapping[str, Standing]) -> list[str]:
    """All examples of the writers whose examples together are suspect, and others that are suspect by themselves.

    Many examples, each shown a few times, give nothing away one by one. So the same test is made of the writers:
    answers with any of theirs against answers with none. What they spoiled counts against nobody who was shown beside
    them. `outcomes` of one tenant, oldest first.
    """
    since = {id: s.since for id, s in standings.items() if s.since}
    order = {id: s.order for id, s in standings.items()}
    writers = {id: s.writer for id, s in standings.items() if s.writer is not None}
    cleared: dict[str, float] = {}
    for id, writer in writers.items():
        cleared[writer] = max(cleared.get(writer, 0.0), since.get(id, 0.0))
    theirs = [o._replace(shown=tuple({writers[id] for id in o.shown if id in writers})) for o in outcomes]
    bad = set(suspects(theirs, cleared, writers=writers))
    others = [o for o in outcomes if not any(writers.get(id) in bad for id in o.shown)]
    found = suspects(others, since, order)
    return list(dict.fromkeys([*found, *(id for id, writer in writers.items() if writer in bad)]))


def suspects(
    outcomes: Sequence[Traced],
    since: Mapping[str, float] | None = None,
    order: Mapping[str, int] | None = None,
    writers: Mapping[str, str] | None = None,
) -> list[str]:
    """Examples after which answers got worse. `outcomes` of one tenant, oldest first.

    `since`: for some examples, the time from which on they are to be judged; they may have been cleared, or bettered.
    `writers`: where those shown are writers, whose examples the nearest are.
    `order`: when they appeared. Of those that reach the bound together it is the newest: before it, answers were good.
    """
    found: list[str] = []
    while len(found) < SUSPECTS:
        suspect = _first(outcomes, since or {}, order or {}, writers or {}, found)
        if suspect is None:
            break
        found.append(suspect)
    return found


def _first(
    outcomes: Sequence[Traced],
    since: Mapping[str, float],
    order: Mapping[str, int],
    writers: Mapping[str, str],
    known: Collection[str],
) -> str | None:
    trial = _Trial(order, writers)
    for outcome in outcomes:
        if any(id in outcome.shown for id in known):
            continue
        reached = trial.take(outcome, since)
        if reached is not None:
            return reached
    return None


class _Trial:
    """What is known after some outcomes."""

    def __init__(self, order: Mapping[str, int], writers: Mapping[str, str]) -> None:
        self.order = order
        self.writers = writers
        self.wealth: dict[str, list[float]] = defaultdict(lambda: [1.0] * len(STAKES))
        self.of_kind: dict[tuple[str, str], deque[tuple[int, Traced]]] = defaultdict(lambda: deque(maxlen=KEPT))
        self.lost: dict[str, float] = defaultdict(float)  # by backend, with everybody
        self.number = 0

    def take(self, outcome: Traced, since: Mapping[str, float]) -> str | None:
        """Learn from one more; the example that has reached the bound by it, if any. Where several of those shown
        are near it, which of them it is cannot be seen from outcomes: it is the newest."""
        self.number += 1
        judged = [id for id in outcome.shown if outcome.at >= since.get(id, 0.0)]
        for id in judged:
            self._bet(id, outcome)
        self._remember(outcome)
        if not any(self._mean(id) >= 1.0 / ALPHA for id in judged):
            return None
        near = [id for id in judged if self._mean(id) >= SHARED / ALPHA]
        return max(near, key=lambda id: (self.order.get(id, 0), self._mean(id)))

    def _bet(self, id: str, outcome: Traced) -> None:
        without = self._controls(outcome, id)
        if len(without) < CONTROLS:
            return
        expected = min(max(_low(without) + min(self.lost[outcome.backend], 0.0) - TOLERANCE, 0.0), 1.0 - 1e-6)
        shortfall = (expected - outcome.quality) / (1.0 - expected)
        self.wealth[id] = [w * (1.0 + s * shortfall) for w, s in zip(self.wealth[id], STAKES, strict=True)]

    def _controls(self, outcome: Traced, id: str | None) -> list[float]:
        """Qualities of earlier answers of this kind at this backend, without `id`."""
        others = [other for other in outcome.nearest if other != id and (id is None or self.writers.get(other) != id)]
        found = {
            number: earlier.quality
            for other in others[:KIND]
            for number, earlier in self.of_kind[outcome.backend, other]
            if id is None or id not in earlier.shown
        }
        return list(found.values())

    def _remember(self, outcome: Traced) -> None:
        if not any(self._mean(id) > 1.0 for id in outcome.shown):  # else it may be one example's doing
            kind = self._controls(outcome, None)
            if len(kind) >= CONTROLS:
                residual = outcome.quality - sum(kind) / len(kind)
                self.lost[outcome.backend] += DRIFT_STEP * (residual - self.lost[outcome.backend])
        for other in outcome.nearest:
            self.of_kind[outcome.backend, other].append((self.number, outcome))

    def _mean(self, id: str) -> float:
        wealth = self.wealth.get(id)
        return 1.0 if wealth is None else sum(wealth) / len(wealth)


def _low(values: Sequence[float]) -> float:
    """Their mean less one standard error, the spread being at least that of one more value in the middle."""
    n = len(values)
    mean = (sum(values) + 0.5) / (n + 1)
    spread = math.sqrt(max((sum((v - mean) ** 2 for v in values) + 0.25) / n, 1e-9))
    return mean - spread / math.sqrt(n)
