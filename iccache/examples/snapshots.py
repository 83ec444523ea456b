"""Making snapshots of the store's vectors, and catalogues of snapshots, off the path.

A snapshot is a cache of the store: it says of which embedder, of which store and as of which change it is. One that
does not fit is passed over and written anew. A catalogue made of one goes on from its change to the newest.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from iccache import private
from iccache.errors import IccacheError
from iccache.examples.catalogue import FLAT_BELOW, Catalogue
from iccache.examples.index.clustered import SAMPLED_PER_CLUSTER, Clustering, clusters
from iccache.examples.index.snapshot import (
    About,
    Array,
    Memory,
    Part,
    Snapshot,
    SnapshotError,
    SnapshotWriter,
    beside,
    id_hash,
    scrub,
    sweep,
)
from iccache.examples.sqlite.key import Key
from iccache.types import Change, ChangeKind, Example, Matrix, Vector

try:
    import fcntl
except ImportError:  # Windows: then every process makes its own
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

BLOCK = 4096  # vectors worked on at once: what holds the interpreter, holds it for a few milliseconds
CHANGES_AT_ONCE = 1000
RECALL_WANTED = 0.97  # of the ten nearest, of a sample of the examples themselves
RECALL_K = 10
RECALL_SAMPLE = 64
COMPARED_AT_MOST = 20_000  # vectors, centroids included: what bounds the time of a search, whatever recall it takes
NICENESS = 10  # of the process that works off the path; a thread that gives way may hold the interpreter meanwhile
HERE_UP_TO = FLAT_BELOW  # examples; more are clustered in a process of their own, which costs half a second to start
LOOK_EVERY_S = 0.1
STOPS_WITHIN_S = 2.0  # of being asked to
AGAIN_S = 60.0  # after a failure


class Stopped(IccacheError):
    """The process ends: what was being made is not needed."""


class Source(Protocol):
    """What is read of the store. A connection belongs to one thread."""

    def examples(self, ids: Sequence[str]) -> list[Example]: ...

    def embeddings(self) -> Iterator[tuple[str, str, str, float, Vector]]: ...

    def changes(self, since: int, limit: int = ...) -> list[Change]: ...

    def last_change(self) -> int: ...

    def restored_at(self) -> int: ...

    def count_examples(self) -> int: ...

    def close(self) -> None: ...


class Snapshots:
    """Keeps the snapshot of one store, and makes catalogues of it."""

    def __init__(self, open_source: Callable[[], Source], identity: str, dim: int, store: Path | None) -> None:
        """`open_source`: a connection for the thread that calls it. `identity` and `dim` of the embedder.

        `store`: the file beside which the snapshot is; None: nobody else's, in a temporary folder.
        """
        self._open_source = open_source
        self._identity = identity
        self._dim = dim
        self._store = store
        self._folder: AbstractContextManager[str] = nullcontext("")
        if store is None:
            self._folder = tempfile.TemporaryDirectory(prefix="iccache-")
        self.path = beside(store) if store is not None else Path(self._folder.__enter__()) / "store.vectors"
        self._thread: threading.Thread | None = None
        self._ready: Catalogue | None = None
        self._not_before = 0.0  # monotonic
        self._stopping = threading.Event()

    def open(self, source: Source) -> Catalogue:
        """A catalogue of the snapshot there is, up to date. Raises SnapshotError when there is none that fits."""
        snapshot = Snapshot(self.path)
        about = snapshot.about
        if (about.embedder, about.dim) != (self._identity, self._dim):
            raise SnapshotError(f"{self.path}: is of another embedder")
        if not fits(about, source):
            raise SnapshotError(f"{self.path}: is of another store, or too old to be brought up to date")
        snapshot.read_ahead()
        catalogue = Catalogue.of(snapshot)
        self._catch_up(catalogue, source)
        return catalogue

    def make(self, source: Source) -> Catalogue:
        """Write a snapshot and open it. Raises StoreError, OSError, SnapshotError, Stopped.

        Of many examples in a process of its own: see `cluster`.
        """
        if self._store is None or source.count_examples() <= HERE_UP_TO:
            return self.make_here(source)
        self._make_elsewhere()
        return self.open(source)

    def make_here(self, source: Source) -> Catalogue:
        """As `make`, in this process."""
        started = time.monotonic()
        with self._alone():
            with suppress(SnapshotError):  # another process may have made it while this one waited
                catalogue = self.open(source)
                if not catalogue.is_worn():
                    return catalogue
            write_snapshot(source, self.path, self._identity, self._dim, self.go_on, self._store)
        catalogue = self.open(source)
        log.info("%d examples clustered in %.1f s: %s", len(catalogue), time.monotonic() - started, self.path)
        return catalogue

    def start(self) -> None:
        """Make a catalogue in a thread of its own, unless one is being made; `finished` gives it."""
        if self._thread is None and not self._stopping.is_set() and time.monotonic() >= self._not_before:
            self._thread = threading.Thread(target=self._run, name="snapshot", daemon=True)
            self._thread.start()

    def finished(self) -> Catalogue | None:
        """The catalogue that was made, once."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread.join()
        self._thread = None
        catalogue, self._ready = self._ready, None
        if catalogue is None:
            self._not_before = time.monotonic() + AGAIN_S
        return catalogue

    def at_work(self) -> bool:
        return self._thread is not None

    def stop(self) -> None:
        """End what is under way; it does so at the next occasion."""
        self._stopping.set()

    def close(self) -> None:
        """End what is under way; what is half written is removed."""
        self.stop()
        if self._thread is not None:
            self._thread.join()
        self._folder.__exit__(None, None, None)

    def _run(self) -> None:
        try:
            with closing(self._open_source()) as source:
                self._ready = self.make(source)
        except Stopped:
            pass
        except (IccacheError, OSError) as exc:
            log.warning("the examples could not be clustered, going on as before: %s", exc)
        except Exception:
            log.exception("the examples could not be clustered, going on as before")

    def _make_elsewhere(self, memory: Memory | None = None, key: Key | None = None) -> None:
        """`memory`: where to, instead of beside the store; `key` goes along by way of a pipe that nobody else reads."""
        command = [sys.executable, "-m", "iccache.examples.cluster", str(self._store), self._identity, str(self._dim)]
        command += [] if memory is None else [str(memory.descriptor)]
        descriptors = () if memory is None else (memory.descriptor,)
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=descriptors
        ) as process:
            assert process.stdin is not None  # it stays open: where this process ends, so does that one
            with suppress(BrokenPipeError):
                process.stdin.write(f"{key.reveal()}\n".encode() if key else b"")
                process.stdin.flush()
            while process.poll() is None:
                if self._stopping.wait(LOOK_EVERY_S):
                    process.terminate()
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(STOPS_WITHIN_S)
                    process.kill()
                    process.wait()
                    sweep(self.path)
                    raise Stopped("stopping")
        if process.returncode != 0:
            raise SnapshotError(f"{self.path}: the process that was to write it ended with {process.returncode}")

    def _catch_up(self, catalogue: Catalogue, source: Source) -> None:
        """Also erase what was deleted and not scrubbed: by a process that was killed in between, or while the file that
        is in the place now was being written."""
        gone: list[str] = []
        while changes := source.changes(catalogue.cursor, CHANGES_AT_ONCE):
            self.go_on()
            present = {example.id for example in apply(catalogue, changes, source)}
            gone += [c.key for c in changes if c.kind is ChangeKind.EXAMPLE and c.key not in present]
        if gone:
            scrub(self.path, gone)

    def _alone(self) -> AbstractContextManager[Any]:
        """One process at a time."""
        if fcntl is None:
            return nullcontext()
        lock = private.make(self.path.with_name(f"{self.path.name}.lock")).open("a")
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock  # closing it ends the lock
            except BlockingIOError:
                self.go_on()
                time.sleep(0.1)

    def go_on(self) -> None:
        """Raises Stopped once `stop` was called."""
        if self._stopping.is_set():
            raise Stopped("stopping")


