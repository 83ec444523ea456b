"""Whether an example is shown: duplicates, confirmations, holds, and what was made from what; for every store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from iccache.examples.store import ExampleStore, open_store
from iccache.types import ChangeKind, Considered, Example, ExampleStats, Feedback, Hold
from tests.factories import AT, make_example, make_exchange, make_feedback


@pytest.fixture(params=["sqlite:///:memory:", "sqlite:///{tmp_path}/store.db"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ExampleStore]:
    with closing(open_store(request.param.format(tmp_path=tmp_path), quality_floor=0.3)) as opened:
        yield opened


def example(store: ExampleStore, id: str = "e1") -> Example:
    return store.examples([id])[0]


def again(store: ExampleStore, n: int, subject: str | None, answer: str = "yes") -> None:
    given = {"request": "q", "answer": answer, "subject": subject, "at": AT + n}
    store.admit(make_example(f"again{n}", request_id=f"r{n}", **given))


# duplicates


def test_the_same_answer_strengthens_the_example_that_is_there(store: ExampleStore) -> None:
    store.admit(make_example("e1", request="q", answer="Yes.", subject="ann", stats=ExampleStats(own_quality=0.9)))
    again(store, 1, "bob")
    again(store, 2, "cyd")
    found = example(store)
    assert (found.stats.confirmations, found.at, found.subject, found.answer) == (2, AT + 2, "ann", "Yes.")
    assert found.stats.own_quality == 0.9
    assert store.count_examples() == 1


def test_one_writer_is_one_voice(store: ExampleStore) -> None:
    store.admit(make_example("e1", request="q", answer="yes", subject="ann"))
    for n, subject in enumerate(["ann", "ann", "bob", "bob", "bob"]):
        again(store, n, subject)
    assert example(store).stats.confirmations == 1
    assert example(store).at == AT + 4


def test_writers_without_a_name_are_a_voice_each(store: ExampleStore) -> None:
    store.admit(make_example("e1", request="q", answer="yes"))
    for n in range(3):
        again(store, n, None)
    assert example(store).stats.confirmations == 3


def test_the_answer_of_most_writers_stays(store: ExampleStore) -> None:
    store.admit(make_example("e1", request="q", answer="yes", subject="ann"))
    again(store, 1, "bob")
    again(store, 2, "mallory", "no")
    assert (example(store).answer, example(store).stats.confirmations) == ("yes", 0)
    again(store, 3, "mallory", "no")
    assert (example(store).answer, example(store).subject, example(store).at) == ("no", "mallory", AT + 3)


def test_feedback_on_a_confirming_answer_is_feedback_on_the_examples(store: ExampleStore) -> None:
    store.admit(make_example("e1", request="q", answer="yes"))
    store.record(make_exchange("r1", system="", task="q", answer="yes"))
    again(store, 1, "bob")
    store.add_feedback(make_feedback("r1", 0.1), tenant="t")
    assert (example(store).stats.own_quality, example(store).held) == (0.1, Hold.BAD)


# the quality floor


def test_what_turns_out_poor_is_no_longer_shown_until_it_is_better(store: ExampleStore) -> None:
    store.record(make_exchange("r1"))
    store.admit(make_example("e1", request_id="r1"))
    seq = store.last_change()
    store.add_feedback(make_feedback("r1", 0.2), tenant="t")
    assert example(store).held is Hold.BAD
    assert (ChangeKind.EXAMPLE, "e1") in {(c.kind, c.key) for c in store.changes(seq)}
    store.add_feedback(make_feedback("r1", 0.4), tenant="t")
    assert example(store).held is None
    store.add_feedback(make_feedback("r1", 0.0), tenant="t")
    store.update_example("e1", answer="better", own_quality=0.8)
    assert example(store).held is None


def test_what_is_known_to_be_poor_never_was_shown(store: ExampleStore) -> None:
    store.record(make_exchange("r1"))
    store.add_feedback(make_feedback("r1", 0.2), tenant="t")
    store.admit(make_example("e1", request_id="r1"))
    assert example(store).held is Hold.BAD


def test_a_poor_answer_makes_room_at_once(store: ExampleStore) -> None:
    store.record(make_exchange("r0"))
    store.admit(make_example("e1", request_id="r0", request="q", answer="yes"))
    again(store, 1, None)
    store.add_feedback(make_feedback("r0", 0.0), tenant="t")
    again(store, 2, None, "no")
    assert (example(store).answer, example(store).held, example(store).stats.own_quality) == ("no", None, None)


# quarantine


def quarantined(store: ExampleStore, **given: object) -> None:
    store.record(make_exchange("r0", subject="ann"))
    made = make_example("e1", request_id="r0", request="q", answer="yes", subject="ann")
    store.admit(made._replace(held=Hold.QUARANTINE, **given))


def test_two_other_writers_release_from_quarantine(store: ExampleStore) -> None:
    quarantined(store)
    for n, subject in enumerate(["ann", "ann", "bob", "bob"]):
        again(store, n, subject)
    assert example(store).held is Hold.QUARANTINE
    again(store, 9, "cyd")
    assert example(store).held is None


@pytest.mark.parametrize(("source", "released"), [("user", False), ("check", True), ("judge", True)])
def test_praise_by_its_user_alone_does_not_release(store: ExampleStore, source: str, released: bool) -> None:
    quarantined(store)
    store.add_feedback(Feedback("r0", source, 1.0, AT), tenant="t")
    assert (example(store).held is None) == released


def test_a_demonstration_does_not_release_either(store: ExampleStore) -> None:
    quarantined(store)
    store.add_feedback(make_feedback("r0", None, "demonstration"), tenant="t", demonstration="better")
    assert (example(store).answer, example(store).held) == ("better", Hold.QUARANTINE)


def test_what_is_held_near_a_text_is_found(store: ExampleStore) -> None:
    quarantined(store)
    store.admit(make_example("free"))
    store.admit(make_example("theirs", tenant="u")._replace(held=Hold.QUARANTINE))
    found = store.held_near("t", example(store).embedding, "test", 5)
    assert [id for id, _ in found] == ["e1"]
    assert found[0][1] == pytest.approx(1.0)
    assert store.held_near("t", example(store).embedding, "other model", 5) == []
    assert store.held_near("t", np.zeros(3, dtype=np.float32), "test", 5) == []


# holding by hand, and derived entries


def test_held_examples_are_kept_and_not_among_the_embeddings(store: ExampleStore) -> None:
    for id in ("e1", "e2"):
        store.admit(make_example(id))
    assert store.hold(["e1", "nobody"], Hold.SUSPECT) == ["e1"]
    assert store.hold(["e1"], Hold.BAD) == []
    assert [id for id, *_ in store.embeddings()] == ["e2"]
    assert {e.id for e in store.list_examples()} == {"e1", "e2"}
    assert store.release(["e1", "e2"]) == ["e1"]
    assert [id for id, *_ in store.embeddings()] == ["e1", "e2"]


def test_what_was_made_from_an_example_is_held_with_it(store: ExampleStore) -> None:
    for id in ("source", "guide", "guide of guides", "other"):
        store.admit(make_example(id))
    store.derive("guide", ["source", "other"])
    store.derive("guide of guides", ["guide"])
    assert set(store.hold(["source"], Hold.SUSPECT)) == {"source", "guide", "guide of guides"}
    assert example(store, "other").held is None


def test_what_was_made_from_an_example_is_deleted_and_evicted_with_it(store: ExampleStore) -> None:
    for id in ("a", "from a", "b", "from b", "other"):
        store.admit(make_example(id))
    store.derive("from a", ["a"])
    store.derive("from b", ["b"])
    assert store.delete_examples(["a"]) == 2
    assert store.delete_examples(["b"], keep_exchanges=True) == 2
    assert [e.id for e in store.each_example()] == ["other"]


def test_a_suspect_stays_one_when_it_is_asked_again_and_not_when_replay_betters_it(store: ExampleStore) -> None:
    store.admit(make_example("e1", request="q", answer="yes"))
    store.hold(["e1"], Hold.SUSPECT)
    again(store, 1, None)
    again(store, 2, None, "no")
    again(store, 3, None, "no")
    assert (example(store).answer, example(store).held) == ("no", Hold.SUSPECT)
    store.update_example("e1", own_quality=0.9)
    assert example(store).held is Hold.SUSPECT
    store.update_example("e1", answer="bettered", own_quality=0.9)
    assert example(store).held is None


def test_a_purge_forgets_who_confirmed(store: ExampleStore) -> None:
    store.record(make_exchange("r1", subject="bob"))
    store.admit(make_example("e1", request="q", answer="yes", subject="ann"))
    again(store, 1, "bob")
    store.purge("t", "bob")
    store.record(make_exchange("r1", subject="bob"))
    store.add_feedback(make_feedback("r1", 0.0), tenant="t")
    assert example(store).stats.own_quality is None


# what outcomes say, erasure and retention


def test_scored_answers_are_read_with_what_was_shown(store: ExampleStore) -> None:
    considered = [Considered("e1", 0.9, 0.5, True), Considered("e2", 0.8, 0.4, False)]
    for n in range(4):
        store.record(make_exchange(f"r{n}", at=AT + n, shown=("e1",), considered=considered))
        if n:
            store.add_feedback(make_feedback(f"r{n}", n / 4), tenant="t")
    store.record(make_exchange("theirs", tenant="u"))
    assert store.judged_tenants() == ["t"]
    found = store.judged("t", 2)
    assert [(o.at, o.quality, o.shown, o.nearest) for o in found] == [
        (AT + 2, 0.5, ("e1",), ("e1", "e2")),
        (AT + 3, 0.75, ("e1",), ("e1", "e2")),
    ]


def test_a_released_or_bettered_example_is_judged_from_then_on(store: ExampleStore) -> None:
    for id in ("e1", "e2", "e3"):
        store.admit(make_example(id))
    store.hold(["e1"], Hold.SUSPECT)
    assert {s.since for s in store.standings("t").values()} == {0.0}
    store.release(["e1"])
    store.update_example("e2", answer="better")
    found = store.standings("t")
    assert {id for id, s in found.items() if s.since} == {"e1", "e2"}
    assert found["e1"].order < found["e2"].order < found["e3"].order


def test_an_erasure_takes_what_was_learned_along(store: ExampleStore) -> None:
    store.record(make_exchange("r1", subject="ann", features=np.ones(3)))
    store.record(make_exchange("r2", subject="bob", features=np.ones(3)))
    store.save_state("router", 1, b"knows ann")
    store.save_state("import:1", 1, b"a bookmark")
    assert store.erasures() == (0, 0.0)
    store.purge("t", "nobody")
    assert store.load_state("router") is not None
    store.purge("t", "ann")
    assert store.erasures()[0] == 1
    assert store.load_state("router") is None
    assert store.load_state("import:1") is not None
    ann, bob = store.exchange("r1"), store.exchange("r2")
    assert ann is not None and ann.features is None
    assert bob is not None and bob.features is not None


def test_what_is_older_than_a_tenant_keeps_is_erased(store: ExampleStore) -> None:
    for n in range(5):
        store.record(make_exchange(f"r{n}", at=AT + n))
        store.admit(make_example(f"e{n}", at=AT + n, request_id=f"r{n}"))
    store.record(make_exchange("theirs", tenant="u", at=AT))
    assert store.expire("t", AT + 3, limit=2) == 4
    assert store.expire("t", AT + 3, limit=2) == 2
    assert store.expire("t", AT + 3) == 0
    assert [e.id for e in store.each_example()] == ["e3", "e4"]
    assert [e.request_id for e in store.exchanges(0)] == ["theirs", "r3", "r4"]
