"""Comparing with every vector: exact, and the cheapest while there are few."""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import numpy as np

from iccache.examples.index import checked
from iccache.types import Matrix, Vector

SMALLEST = 64  # rows that are reserved at least


class FlatIndex:
    """Compares with every vector: exact. Adding and removing cost O(1), searching O(n * dim).

    The vectors are rows of one array; the last one moves into the place of a removed one.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._ids: list[str] = []
        self._row: dict[str, int] = {}
        self._vectors = np.zeros((SMALLEST, dim), np.float32)

    def add(self, id: str, vector: Vector) -> None:
        self.add_many([id], np.asarray(vector)[np.newaxis])

    def add_many(self, ids: Sequence[str], vectors: Matrix) -> None:
        checked(ids, vectors, self.dim)
        rows = [self._take_row(id) for id in ids]
        self._house(len(self._ids))
        for row, vector in zip(rows, vectors, strict=True):
            self._vectors[row] = vector

    def remove(self, id: str) -> None:
        row = self._row.pop(id, None)
        if row is None:
            return
        last = self._ids.pop()
        end = len(self._ids)
        if last != id:
            self._ids[row], self._row[last] = last, row
            self._vectors[row] = self._vectors[end]
        self._vectors[end] = 0.0  # what was deleted is not kept in memory either
        if SMALLEST <= end < len(self._vectors) // 4:
            self._house(end, shrink=True)

    def search(self, vector: Vector, k: int) -> list[tuple[str, float]]:
        n = len(self._ids)
        if n == 0 or k < 1:
            return []
        faiss.omp_set_num_threads(1)  # counts for the calling thread only
        query = np.ascontiguousarray(vector, np.float32)[np.newaxis]
        cosines, rows = faiss.knn(query, self._vectors[:n], min(k, n), metric=faiss.METRIC_INNER_PRODUCT)
        best = zip(rows[0].tolist(), np.clip(cosines[0], -1.0, 1.0).tolist(), strict=True)
        return [(self._ids[row], cosine) for row, cosine in best if row >= 0]

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, id: object) -> bool:
        return id in self._row

    def _take_row(self, id: str) -> int:
        row = self._row.setdefault(id, len(self._ids))
        if row == len(self._ids):
            self._ids.append(id)
        return row

    def _house(self, n: int, shrink: bool = False) -> None:
        """Room for `n` rows, and for as many again, so that growing costs O(1) per vector."""
        if n <= len(self._vectors) and not shrink:
            return
        room = np.zeros((max(2 * n, SMALLEST), self.dim), np.float32)
        kept = min(n, len(self._vectors))
        room[:kept] = self._vectors[:kept]
        self._vectors = room
