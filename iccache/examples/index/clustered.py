"""Looking into the nearest of sqrt(n) clusters (an inverted file, IVF), at one byte for a dimension.

The paper's argument: with K clusters a search compares with K centroids and, where it looks into one, with n / K
members; K + n / K is least at K = sqrt(n). Looking into p of them, which recall asks for, it is K + p n / K.

What was clustered is a part of a snapshot: it stays as it is, in the file's pages, and processes share it. What was
added since goes to lists in memory with the same centroids and is found at once; what was removed is marked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import faiss  # its type stubs know a part of it: hence the `type: ignore`s below
import numpy as np
from numpy.typing import NDArray

from iccache.examples.index import checked
from iccache.examples.index.snapshot import ROW_NUMBER_BYTES, Part, Snapshot
from iccache.types import Matrix, Vector

SAMPLED_PER_CLUSTER = 64  # vectors that k-means looks at; faiss's own default is 256, for no better recall here
ITERATIONS = 10  # of k-means
WIDER = 0.1  # of the range of a dimension in the sample: room on either side for what was not in it
NARROWEST = 0.02  # range of a dimension
REACH_FURTHER = 4  # times as many lists, where those looked into hold fewer than were asked for


def clusters(n: int) -> int:
    """K for n vectors."""
    return max(1, round(math.sqrt(n)))


class Clustering:
    """Centroids, and how a vector becomes bytes."""

    def __init__(self, centroids: Matrix, ranges: NDArray[np.float32]) -> None:
        """`centroids` (K, dim), unit rows; `ranges` (2 dim,): of each dimension the least value, then the width."""
        self.centroids = centroids
        self.ranges = ranges
        self.quantizer = faiss.IndexFlatIP(centroids.shape[1])
        self.quantizer.add(centroids)
        self._encoder = self.lists()

    @staticmethod
    def learn(sample: Matrix, n: int, seed: int = 1) -> Clustering:
        """By spherical k-means of `sample`, for `n` vectors."""
        faiss.omp_set_num_threads(1)
        k = min(clusters(n), len(sample))
        kmeans = faiss.Kmeans(
            sample.shape[1],
            k,
            niter=ITERATIONS,
            spherical=True,
            seed=seed,
            min_points_per_centroid=1,
            max_points_per_centroid=SAMPLED_PER_CLUSTER,
        )
        kmeans.train(sample)
        low, high = sample.min(axis=0), sample.max(axis=0)
        width = np.maximum((high - low) * (1 + 2 * WIDER), NARROWEST)
        ranges = np.concatenate([(low + high - width) / 2, width]).astype(np.float32)
        return Clustering(np.ascontiguousarray(kmeans.centroids, np.float32), ranges)

    def assign(self, vectors: Matrix) -> NDArray[np.int64]:
        """(n,): the nearest centroid of each."""
        faiss.omp_set_num_threads(1)
        nearest: NDArray[np.int64] = self.quantizer.search(vectors, 1)[1][:, 0]
        return nearest

    @staticmethod
    def compare(queries: Matrix, vectors: Matrix, k: int) -> tuple[Matrix, NDArray[np.int64]]:
        """(cosines, rows), each (queries, at most k), of the nearest among `vectors`: brute force."""
        faiss.omp_set_num_threads(1)
        found: tuple[Matrix, NDArray[np.int64]] = faiss.knn(
            queries, vectors, min(k, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT
        )
        return found

    def encode(self, vectors: Matrix) -> NDArray[np.uint8]:
        """(n, dim)."""
        codes: NDArray[np.uint8] = self._encoder.sq.compute_codes(np.ascontiguousarray(vectors, np.float32))
        return codes

    def lists(self) -> Any:
        """An empty inverted file with these centroids and ranges."""
        k, dim = self.centroids.shape
        lists = faiss.IndexIVFScalarQuantizer(
            self.quantizer, dim, k, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT, False
        )
        faiss.copy_array_to_vector(self.ranges, lists.sq.trained)
        lists.is_trained = True
        return lists


class ClusteredIndex:
    """A part of a snapshot, and what changed since. Adding costs K comparisons, searching K + probes * n / K."""

    def __init__(self, snapshot: Snapshot, part: Part) -> None:
        self.dim = snapshot.about.dim
        self.probes = part.probes
        self._snapshot = snapshot  # keeps the file mapped
        self._ids = snapshot.ids(part)
        self._starts = snapshot.array(part.arrays["starts"])
        self._lists_at = part.arrays["lists"].at
        self._lists = snapshot.array(part.arrays["lists"])
        ranges, centroids = snapshot.array(part.arrays["ranges"]), snapshot.array(part.arrays["centroids"])
        self._clustering = Clustering(np.array(centroids), np.array(ranges))
        self._base = self._mapped()
        self._alive = np.full(part.n // 8 + 1, 0xFF, np.uint8)  # a bit for each row
        self._some = faiss.IDSelectorBitmap(self._alive)  # type: ignore[call-arg, arg-type]
        self._dead = 0
        self._tail = self._clustering.lists()
        self._tail.set_direct_map_type(faiss.DirectMap.Hashtable)  # type: ignore[attr-defined]
        self._tail_row: dict[str, int] = {}
        self._tail_id: dict[int, str] = {}
        self._next_row = part.n

    def add(self, id: str, vector: Vector) -> None:
        self.add_many([id], np.asarray(vector)[np.newaxis])

    def add_many(self, ids: Sequence[str], vectors: Matrix) -> None:
        checked(ids, vectors, self.dim)
        last = {id: i for i, id in enumerate(ids)}
        vectors = np.ascontiguousarray(vectors[list(last.values())], np.float32)
        codes = self._clustering.encode(vectors)
        new = [i for i, id in enumerate(last) if not self._holds(id, codes[i])]
        for i, id in enumerate(last):
            if i in new:
                self.remove(id)
        self._append([id for i, id in enumerate(last) if i in new], vectors[new])

    def remove(self, id: str) -> None:
        tail_row = self._tail_row.pop(id, None)
        if tail_row is not None:
            del self._tail_id[tail_row]
            self._tail.remove_ids(np.array([tail_row], np.int64))
            return
        row = self._base_row(id)
        if row is not None:
            self._alive[row >> 3] &= ~np.uint8(1 << (row & 7))
            self._dead += 1

    def search(self, vector: Vector, k: int) -> list[tuple[str, float]]:
        k = min(k, len(self))
        if k < 1:
            return []
        faiss.omp_set_num_threads(1)  # counts for the calling thread only
        query = np.ascontiguousarray(vector, np.float32)[np.newaxis]
        probes, k_lists = self.probes, len(self._starts) - 1
        while True:
            found = self._look_into(query, k, min(probes, k_lists))
            if len(found) >= k or probes >= k_lists:
                ids = self._ids_of([row for _, row in found[:k]])
                return [(id, min(max(cosine, -1.0), 1.0)) for id, (cosine, _) in zip(ids, found, strict=False)]
            probes *= REACH_FURTHER

    def __len__(self) -> int:
        return len(self._ids) - self._dead + len(self._tail_row)

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and (id in self._tail_row or self._base_row(id) is not None)

    @property
    def changed(self) -> int:
        """Vectors added and removed since the snapshot."""
        return self._dead + len(self._tail_row)

    def _look_into(self, query: Matrix, k: int, probes: int) -> list[tuple[float, int]]:
        """(cosine, row) of at most `k` in each of the two halves, best first."""
        cosines, nearest = self._clustering.quantizer.search(query, probes)
        found = _search(self._base, query, k, nearest, cosines, self._some if self._dead else None)
        if self._tail_row:
            found += _search(self._tail, query, k, nearest, cosines, None)
            found.sort(reverse=True)
        return found

    def _append(self, ids: Sequence[str], vectors: Matrix) -> None:
        if not ids:
            return
        rows = np.arange(self._next_row, self._next_row + len(ids))
        self._next_row += len(ids)
        self._tail.add_with_ids(vectors, rows)
        pairs = list(zip(ids, rows.tolist(), strict=True))
        self._tail_row.update(pairs)
        self._tail_id.update((row, id) for id, row in pairs)

    def _holds(self, id: str, code: NDArray[np.uint8]) -> bool:
        """Whether the snapshot has `id` at this place: an example was written anew with the same request.

        A step to either side is the same place: what is in the file was rounded twice.
        """
        row = None if id in self._tail_row else self._base_row(id)
        return row is not None and bool((np.abs(self._code(row).astype(np.int16) - code) <= 1).all())

    def _code(self, row: int) -> NDArray[np.uint8]:
        start = int(self._starts[int(np.searchsorted(self._starts, row, side="right")) - 1])
        at = start * (self.dim + ROW_NUMBER_BYTES) + (row - start) * self.dim
        return self._lists[at : at + self.dim]

    def _base_row(self, id: str) -> int | None:
        row = self._ids.row(id)
        return row if row is not None and self._alive[row >> 3] >> (row & 7) & 1 else None

    def _ids_of(self, rows: Sequence[int]) -> list[str]:
        if self._tail_row:
            return [self._ids.id(row) if row < len(self._ids) else self._tail_id[row] for row in rows]
        return self._ids.some(rows)

    def _mapped(self) -> Any:
        """The lists in the file, as faiss searches them."""
        base = self._clustering.lists()
        lists = faiss.OnDiskInvertedLists()
        sizes = np.diff(self._starts).tolist()
        lists.nlist, lists.code_size = len(sizes), self.dim
        lists.filename, lists.read_only = self._snapshot.name_to_map(), True
        lists.totsize = self._snapshot.size
        places = faiss.OnDiskOneListVector()  # type: ignore[attr-defined]
        for start, size in zip(self._starts.tolist(), sizes, strict=False):
            place = faiss.OnDiskOneList()
            place.size = place.capacity = size
            place.offset = self._lists_at + start * (self.dim + ROW_NUMBER_BYTES)
            places.push_back(place)
        lists.lists = places
        lists.do_mmap()
        base.replace_invlists(lists, False)
        base.ntotal = len(self._ids)
        self._on_disk = lists  # faiss does not own it
        return base


def _search(
    lists: Any, query: Matrix, k: int, nearest: NDArray[np.int64], cosines: Matrix, some: Any
) -> list[tuple[float, int]]:
    """(cosine, row) of at most `k` in the lists `nearest`, best first."""
    found, rows = np.empty((1, k), np.float32), np.empty((1, k), np.int64)
    parameters = faiss.SearchParametersIVF(sel=some, nprobe=nearest.shape[1])  # type: ignore[call-arg]
    lists.search_preassigned_c(
        1,
        faiss.swig_ptr(query),
        k,
        faiss.swig_ptr(nearest),
        faiss.swig_ptr(cosines),
        faiss.swig_ptr(found),
        faiss.swig_ptr(rows),
        False,
        parameters,
    )
    return [(c, row) for c, row in zip(found[0].tolist(), rows[0].tolist(), strict=True) if row >= 0]