class InMemory(Snapshots):
    """For an encrypted store, beside which nothing may be that is not: each process makes its own, when it starts and
    whenever it pays, and has it in memory.
    """

    def __init__(self, open_source: Callable[[], Source], identity: str, dim: int, store: Path, key: Key) -> None:
        super().__init__(open_source, identity, dim, store)
        self._key = key
        self._memory: Memory | None = None
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
            sweep(self.path)

    def open(self, source: Source) -> Catalogue:
        if self._memory is None:
            raise SnapshotError("of an encrypted store there is none on disk")
        return super().open(source)

    def make(self, source: Source) -> Catalogue:
        started = time.monotonic()
        memory, before = Memory(), self._memory
        try:
            if source.count_examples() <= HERE_UP_TO:
                write_snapshot(source, memory, self._identity, self._dim, self.go_on)
            else:
                self._make_elsewhere(memory, self._key)
        except BaseException:
            memory.close()
            raise
        self._memory, self.path = memory, memory.path
        if before is not None:
            before.close()
        catalogue = self.open(source)
        log.info("%d examples clustered in %.1f s, in memory", len(catalogue), time.monotonic() - started)
        return catalogue

    def close(self) -> None:
        super().close()
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def apply(catalogue: Catalogue, changes: Sequence[Change], source: Source) -> list[Example]:
    """Bring a catalogue up to date with `changes`; returns those of their examples that exist."""
    if changes:
        catalogue.cursor = max(catalogue.cursor, changes[-1].seq)
    ids = list(dict.fromkeys(change.key for change in changes if change.kind is ChangeKind.EXAMPLE))
    if not ids:
        return []
    present = source.examples(ids)
    catalogue.follow(ids, present)
    return present


