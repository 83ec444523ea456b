"""A snapshot is a cache of the store and nothing more: what it says is what the store says, or it is not used."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iccache.examples import catalogue, snapshots
from iccache.examples.catalogue import Catalogue
from iccache.examples.index.clustered import clusters
from iccache.examples.index.snapshot import Snapshot, SnapshotError, beside, scrub
from iccache.examples.retriever import Retriever
from iccache.examples.snapshots import Snapshots, Stopped, apply, write_snapshot
from iccache.examples.sqlite.store import SqliteStore
from iccache.examples.store import restore_store
from iccache.types import Example, ExampleStats, Matrix, Query, Vector
from tests.vectors import EMBEDDER, clustered, units

DIM = 16
NOW = 1_000_000.0


class Known:
    """An embedder whose texts are numbers of vectors."""

    identity = EMBEDDER
    dim = DIM

    def embed(self, texts: list[str]) -> Matrix:
        return np.concatenate([units(int(text), 1, DIM) for text in texts]) if texts else np.empty((0, DIM), np.float32)


def example(id: str, seed: int, tenant: str = "t", embedder: str = EMBEDDER) -> Example:
    return Example(
        id=id,
        tenant=tenant,
        subject=None,
        request_id=f"r-{id}",
        at=NOW,
        dialect="chat",
        system="",
        request=f"{id} {seed}",
        answer="answer",
        backend="large",
        embedder=embedder,
        embedding=units(seed, 1, DIM)[0],
        tokens=10,
        stats=ExampleStats(),
    )


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few examples are enough to be clustered."""
    monkeypatch.setattr(catalogue, "FLAT_BELOW", 50)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "store.db")
    yield opened
    opened.close()


@pytest.fixture
def kept(store: SqliteStore) -> Iterator[Snapshots]:
    opened = Snapshots(store.reader, EMBEDDER, DIM, store.path)
    yield opened
    opened.close()


def fill(store: SqliteStore, numbers: range, **other: str) -> None:
    with store.transaction():
        for i in numbers:
            store.admit(example(f"e{i}", i, **other))


def write(store: SqliteStore, flat_below: int = 50) -> Path:
    path = beside(store.path)
    write_snapshot(store, path, EMBEDDER, DIM, flat_below=flat_below)
    return path


def found(index: Catalogue, seed: int, tenant: str = "t", k: int = 1) -> list[str]:
    return index.search(tenant, units(seed, 1, DIM)[0], k)


def is_right(index: Catalogue, held: dict[str, tuple[str, int]]) -> None:
    """`held`: tenant and seed by id. Every example is found where it is, and nothing else is."""
    assert len(index) == len(held)
    tenants = {tenant for tenant, _ in held.values()} | {"t", "u"}
    for tenant in tenants:
        own = {id: seed for id, (whose, seed) in held.items() if whose == tenant}
        everything = index.search(tenant, units(0, 1, DIM)[0], 10_000)
        assert sorted(everything) == sorted(own)
        for id, seed in own.items():
            assert id in found(index, seed, tenant, k=5)


# the file


@pytest.mark.parametrize("flat_below", [50, 10_000])
def test_a_snapshot_holds_what_the_store_holds(store: SqliteStore, kept: Snapshots, flat_below: int) -> None:
    fill(store, range(300))
    fill(store, range(1000, 1020), tenant="u")
    fill(store, range(2000, 2003), embedder="another")
    write(store, flat_below)
    index = kept.open(store)
    held = {f"e{i}": ("t", i) for i in range(300)} | {f"e{i}": ("u", i) for i in range(1000, 1020)}
    is_right(index, held)
    assert list(index.stale) == ["e2000", "e2001", "e2002"]
    assert (index._clustered.keys() == {"t"}) == (flat_below == 50)


def test_an_empty_store_has_a_snapshot_too(store: SqliteStore, kept: Snapshots) -> None:
    write(store)
    is_right(kept.open(store), {})


