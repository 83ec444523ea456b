"""Examples in memory are those of the store: whatever changes there, here or by another process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from iccache.examples.at_hand import CONFIRMED_FOR_S, KEPT_S, AtHand, size_of
from iccache.examples.embed.hashed import HashEmbedder
from iccache.examples.retriever import QUICK_CHARS, Retriever
from iccache.examples.sqlite.store import SqliteStore
from iccache.examples.traits import traits
from iccache.types import Example, Hold, Query
from tests.factories import make_example

NOW = 1_900_000_000.0
EMBEDDER = HashEmbedder()
QUERY = Query("acme", "how do I reset my password", 3)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def at_hand(clock: Clock) -> AtHand:
    kept = AtHand(clock=clock)
    kept.confirm()
    return kept


def example(id: str, request: str = "how do I reset my password", **other: object) -> Example:
    vector = EMBEDDER.embed([request])[0]
    return make_example(
        id, tenant="acme", request=request, at=NOW, request_id=f"r-{id}", embedder=EMBEDDER.identity, embedding=vector,
        **other,
    )  # fmt: skip


def test_what_was_put_is_there_until_it_changes(at_hand: AtHand) -> None:
    at_hand.put([example("a"), example("b")])
    assert list(at_hand.get(["a", "b", "c"])) == ["a", "b"]
    at_hand.forget(["a", "c"])
    assert list(at_hand.get(["a", "b"])) == ["b"]
    at_hand.clear()
    assert at_hand.get(["b"]) == {} and at_hand.size == 0


def test_a_judgement_counts_for_the_example_itself_and_for_those_shown(at_hand: AtHand) -> None:
    at_hand.put([example("a"), example("b"), example("c")])
    at_hand.forget_exchange("r-a", ["b"])
    assert list(at_hand.get(["a", "b", "c"])) == ["c"]


def test_who_cannot_see_changes_gives_nothing(at_hand: AtHand, clock: Clock) -> None:
    at_hand.put([example("a")])
    clock.now = CONFIRMED_FOR_S + 0.01
    assert at_hand.get(["a"]) == {}
    at_hand.confirm()
    assert list(at_hand.get(["a"])) == ["a"]


def test_nothing_is_kept_for_long(at_hand: AtHand, clock: Clock) -> None:
    at_hand.put([example("a")])
    clock.now = KEPT_S + 1
    at_hand.confirm()
    assert at_hand.get(["a"]) == {}


def test_it_is_bounded_in_bytes_and_the_latest_stay(clock: Clock) -> None:
    one = size_of(example("e0", answer="x" * 5000))
    at_hand = AtHand(5 * one, clock)
    at_hand.confirm()
    at_hand.put([example(f"e{i}", answer="x" * 5000) for i in range(5)])
    at_hand.get(["e0"])
    at_hand.put([example("e5", answer="x" * 5000)])
    assert sorted(at_hand.get(f"e{i}" for i in range(6))) == ["e0", "e2", "e3", "e4", "e5"]
    assert at_hand.size <= 5 * one
    at_hand.put([example("huge", answer="x" * 10 * one)])
    assert len(at_hand) == 0 and at_hand.size == 0


def test_traits_belong_to_one_version_of_an_example() -> None:
    first = example("a", answer="One  answer")
    assert traits(first) is traits(first)
    assert traits(first).answer == traits(example("b", answer="one answer")).answer
    assert traits(first._replace(answer="another")).answer != traits(first).answer
    assert "traits" not in first._asdict()


# with a store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "store.db")
    for i in range(4):
        opened.admit(example(f"e{i}", f"how do I reset my password {'again ' * i}"))
    yield opened
    opened.close()


class Followed:
    """A retriever that follows its store as the proxy's does."""

    def __init__(self, store: SqliteStore, clock: Clock) -> None:
        self.reader = store.reader()
        self.retriever = Retriever(self.reader, EMBEDDER, at_hand=AtHand(clock=clock))
        self.retriever.load()
        self.cursor = self.reader.last_change()
        self.follow()

    def follow(self) -> None:
        changes = self.reader.changes(self.cursor)
        self.retriever.apply(changes)
        self.cursor = changes[-1].seq if changes else self.cursor
        self.retriever.at_hand.confirm()

    def recall(self) -> list[Example]:
        return [e for e, _ in self.retriever.recall([QUERY], NOW)[0].nearest]

    def at_once(self, now: float = NOW) -> list[Example] | None:
        """None where it takes the store."""
        begun = self.retriever.begin(QUERY)
        if begun is None or begun.missing:
            return None
        found = self.retriever.end(begun, {}, now)
        return None if found is None else [e for e, _ in found.nearest]


