from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iccache import config
from iccache.examples import eviction
from iccache.examples.eviction import EXACT_UP_TO, Thing, solve
from iccache.types import ExampleStats, Weighed
from replay.store import open_replay_store
from tests.bench import eviction as bench
from tests.factories import AT, DIM, make_example, make_exchange
from tests.replay.world import make_settings

HOUR = 3600.0
WEIGHTS, VALUES = st.integers(1, 60), st.floats(0, 100)


def things_of(pairs: Sequence[tuple[int, float]]) -> list[Thing]:
    return [Thing(f"e{n}", weight, value) for n, (weight, value) in enumerate(pairs)]


def worth(things: Sequence[Thing]) -> float:
    return sum(thing.value for thing in things)


def brute_force(things: Sequence[Thing], capacity: int) -> float:
    """The best value of all subsets that fit."""
    return max(
        worth(subset)
        for size in range(len(things) + 1)
        for subset in itertools.combinations(things, size)
        if sum(thing.weight for thing in subset) <= capacity
    )


def best_by_table(things: Sequence[Thing], capacity: int) -> float:
    """The best value, by dynamic programming over the capacity: a second way of knowing for many."""
    best = np.zeros(capacity + 1)
    for thing in things:
        if thing.weight <= capacity:
            best[thing.weight :] = np.maximum(best[thing.weight :], best[: capacity + 1 - thing.weight] + thing.value)
    return float(best[-1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WEIGHTS, VALUES), max_size=11), st.integers(0, 400))
def test_few_are_solved_as_well_as_by_brute_force(pairs: list[tuple[int, float]], capacity: int) -> None:
    things = things_of(pairs)
    kept = solve(things, capacity)
    assert sum(thing.weight for thing in kept) <= capacity
    assert len({thing.id for thing in kept}) == len(kept)
    assert worth(kept) == pytest.approx(brute_force(things, capacity))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WEIGHTS, VALUES), min_size=EXACT_UP_TO + 1, max_size=60), st.integers(0, 800))
def test_many_are_solved_within_the_bounds(pairs: list[tuple[int, float]], capacity: int) -> None:
    things = things_of(pairs)
    kept = solve(things, capacity)
    optimum = best_by_table(things, capacity)
    assert sum(thing.weight for thing in kept) <= capacity
    assert len({thing.id for thing in kept}) == len(kept)
    slack = 1e-9 * (1 + optimum)
    assert worth(kept) >= optimum / 2 - slack
    assert worth(kept) >= optimum - max(thing.value for thing in things) - slack


def test_the_most_valuable_one_alone_can_be_the_answer() -> None:
    """By value per byte the small ones come first, and then it does not fit."""
    small = [Thing(f"s{n}", 1, 2.0) for n in range(EXACT_UP_TO + 1)]
    kept = solve([*small, Thing("big", 100, 150.0)], 100)
    assert [thing.id for thing in kept] == ["big"]


def test_what_is_worth_nothing_is_kept_while_there_is_room_newest_first() -> None:
    for count in (3, EXACT_UP_TO + 3):
        things = [Thing(f"e{n}", 10, 0.0, at=float(n)) for n in range(count)]
        assert {thing.id for thing in solve(things, 20)} == {f"e{count - 1}", f"e{count - 2}"}


def test_everything_is_kept_where_everything_fits() -> None:
    things = things_of([(10, 0.0)] * 30)
    assert solve(things, 300) == things


def weighed(id: str, **given: Any) -> Weighed:
    fields: dict[str, Any] = {
        **{"at": AT, "text_bytes": 100, "embedding_bytes": 50},
        **{"credit": 0.0, "offloads": 0.0, "offloads_at": AT},
    }
    return Weighed(id=id, **{**fields, **given})


def test_weight_counts_text_and_the_embedding_in_the_store_and_in_the_index() -> None:
    assert eviction.weight(weighed("e")) == 200


@pytest.mark.parametrize(("hours", "left"), [(0, 1.0), (1, 0.9), (2, 0.81)])
def test_value_decays_by_the_hour(hours: int, left: float) -> None:
    assert eviction.value(weighed("e", offloads=4.0), AT + hours * HOUR, 0.9) == pytest.approx((4.0 + 0.5) * left)