def test_what_came_after_the_snapshot_is_caught_up_with(store: SqliteStore, kept: Snapshots) -> None:
    fill(store, range(100))
    write(store)
    fill(store, range(100, 150))
    store.delete_examples(["e0", "e1", "e120"])
    store.update_example("e2", embedding=units(999, 1, DIM)[0])
    held = {f"e{i}": ("t", i) for i in range(2, 150) if i != 120} | {"e2": ("t", 999)}
    is_right(kept.open(store), held)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_a_little(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def turn_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def replace_by_noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("harm", [cut, cut_a_little, empty, turn_a_bit, replace_by_noise, remove])
def test_a_broken_snapshot_is_passed_over(store: SqliteStore, kept: Snapshots, harm: Callable[[Path], None]) -> None:
    fill(store, range(100))
    harm(write(store))
    with pytest.raises(SnapshotError):
        kept.open(store)
    retriever = Retriever(store, Known(), snapshots=kept)
    retriever.load()
    is_right(retriever.catalogue, {f"e{i}": ("t", i) for i in range(100)})


def test_a_snapshot_of_another_embedder_is_passed_over(store: SqliteStore) -> None:
    fill(store, range(100))
    write(store)
    for identity, dim in (("another", DIM), (EMBEDDER, DIM + 1)):
        other = Snapshots(store.reader, identity, dim, store.path)
        with pytest.raises(SnapshotError, match="another embedder"):
            other.open(store)


def test_a_snapshot_of_another_store_is_passed_over(store: SqliteStore, kept: Snapshots, tmp_path: Path) -> None:
    other = SqliteStore(tmp_path / "other.db")
    fill(store, range(100))
    with other.transaction():
        for i in range(100):
            other.admit(example(f"o{i}", i))
    os.replace(write(other), beside(store.path))
    with pytest.raises(SnapshotError, match="another store"):
        kept.open(store)
    other.close()


def test_a_snapshot_that_the_feed_cannot_bring_up_to_date_is_passed_over(store: SqliteStore, kept: Snapshots) -> None:
    fill(store, range(100))
    write(store)
    fill(store, range(100, 120))
    store.trim_changes(110)
    with pytest.raises(SnapshotError, match="too old"):
        kept.open(store)


def test_a_snapshot_without_a_witness_is_passed_over_once_anything_changed(store: SqliteStore, kept: Snapshots) -> None:
    """All changes have been trimmed: another store could have as many."""
    fill(store, range(100))
    store.trim_changes(1000)
    write(store)
    is_right(kept.open(store), {f"e{i}": ("t", i) for i in range(100)})
    fill(store, range(100, 101))
    with pytest.raises(SnapshotError):
        kept.open(store)


def test_a_snapshot_from_before_a_restore_is_passed_over(store: SqliteStore, kept: Snapshots, tmp_path: Path) -> None:
    fill(store, range(10))
    store.backup(tmp_path / "backup")
    fill(store, range(10, 100))
    write(store)
    restore_store(f"sqlite:///{store.path}", tmp_path / "backup")
    with pytest.raises(SnapshotError):
        kept.open(store)
    assert not beside(store.path).exists()  # it held vectors that the restored store does not hold


def test_a_snapshot_has_the_permissions_of_the_store(store: SqliteStore, kept: Snapshots) -> None:
    os.chmod(store.path, 0o600)
    fill(store, range(10))
    kept.make(store)
    assert beside(store.path).stat().st_mode & 0o777 == 0o600


# erasure


def vector_bytes(path: Path, id: str) -> bytes:
    """What stands where the vector of `id` is."""
    snapshot = Snapshot(path)
    for part in snapshot.about.parts:
        row = snapshot.ids(part).row(id)
        if row is not None and part.probes == 0:
            return snapshot.array(part.arrays["vectors"])[row].tobytes()
        if row is not None:
            starts = snapshot.array(part.arrays["starts"])
            of = int(np.searchsorted(starts, row, side="right")) - 1
            at = int(starts[of]) * (DIM + 8) + (row - int(starts[of])) * DIM
            return snapshot.array(part.arrays["lists"])[at : at + DIM].tobytes()
    raise AssertionError(id)


@pytest.mark.parametrize("flat_below", [50, 10_000])
def test_a_deleted_example_leaves_the_snapshot_with_the_deletion(store: SqliteStore, flat_below: int) -> None:
    fill(store, range(100))
    fill(store, range(100, 110), tenant="u")
    path = write(store, flat_below)
    before = {f"e{i}": vector_bytes(path, f"e{i}") for i in range(110)}
    store.delete_examples(["e7", "unknown", "e99"])
    store.purge("u")
    gone = {"e7", "e99", *(f"e{i}" for i in range(100, 110))}
    for id, was in before.items():
        assert vector_bytes(path, id) == (bytes(len(was)) if id in gone else was)
        assert any(was)


def test_a_deletion_that_is_undone_erases_nothing(store: SqliteStore) -> None:
    fill(store, range(60))
    path = write(store)
    before = path.read_bytes()
    with pytest.raises(RuntimeError), store.transaction():
        store.delete_examples(["e7"])
        raise RuntimeError
    with store.transaction(), pytest.raises(RuntimeError), store.transaction():
        store.delete_examples(["e7"])
        raise RuntimeError
    store.delete_examples([])
    assert path.read_bytes() == before


def test_what_a_killed_process_left_is_erased_at_the_next_start(store: SqliteStore, kept: Snapshots) -> None:
    fill(store, range(60))
    path = write(store)
    before = path.read_bytes()
    store.delete_examples(["e7"])
    path.write_bytes(before)  # as if it had been killed between the commit and the erasure
    kept.open(store)
    assert not any(vector_bytes(path, "e7"))


def test_what_is_deleted_while_a_snapshot_is_written_is_not_in_it(store: SqliteStore, kept: Snapshots) -> None:
    fill(store, range(60))
    deleted = False

    def delete_once() -> None:
        nonlocal deleted
        if not deleted:
            deleted = True
            store.delete_examples(["e7"])

    kept.go_on = delete_once  # type: ignore[method-assign]  # called in the middle of the work
    index = kept.make(store)
    assert deleted
    assert not any(vector_bytes(kept.path, "e7"))
    assert "e7" not in found(index, 7, k=100)


def test_an_erased_vector_takes_nobodys_place(store: SqliteStore, kept: Snapshots) -> None:
    """Zeros in the file are some vector or other once decoded: they must not fill the list of the nearest."""
    fill(store, range(200))
    write(store)
    index = kept.open(store)
    gone = [f"e{i}" for i in range(150)]
    store.delete_examples(gone)
    apply(index, store.changes(index.cursor), store)
    is_right(index, {f"e{i}": ("t", i) for i in range(150, 200)})


def test_scrubbing_where_there_is_no_snapshot_does_nothing(tmp_path: Path) -> None:
    assert scrub(tmp_path / "none", ["a"]) == 0
    assert not (tmp_path / "none").exists()


# clusters


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (100, 10), (10_000, 100), (1_000_000, 1000)])
def test_there_are_as_many_clusters_as_the_square_root(n: int, k: int) -> None:
    assert clusters(n) == k


