"""Which vectors are nearest. An index holds one tenant's vectors and belongs to one thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from iccache.types import Matrix, Vector


class VectorIndex(Protocol):
    """Unit vectors by id. Adding a known id replaces its vector."""

    def add(self, id: str, vector: Vector) -> None:
        """`vector` (dim,), unit norm. Raises ValueError on another shape, or on what is not finite."""
        ...

    def add_many(self, ids: Sequence[str], vectors: Matrix) -> None:
        """`vectors` (n, dim), unit rows. Where an id is repeated, the last one holds."""
        ...

    def remove(self, id: str) -> None:
        """Forget `id`; nothing happens when it is unknown."""
        ...

    def search(self, vector: Vector, k: int) -> list[tuple[str, float]]:
        """At most `k` ids with their cosine in [-1, 1], best first; fewer only where there are fewer.

        Which ids: the nearest, exactly or mostly. An index that keeps less than whole vectors gives a cosine that is
        off by as much as it has rounded.
        """
        ...

    def __len__(self) -> int: ...

    def __contains__(self, id: object) -> bool: ...


def checked(ids: Sequence[str], vectors: Matrix, dim: int) -> None:
    """Raise ValueError unless `vectors` is (len(ids), dim) and finite."""
    if vectors.shape != (len(ids), dim):
        raise ValueError(f"vectors of shape {vectors.shape} for {len(ids)} ids of {dim} dimensions")
    if not np.isfinite(vectors).all():
        raise ValueError("a vector is not finite")
