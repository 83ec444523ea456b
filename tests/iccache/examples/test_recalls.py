"""What was recalled before is only used where it would be recalled again."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from iccache.examples.recalls import COMPARED, CONFIRMED_FOR_S, LONGEST_CHARS, LONGEST_S, Recalls
from iccache.types import Example, Query, Recalled, Vector
from tests.factories import make_example

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


def unit(degrees: float) -> Vector:
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], np.float32)


def nearest(held: dict[str, Example], tenant: str, vector: Vector, k: int) -> Recalled:
    """By comparing with everything."""
    own = [(e, float(e.embedding @ vector)) for e in held.values() if e.tenant == tenant]
    return Recalled(vector, sorted(own, key=lambda pair: -pair[1])[:k])


def names(recalled: Recalled) -> list[tuple[str, str]]:
    return [(e.id, e.answer) for e, _ in recalled.nearest]


placed = st.tuples(
    st.sampled_from("abcdefgh"), st.sampled_from("tu"), st.integers(0, 90), st.sampled_from(["", "held"])
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(placed, max_size=8, unique_by=lambda p: p[0]),
    st.lists(st.one_of(placed, st.sampled_from("abcdefgh")), min_size=1, max_size=3),
    st.lists(st.tuples(st.sampled_from("tu"), st.integers(0, 90), st.integers(0, 4)), min_size=1, max_size=6),
)
def test_what_is_still_known_after_a_change_is_what_would_be_found(
    before: list[tuple[str, str, int, str]],
    changes: list[tuple[str, str, int, str] | str],
    asked: list[tuple[str, int, int]],
) -> None:
    def placed_at(id: str, tenant: str, degrees: int, note: str) -> Example:
        return make_example(id, tenant=tenant, embedding=unit(degrees), answer=note)

    held = {p[0]: placed_at(*p) for p in before if p[3] != "held"}
    recalls = Recalls(lambda: 0.0)
    recalls.confirm()
    queries = {Query(tenant, f"{degrees}", k): unit(degrees) for tenant, degrees, k in asked}
    old = {query: nearest(held, query.tenant, vector, query.k) for query, vector in queries.items()}
    for query, recalled in old.items():
        recalls.put(recalls.state, query, recalled)
    changed: dict[str, None] = {}
    for change in changes:
        id = change if isinstance(change, str) else change[0]
        changed[id] = None
        held.pop(id, None)
        if not isinstance(change, str) and change[3] != "held":
            held[id] = placed_at(*change)._replace(answer="new")
    recalls.follow(changed, [held[id] for id in changed if id in held])
    for query, vector in queries.items():
        now, known = nearest(held, query.tenant, vector, query.k), recalls.get(*query)
        if known is not None:
            assert names(known) == names(now)
        elif names(old[query]) == names(now):  # forgotten for nothing: only where a new one is as near as the last
            last = now.nearest[-1][1]
            others = [e for id in changed if id in held and (e := held[id]).tenant == query.tenant]
            assert max(float(e.embedding @ vector) for e in others) > last - 1e-4


def test_what_changed_otherwise_is_forgotten_by_example_and_by_the_request_it_came_from() -> None:
    for name in ("e1", "request-e1"):
        recalls = Recalls(lambda: 0.0)
        recalls.confirm()
        recalls.put(recalls.state, QUERY, Recalled(unit(0), [(make_example("e1", embedding=unit(0)), 1.0)]))
        recalls.drop(["e2", "request-e2"])
        assert recalls.get(*QUERY) is not None
        recalls.drop([name])
        assert recalls.get(*QUERY) is None


def test_so_many_changes_at_once_that_comparing_would_take_long() -> None:
    recalls = known([0.0])
    recalls.follow([], [make_example(f"e{i}", tenant="another") for i in range(COMPARED + 1)])
    assert recalls.get(*QUERY) is None


def test_what_was_begun_before_an_example_came_does_not_count_after_it() -> None:
    for change in (lambda r: r.follow(["e1"], []), lambda r: r.drop(["e1"])):
        recalls = known([0.0])
        before = recalls.state
        change(recalls)
        recalls.put(before, Query("t", "other", 3), FOUND)
        assert recalls.get("t", "other", 3) is None
        recalls.put(recalls.state, Query("t", "other", 3), FOUND)
        assert recalls.get("t", "other", 3) is FOUND
