"""What every index does, checked against comparing with everything."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iccache.examples.index import VectorIndex
from iccache.examples.index.clustered import ClusteredIndex
from iccache.examples.index.flat import FlatIndex
from iccache.types import Vector
from tests.vectors import clustered, units

DIM = 8


def emptied(dim: int) -> ClusteredIndex:
    """A clustered index all of whose examples were removed: what is added is in its tail."""
    old = np.concatenate([units(99, 60, dim), np.eye(dim), -np.eye(dim)]).astype(np.float32)  # the whole of every range
    index = clustered({f"old {i}": vector for i, vector in enumerate(old)})
    for i in range(len(old)):
        index.remove(f"old {i}")
    return index


MAKERS: dict[str, Callable[[int], VectorIndex]] = {"flat": FlatIndex, "clustered": emptied}
ROUNDING = {"flat": 1e-5, "clustered": 0.03}  # of a cosine, in so few dimensions


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[[int], VectorIndex]:
    return MAKERS[request.param]


def brute_force(known: dict[str, Vector], query: Vector, k: int) -> list[float]:
    return sorted((float(vector @ query) for vector in known.values()), reverse=True)[:k]


def agrees(index: VectorIndex, known: dict[str, Vector], query: Vector, k: int) -> None:
    off = ROUNDING["flat" if isinstance(index, FlatIndex) else "clustered"]
    if isinstance(index, ClusteredIndex):
        index.probes = 1_000_000  # all lists: what is left is rounding
    found = index.search(query, k)
    np.testing.assert_allclose([cosine for _, cosine in found], brute_force(known, query, k), atol=off)
    assert len({id for id, _ in found}) == len(found)
    for id, cosine in found:
        assert cosine == pytest.approx(float(known[id] @ query), abs=off)
    assert len(index) == len(known)
    assert all(id in index for id in known)


def test_an_empty_index_finds_nothing(make: Callable[[int], VectorIndex]) -> None:
    index = make(DIM)
    assert index.search(units(0, 1)[0], 5) == []
    assert len(index) == 0
    assert "a" not in index


def test_fewer_than_k_are_not_padded(make: Callable[[int], VectorIndex]) -> None:
    index = make(DIM)
    index.add_many(["a", "b"], units(0, 2))
    assert len(index.search(units(1, 1)[0], 5)) == 2
    assert len(index.search(units(1, 1)[0], 1)) == 1
    assert index.search(units(1, 1)[0], 0) == []
    assert index.search(units(1, 1)[0], -1) == []


def test_itself_is_nearest_with_cosine_one(make: Callable[[int], VectorIndex]) -> None:
    index, vectors = make(DIM), units(0, 100)
    index.add_many([str(i) for i in range(100)], vectors)
    for i in range(100):
        id, cosine = index.search(vectors[i], 1)[0]
        assert id == str(i)
        assert cosine == pytest.approx(1.0, abs=1e-6 if isinstance(index, FlatIndex) else 0.03)
        assert cosine <= 1.0


def test_the_same_id_replaces(make: Callable[[int], VectorIndex]) -> None:
    index, (old, new) = make(DIM), units(0, 2)
    index.add("a", old)
    index.add("a", new)
    assert len(index) == 1
    assert index.search(new, 5) == [("a", pytest.approx(1.0, abs=0.03))]
    index.add_many(["b", "b"], np.stack([new, old]))
    assert dict(index.search(old, 5))["b"] == pytest.approx(1.0, abs=0.03)


def test_what_was_removed_is_not_found_again(make: Callable[[int], VectorIndex]) -> None:
    index, vectors = make(DIM), units(0, 200)
    index.add_many([str(i) for i in range(200)], vectors)
    for i in range(0, 200, 2):
        index.remove(str(i))
        index.remove(str(i))
    assert len(index) == 100
    for vector in vectors:
        assert all(int(id) % 2 for id, _ in index.search(vector, 200))


def test_identical_vectors_are_all_found(make: Callable[[int], VectorIndex]) -> None:
    index, vector = make(DIM), units(0, 1)[0]
    for i in range(50):
        index.add(str(i), vector)
    assert {id for id, _ in index.search(vector, 50)} == {str(i) for i in range(50)}


@pytest.mark.parametrize("vector", [np.ones(DIM + 1), np.full(DIM, np.nan), np.full(DIM, np.inf)])
def test_a_broken_vector_is_refused_and_changes_nothing(make: Callable[[int], VectorIndex], vector: Vector) -> None:
    index = make(DIM)
    index.add("a", units(0, 1)[0])
    with pytest.raises(ValueError):
        index.add("b", vector.astype(np.float32))
    assert len(index) == 1
    assert "b" not in index


def test_the_caller_may_reuse_its_array(make: Callable[[int], VectorIndex]) -> None:
    index, vector = make(DIM), units(0, 1)[0].copy()
    index.add("a", vector)
    kept = vector.copy()
    vector[:] = 0.0
    assert index.search(kept, 1)[0][1] == pytest.approx(1.0, abs=0.03)


steps = st.lists(
    st.tuples(st.sampled_from(["add", "add", "remove", "search"]), st.integers(0, 30), st.integers(0, 10_000)),
    max_size=120,
)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=150, deadline=None)
@given(steps=steps)
def test_any_history_agrees_with_brute_force(name: str, steps: list[tuple[str, int, int]]) -> None:
    index = MAKERS[name](DIM)
    known: dict[str, Vector] = {}
    for step, i, seed in steps:
        if step == "add":
            known[str(i)] = units(seed, 1)[0]
            index.add(str(i), known[str(i)])
        elif step == "remove":
            known.pop(str(i), None)
            index.remove(str(i))
        else:
            agrees(index, known, units(seed, 1)[0], i)
    agrees(index, known, units(1, 1)[0], 10)


def test_growing_and_shrinking_by_thousands_agrees_with_brute_force(make: Callable[[int], VectorIndex]) -> None:
    index, vectors = make(DIM), units(3, 5000)
    known = {str(i): vector for i, vector in enumerate(vectors)}
    index.add_many(list(known), vectors)
    generator = np.random.default_rng(4)
    for i in generator.permutation(5000)[:4900]:
        index.remove(str(i))
        del known[str(i)]
        if i % 250 == 0:
            agrees(index, known, vectors[i], 10)
    agrees(index, known, vectors[0], 200)
