"""Which of the recalled examples are shown, and in which order. Pure: no clock, no store, no model but utility."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from iccache import config
from iccache.examples.tokens import MESSAGE_TOKENS
from iccache.examples.traits import overlap, traits
from iccache.examples.trust import crowded, most_of_one
from iccache.examples.utility import NAMES as FEATURES
from iccache.examples.utility import Rows, UtilityModel, candidate_rows
from iccache.examples.ways import Shown
from iccache.types import Example, Match, Recalled

PAIR_TOKENS = 2 * MESSAGE_TOKENS  # what showing a pair as two messages adds to its text
SAME_WORDS = 0.75  # overlap above which two requests with the same answer say the same, whatever the embedder
SAME_COSINE = 0.98  # or cosine: for text without spaces; with every embedder measured, only the same text put otherwise
THRESHOLD_STATE = "threshold"  # under which the store keeps what replay has measured
UNRELATED_LOSS = 0.5  # in quality: another task's examples take a student's own abilities away
MAJORITY = 0.5  # vote from which all examples may give one answer: a student that is shown one alone repeats it
UNMEASURED = 0.0  # threshold before any gain was measured: all pass but those whose own record speaks against them
VOTE = FEATURES.index("vote")


class Selection(NamedTuple):
    """What became of the recalled examples."""

    considered: tuple[Match, ...]  # all of them, highest utility first
    shown: tuple[Match, ...]  # in the order to be shown: the best last, next to the question
    tokens: int  # that the shown ones add to the prompt
    seen: Shown = Shown(())  # what is known of the shown ones, in any order


NOTHING = Selection((), (), 0)


class Selector:
    """Takes examples by falling utility as long as they are worth it, say something new, and fit.

    An example of a request identical to this one is as good as any other and is shown like any other: it is the
    student that answers, and the record names what it was shown.
    """

    def __init__(self, utility: UtilityModel, limits: config.Selection, auto_threshold: float | None = None) -> None:
        """`auto_threshold`: what `limits.threshold = "auto"` means by now; None: nothing has been measured."""
        self.utility = utility
        self.limits = limits
        self.auto_threshold = auto_threshold
        self.unrelated = -1.0  # highest cosine that says nothing: what requests of different subjects have anyway

    @property
    def threshold(self) -> float:
        """Utility below which an example is not shown."""
        if self.limits.threshold != "auto":
            return self.limits.threshold
        return UNMEASURED if self.auto_threshold is None else self.auto_threshold

    def _ranked(
        self, recalled: Recalled, rows: Rows, system: str, student: str | None, local: float
    ) -> list[tuple[Match, int]]:
        """All recalled examples with their utility for `student` and their place in `rows`, highest first; ties by
        similarity, then the newer. Those that neither are near nor share a system prompt lose UNRELATED_LOSS.
        """
        if not recalled.nearest:
            return []
        predicted = self.utility.predict(rows, student)
        if local:
            predicted = predicted + local
        nearest = recalled.nearest
        if min([similarity for _, similarity in nearest]) <= self.unrelated:
            foreign = rows[:, FEATURES.index("same_system")] < 0.5 if system.strip() else np.ones(len(rows), bool)
            predicted = predicted - UNRELATED_LOSS * (foreign & (rows[:, 0] <= self.unrelated))
        places = sorted(
            [(-u, -s, -e.at, e.id, i) for i, ((e, s), u) in enumerate(zip(nearest, predicted.tolist(), strict=True))]
        )
        return [(Match(*nearest[i], -u), i) for u, _, _, _, i in places]

    def select(
        self,
        recalled: Recalled,
        *,
        student_window_tokens: int,
        request_tokens: int,
        reply_tokens: int,
        cap: int | None,
        request: str = "",
        system: str,
        now: float,
        student: str | None = None,
        local: float = 0.0,
        asker: str | None = None,
        rows: Rows | None = None,
        tokens_of: Callable[[Example], int] | None = None,
    ) -> Selection:
        """The examples to show `student` for a `request` asked under `system`.

        `local`: what answers to similar requests say that examples gain here beyond what the model expects; it is
        added to all, so it decides how many pass the threshold and not which come first.
        Never more than `cap` (the client's; None: no cap) or `max_examples`, nor more tokens than `max_tokens` or
        than the window leaves beside `request_tokens` and `reply_tokens`. A pair is shown whole or not at all; one
        that does not fit makes room for the next. Of one end user other than the `asker`, at most `writer_share`.
        Where all of three or more would give one answer, and it has no MAJORITY of the recalled, the last of them
        makes room for the next that gives another.
        `tokens_of`: what showing an example adds to the prompt, `example_tokens` unless the student counts otherwise.
        `rows`: what `candidate_rows` gave for the recalled, where that is known: it is the same for every student.
        """
        if rows is None:
            rows = candidate_rows(recalled.nearest, request=request, system=system, now=now)
        tokens_of = tokens_of or example_tokens
        considered = self._ranked(recalled, rows, system, student, local)
        most = self.limits.max_examples if cap is None else min(cap, self.limits.max_examples)
        room = min(self.limits.max_tokens, student_window_tokens - request_tokens - reply_tokens)
        of_one = most_of_one(self.limits.writer_share, most)
        shown: list[Match] = []
        places: list[int] = []
        spare: tuple[Match, int] | None = None  # would give the answer that all the others give
        for match, place in considered:
            if len(shown) >= most or not match.utility >= self.threshold:  # a utility that is no number is not shown
                break
            cost = tokens_of(match.example)
            if match.example.subject is not None and crowded(match.example, [m.example for m in shown], asker, of_one):
                continue
            if cost > room or any(same(match.example, other.example) for other in shown):
                continue
            if len(shown) == most - 1 and rows[place, VOTE] < MAJORITY and _one_answer([*shown, match]):
                spare = spare or (match, place)
                continue
            shown.append(match)
            places.append(place)
            room -= cost
        if spare and len(shown) < most:
            shown.append(spare[0])
            places.append(spare[1])
        return Selection(
            tuple(match for match, _ in considered),
            tuple(reversed(shown)),
            sum(tokens_of(m.example) for m in shown),
            Shown(*self.utility.seen(rows[places]).T.tolist()) if places else Shown(()),
        )


def _one_answer(shown: Sequence[Match]) -> bool:
    """Whether three or more examples all give the same answer."""
    return len(shown) > 2 and len({traits(match.example).answer for match in shown}) == 1


def restored_threshold(state: bytes) -> float:
    """What replay has chosen. Raises ValueError for what it has not written."""
    try:
        at = float(json.loads(state)["at"])
    except (ValueError, TypeError, KeyError) as exc:
        raise ValueError(f"the threshold of utility cannot be read: {exc!r}") from exc
    if not math.isfinite(at):
        raise ValueError("the threshold of utility is no number")
    return at


def example_tokens(example: Example) -> int:
    """Tokens that showing `example` adds to a prompt."""
    return max(example.tokens, 0) + PAIR_TOKENS


def same(a: Example, b: Example) -> bool:
    """Whether showing both says nothing that one does not: the same request, or nearly so with the same answer."""
    one, other = traits(a), traits(b)
    if one.asked == other.asked:
        return True
    if one.answered != other.answered:
        return False
    if overlap(frozenset(one.words), other.words) > SAME_WORDS:
        return True
    return float(a.embedding @ b.embedding) > SAME_COSINE
