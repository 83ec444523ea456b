"""Whether an example may be shown, and what becomes of one that is there already. Rules, and the SQL they need.

An example that is held is kept, counted and replayed, but not recalled: `Hold` says why. Among answers to one
question the one that most writers gave stays, by the majority vote of Boyer and Moore (1981): an agreeing answer adds
one to the count of confirmations, a contradicting one takes one away, and at zero takes the place.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import NamedTuple

from iccache.examples.agreement import agree
from iccache.examples.credit import GOOD_ENOUGH
from iccache.types import Example, Hold

ENOUGH = 2  # confirmations that release an example from quarantine
WITNESSES_KEPT = 50  # exchanges remembered for each example; of the rest the count alone
HELD_SEARCHED = 2000  # newest examples in quarantine that an answer is compared with


class Known(NamedTuple):
    """The example that is there."""

    original: bool  # its answer is that of its exchange, not of a demonstration or of replay
    subject: str | None
    answer: str
    own_quality: float | None
    confirmations: int
    held: str | None


class Meeting(StrEnum):
    """What a duplicate does to the example that is there."""

    CONFIRMS = "confirms"  # same answer
    YIELDS = "yields"  # the one there is better than any routine answer
    DOUBTS = "doubts"  # another answer, but the one there has more voices
    REPLACES = "replaces"


def meet(there: Known, new: Example, original: bool, floor: float) -> Meeting:
    """`original`: the new answer is a routine one. `floor`: quality below which an answer is known to be poor."""
    poor = there.own_quality is not None and there.own_quality < floor
    if original and agree(there.answer, new.answer):
        return Meeting.CONFIRMS
    if original and not there.original:
        return Meeting.YIELDS
    if original and there.confirmations > 0 and not poor:
        return Meeting.DOUBTS
    return Meeting.REPLACES


def counts(witness: str | None, writer: str | None, known: Collection[str | None]) -> bool:
    """Whether an agreeing answer is one more voice: not the writer's own, and each subject's once."""
    return witness is None or (witness != writer and witness not in known)


class Facts(NamedTuple):
    """What is known of an example."""

    own_quality: float | None
    confirmations: int
    checked: bool  # its quality is not the word of its user alone
    renewed: bool  # its answer was just replaced by a better one


def hold_after(hold: Hold | None, facts: Facts, floor: float) -> Hold | None:
    """The hold that these facts leave.

    A user's praise of an answer does not release it from quarantine: whoever plants an example can praise it as well.
    A suspect stays one until it has another answer, or somebody releases it.
    """
    quality = facts.own_quality
    poor = quality is not None and quality < floor
    good = quality is not None and quality >= GOOD_ENOUGH
    if hold is Hold.SUSPECT:
        return None if facts.renewed and good else hold
    if hold is Hold.QUARANTINE:
        evident = facts.confirmations >= ENOUGH or (facts.checked and good)
        return None if evident and not poor else hold
    return Hold.BAD if poor else None


def hold_at_first(new: Example, floor: float) -> Hold | None:
    """The hold with which an example enters: a poor answer is kept for replay to better it, and not shown."""
    return hold_after(new.held, Facts(new.stats.own_quality, 0, checked=False, renewed=False), floor)


def hold_replaced(before: str | None, new: Example, floor: float) -> Hold | None:
    """The hold of an example whose answer has just been replaced by `new`. Asking again clears no suspect."""
    return Hold.SUSPECT if before == Hold.SUSPECT.value else hold_at_first(new, floor)


# examples whose answer is that of an exchange, or was confirmed by it
ANSWERED_BY = """
SELECT id FROM examples WHERE request_id = ? AND original
UNION SELECT example_id FROM witnesses WHERE request_id = ?
"""
DOUBT = "UPDATE example_stats SET confirmations = confirmations - 1 WHERE example_id = ?"
REPLACE_STATS = "UPDATE example_stats SET own_quality = ?, confirmations = 0 WHERE example_id = ?"
FORGET_WITNESSES = """
DELETE FROM witnesses WHERE example_id = ? AND request_id NOT IN
(SELECT request_id FROM witnesses WHERE example_id = ? ORDER BY at DESC LIMIT ?)
"""
WITH_DERIVED = """
WITH RECURSIVE reached (id) AS (
    SELECT value FROM json_each(?)
    UNION SELECT derived_id FROM derivations JOIN reached ON source_id = reached.id
)
SELECT id, request_id, held FROM examples WHERE id IN (SELECT id FROM reached)
"""
JUDGED = """
SELECT backend, at, quality, shown, considered FROM exchanges
WHERE tenant = ? AND quality IS NOT NULL AND complete ORDER BY at DESC LIMIT ?
"""
NEWEST_HELD = """
SELECT id, embedding FROM examples WHERE tenant = ? AND held = 'quarantine' AND embedder = ? ORDER BY at DESC LIMIT ?
"""
