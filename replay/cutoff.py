"""The rank at which a replay no longer buys offloading, found while the run goes on.

What an improved answer can save, until it has paid back or not, is

    potential(e) = recovered * lost(e) * gap(e)

    lost(e)     answers per day that e was shown for and that were not good enough, each shared among the examples shown
                for it, times `replay.payback_days`: offloads that did not succeed
    gap(e)      what one such answer costs more on the dearest backend than on the cheapest student with examples
    recovered   share of lost answers that earlier improvements turned into good ones: measured on the answers that
                were scored after them, shrunk towards one half by PRIOR_ANSWERS answers

Over the latest WINDOW rounds, with `improved` the share of them that found a better answer, the run stops when

    improved * sum(potential) < sum(what the rounds cost)

The order descends in gain, so that what follows is worth less still. It also stops when none of WINDOW rounds improved
anything (at a chance of 0.14 or more that has a probability under 5 %); where there is no student, or it is no
cheaper, that rule stands alone.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from iccache import config
from replay.prices import nusd
from replay.store import Record, Recovery

WINDOW = 20  # rounds
PRIOR_ANSWERS = 10.0
PRIOR_RECOVERED = 0.5
DAY_S = 86_400.0
LEAST_AGE_DAYS = 1.0  # what was seen in an hour is not taken for every hour


class Round(NamedTuple):
    """One example that was asked again."""

    improved: bool
    potential_nusd: float
    cost_nusd: int


class CutOff:
    """Watches the rounds of one invocation."""

    def __init__(self, pays_in_money: bool) -> None:
        """`pays_in_money`: whether a good answer of a student is cheaper than the dearest backend's."""
        self.pays_in_money = pays_in_money
        self.rounds = 0
        self.cost_nusd = 0
        self.saving_nusd = 0.0  # potential of what was improved
        self._lately: deque[Round] = deque(maxlen=WINDOW)

    def add(self, round: Round) -> None:
        self.rounds += 1
        self.cost_nusd += round.cost_nusd
        self.saving_nusd += round.potential_nusd if round.improved else 0.0
        self._lately.append(round)

    @property
    def reached(self) -> bool:
        """Whether the latest rounds were not worth what they cost."""
        if len(self._lately) < WINDOW:
            return False
        improved = sum(r.improved for r in self._lately) / WINDOW
        if improved == 0.0 or not self.pays_in_money:
            return improved == 0.0
        return improved * sum(r.potential_nusd for r in self._lately) < sum(r.cost_nusd for r in self._lately)


def recovered(improvements: list[Recovery]) -> float:
    """The share of lost answers that improvements win back, in [0, 1], from what was scored before and after them."""
    won, lost = PRIOR_ANSWERS * PRIOR_RECOVERED, PRIOR_ANSWERS
    for one in improvements:
        won += one.answers * (one.quality - one.quality_before)
        lost += one.answers * (1.0 - one.quality_before)
    return min(1.0, max(0.0, won / lost))


def lost(row: Record, payback_days: float, now: float) -> float:
    """Answers that go wrong with this example within `payback_days` if nothing changes; in shares of answers."""
    age_days = max(LEAST_AGE_DAYS, (now - row.at) / DAY_S)
    return max(0.0, row.credit - row.credited_quality) / age_days * payback_days


def gap_nusd(row: Record, student: config.Backend | None, dearest: config.Backend | None, shown: int) -> float:
    """What an answer like this example's costs more on the dearest backend than on `student` shown `shown` of its kind.

    Not below 0; 0 without a student.
    """
    if student is None or dearest is None:
        return 0.0
    bytes_per_token = 4
    given = (row.system_bytes + row.request_bytes) // bytes_per_token
    made = row.answer_bytes // bytes_per_token + 1
    return float(max(0, nusd(dearest, given, made) - nusd(student, given + shown * row.tokens, made)))
