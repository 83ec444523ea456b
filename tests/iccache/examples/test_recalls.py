"""What was recalled before is only used where it would be recalled again."""

from __future__ import annotations

import numpy as np

from iccache.examples.recalls import CONFIRMED_FOR_S, LONGEST_CHARS, LONGEST_S, Recalls
from iccache.types import Query, Recalled

FOUND = Recalled(np.ones(1, np.float32), [])
QUERY = Query("t", "text", 3)


def known(now: list[float]) -> Recalls:
    recalls = Recalls(lambda: now[0], kept=2)
    recalls.confirm()
    recalls.put(recalls.state, QUERY, FOUND)
    return recalls


def test_the_same_question_again() -> None:
    recalls = known([0.0])
    assert recalls.get("t", "text", 3) is FOUND
    assert recalls.get("another", "text", 3) is None
    assert recalls.get("t", "text", 4) is None
    assert recalls.get("t", "other", 3) is None


def test_a_change_of_the_store_is_the_end() -> None:
    recalls = known([0.0])
    recalls.forget()
    assert recalls.get("t", "text", 3) is None


def test_what_was_begun_before_a_change_does_not_count_after_it() -> None:
    recalls = known([0.0])
    before = recalls.state
    recalls.forget()
    recalls.put(before, QUERY, FOUND)
    assert recalls.get("t", "text", 3) is None


def test_who_cannot_see_changes_remembers_nothing() -> None:
    now = [0.0]
    recalls = known(now)
    now[0] = CONFIRMED_FOR_S + 0.01
    assert recalls.get("t", "text", 3) is None
    recalls.confirm()
    assert recalls.get("t", "text", 3) is FOUND


def test_nothing_is_remembered_for_long() -> None:
    now = [0.0]
    recalls = known(now)
    now[0] = LONGEST_S + 1
    recalls.confirm()
    assert recalls.get("t", "text", 3) is None


def test_few_and_short_texts_are_kept() -> None:
    recalls = known([0.0])
    for text in ("b", "c", "x" * (LONGEST_CHARS + 1)):
        recalls.put(recalls.state, Query("t", text, 3), FOUND)
    assert recalls.get("t", "text", 3) is None
    assert recalls.get("t", "c", 3) is FOUND
    assert recalls.get("t", "x" * (LONGEST_CHARS + 1), 3) is None
