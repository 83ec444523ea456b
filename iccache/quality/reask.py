"""The same asked again soon by the same user: the answer before did not do.

Only where the user is known (a session or a subject), so that a service that asks the same for many is no witness; not
within two seconds, which is a program's retry; and not the third time and after, which is a program's habit.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import NamedTuple

from iccache.types import Exchange

SOURCE = "reask"
SCORE = 0.25
SOONEST_S, LATEST_S = 2.0, 120.0  # between an answer's end and the question after it
ALIKE = 0.8  # shared words, of all words of both
REMEMBERED = 20_000  # users, of this process
MOST_CHARS = 20_000  # of a question, that are looked at
WORDS = re.compile(r"\w+")


class Asked(NamedTuple):
    request_id: str
    backend: str
    words: frozenset[str]
    ended: float  # Unix seconds
    again: bool  # it was itself one more time of the same


class Reasks:
    """The last question of each user."""

    def __init__(self) -> None:
        self._last: OrderedDict[tuple[str, str], Asked] = OrderedDict()

    def notice(self, exchange: Exchange) -> Asked | None:
        """The question whose answer did not do, now that `exchange` is over; None: nothing is to be said."""
        who = exchange.session or exchange.subject
        if who is None or not exchange.task or not exchange.complete:
            return None
        key, words = (exchange.tenant, who), frozenset(WORDS.findall(exchange.task[:MOST_CHARS].lower()))
        last = self._last.get(key)
        soon = last is not None and exchange.at - last.ended <= LATEST_S
        again = last is not None and soon and alike(last.words, words)
        self._last[key] = Asked(exchange.request_id, exchange.backend, words, exchange.at + exchange.latency_s, again)
        self._last.move_to_end(key)
        if len(self._last) > REMEMBERED:
            self._last.popitem(last=False)
        if last is None or not again or last.again or exchange.at - last.ended < SOONEST_S:
            return None
        return last


def alike(a: frozenset[str], b: frozenset[str]) -> bool:
    """Whether two questions are nearly the same (Jaccard index of their words)."""
    return bool(a | b) and len(a & b) >= ALIKE * len(a | b)