def compared(index: catalogue.ClusteredIndex, query: Vector) -> int:
    """Vectors that a search compares with, as faiss counts them."""
    from faiss import cvar  # noqa: PLC0415

    cvar.indexIVF_stats.reset()
    index.search(query, 1)
    return int(cvar.indexIVF_stats.ndis) + len(index._clustering.centroids)


@pytest.mark.parametrize("probes", [1, 4])
def test_a_search_compares_with_k_centroids_and_n_over_k_members(probes: int) -> None:
    n = 10_000
    index = clustered({str(i): vector for i, vector in enumerate(units(1, n, DIM))})
    index.probes = probes
    counts = [compared(index, query) for query in units(2, 200, DIM)]
    expected = 100 + probes * n / 100
    assert expected / 2 < np.mean(counts) < expected * 2


def test_as_many_lists_are_looked_into_as_recall_asks_for() -> None:
    """Against brute force; and not many more than needed: half as many would not do."""
    n, queries = 5000, units(2, 300, DIM)
    vectors = units(1, n, DIM)
    index = clustered({str(i): vector for i, vector in enumerate(vectors)})
    nearest = np.argsort(-queries @ vectors.T, axis=1)[:, :10]

    def recall() -> float:
        hits = [
            len({int(id) for id, _ in index.search(q, 10)} & set(true.tolist()))
            for q, true in zip(queries, nearest, strict=True)
        ]
        return float(np.mean(hits)) / 10

    assert recall() > 0.93
    index.probes //= 2
    assert recall() < 0.93