def fits(about: About, source: Source) -> bool:
    """Whether a snapshot is of this store, and the feed can bring it up to date."""
    if about.restored_at != source.restored_at() or about.witness != _witness(source, about.cursor):
        return False
    return about.witness != "" or about.cursor == source.last_change()


def _witness(source: Source, cursor: int) -> str:
    """The key of the change `cursor`; "" where there is none, or none any more."""
    found = source.changes(cursor - 1, 1)
    return found[0].key if found and found[0].seq == cursor else ""


# writing


def write_snapshot(
    source: Source,
    to: Path | Memory,
    identity: str,
    dim: int,
    go_on: Callable[[], None] = lambda: None,
    like: Path | None = None,
    flat_below: int = FLAT_BELOW,
) -> None:
    """Write the vectors that `source` has of the embedder `identity` to a file, or to memory and nowhere else.

    `go_on` is called now and then, and may raise. `like`: the file whose permissions it gets. Fewer vectors of a tenant
    than `flat_below` are not clustered. Raises OSError.
    """
    cursor, restored_at = source.last_change(), source.restored_at()
    witness = _witness(source, cursor)
    with _spool_for(to) as spool, _writer(to) as writer:
        tenants, stale = _spool(source, spool, identity, dim, go_on)
        vectors: NDArray[np.float16] = np.empty((0, dim), np.float16)
        if tenants:
            vectors = np.memmap(spool, np.float16, "r").reshape(-1, dim)
        parts = tuple(_write_part(writer, tenant, rows, vectors, go_on, flat_below) for tenant, rows in tenants.items())
        ids = writer.write(np.frombuffer("".join(f"{id}\0" for id in stale).encode(), np.uint8))
        writer.finish(About(identity, dim, restored_at, cursor, witness, parts, ids), like)


def _spool_for(to: Path | Memory) -> Any:
    """A file for what is needed meanwhile, where the snapshot itself may be."""
    return tempfile.TemporaryFile(dir=to.parent) if isinstance(to, Path) else open(Memory().descriptor, "w+b")


def _writer(to: Path | Memory) -> SnapshotWriter:
    return SnapshotWriter(to) if isinstance(to, Path) else SnapshotWriter(to.path, in_place=True)


class _Rows:
    """One tenant's examples while they are being read: about 60 bytes each."""

    def __init__(self) -> None:
        self.text = bytearray()  # their ids
        self.ends = array("q")  # where each id ends
        self.hashes = array("Q")
        self.places = array("q")  # of its vector in the spool

    def add(self, id: str, place: int) -> None:
        self.text += id.encode()
        self.ends.append(len(self.text))
        self.hashes.append(id_hash(id))
        self.places.append(place)

    def ids_in_order(self, order: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64], NDArray[np.uint64]]:
        """(text, ends, hashes) of the rows in another order."""
        ends = np.array(self.ends)
        starts = ends - np.diff(ends, prepend=0)
        text = b"".join(
            bytes(self.text[s:e]) for s, e in zip(starts[order].tolist(), ends[order].tolist(), strict=True)
        )
        return text, np.cumsum(ends[order] - starts[order]), np.array(self.hashes)[order]


def _spool(
    source: Source, spool: Any, identity: str, dim: int, go_on: Callable[[], None]
) -> tuple[dict[str, _Rows], list[str]]:
    """All vectors to a file, as float16, in the order of the store: k-means needs them twice, and has no room."""
    tenants: dict[str, _Rows] = {}
    stale: list[str] = []
    block = np.empty((BLOCK, dim), np.float16)
    place = 0
    for id, tenant, embedder, _, vector in source.embeddings():
        if embedder != identity or vector.shape != (dim,):
            stale.append(id)
            continue
        block[place % BLOCK] = vector
        tenants.setdefault(tenant, _Rows()).add(id, place)
        place += 1
        if place % BLOCK == 0:
            spool.write(block.data)
            go_on()
    spool.write(block[: place % BLOCK].data)
    spool.flush()
    go_on()
    return tenants, stale


