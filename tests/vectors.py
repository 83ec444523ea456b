"""Vectors with known neighbours, and indexes that hold them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from iccache.examples.catalogue import FLAT_BELOW
from iccache.examples.index.clustered import ClusteredIndex
from iccache.examples.index.snapshot import Snapshot
from iccache.examples.snapshots import write_snapshot
from iccache.types import Change, ChangeKind, Example, Matrix, Vector

EMBEDDER = "synthetic"


def units(seed: int, n: int, dim: int = 8) -> Matrix:
    """(n, dim), uniform on the sphere."""
    rows = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Vectors:
    """A store that holds nothing but embeddings, of one tenant."""

    def __init__(self, held: Mapping[str, Vector]) -> None:
        self.held = held

    def embeddings(self) -> Iterator[tuple[str, str, str, float, Vector]]:
        for id, vector in self.held.items():
            yield id, "t", EMBEDDER, 0.0, vector

    def examples(self, ids: Sequence[str]) -> list[Example]:
        return []

    def changes(self, since: int, limit: int = 1) -> list[Change]:
        return [Change(1, ChangeKind.EXAMPLE, "a")] if since == 0 else []

    def last_change(self) -> int:
        return 1

    def restored_at(self) -> int:
        return 0

    def count_examples(self) -> int:
        return len(self.held)

    def close(self) -> None:
        pass


def clustered(held: Mapping[str, Vector]) -> ClusteredIndex:
    """An index that has clustered `held`, however few they are."""
    dim = len(next(iter(held.values())))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors"
        write_snapshot(Vectors(held), path, EMBEDDER, dim, flat_below=min(FLAT_BELOW, len(held)))
        snapshot = Snapshot(path)
        return ClusteredIndex(snapshot, snapshot.about.parts[0])
