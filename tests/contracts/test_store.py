"""What every ExampleStore does. A new implementation becomes a parameter of `store`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iccache.errors import ConfigError, StoreError
from iccache.examples import credit
from iccache.examples.sqlite.key import Key
from iccache.examples.store import ExampleStore, open_store, restore_store
from iccache.types import (
    BackendScore,
    Change,
    ChangeKind,
    Considered,
    DecisionKind,
    Example,
    ExampleStats,
    Exchange,
    Feedback,
    Reason,
    Usage,
)
from tests.factories import AT, make_example, make_exchange, make_feedback, make_vector
from tests.postgres import Server

KEY = Key("8f1d3b5a7c9e0f2d4b6a8c0e1f3d5b7a9c1e2f4d6b8a0c3e5f7d9b1a2c4e6f80")
HOUR = 3600.0
DAY = 86400.0


@pytest.fixture(params=["file", "encrypted", "memory", "postgres"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def key(kind: str) -> Key | None:
    return KEY if kind == "encrypted" else None


@pytest.fixture
def store(kind: str, key: Key | None, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ExampleStore]:
    if kind == "postgres":
        url = request.getfixturevalue("postgres_url")
    else:
        url = "sqlite:///:memory:" if kind == "memory" else f"sqlite:///{tmp_path}/store.db"
    with closing(open_store(url, key=key)) as opened:
        yield opened


def stats_of(store: ExampleStore, id: str) -> ExampleStats:
    return store.examples([id])[0].stats


def new_changes(store: ExampleStore, since: int) -> list[Change]:
    return [change._replace(seq=0) for change in store.changes(since)]


def same_example(a: Example, b: Example) -> bool:
    return a._replace(embedding=None) == b._replace(embedding=None) and np.array_equal(a.embedding, b.embedding)  # type: ignore[arg-type]


# opening


@pytest.mark.parametrize("url", ["mysql://localhost/x", "sqlite:///", "iccache.db", "sqlite://x.db"])
def test_another_kind_of_url_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigError, match="sqlite:///FILE nor"):
        open_store(url)


def test_an_empty_store(store: ExampleStore) -> None:
    assert store.exchange("r") is None
    assert store.feedback("r") == []
    assert list(store.exchanges(0.0)) == []
    assert store.examples(["e"]) == []
    assert store.examples([]) == []
    assert store.example_of("r") is None
    assert store.list_examples() == []
    assert store.count_examples() == 0
    assert list(store.embeddings()) == []
    assert store.changes(0) == []
    assert (store.last_change(), store.oldest_change()) == (0, 1)
    assert store.load_state("index") is None
    assert store.spent_today("t", AT) == 0.0
    assert store.session_backend("t", "s") is None
    assert list(store.each_example()) == []
    assert store.answer_to("t", "", "q") is None
    assert store.daily(0.0) == []
    assert store.restored_at() == 0
    assert store.delete_examples(["e"]) == 0
    assert store.purge("t") == {"examples": 0, "exchanges": 0}
    assert not store.update_example("e", answer="x")
    assert store.writable()


# transactions


def test_what_a_failing_transaction_wrote_is_gone(store: ExampleStore) -> None:
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.admit(make_example("e1"))
        raise ZeroDivisionError
    assert store.count_examples() == 0
    assert store.last_change() == 0


def test_a_part_of_a_transaction_can_fail_alone(store: ExampleStore) -> None:
    with store.transaction():
        store.admit(make_example("e1"))
        with pytest.raises(ZeroDivisionError), store.transaction():
            store.admit(make_example("e2"))
            raise ZeroDivisionError
        store.admit(make_example("e3"))
    assert {e.id for e in store.list_examples()} == {"e1", "e3"}


# exchanges


def test_an_exchange_comes_back_as_it_was(store: ExampleStore) -> None:
    exchange = make_exchange(
        subject="ann",
        session="s1",
        stream=True,
        decision=DecisionKind.FALLBACK,
        reason=Reason.STATUS,
        finish_reason="stop",
        usage=Usage(100, 7, 60, True),
        latency_s=1.5,
        first_byte_s=0.25,
        overhead_s=0.004,
        propensity=0.75,
        features=np.array([1.0, 0.1, -3.5e-9]),
        shown=("e2", "e1"),
        considered=(Considered("e2", 0.9, 0.3, True), Considered("e3", 0.5, 0.0, False)),
        backends=(BackendScore("small", 0.8, 0.0, 0.75), BackendScore("large", 0.7, -0.1, 0.25)),
        extra={"tags": ["a"], "n": None},
        task="naïve \x00 日本語 🎉 \ufdd0 \ufdd00",
    )
    store.record(exchange)
    found = store.exchange("r1")
    assert found is not None
    assert found.features is not None and found.features.dtype == np.float64
    np.testing.assert_array_equal(found.features, exchange.features)
    without = {"features": None}
    assert dataclasses.replace(found, **without) == dataclasses.replace(exchange, **without)
    assert isinstance(found.decision, DecisionKind) and isinstance(found.reason, Reason)


def test_an_exchange_recorded_early_is_completed_later(store: ExampleStore) -> None:
    store.record(make_exchange(complete=False, answer="", cost_usd=0.0))
    assert store.add_feedback(make_feedback(score=0.25), tenant="t")
    store.record(make_exchange(answer="whole", cost_usd=0.5))
    found = store.exchange("r1")
    assert found is not None
    assert (found.answer, found.cost_usd, found.complete, found.quality) == ("whole", 0.5, True, 0.25)
    assert store.feedback("r1") == [make_feedback(score=0.25)]


def test_an_incomplete_record_never_replaces_a_complete_one(store: ExampleStore) -> None:
    store.record(make_exchange(answer="whole"))
    store.record(make_exchange(complete=False, answer=""))
    found = store.exchange("r1")
    assert found is not None and found.answer == "whole" and found.complete


def test_uses_are_counted_once_and_only_for_complete_answers(store: ExampleStore) -> None:
    store.admit(make_example("e1"))
    store.admit(make_example("e2"))
    store.record(make_exchange(complete=False, shown=("e1", "gone")))
    assert stats_of(store, "e1").uses == 0
    store.record(make_exchange(shown=("e1", "gone")))
    store.record(make_exchange(shown=("e1", "gone")))
    assert stats_of(store, "e1").uses == 1
    assert stats_of(store, "e2").uses == 0


@pytest.mark.parametrize("seed", range(6))
def test_many_recorded_together_are_as_recorded_one_by_one(store: ExampleStore, seed: int) -> None:
    """Some are known, some come twice, some are incomplete; one has feedback already; examples are shown more often."""
    draw = np.random.default_rng(seed)
    for side in "ab":
        for i in range(4):
            store.admit(make_example(f"{side}e{i}"))
    plan: list[tuple[int, bool, list[int]]] = []
    for _ in range([1, 3, 40, 150, 70, 129][seed]):
        shown = draw.choice(4, int(draw.integers(0, 4)), replace=False).tolist()
        plan.append((int(draw.integers(0, 120)), bool(draw.random() < 0.8), [*shown, *shown[:1]]))
    first = plan[: len(plan) // 3]

    def exchanges(side: str, of: list[tuple[int, bool, list[int]]], answer: str) -> list[Exchange]:
        return [
            make_exchange(
                f"{side}{number:03}", complete=complete, task="q", answer=f"{answer} {i}", features=np.array([0.5, i]),
                shown=tuple(f"{side}e{e}" for e in shown),
            )
            for i, (number, complete, shown) in enumerate(of)
        ]  # fmt: skip

    for side in "ab":
        for exchange in exchanges(side, first, "early"):
            store.record(exchange)
        if first:
            store.add_feedback(make_feedback(f"{side}{first[0][0]:03}", 0.25), tenant="t")
    for exchange in exchanges("a", plan, "later"):
        store.record(exchange)
    store.record_all(exchanges("b", plan, "later"))
    store.record_all([])

    def told(side: str) -> list[Any]:
        found = [e for e in store.exchanges(0) if e.request_id.startswith(side)]
        stats = [stats_of(store, f"{side}e{i}") for i in range(4)]
        rows = [
            dataclasses.replace(
                e, features=e.features.tolist(), request_id=e.request_id[1:], shown=tuple(s[1:] for s in e.shown)
            )
            for e in found
        ]
        return [rows, stats]

    assert told("b") == told("a")
    assert len({number for number, _, _ in plan}) == len(told("a")[0])


def test_of_many_recorded_together_all_are_or_none(store: ExampleStore) -> None:
    broken = make_exchange("broken", extra={"no": object()})
    with pytest.raises(StoreError):
        store.record_all([*(make_exchange(f"r{i}") for i in range(70)), broken])
    assert list(store.exchanges(0)) == []


def test_exchanges_are_listed_by_time_and_tenant(store: ExampleStore) -> None:
    with store.transaction():
        for i in range(2500):  # more than one page, several at the same time
            store.record(make_exchange(f"r{i:04}", at=AT + i // 3, tenant="t" if i % 2 else "u"))
    assert [e.request_id for e in store.exchanges(AT)] == [f"r{i:04}" for i in range(2500)]
    assert [e.request_id for e in store.exchanges(AT + 1, "u")] == [f"r{i:04}" for i in range(4, 2500, 2)]


def test_spending_counts_the_day_in_utc_and_the_tenant(store: ExampleStore) -> None:
    midnight = AT - AT % DAY
    for i, (at, tenant) in enumerate([(midnight - 1, "t"), (midnight, "t"), (midnight + DAY - 1, "t"), (AT, "u")]):
        store.record(make_exchange(f"r{i}", at=at, tenant=tenant, cost_usd=2.0**i))
    store.record(make_exchange("r9", at=midnight + DAY, cost_usd=1000.0))
    assert store.spent_today("t", AT) == 6.0
    assert store.spent_today("t", midnight + DAY) == 1000.0


def test_a_session_remembers_its_last_backend(store: ExampleStore) -> None:
    store.record(make_exchange("r2", session="s", at=AT + 1, backend="large"))
    store.record(make_exchange("r1", session="s", at=AT, backend="small"))
    store.record(make_exchange("r3", session="s", at=AT + 2, backend="other", tenant="u"))
    assert store.session_backend("t", "s") == "large"
    assert store.session_backend("u", "s") == "other"
    assert store.session_backend("t", "s2") is None


# feedback


def test_feedback_needs_a_known_exchange_of_the_tenant(store: ExampleStore) -> None:
    store.record(make_exchange("r1", tenant="u"))
    assert not store.add_feedback(make_feedback("r1"), tenant="t")
    assert not store.add_feedback(make_feedback("nope"), tenant="t")
    assert store.feedback("r1") == []
    assert store.last_change() == 0


def test_an_identical_repeat_changes_nothing(store: ExampleStore) -> None:
    store.record(make_exchange())
    assert store.add_feedback(make_feedback(score=0.5), tenant="t")
    assert store.add_feedback(make_feedback(score=0.5, at=AT + 9), tenant="t")
    assert store.feedback("r1") == [make_feedback(score=0.5)]
    assert new_changes(store, 0) == [Change(0, ChangeKind.QUALITY, "r1", None, 0.5)]


def test_a_new_value_of_a_source_replaces_the_old(store: ExampleStore) -> None:
    store.record(make_exchange())
    store.add_feedback(make_feedback(score=0.25), tenant="t")
    store.add_feedback(make_feedback(score=0.75, at=AT + 9), tenant="t")
    assert store.feedback("r1") == [make_feedback(score=0.75, at=AT + 9)]
    assert new_changes(store, 1) == [Change(0, ChangeKind.QUALITY, "r1", 0.25, 0.75)]


def test_sources_are_weighed_together(store: ExampleStore) -> None:
    store.record(make_exchange())
    for source, score in (("user", 1.0), ("check", 0.0), ("judge", 0.5)):
        store.add_feedback(make_feedback(source=source, score=score), tenant="t")
    found = store.exchange("r1")
    assert found is not None and found.quality == pytest.approx((1.0 * 1 + 0.7 * 0 + 0.5 * 0.5) / 2.2)


@pytest.mark.parametrize("score", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_score_out_of_range_is_refused(store: ExampleStore, score: float) -> None:
    store.record(make_exchange())
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        store.add_feedback(make_feedback(score=score), tenant="t")
    with pytest.raises(ValueError, match="score or a demonstration"):
        store.add_feedback(make_feedback(score=None), tenant="t")
    assert store.feedback("r1") == []


def test_credit_is_shared_among_the_examples_shown(store: ExampleStore) -> None:
    for id in ("e1", "e2"):
        store.admit(make_example(id))
    store.record(make_exchange(shown=("e1", "e2"), relative_cost=0.5))
    store.add_feedback(make_feedback(score=0.8), tenant="t")
    stats = stats_of(store, "e1")
    assert stats == stats_of(store, "e2")
    assert stats == ExampleStats(
        uses=1,
        credit=0.5,
        credited_quality=0.4,
        offloads=0.5,
        offloads_at=AT,
        gain=pytest.approx(credit.GAIN_STEP * 0.2 * 0.5),
    )


def test_replaced_feedback_leaves_what_the_new_value_alone_would_have_left(store: ExampleStore) -> None:
    store.admit(make_example("e1"))
    store.record(make_exchange(shown=("e1",)))
    store.add_feedback(make_feedback(score=0.9), tenant="t")
    store.add_feedback(make_feedback(score=0.1), tenant="t")
    stats = stats_of(store, "e1")
    assert stats.credit == pytest.approx(1.0)
    assert stats.credited_quality == pytest.approx(0.1)
    assert stats.offloads == pytest.approx(0.0)
    assert stats.gain == pytest.approx(credit.GAIN_STEP * 0.9 * 0.5)


def test_feedback_on_an_early_record_follows_the_complete_one(store: ExampleStore) -> None:
    """The first choice failed after the early record: another backend answered, and other examples were shown."""
    for id in ("e1", "e2"):
        store.admit(make_example(id))
    store.record(make_exchange(complete=False, shown=("e1",), offloaded=True))
    store.add_feedback(make_feedback(score=1.0), tenant="t")
    store.record(make_exchange(shown=("e2",), offloaded=False, at=AT + 1))
    was, now = stats_of(store, "e1"), stats_of(store, "e2")
    assert (was.uses, was.credit, was.credited_quality) == (0, 0.0, 0.0)
    assert was.offloads == pytest.approx(0.0, abs=1e-4)
    assert (now.uses, now.credit, now.credited_quality, now.offloads) == (1, 1.0, 1.0, 0.0)


def test_feedback_on_the_own_exchange_is_the_examples_own_quality(store: ExampleStore) -> None:
    store.record(make_exchange("r1"))
    store.add_feedback(make_feedback("r1", 0.25), tenant="t")
    store.admit(make_example("e1", request_id="r1"))  # judged before it was admitted
    assert stats_of(store, "e1").own_quality == 0.25
    store.add_feedback(make_feedback("r1", 0.75), tenant="t")
    assert stats_of(store, "e1").own_quality == 0.75


def test_feedback_on_an_answer_that_was_improved_since_is_not_the_examples(store: ExampleStore) -> None:
    store.record(make_exchange("r1"))
    store.admit(make_example("e1", request_id="r1"))
    store.update_example("e1", answer="better", own_quality=0.9)
    store.add_feedback(make_feedback("r1", 0.0), tenant="t")
    assert stats_of(store, "e1").own_quality == 0.9


def test_a_preference_scores_both(store: ExampleStore) -> None:
    store.record(make_exchange("r1"))
    store.record(make_exchange("r2"))
    assert store.preference("r1", "r2", "t", AT)
    assert store.feedback("r1") == [Feedback("r1", "user", 1.0, AT)]
    assert store.feedback("r2") == [Feedback("r2", "user", 0.0, AT)]


def test_a_preference_over_what_is_unknown_writes_nothing(store: ExampleStore) -> None:
    store.record(make_exchange("r1"))
    store.record(make_exchange("r2", tenant="u"))
    assert not store.preference("r1", "r2", "t", AT)
    assert not store.preference("nope", "r1", "t", AT)
    assert store.feedback("r1") == []
    with pytest.raises(ValueError, match="over itself"):
        store.preference("r1", "r1", "t", AT)


# demonstrations


def demonstrate(store: ExampleStore, request_id: str, answer: str, at: float = AT) -> bool:
    return store.add_feedback(
        Feedback(request_id, "demonstration", None, at),
        tenant="t",
        demonstration=answer,
        embedding=make_vector(request_id),
        embedder="test",
        tokens=9,
    )


def test_a_demonstration_becomes_the_examples_answer(store: ExampleStore) -> None:
    store.record(make_exchange("r1"))
    store.admit(make_example("e1", request_id="r1"))
    seq = store.last_change()
    assert demonstrate(store, "r1", "shown how")
    example = store.examples(["e1"])[0]
    assert (example.answer, example.backend, example.tokens) == ("shown how", "demonstration", 9)
    assert example.stats.own_quality == 1.0
    assert new_changes(store, seq) == [Change(0, ChangeKind.EXAMPLE, "e1")]
    assert demonstrate(store, "r1", "shown how", AT + 1)  # an identical repeat
    assert store.last_change() == seq + 1
    assert demonstrate(store, "r1", "shown better", AT + 2)
    assert store.examples(["e1"])[0].answer == "shown better"


def test_a_demonstration_on_a_students_answer_makes_an_example(store: ExampleStore) -> None:
    store.record(make_exchange("r1", subject="ann"))
    assert demonstrate(store, "r1", "shown how")
    example = store.example_of("r1")
    assert example is not None
    assert (example.tenant, example.subject, example.system) == ("t", "ann", "Be brief.")
    assert (example.request, example.answer, example.backend) == ("the question of r1", "shown how", "demonstration")
    assert example.stats.own_quality == 1.0
    np.testing.assert_array_equal(example.embedding, make_vector("r1"))
    exchange = store.exchange("r1")
    assert exchange is not None and exchange.quality is None  # a better answer is no score of the given one


def test_a_demonstration_while_the_answer_still_streams_outlives_it(store: ExampleStore) -> None:
    store.record(make_exchange("r1", complete=False, answer=""))
    assert store.add_feedback(Feedback("r1", "demonstration", None, AT), tenant="t", demonstration="shown how")
    assert store.example_of("r1") is None  # no embedding was handed in: it waits
    store.record(make_exchange("r1"))
    id = store.admit(make_example("e1", request_id="r1", system="Be brief.", request="the question of r1"))
    example = store.examples([id])[0]
    assert (example.answer, example.backend, example.stats.own_quality) == ("shown how", "demonstration", 1.0)


def test_a_demonstration_and_a_score_do_not_disturb_each_other(store: ExampleStore) -> None:
    store.record(make_exchange("r1"))
    store.admit(make_example("e1", request_id="r1"))
    demonstrate(store, "r1", "shown how")
    store.add_feedback(make_feedback("r1", 0.0), tenant="t")
    assert stats_of(store, "e1").own_quality == 1.0
    exchange = store.exchange("r1")
    assert exchange is not None and exchange.quality == 0.0
    assert {f.source for f in store.feedback("r1")} == {"user", "demonstration"}


# examples


def test_examples_come_back_as_they_were_in_the_order_asked(store: ExampleStore) -> None:
    examples = {
        id: make_example(id, subject="ann", stats=ExampleStats(1, 2.0, 1.5, 0.5, AT, 0.25, 0.75, 2))
        for id in ("e1", "e2", "e3")
    }
    for example in examples.values():
        assert store.admit(example) == example.id
    found = store.examples(["e3", "nope", "e1"])
    assert [e.id for e in found] == ["e3", "e1"]
    assert all(same_example(e, examples[e.id]) for e in found)
    assert found[0].embedding.dtype == np.float32
    own = store.example_of("request-e2")
    assert own is not None and own.id == "e2"


def test_a_duplicate_takes_the_new_answer_and_keeps_id_and_statistics(store: ExampleStore) -> None:
    store.admit(make_example("e1", request="q", stats=ExampleStats(uses=3, own_quality=0.25)))
    seq = store.last_change()
    again = make_example("e2", request="q", answer="new", dialect="messages", at=AT + 5, subject="bob")
    assert store.admit(again) == "e1"
    example = store.examples(["e1"])[0]
    assert same_example(example, again._replace(id="e1", stats=ExampleStats(uses=3)))
    assert store.count_examples() == 1
    assert new_changes(store, seq) == [Change(0, ChangeKind.EXAMPLE, "e1")]


@pytest.mark.parametrize("other", [{"tenant": "u"}, {"system": "Rhyme."}, {"request": "Q"}])
def test_what_differs_in_tenant_system_or_request_is_no_duplicate(store: ExampleStore, other: dict[str, str]) -> None:
    store.admit(make_example("e1", request="q"))
    assert store.admit(make_example("e2", **{"request": "q", **other})) == "e2"


def test_the_border_between_system_and_request_matters(store: ExampleStore) -> None:
    store.admit(make_example("e1", system="ab", request="c"))
    assert store.admit(make_example("e2", system="a", request="bc")) == "e2"


@pytest.mark.parametrize("by", ["replay", "demonstration"])
def test_a_routine_duplicate_does_not_undo_an_improvement(store: ExampleStore, by: str) -> None:
    store.record(make_exchange("r1", system="", task="q"))
    store.admit(make_example("e1", request_id="r1", request="q"))
    if by == "replay":
        store.update_example("e1", expected_answer="the answer of e1", answer="improved", own_quality=0.9)
    else:
        demonstrate(store, "r1", "improved")
    assert store.admit(make_example("e2", request="q", answer="routine", at=AT + 5)) == "e1"
    example = store.examples(["e1"])[0]
    assert (example.answer, example.at, example.request_id) == ("improved", AT + 5, "r1")


def test_examples_are_listed_newest_first(store: ExampleStore) -> None:
    for i in range(6):
        store.admit(
            make_example(f"e{i}", at=AT + i, tenant="t" if i % 2 else "u", subject="ann" if i % 3 == 0 else None)
        )
    assert [e.id for e in store.list_examples()] == ["e5", "e4", "e3", "e2", "e1", "e0"]
    assert [e.id for e in store.list_examples(limit=2, offset=1)] == ["e4", "e3"]
    assert [e.id for e in store.list_examples("t")] == ["e5", "e3", "e1"]
    assert [e.id for e in store.list_examples("t", "ann")] == ["e3"]
    assert [e.id for e in store.list_examples(subject="ann")] == ["e3", "e0"]
    assert (store.count_examples(), store.count_examples("t"), store.count_examples("x")) == (6, 3, 0)


def test_embeddings_are_all_there(store: ExampleStore) -> None:
    with store.transaction():
        for i in range(2100):  # more than two pages
            store.admit(make_example(f"e{i}", at=AT + i))
    found = list(store.embeddings())
    assert [(id, tenant, embedder, at) for id, tenant, embedder, at, _ in found] == [
        (f"e{i}", "t", "test", AT + i) for i in range(2100)
    ]
    np.testing.assert_array_equal(found[7][4], make_vector("the question of e7"))


def test_an_update_sets_what_is_given(store: ExampleStore) -> None:
    store.admit(make_example("e1", stats=ExampleStats(own_quality=0.5, replays=1, gain=0.3)))
    seq = store.last_change()
    assert store.update_example("e1", replays=2, gain=0.0)
    assert store.last_change() == seq
    assert stats_of(store, "e1") == ExampleStats(own_quality=0.5, replays=2, gain=0.0)
    assert store.update_example("e1", answer="", tokens=3, backend="x", embedder="m", embedding=make_vector("z"))
    example = store.examples(["e1"])[0]
    assert (example.answer, example.tokens, example.backend, example.embedder) == ("", 3, "x", "m")
    np.testing.assert_array_equal(example.embedding, make_vector("z"))
    assert new_changes(store, seq) == [Change(0, ChangeKind.EXAMPLE, "e1")]


def test_an_update_does_not_lose_a_concurrent_one(store: ExampleStore) -> None:
    store.admit(make_example("e1", answer="old"))
    assert store.update_example("e1", expected_answer="old", answer="first")
    assert not store.update_example("e1", expected_answer="old", answer="second", replays=7)
    example = store.examples(["e1"])[0]
    assert (example.answer, example.stats.replays) == ("first", 0)


def test_feedback_from_before_a_gain_was_set_no_longer_moves_it(store: ExampleStore) -> None:
    store.admit(make_example("e1"))
    store.record(make_exchange("r1", shown=("e1",)))
    store.add_feedback(make_feedback("r1", 0.0), tenant="t")
    store.update_example("e1", gain=0.0)
    store.add_feedback(make_feedback("r1", 1.0), tenant="t")
    assert (stats_of(store, "e1").gain, stats_of(store, "e1").credit) == (0.0, 0.0)
    store.record(make_exchange("r2", shown=("e1",)))
    store.add_feedback(make_feedback("r2", 0.0), tenant="t")
    stats = stats_of(store, "e1")
    assert stats.gain == pytest.approx(credit.GAIN_STEP * 0.5)
    assert (stats.credit, stats.credited_quality) == (1.0, 0.0), "the record began anew"
    assert stats.offloads == pytest.approx(1.0), "what was earned stays"


def test_a_deleted_example_is_gone_with_its_text(store: ExampleStore) -> None:
    store.record(make_exchange("r1", subject="ann", extra={"x": 1}))
    store.admit(make_example("e1", request_id="r1"))
    store.admit(make_example("e2"))
    store.record(make_exchange("r2", shown=("e1", "e2")))
    store.add_feedback(make_feedback("r2", 1.0), tenant="t")
    seq = store.last_change()
    assert store.delete_examples(["e1", "nope"]) == 1
    assert [e.id for e in store.list_examples()] == ["e2"]
    assert new_changes(store, seq) == [Change(0, ChangeKind.EXAMPLE, "e1")]
    exchange = store.exchange("r1")
    assert exchange is not None
    assert (exchange.system, exchange.task, exchange.answer, exchange.subject, exchange.extra) == ("", "", "", None, {})
    store.add_feedback(make_feedback("r2", 0.0), tenant="t")  # of what was shown, one half is left
    assert stats_of(store, "e2").credited_quality == pytest.approx(0.0)
    store.admit(make_example("e1"))  # the id returns: nothing of the past sticks to it
    store.add_feedback(make_feedback("r2", 0.5), tenant="t")
    assert stats_of(store, "e1").credit == pytest.approx(0.5)


def test_an_evicted_example_leaves_its_exchange_alone(store: ExampleStore) -> None:
    store.record(make_exchange("r1"))
    store.admit(make_example("e1", request_id="r1"))
    assert store.delete_examples(["e1"], keep_exchanges=True) == 1
    exchange = store.exchange("r1")
    assert exchange is not None and exchange.task == "the question of r1"


def fill_for_purge(store: ExampleStore) -> None:
    for tenant in ("t", "u"):
        for subject in ("ann", "bob"):
            key = f"{tenant}-{subject}"
            store.record(make_exchange(f"r-{key}", tenant=tenant, subject=subject, session="s"))
            store.admit(make_example(f"e-{key}", tenant=tenant, subject=subject, request_id=f"r-{key}"))


@pytest.mark.parametrize(
    ("subject", "erased"), [("ann", {"t-ann"}), (None, {"t-ann", "t-bob"}), ("nobody", set[str]())]
)
def test_a_purge_erases_whom_it_names_and_nobody_else(
    store: ExampleStore, subject: str | None, erased: set[str]
) -> None:
    fill_for_purge(store)
    counts = {"examples": len(erased), "exchanges": len(erased)}
    assert store.purge("t", subject, dry_run=True) == counts
    assert store.count_examples() == 4
    assert store.purge("t", subject) == counts
    assert store.purge("t", subject) == {"examples": 0, "exchanges": 0}
    everyone = {"t-ann", "t-bob", "u-ann", "u-bob"}
    assert {e.id for e in store.list_examples()} == {f"e-{key}" for key in everyone - erased}
    for key in everyone:
        exchange = store.exchange(f"r-{key}")
        assert exchange is not None
        assert (exchange.task == "") == (key in erased)
        assert (exchange.subject is None) == (key in erased)


# the feed and saved states


def test_changes_are_numbered_and_read_from_a_cursor(store: ExampleStore) -> None:
    for i in range(5):
        store.admit(make_example(f"e{i}"))
    seqs = [change.seq for change in store.changes(0)]
    assert seqs == sorted(set(seqs)) and store.last_change() == seqs[-1]
    assert [c.seq for c in store.changes(seqs[1], limit=2)] == seqs[2:4]


def test_the_next_change_of_a_kind_is_found(store: ExampleStore) -> None:
    assert store.next_change(ChangeKind.EXAMPLE, 0) is None
    exchange = make_exchange()
    store.admit(make_example("e1"))
    store.record(exchange)
    store.add_feedback(make_feedback(), tenant=exchange.tenant)
    store.admit(make_example("e2"))
    changes = store.changes(0)
    assert {c.kind for c in changes} == set(ChangeKind)
    for kind in ChangeKind:
        for since in range(changes[-1].seq + 1):
            later = [c.seq for c in changes if c.kind is kind and c.seq > since]
            assert store.next_change(kind, since) == (later[0] if later else None)


def test_trimmed_changes_are_not_numbered_again(store: ExampleStore) -> None:
    for i in range(3):
        store.admit(make_example(f"e{i}"))
    assert store.trim_changes(3) == 2
    assert (store.oldest_change(), store.last_change()) == (3, 3)
    assert store.trim_changes(99) == 1
    assert (store.oldest_change(), store.last_change()) == (4, 3)
    store.admit(make_example("e9"))
    assert [c.seq for c in store.changes(0)] == [4]


def test_only_a_newer_state_is_kept(store: ExampleStore) -> None:
    assert store.save_state("router", 5, b"five")
    assert not store.save_state("router", 5, b"also five")
    assert not store.save_state("router", 4, b"four")
    assert store.save_state("index", 1, b"\x00one")
    assert store.load_state("router") == (5, b"five")
    assert store.save_state("router", 6, b"six")
    assert store.load_state("router") == (6, b"six")
    assert store.load_state("index") == (1, b"\x00one")


# upkeep


def test_trim_deletes_what_is_old_a_piece_at_a_time(store: ExampleStore) -> None:
    for i in range(10):
        store.record(make_exchange(f"r{i}", at=AT + i * DAY))
        store.add_feedback(make_feedback(f"r{i}"), tenant="t")
    store.admit(make_example("e1", at=AT))
    now = AT + 10 * DAY
    assert store.trim(now, 0) == 0
    assert [store.trim(now, 6, limit=3) for _ in range(3)] == [3, 1, 0]
    assert [e.request_id for e in store.exchanges(0)] == [f"r{i}" for i in range(4, 10)]
    assert store.feedback("r0") == []
    assert store.count_examples() == 1
    assert store.last_change() == 11 and store.oldest_change() == 1  # written today


def test_sizes_are_told_by_part(store: ExampleStore) -> None:
    before = store.size_bytes()
    assert set(before) == {"examples", "embeddings", "exchanges", "other", "wal", "index"}
    store.admit(make_example("e1", system="é", request="12345", answer="678"))
    store.record(make_exchange(system="", task="abc", answer="d"))
    sizes = store.size_bytes()
    assert (sizes["examples"], sizes["embeddings"], sizes["exchanges"]) == (10, 32, 4)
    store.update_example("e1", answer="")
    assert store.size_bytes()["examples"] == 7
    store.delete_examples(["e1"])
    assert store.size_bytes()["examples"] == 0


def test_a_reader_sees_commits_and_cannot_write(store: ExampleStore) -> None:
    with closing(store.reader()) as reader:
        store.admit(make_example("e1"))
        assert [e.id for e in reader.examples(["e1"])] == ["e1"]
        assert not reader.writable()
        with pytest.raises(StoreError):
            reader.admit(make_example("e2"))
    assert store.count_examples() == 1


@pytest.mark.parametrize("kind", ["file", "encrypted", "memory"])
def test_a_backup_opens_with_all_there_was(store: ExampleStore, key: Key | None, tmp_path: Path) -> None:
    store.admit(make_example("e1"))
    target = tmp_path / "backup.db"
    store.backup(target)
    store.admit(make_example("e2"))
    with closing(open_store(f"sqlite:///{target}", key=key)) as copy:
        assert [e.id for e in copy.list_examples()] == ["e1"]
    assert sorted(p.name for p in tmp_path.iterdir() if "partial" in p.name) == []


def test_each_example_comes_once_in_the_order_admitted(store: ExampleStore) -> None:
    for i in range(250):
        store.admit(make_example(f"e{i}", tenant="ab"[i % 2], subject=("ann", None)[i % 3 == 0], at=AT - i))
    assert [e.id for e in store.each_example()] == [f"e{i}" for i in range(250)]
    assert [e.id for e in store.each_example("a")] == [f"e{i}" for i in range(0, 250, 2)]
    assert [e.id for e in store.each_example("a", "ann")] == [f"e{i}" for i in range(0, 250, 2) if i % 3]
    assert list(store.each_example("c")) == []
    reading = store.each_example()
    first = next(reading)
    assert same_example(first, store.examples(["e0"])[0])
    store.delete_examples([f"e{i}" for i in range(100, 250)])  # while it goes on
    assert len(list(reading)) == 99


def test_the_answer_to_what_would_be_a_duplicate(store: ExampleStore) -> None:
    store.admit(make_example("e1", system="s", request="q", answer="a"))
    assert store.answer_to("t", "s", "q") == "a"
    for other in (("u", "s", "q"), ("t", "", "q"), ("t", "s", "Q"), ("t", "sq", "")):
        assert store.answer_to(*other) is None
    store.update_example("e1", answer="b")
    assert store.answer_to("t", "s", "q") == "b"


def test_daily_sums(store: ExampleStore) -> None:
    midnight = AT - AT % DAY + DAY
    rows = [
        ("r1", midnight - 1, "small", True, 200),
        ("r2", midnight, "small", True, 200),
        ("r3", midnight + 1, "small", False, 502),
        ("r4", midnight + 2, "large", False, 200),
    ]
    for id, at, backend, offloaded, status in rows:
        usage = Usage(100, 10, 40)
        made = {"at": at, "backend": backend, "offloaded": offloaded, "status": status, "usage": usage, "cost_usd": 0.5}
        store.record(make_exchange(id, latency_s=2.0, **made))
    store.record(make_exchange("other", tenant="u", at=midnight))
    store.add_feedback(make_feedback("r2", 0.25), tenant="t")
    before, large, small = store.daily(0.0, "t")
    assert (before.day, large.day, small.day) == ("2023-11-14", "2023-11-15", "2023-11-15")
    assert (large.backend, large.decision, large.requests, large.offloaded_cost_usd) == ("large", "routed", 1, 0.0)
    assert small == ("2023-11-15", "small", "routed", 2, 1, 1, 200, 20, 80, 1.0, 4.0, 1, 0.25, 60, 10, 0.5)
    assert store.daily(midnight, "t") == [large, small]
    assert sum(day.requests for day in store.daily(0.0)) == 5


# restoring


@pytest.mark.parametrize("kind", ["file", "encrypted"])
def test_a_restored_store_holds_what_the_backup_held(tmp_path: Path, key: Key | None) -> None:
    url, copy = f"sqlite:///{tmp_path}/store.db", tmp_path / "copy.db"
    with closing(open_store(url, key=key)) as store:
        store.record(make_exchange("r1"))
        store.admit(make_example("e1"))
        store.save_state("router", 1, b"then")
        store.backup(copy)
        store.admit(make_example("e2"))
        store.add_feedback(make_feedback("r1", 1.0), tenant="t")
        store.delete_examples(["e1"])
        store.save_state("router", 3, b"now")
        with closing(store.reader()) as reader:
            cursor = store.last_change()
            kept = restore_store(url, copy, key=key)
            for each in (store, reader):
                assert [e.id for e in each.each_example()] == ["e1"]
                assert each.feedback("r1") == []
                assert cursor < each.restored_at() < each.oldest_change() <= each.last_change()
                assert cursor < each.oldest_change() - 1  # by which a follower knows
                assert [c.key for c in each.changes(each.restored_at())] == ["e1"]
                assert each.load_state("router") == (each.restored_at() + 1, b"then")
            assert not store.save_state("router", cursor + 1, b"stale")
            last = store.last_change()
            store.admit(make_example("e3"))
            assert [c.seq for c in reader.changes(last)] == [last + 1]
        assert kept is not None
        with closing(open_store(f"sqlite:///{kept}", key=key)) as old:
            assert [e.id for e in old.each_example()] == ["e2"]
            assert old.load_state("router") == (3, b"now")


@pytest.mark.parametrize("kind", ["file", "encrypted"])
def test_restoring_twice_is_restoring(tmp_path: Path, key: Key | None) -> None:
    url, copy = f"sqlite:///{tmp_path}/store.db", tmp_path / "copy.db"
    with closing(open_store(url, key=key)) as store:
        store.backup(copy)
        cursors = [store.last_change()]
        for _ in range(3):
            assert restore_store(url, copy, keep=False, key=key) is None
            assert store.restored_at() > cursors[-1]
            assert cursors[-1] < store.oldest_change() - 1
            cursors.append(store.last_change())
            store.backup(copy)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy.db", "store.db"]


@pytest.mark.parametrize("kind", ["memory"])
def test_a_store_in_memory_takes_no_backup_back(store: ExampleStore, tmp_path: Path) -> None:
    store.backup(tmp_path / "copy.db")
    with pytest.raises(ConfigError, match="memory"):
        restore_store("sqlite:///:memory:", tmp_path / "copy.db")


def test_text_that_no_database_takes_is_an_error_of_the_store(store: ExampleStore) -> None:
    with pytest.raises(StoreError, match="surrogates"):
        store.record(make_exchange(task="\ud800"))
    with pytest.raises(StoreError, match="surrogates"):
        store.admit(make_example()._replace(request="\ud800"))
    with pytest.raises(StoreError, match="surrogates"):
        store.examples(["\ud800"])
    assert store.exchange("r1") is None


# any sequence of feedback leaves what its final values leave

EXCHANGES = [
    make_exchange("r0", shown=("e0",), at=AT, offloaded=True, relative_cost=0.3),
    make_exchange("r1", shown=("e0", "e1", "e2"), at=AT + 2 * HOUR, offloaded=True, relative_cost=1.0),
    make_exchange("r2", shown=("e1", "e0"), at=AT + HOUR, offloaded=False, relative_cost=0.7),
    make_exchange("r3", shown=(), at=AT, offloaded=True, relative_cost=0.0),
    make_exchange("r4", shown=("e2", "gone"), at=AT + 30 * HOUR, offloaded=True, relative_cost=0.5),
]
scores = st.sampled_from([0.0, 0.1, 0.49, 0.5, 0.9, 1.0])
steps = st.one_of(
    st.tuples(st.just("record"), st.integers(0, 4), st.booleans()),
    st.tuples(st.just("feedback"), st.integers(0, 4), st.sampled_from(["user", "check", "judge"]), scores),
)


@contextmanager
def fresh_store(server: Server | None) -> Iterator[ExampleStore]:
    """In memory, or where there is a server, in a database of it."""
    place = nullcontext("sqlite:///:memory:") if server is None else server.empty_store()
    with place as url, closing(open_store(url)) as store:
        fill_with_examples(store)
        yield store


def fill_with_examples(store: ExampleStore) -> None:
    for i in range(3):
        store.admit(make_example(f"e{i}"))


def expected_stats(example: str, order: list[str], qualities: dict[str, float], complete: set[str]) -> ExampleStats:
    """The definitions in credit.py, applied once to the final qualities."""
    now = AT + 30 * HOUR
    stats = {"uses": 0, "credit": 0.0, "quality": 0.0, "offloads": 0.0}
    by_id: dict[str, Exchange] = {e.request_id: e for e in EXCHANGES}
    for exchange in EXCHANGES:
        if example in exchange.shown and exchange.request_id in complete:
            stats["uses"] += 1
    gain = 0.0
    for request_id in order:
        exchange = by_id[request_id]
        if example not in exchange.shown:
            continue
        quality = qualities[request_id]
        share = 1 / len(exchange.shown)
        stats["credit"] += share
        stats["quality"] += quality * share
        if exchange.offloaded and quality >= 0.5:
            stats["offloads"] += share * 0.9 ** ((now - exchange.at) / HOUR)
        gain = 0.8 * gain + 0.2 * (1 - quality) * exchange.relative_cost
    return ExampleStats(stats["uses"], stats["credit"], stats["quality"], stats["offloads"], now, gain)


@settings(max_examples=100, deadline=None)
@given(st.lists(steps, max_size=30))
def test_any_sequence_leaves_the_statistics_of_its_final_values(sequence: list[tuple[object, ...]]) -> None:
    check_any_sequence(None, sequence)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequence=st.lists(steps, max_size=30))
def test_any_sequence_does_so_in_postgres(postgres_server: Server, sequence: list[tuple[object, ...]]) -> None:
    check_any_sequence(postgres_server, sequence)


def check_any_sequence(server: Server | None, sequence: list[tuple[object, ...]]) -> None:
    order: list[str] = []
    final: dict[tuple[str, str], float] = {}
    known: set[str] = set()
    complete: set[str] = set()
    with fresh_store(server) as store:
        for kind, number, *rest in sequence:
            exchange = EXCHANGES[int(str(number))]
            id = exchange.request_id
            if kind == "record":
                store.record(dataclasses.replace(exchange, complete=bool(rest[0])))
                known.add(id)
                complete |= {id} if rest[0] else set()
            else:
                source, score = str(rest[0]), float(str(rest[1]))
                assert store.add_feedback(Feedback(id, source, score, AT), tenant="t") == (id in known)
                if id in known:
                    order += [] if id in order else [id]
                    final[id, source] = score
        qualities = {
            id: credit.combined_quality({s: score for (r, s), score in final.items() if r == id}) or 0.0 for id in order
        }
        now = AT + 30 * HOUR
        for example in store.examples(["e0", "e1", "e2"]):
            expected = expected_stats(example.id, order, qualities, complete)
            offloads = credit.decayed_offloads(example.stats, now)
            actual = example.stats._replace(offloads=offloads, offloads_at=now)
            assert actual[:7] == pytest.approx(expected[:7], abs=1e-9)
        learned: dict[str, float] = {}  # what a follower of the feed ends with
        for change in store.changes(0, limit=10_000):
            if change.kind is ChangeKind.QUALITY:
                assert learned.get(change.key) == change.old and change.new is not None
                learned[change.key] = change.new
        assert learned == pytest.approx(qualities)