def test_a_young_example_is_given_credit_until_it_has_a_record() -> None:
    young, judged, old = weighed("y"), weighed("j", credit=4.0), weighed("o", at=AT - 100 * HOUR)
    values = [eviction.value(one, AT, 0.9) for one in (young, judged, old)]
    assert values == sorted(values, reverse=True)
    assert values[:2] == [0.5, pytest.approx(0.1)]


def test_what_is_too_old_goes_first_even_where_there_is_room() -> None:
    rows = [weighed("old", at=AT - 3 * 86_400, offloads=9.0), weighed("new")]
    due = eviction.plan(rows, config.Cache(ttl_days=2), AT)
    assert (due.expired, due.evicted, due.kept, due.bytes) == (["old"], [], 1, 200)


@pytest.mark.parametrize("count", [10, 200])
def test_used_examples_stay_and_the_capacity_holds(tmp_path: Path, count: int) -> None:
    capacity = count // 4 * 200
    settings = make_settings(tmp_path, "http://127.0.0.1:9", cache={"capacity_bytes": capacity})
    store = open_replay_store(settings)
    used = {f"e{n:03}" for n in range(0, count, 10)}
    for n in range(count):
        id = f"e{n:03}"
        stats = ExampleStats(offloads=2.0, offloads_at=AT) if id in used else ExampleStats()
        store.record(make_exchange(f"request-{id}", at=AT))
        store.admit(make_example(id, at=AT - n * HOUR, stats=stats))
    before, cursor = store.count_examples(), store.last_change()

    done = eviction.upkeep(store, settings, AT + HOUR)

    left = {row.id: row for row in store.weighed()}
    assert used <= set(left)
    assert 0 < sum(eviction.weight(row) for row in left.values()) <= capacity
    assert done.evicted == before - len(left) > 0
    assert len(store.changes(cursor)) == done.evicted, "followers are told"
    gone = next(f"e{n:03}" for n in range(count) if f"e{n:03}" not in left)
    exchange = store.exchange(f"request-{gone}")
    assert exchange is not None and exchange.answer, "eviction saves space; it hides nothing"
    assert eviction.upkeep(store, settings, AT + HOUR) == eviction.Upkeep()


def test_a_quarter_of_the_capacity_keeps_nearly_all_of_the_benefit_of_real_requests() -> None:
    """The bench of the README: nearly all of what the whole cache brings, and more than its rivals."""
    rows = {(r["rule"], r["popularity"]): r["benefit"] for r in bench.measure(shares=[0.25])}
    assert rows["knapsack", "same"] > 0.93
    for day in ("same", "shifts"):
        assert rows["knapsack", day] > max(rows["at random", day], rows["least recently used goes", day])


def test_a_quarter_of_the_capacity_keeps_nearly_all_of_the_offloads() -> None:
    """Use is uneven (Zipf): what is kept by value brings far more than what is kept at random."""
    rng = np.random.default_rng(7)
    offloads = rng.permutation(1000.0 / np.arange(1, 2001))
    rows = [
        weighed(f"e{n}", offloads=o, text_bytes=int(b))
        for n, (o, b) in enumerate(zip(offloads, rng.integers(50, 400, 2000), strict=True))
    ]
    things = [Thing(row.id, eviction.weight(row), eviction.value(row, AT, 0.9)) for row in rows]
    capacity = sum(thing.weight for thing in things) // 4
    benefit = dict(zip((row.id for row in rows), offloads, strict=True))
    kept = sum(benefit[thing.id] for thing in solve(things, capacity))
    assert kept / offloads.sum() > 0.8


def test_old_exchanges_are_trimmed_and_examples_stay(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, "http://127.0.0.1:9", store={"keep_exchanges_days": 1})
    store = open_replay_store(settings)
    for n in range(5):
        store.record(make_exchange(f"request-e{n}", at=AT - n * 86_400))
        store.admit(make_example(f"e{n}"))

    done = eviction.upkeep(store, settings, AT + HOUR)

    assert [e.request_id for e in store.exchanges(0)] == ["request-e0"]
    assert store.count_examples() == 5
    assert done.trimmed >= 4


def test_the_embedding_of_the_factories_has_the_size_that_is_counted(tmp_path: Path) -> None:
    store = open_replay_store(make_settings(tmp_path, "http://127.0.0.1:9"))
    store.admit(make_example("e", system="é", request="ab", answer="c"))
    (row,) = store.weighed()
    assert (row.text_bytes, row.embedding_bytes) == (5, 4 * DIM)
