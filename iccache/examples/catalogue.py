"""Which examples there are to be found: an index for every tenant, as the store had it at one change of its feed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from iccache.examples.index import VectorIndex
from iccache.examples.index.clustered import ClusteredIndex
from iccache.examples.index.flat import FlatIndex
from iccache.examples.index.snapshot import Snapshot
from iccache.types import Example, Matrix, Vector

FLAT_BELOW = 2000  # vectors: beyond, looking into clusters costs less than half of comparing with all
WORN = 0.125  # share of a clustered index that may have changed before it is clustered anew
BLOCK = 4096  # vectors handed to an index at once


class Catalogue:
    """Indexes by tenant, made when they are first needed. Belongs to one thread."""

    def __init__(self, identity: str, dim: int, make_index: Callable[[int], VectorIndex] = FlatIndex) -> None:
        """`identity` and `dim` of the embedder whose vectors these are."""
        self.identity = identity
        self.dim = dim
        self.make_index = make_index
        self.snapshot: Snapshot | None = None
        self.cursor = 0  # the change of the store up to which everything is included
        self.stale: dict[str, None] = {}  # ids embedded by another model, in the order they are to be embedded anew
        self._indexes: dict[str, VectorIndex] = {}  # by tenant
        self._clustered: dict[str, ClusteredIndex] = {}  # those of them that know their ids without a dict
        self._tenant: dict[str, str] = {}  # of each example in the others

    @staticmethod
    def of(snapshot: Snapshot, make_index: Callable[[int], VectorIndex] = FlatIndex) -> Catalogue:
        """What a snapshot holds."""
        about = snapshot.about
        catalogue = Catalogue(about.embedder, about.dim, make_index)
        catalogue.snapshot, catalogue.cursor = snapshot, about.cursor
        catalogue.stale = dict.fromkeys(snapshot.stale())
        for part in about.parts:
            if part.probes:
                index = ClusteredIndex(snapshot, part)
                catalogue._indexes[part.tenant] = catalogue._clustered[part.tenant] = index
                continue
            ids, vectors = snapshot.ids(part), snapshot.array(part.arrays["vectors"])
            for start in range(0, part.n, BLOCK):
                block = vectors[start : start + BLOCK].astype(np.float32)
                catalogue.add(part.tenant, [ids.id(row) for row in range(start, start + len(block))], block)
        return catalogue

    def __len__(self) -> int:
        """Examples that can be found."""
        return len(self._tenant) + sum(map(len, self._clustered.values()))

    def add(self, tenant: str, ids: Sequence[str], vectors: Matrix) -> None:
        """`vectors` (n, dim) of examples of one tenant."""
        if tenant not in self._indexes:
            self._indexes[tenant] = self.make_index(self.dim)
        self._indexes[tenant].add_many(ids, vectors)
        if tenant not in self._clustered:
            self._tenant.update((id, tenant) for id in ids)

    def forget(self, id: str) -> None:
        self.stale.pop(id, None)
        tenant = self._tenant_of(id)
        if tenant is None:
            return
        self._tenant.pop(id, None)
        self._indexes[tenant].remove(id)
        if len(self._indexes[tenant]) == 0:
            del self._indexes[tenant]
            self._clustered.pop(tenant, None)

    def follow(self, ids: Sequence[str], present: Sequence[Example]) -> None:
        """Take over what the store says now of examples that changed: those not in `present` are gone."""
        known = {example.id: example for example in present}
        added: dict[str, list[Example]] = {}
        for id in ids:
            example = known.get(id)
            if example is None or example.held is not None:
                self.forget(id)
            elif not self.comparable(example):
                self.forget(id)
                self.stale[id] = None
            else:
                if self._tenant_of(id) not in (None, example.tenant):
                    self.forget(id)
                self.stale.pop(id, None)
                added.setdefault(example.tenant, []).append(example)
        for tenant, examples in added.items():
            self.add(tenant, [e.id for e in examples], np.stack([e.embedding for e in examples]))

    def search(self, tenant: str, vector: Vector, k: int) -> list[str]:
        """At most `k` ids of a tenant, nearest first."""
        index = self._indexes.get(tenant)
        return [] if index is None else [id for id, _ in index.search(vector, k)]

    def comparable(self, example: Example) -> bool:
        return example.embedder == self.identity and example.embedding.shape == (self.dim,)

    def is_worn(self) -> bool:
        """Whether clustering anew would pay."""
        if any(index.changed > max(FLAT_BELOW, WORN * len(index)) for index in self._clustered.values()):
            return True
        return any(len(index) >= FLAT_BELOW for tenant, index in self._indexes.items() if tenant not in self._clustered)

    def _tenant_of(self, id: str) -> str | None:
        """None where it is not indexed."""
        known = self._tenant.get(id)
        if known is not None:
            return known
        return next((tenant for tenant, index in self._clustered.items() if id in index), None)