@pytest.fixture
def followed(store: SqliteStore, clock: Clock) -> Iterator[Followed]:
    one = Followed(store, clock)
    yield one
    one.reader.close()


def test_what_was_recalled_once_is_recalled_at_once(followed: Followed) -> None:
    assert followed.at_once() is None
    first = followed.recall()
    assert [e.id for e in first] == ["e0", "e1", "e2"]
    assert all(a is b for a, b in zip(first, followed.at_once() or (), strict=True))
    assert all(a is b for a, b in zip(first, followed.recall(), strict=True))
    plain = Retriever(followed.reader, EMBEDDER)
    plain.load()
    for (mine, cosine), (theirs, same) in zip(
        followed.retriever.recall([QUERY], NOW)[0].nearest, plain.recall([QUERY], NOW)[0].nearest, strict=True
    ):
        assert mine.id == theirs.id
        assert cosine == pytest.approx(same)
        assert np.array_equal(mine.embedding, theirs.embedding)


def test_every_change_of_the_store_is_seen(followed: Followed, store: SqliteStore) -> None:
    """Written by another connection, as by another process."""
    followed.recall()
    store.update_example("e0", answer="a better answer")
    followed.follow()
    assert [e.answer for e in followed.recall() if e.id == "e0"] == ["a better answer"]
    store.hold(["e1"], Hold.SUSPECT)
    followed.follow()
    assert "e1" not in [e.id for e in followed.recall()]
    store.delete_examples(["e0"])
    followed.follow()
    assert followed.at_once() is None or "e0" not in [e.id for e in followed.at_once() or ()]
    assert [e.id for e in followed.recall()] == ["e2", "e3"]
    assert [e.id for e in followed.at_once() or ()] == ["e2", "e3"]


def test_a_process_that_cannot_follow_shows_nothing_that_was_deleted(
    followed: Followed, store: SqliteStore, clock: Clock
) -> None:
    followed.recall()
    store.delete_examples(["e0"])
    clock.now += CONFIRMED_FOR_S + 0.01
    assert followed.at_once() is None
    assert "e0" not in [e.id for e in followed.recall()]


def test_what_would_take_long_is_not_done_at_once(followed: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    followed.recall()
    assert followed.at_once() is not None
    assert followed.retriever.begin(QUERY._replace(text="x" * (QUICK_CHARS + 1))) is None
    monkeypatch.setattr(EMBEDDER, "quick", False)
    assert followed.at_once() is None


def test_expired_examples_are_not_at_hand(store: SqliteStore, clock: Clock) -> None:
    followed = Followed(store, clock)
    followed.recall()
    followed.retriever.ttl_s = 10.0
    assert followed.at_once(NOW + 20.0) is None
    assert followed.retriever.recall([QUERY], NOW + 20.0)[0].nearest == []
    followed.reader.close()


def test_only_what_is_not_at_hand_is_read(followed: Followed) -> None:
    first = followed.recall()
    followed.retriever.at_hand.forget(["e1"])
    begun = followed.retriever.begin(QUERY)
    assert begun is not None and begun.missing == ["e1"]
    ended = followed.retriever.end(begun, followed.retriever.read(begun.missing), NOW)
    assert ended is not None and [e.id for e, _ in ended.nearest] == [e.id for e in first]
    assert followed.at_once() is not None
    assert followed.retriever.end(begun, {}, NOW) is None  # it is gone: look further