def test_a_search_is_bounded_whatever_recall_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random directions in many dimensions have no clusters: recall would ask for nearly all lists."""
    monkeypatch.setattr(snapshots, "COMPARED_AT_MOST", 1000)
    n, dim = 2500, 64
    index = clustered({str(i): vector for i, vector in enumerate(units(1, n, dim))})
    assert index.probes == (1000 - 50) * 50 // n


def test_an_example_written_anew_with_the_same_request_changes_nothing() -> None:
    vectors = units(1, 100, DIM)
    index = clustered({str(i): vector for i, vector in enumerate(vectors)})
    index.add_many([str(i) for i in range(100)], vectors)
    assert index.changed == 0
    index.add("5", -vectors[5])
    assert index.search(-vectors[5], 1)[0][0] == "5"
    assert "5" not in {id for id, _ in index.search(vectors[5], 5)}


# many changes, and catalogues that take each other's place

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 40), st.integers(0, 10_000)),
        st.tuples(st.just("add"), st.integers(0, 40), st.integers(0, 10_000)),
        st.tuples(st.just("remove"), st.integers(0, 40), st.just(0)),
        st.tuples(st.just("begin"), st.just(0), st.just(0)),
        st.tuples(st.just("take over"), st.just(0), st.just(0)),
        st.tuples(st.just("restart"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS)
def test_any_history_agrees_with_a_dictionary(
    operations: list[tuple[str, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = SqliteStore(tmp_path_factory.mktemp("history") / "store.db")
    kept = Snapshots(store.reader, EMBEDDER, DIM, store.path)
    held: dict[str, tuple[str, int]] = {}
    retriever = Retriever(store, Known(), snapshots=kept)
    retriever.load()
    cursor = 0

    def follow() -> None:
        nonlocal cursor
        changes = store.changes(cursor)
        retriever.apply(changes)
        cursor = changes[-1].seq if changes else cursor

    made: Catalogue | None = None
    for what, i, seed in operations:
        id = f"e{i}"
        if what == "add":
            if id in held:
                store.update_example(id, embedding=units(seed, 1, DIM)[0])
                held[id] = (held[id][0], seed)
            else:
                tenant = "t" if i % 3 else "u"
                store.admit(example(id, seed, tenant))
                held[id] = (tenant, seed)
        elif what == "remove":
            store.delete_examples([id])
            held.pop(id, None)
        elif what == "begin":
            write(store, flat_below=8)
            made = kept.open(store)
        elif what == "take over" and made is not None:
            retriever._take_over(made)
            made = None
        elif what == "restart":
            retriever = Retriever(store, Known(), snapshots=kept)
            retriever.load()
        follow()
    is_right(retriever.catalogue, held)
    kept.close()
    store.close()


@pytest.mark.usefixtures("few")
def test_clusters_are_made_in_another_thread_and_taken_over(store: SqliteStore, kept: Snapshots) -> None:
    retriever = Retriever(store, Known(), snapshots=kept)
    retriever.load()
    fill(store, range(200))
    retriever.apply(store.changes(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_snapshot, "__defaults__", (*write_snapshot.__defaults__[:-1], 50))
        retriever.look_after()
        fill(store, range(200, 220))  # meanwhile
        store.delete_examples(["e3"])
        retriever.apply(store.changes(200))
        deadline = time.monotonic() + 60
        while retriever.catalogue.snapshot is None and time.monotonic() < deadline:
            retriever.look_after()
            time.sleep(0.01)
    assert retriever.catalogue.snapshot is not None
    held = {f"e{i}": ("t", i) for i in range(220) if i != 3}
    is_right(retriever.catalogue, held)
    nearest = retriever.recall([Query("t", "210", 1)], NOW)[0].nearest
    assert [e.id for e, _ in nearest] == ["e210"]


def test_another_processs_snapshot_is_adopted(store: SqliteStore, kept: Snapshots) -> None:
    fill(store, range(100))
    write(store)
    retriever = Retriever(store, Known(), snapshots=kept)
    retriever.load()
    before = retriever.catalogue
    write(store)
    deadline = time.monotonic() + 60
    while retriever.catalogue is before and time.monotonic() < deadline:
        retriever.look_after()
        time.sleep(0.01)
    assert retriever.catalogue.snapshot is not None and retriever.catalogue.snapshot.is_current()
    assert retriever.catalogue is not before


def waited_for(kept: Snapshots) -> Catalogue | None:
    assert kept._thread is not None
    kept._thread.join(120)
    return kept.finished()


def test_many_examples_are_clustered_by_a_process_of_their_own(
    store: SqliteStore, kept: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, range(2500))
    with_threads = kept.make_here(store)
    assert with_threads.snapshot is not None
    kept.path.unlink()
    monkeypatch.setattr(snapshots, "HERE_UP_TO", 10)
    monkeypatch.setattr(snapshots, "write_snapshot", None)  # not here
    kept.start()
    made = waited_for(kept)
    assert made is not None and made.snapshot is not None
    assert made.snapshot.about == with_threads.snapshot.about
    is_right(made, {f"e{i}": ("t", i) for i in range(2500)})


def test_stopping_ends_that_process_and_leaves_nothing_half_written(
    store: SqliteStore, kept: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, range(2500))
    monkeypatch.setattr(snapshots, "HERE_UP_TO", 10)
    kept.start()
    kept.close()
    assert kept._thread is not None and not kept._thread.is_alive() and kept.finished() is None
    assert list(store.path.parent.glob("*.partial")) == []


def test_that_process_ends_when_the_one_that_wanted_it_is_gone(store: SqliteStore, kept: Snapshots) -> None:
    """However that ended: by a kill, or by SIGTERM while it was starting."""
    fill(store, range(100))
    command = [sys.executable, "-m", "iccache.examples.cluster", str(store.path), EMBEDDER, str(DIM)]
    with kept._alone(), subprocess.Popen(command, stdin=subprocess.PIPE) as process:  # so it waits, for ever
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        assert process.stdin is not None
        process.stdin.close()
        try:
            assert process.wait(20) != 0
        finally:
            process.kill()
    assert list(store.path.parent.glob("*.partial")) == []


def test_a_process_that_fails_costs_speed_and_nothing_else(
    store: SqliteStore, kept: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, range(20))
    monkeypatch.setattr(snapshots, "HERE_UP_TO", 10)
    monkeypatch.setattr(kept, "_dim", "no number")
    kept.start()
    assert waited_for(kept) is None


def test_closing_ends_what_is_under_way_and_leaves_nothing_half_written(store: SqliteStore, kept: Snapshots) -> None:
    fill(store, range(100))
    kept._stopping.set()
    with pytest.raises(Stopped):
        kept.make(store)
    kept.start()
    assert not kept.at_work()
    assert {p.name for p in store.path.parent.iterdir()} <= {
        "store.db",
        "store.db-wal",
        "store.db-shm",
        "store.db.vectors.lock",
    }


def test_what_a_killed_process_left_half_written_is_removed(store: SqliteStore, kept: Snapshots) -> None:
    fill(store, range(10))
    left = store.path.with_name("store.db.vectors.999999999.partial")
    left.write_bytes(b"half")
    kept.make(store)
    assert not left.exists()


def test_a_folder_that_cannot_be_written_to_costs_speed_and_nothing_else(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, range(100))
    kept = Snapshots(store.reader, EMBEDDER, DIM, store.path.with_name("no folder") / "store.db")
    monkeypatch.setattr("iccache.examples.retriever.WAIT_FOR_FIRST", 50)
    retriever = Retriever(store, Known(), snapshots=kept)
    retriever.load()
    is_right(retriever.catalogue, {f"e{i}": ("t", i) for i in range(100)})


def test_a_store_in_memory_is_clustered_too() -> None:
    store = SqliteStore(":memory:")
    fill(store, range(100))
    kept = Snapshots(store.reader, EMBEDDER, DIM, None)
    write_snapshot(store, kept.path, EMBEDDER, DIM, flat_below=50)
    is_right(kept.open(store), {f"e{i}": ("t", i) for i in range(100)})
    kept.close()
    assert not kept.path.exists()
    store.close()
