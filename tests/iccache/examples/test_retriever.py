"""The retriever finds what the store holds, for its tenant alone, whatever the indexes believe."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iccache.examples.embed.cached import CachedEmbedder
from iccache.examples.embed.hashed import HashEmbedder
from iccache.examples.retriever import Retriever
from iccache.examples.sqlite.store import SqliteStore
from iccache.types import Change, ChangeKind, Example, ExampleStats, Matrix, Query, Vector

NOW = 1_000_000.0


class Shelf:
    """A store in a dict."""

    def __init__(self) -> None:
        self.held: dict[str, Example] = {}
        self.reads = 0

    def examples(self, ids: Sequence[str]) -> list[Example]:
        self.reads += 1
        return [self.held[id] for id in ids if id in self.held]

    def embeddings(self) -> Iterator[tuple[str, str, str, float, Vector]]:
        for e in self.held.values():
            yield e.id, e.tenant, e.embedder, e.at, e.embedding


class Counting(HashEmbedder):
    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def embed(self, texts: Sequence[str]) -> Matrix:
        self.batches.append(len(texts))
        return super().embed(texts)


EMBEDDER = HashEmbedder()


def example(id: str, request: str, tenant: str = "t", **other: Any) -> Example:
    fields: dict[str, Any] = {
        "id": id,
        "tenant": tenant,
        "subject": None,
        "request_id": f"r-{id}",
        "at": NOW,
        "dialect": "chat",
        "system": "",
        "request": request,
        "answer": f"answer of {id}",
        "backend": "large",
        "embedder": EMBEDDER.identity,
        "embedding": EMBEDDER.embed([request])[0],
        "tokens": 10,
        "stats": ExampleStats(),
    }
    return Example(**(fields | other))


def changed(*ids: str) -> list[Change]:
    return [Change(seq, ChangeKind.EXAMPLE, id) for seq, id in enumerate(ids, 1)]


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def retriever(shelf: Shelf) -> Retriever:
    return Retriever(shelf, EMBEDDER, ttl_s=0)


def put(shelf: Shelf, retriever: Retriever, *examples: Example) -> None:
    shelf.held.update((e.id, e) for e in examples)
    retriever.apply(changed(*(e.id for e in examples)))


def ids(retriever: Retriever, text: str, tenant: str = "t", k: int = 10, now: float = NOW) -> list[str]:
    return [e.id for e, _ in retriever.recall([Query(tenant, text, k)], now)[0].nearest]


def test_loading_and_following_find_the_same(shelf: Shelf, retriever: Retriever) -> None:
    put(shelf, retriever, *(example(str(i), f"question number {i} about topic {i % 7}") for i in range(300)))
    loaded = Retriever(shelf, EMBEDDER)
    loaded.load()
    assert len(loaded) == len(retriever) == 300
    for i in range(20):
        text = f"topic {i % 7} number {i}"
        assert ids(loaded, text) == ids(retriever, text)


def test_the_nearest_come_first_with_their_true_cosine(shelf: Shelf, retriever: Retriever) -> None:
    put(shelf, retriever, *(example(str(i), f"question {i} of topic {i % 7}") for i in range(200)))
    query = "question 31 of topic 3"
    vector = EMBEDDER.embed([query])[0]
    recalled = retriever.recall([Query("t", query, 16)], NOW)[0]
    np.testing.assert_array_equal(recalled.embedding, vector)
    expected = sorted((float(e.embedding @ vector) for e in shelf.held.values()), reverse=True)[:16]
    np.testing.assert_allclose([cosine for _, cosine in recalled.nearest], expected, atol=1e-6)
    assert recalled.nearest[0][0].id == "31"


def test_an_empty_cache_recalls_nothing(retriever: Retriever) -> None:
    retriever.load()
    recalled = retriever.recall([Query("t", "anything", 5), Query("other", "", 5)], NOW)
    assert [list(r.nearest) for r in recalled] == [[], []]
    assert recalled[0].embedding.shape == (EMBEDDER.dim,)
    assert retriever.recall([], NOW) == []


def test_k_zero_embeds_and_recalls_nothing(shelf: Shelf, retriever: Retriever) -> None:
    put(shelf, retriever, example("a", "hello"))
    assert list(retriever.recall([Query("t", "hello", 0)], NOW)[0].nearest) == []


def test_a_deleted_example_never_returns_even_before_the_news_of_it(shelf: Shelf, retriever: Retriever) -> None:
    put(shelf, retriever, *(example(str(i), "the same text") for i in range(20)))
    for i in range(19):
        del shelf.held[str(i)]
    assert ids(retriever, "the same text", k=5) == ["19"]
    retriever.apply(changed(*(str(i) for i in range(20))))
    assert ids(retriever, "the same text", k=5) == ["19"]
    assert len(retriever) == 1


def test_what_was_deleted_and_came_back_is_found(shelf: Shelf, retriever: Retriever) -> None:
    put(shelf, retriever, example("a", "hello world"))
    kept = shelf.held.pop("a")
    assert ids(retriever, "hello world") == []
    put(shelf, retriever, kept)
    assert ids(retriever, "hello world") == ["a"]


def test_an_update_replaces(shelf: Shelf, retriever: Retriever) -> None:
    put(shelf, retriever, example("a", "about cats"), example("b", "about dogs"))
    put(shelf, retriever, example("a", "about submarines"))
    assert len(retriever) == 2
    assert ids(retriever, "submarines", k=1) == ["a"]
    assert ids(retriever, "cats and dogs", k=1) == ["b"]


def test_the_cosine_is_that_of_the_store_even_before_the_news(shelf: Shelf, retriever: Retriever) -> None:
    put(shelf, retriever, example("a", "about cats"), example("b", "about dogs"))
    shelf.held["a"] = example("a", "about submarines")
    recalled = retriever.recall([Query("t", "about cats", 2)], NOW)[0]
    for e, cosine in recalled.nearest:
        assert cosine == pytest.approx(float(e.embedding @ recalled.embedding), abs=1e-6)
    assert recalled.nearest[0][0].id == "b"


def test_a_batch_is_embedded_once_and_read_once(shelf: Shelf) -> None:
    embedder = Counting()
    retriever = Retriever(shelf, CachedEmbedder(embedder, 100))
    put(shelf, retriever, *(example(str(i), f"text {i}") for i in range(50)))
    shelf.reads = 0
    queries = [Query("t", f"text {i % 8}", 4) for i in range(16)]
    assert all(len(r.nearest) == 4 for r in retriever.recall(queries, NOW))
    assert embedder.batches == [8]
    assert shelf.reads == 1
    retriever.recall(queries, NOW)
    assert embedder.batches == [8]


def test_expired_examples_are_left_out_and_make_room(shelf: Shelf) -> None:
    retriever = Retriever(shelf, EMBEDDER, ttl_s=100)
    put(shelf, retriever, *(example(str(i), "the same text", at=NOW - i) for i in range(40)))
    assert sorted(ids(retriever, "the same text", k=50, now=NOW + 90), key=int) == [str(i) for i in range(11)]
    assert len(ids(retriever, "the same text", k=5, now=NOW + 90)) == 5
    assert ids(retriever, "the same text", now=NOW + 200) == []
    assert len(retriever) == 0  # they are in the way only once


def test_an_example_is_no_answer_to_its_own_request_when_asked_anew(shelf: Shelf, retriever: Retriever) -> None:
    put(shelf, retriever, *(example(str(i), "the same text") for i in range(10)))
    recalled = retriever.recall([Query("t", "the same text", 9)], NOW, not_from=["r-4"])[0]
    assert sorted(e.id for e, _ in recalled.nearest) == [str(i) for i in range(10) if i != 4]
    assert len(ids(retriever, "the same text")) == 10


def test_embeddings_of_another_model_are_not_compared_but_embedded_anew(shelf: Shelf, retriever: Retriever) -> None:
    old = np.ones(3, np.float32) / np.sqrt(3)
    shelf.held.update((str(i), example(str(i), f"text {i}", embedder="other", embedding=old)) for i in range(5))
    shelf.held["new"] = example("new", "text new")
    retriever.load()
    assert ids(retriever, "text 3") == ["new"]
    assert retriever.stale() == ["0", "1", "2", "3", "4"]
    del shelf.held["0"]
    while written := retriever.reembed(2):
        for id, vector in written:
            shelf.held[id] = shelf.held[id]._replace(embedder=EMBEDDER.identity, embedding=vector)
        retriever.apply(changed(*(id for id, _ in written)))
    assert retriever.stale() == []
    assert ids(retriever, "text 3", k=1) == ["3"]
    assert "0" not in ids(retriever, "text 0")


def test_embedding_anew_goes_on_when_a_write_fails(shelf: Shelf, retriever: Retriever) -> None:
    shelf.held.update((str(i), example(str(i), f"text {i}", embedder="other")) for i in range(4))
    retriever.load()
    assert [id for id, _ in retriever.reembed(2) + retriever.reembed(2) + retriever.reembed(1)] == list("01230")


def test_an_example_that_another_process_embeds_by_an_old_model_becomes_stale(
    shelf: Shelf, retriever: Retriever
) -> None:
    put(shelf, retriever, example("a", "hello"))
    put(shelf, retriever, example("a", "hello", embedder="other"))
    assert ids(retriever, "hello") == []
    assert retriever.stale() == ["a"]
    del shelf.held["a"]
    retriever.apply(changed("a"))
    assert retriever.stale() == []


def test_an_example_embedded_by_another_model_before_the_news_is_not_compared(
    shelf: Shelf, retriever: Retriever
) -> None:
    put(shelf, retriever, example("a", "hello"), example("b", "hello you"))
    shelf.held["a"] = example("a", "hello", embedder="other", embedding=np.full(3, 3**-0.5, np.float32))
    assert ids(retriever, "hello") == ["b"]


def test_a_quality_change_is_none_of_its_business(shelf: Shelf, retriever: Retriever) -> None:
    shelf.held["a"] = example("a", "hello")
    retriever.apply([Change(1, ChangeKind.QUALITY, "a", None, 1.0)])
    assert len(retriever) == 0


def test_a_tenants_last_example_takes_its_index_along(shelf: Shelf, retriever: Retriever) -> None:
    put(shelf, retriever, example("a", "hello"))
    shelf.held.clear()
    retriever.apply(changed("a"))
    assert retriever.catalogue._indexes == {}


def test_tenants_never_see_each_others_examples_over_thousands_of_requests(shelf: Shelf, retriever: Retriever) -> None:
    generator = np.random.default_rng(7)
    tenants = ["a", "b", "a ", "A", ""]
    texts = [f"text {i}" for i in range(12)]  # every tenant asks the same things
    for i in range(600):
        tenant, text = tenants[generator.integers(5)], texts[generator.integers(12)]
        put(shelf, retriever, example(str(i), text, tenant))
        if i % 5 == 0:
            victim = str(generator.integers(i + 1))
            shelf.held.pop(victim, None)
            if i % 2:
                retriever.apply(changed(victim))
    for _ in range(100):
        queries = [
            Query(tenants[generator.integers(5)], texts[generator.integers(12)], int(generator.integers(1, 200)))
            for _ in range(30)
        ]
        for query, recalled in zip(queries, retriever.recall(queries, NOW), strict=True):
            own = sum(e.tenant == query.tenant for e in shelf.held.values())
            assert all(e.tenant == query.tenant for e, _ in recalled.nearest)
            assert len(recalled.nearest) == min(query.k, own)


def test_an_example_whose_tenant_changed_in_the_store_is_not_shown_to_the_old_one(
    shelf: Shelf, retriever: Retriever
) -> None:
    put(shelf, retriever, example("a", "hello", "old"))
    shelf.held["a"] = example("a", "hello", "new")
    assert ids(retriever, "hello", "old") == []
    retriever.apply(changed("a"))
    assert ids(retriever, "hello", "old") == []
    assert ids(retriever, "hello", "new") == ["a"]
    assert set(retriever.catalogue._indexes) == {"new"}


histories = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "drop", "drop silently", "old model"]),
        st.integers(0, 12),
        st.sampled_from("ab"),
        st.sampled_from(["red", "red green", "blue"]),
    ),
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(history=histories)
def test_whatever_happened_recall_is_what_the_store_holds(history: list[tuple[str, int, str, str]]) -> None:
    shelf = Shelf()
    retriever = Retriever(shelf, EMBEDDER)
    steps: dict[str, Callable[[str, str, str], None]] = {
        "put": lambda id, tenant, text: put(shelf, retriever, example(id, text, tenant)),
        "old model": lambda id, tenant, text: put(shelf, retriever, example(id, text, tenant, embedder="old")),
        "drop": lambda id, *_: (shelf.held.pop(id, None), retriever.apply(changed(id)))[1],
        "drop silently": lambda id, *_: (shelf.held.pop(id, None), None)[1],
    }
    for step, i, tenant, text in history:
        steps[step](str(i), tenant, text)
        usable = {e.id for e in shelf.held.values() if e.tenant == tenant and e.embedder == EMBEDDER.identity}
        assert set(ids(retriever, text, tenant, k=20)) == usable
        assert len(ids(retriever, text, tenant, k=3)) == min(3, len(usable))


def test_on_the_real_store_it_follows_the_feed() -> None:
    store = SqliteStore(":memory:")
    for i in range(30):
        store.admit(example(f"e{i}", f"question {i} of topic {i % 5}", "ab"[i % 2]))
    retriever = Retriever(store, EMBEDDER)
    cursor = store.last_change()
    retriever.load()
    assert len(retriever) == 30
    assert ids(retriever, "question 4 of topic 4", "a", k=1) == ["e4"]
    assert ids(retriever, "question 4 of topic 4", "c") == []
    store.delete_examples(["e4"])
    assert "e4" not in ids(retriever, "question 4 of topic 4", "a", k=30)
    store.admit(example("new", "something else entirely", "a"))
    old = np.full(3, 3**-0.5, np.float32)
    store.admit(example("old", "from another model", "a", embedder="other", embedding=old))
    retriever.apply(store.changes(cursor))
    assert len(retriever) == 30
    assert ids(retriever, "something else entirely", "a", k=1) == ["new"]
    for id, vector in retriever.reembed(10):
        assert store.update_example(id, embedder=EMBEDDER.identity, embedding=vector)
    retriever.apply(store.changes(cursor))
    assert ids(retriever, "from another model", "a", k=1) == ["old"]
    assert retriever.stale() == []
    store.close()