def _write_part(
    writer: SnapshotWriter,
    tenant: str,
    rows: _Rows,
    vectors: NDArray[np.float16],
    go_on: Callable[[], None],
    flat_below: int,
) -> Part:
    places = np.array(rows.places)
    if len(places) < flat_below:
        ids = writer.write_ids(*rows.ids_in_order(np.arange(len(places))))
        return Part(tenant, len(places), 0, ids, {"vectors": writer.write(vectors[places])})
    generator = np.random.default_rng(len(places))
    sample = generator.choice(len(places), min(len(places), SAMPLED_PER_CLUSTER * clusters(len(places))), replace=False)
    clustering = Clustering.learn(_gathered(vectors, places[np.sort(sample)]), len(places))
    go_on()
    assigned, probes = _assign(clustering, vectors, places, generator, go_on)
    order = np.argsort(assigned, kind="stable")
    sizes = np.bincount(assigned, minlength=len(clustering.centroids))
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    arrays = {
        "centroids": writer.write(clustering.centroids),
        "ranges": writer.write(clustering.ranges),
        "starts": writer.write(starts),
        "lists": _write_lists(writer, clustering, vectors, places[order], starts, go_on),
    }
    go_on()
    return Part(tenant, len(places), probes, writer.write_ids(*rows.ids_in_order(order)), arrays)


def _write_lists(
    writer: SnapshotWriter,
    clustering: Clustering,
    vectors: NDArray[np.float16],
    places: NDArray[np.int64],
    starts: NDArray[np.int64],
    go_on: Callable[[], None],
) -> Array:
    """List by list, the codes of its rows and then their numbers. `places` in the order of the rows."""
    first = writer.write(np.empty(0, np.uint8))
    for start, end in pairwise(starts.tolist()):
        for at in range(start, end, BLOCK):
            writer.append(clustering.encode(_gathered(vectors, places[at : min(at + BLOCK, end)])))
            go_on()
        writer.append(np.arange(start, end, dtype=np.int64))
    return Array(first.at, first.dtype, (writer.at() - first.at,))


def _assign(
    clustering: Clustering,
    vectors: NDArray[np.float16],
    places: NDArray[np.int64],
    generator: np.random.Generator,
    go_on: Callable[[], None],
) -> tuple[NDArray[np.int64], int]:
    """The list of each vector, and how many lists to look into."""
    sample = generator.choice(len(places), min(len(places), RECALL_SAMPLE), replace=False)
    queries = _gathered(vectors, places[sample])
    assigned = np.empty(len(places), np.int64)
    best = np.full((len(queries), RECALL_K), -2.0, np.float32)  # the cosines of the nearest so far, and who they are
    who = np.zeros((len(queries), RECALL_K), np.int64)
    for start in range(0, len(places), BLOCK):
        block = _gathered(vectors, places[start : start + BLOCK])
        assigned[start : start + BLOCK] = clustering.assign(block)
        cosines, rows = clustering.compare(queries, block, RECALL_K + 1)
        rows = rows + start
        cosines[rows == sample[:, np.newaxis]] = -2.0  # everybody finds itself
        best, who = _nearer((best, who), (cosines, rows))
        go_on()
    return assigned, _probes(clustering, queries, assigned[who], len(places))


def _nearer(
    one: tuple[Matrix, NDArray[np.int64]], other: tuple[Matrix, NDArray[np.int64]]
) -> tuple[Matrix, NDArray[np.int64]]:
    """The best of both: (cosines, rows), each (queries, RECALL_K)."""
    cosines, rows = np.concatenate([one[0], other[0]], axis=1), np.concatenate([one[1], other[1]], axis=1)
    best = np.argsort(-cosines, axis=1)[:, :RECALL_K]
    return np.take_along_axis(cosines, best, 1), np.take_along_axis(rows, best, 1)


def _probes(clustering: Clustering, queries: Matrix, lists: NDArray[np.int64], n: int) -> int:
    """The least number of lists that has RECALL_WANTED of the nearest; fewer where that compares with too many.

    `lists` (queries, RECALL_K): in which list each of the nearest is.
    """
    k = len(clustering.centroids)
    ranked = np.argsort(-(queries @ clustering.centroids.T), axis=1)
    rank = np.argmax(ranked[:, np.newaxis, :] == lists[:, :, np.newaxis], axis=2)
    wanted = int(np.quantile(rank, RECALL_WANTED, method="higher")) + 1
    return max(1, min(wanted, k, int((COMPARED_AT_MOST - k) * k / n)))


def _gathered(vectors: NDArray[np.float16], places: NDArray[np.int64]) -> Matrix:
    """Rows of the spool, as unit vectors."""
    rows = vectors[places].astype(np.float32)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
    return rows
