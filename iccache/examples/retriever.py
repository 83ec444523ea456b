"""The nearest examples of a request's own tenant.

The store is the truth. The indexes here only say where to look: whatever they name is read from the store before it
is used, so what was deleted there cannot appear, however late the news of it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

import numpy as np

from iccache.examples.embed import Embedder
from iccache.examples.index import FlatIndex, VectorIndex
from iccache.types import Change, ChangeKind, Example, Matrix, Query, Recalled, Vector

BLOCK = 4096  # embeddings handed to an index at once while loading


class StoreReader(Protocol):
    """What is read of the store."""

    def examples(self, ids: Sequence[str]) -> list[Example]:
        """Those of `ids` that exist, in their order."""
        ...

    def embeddings(self) -> Iterator[tuple[str, str, str, float, Vector]]:
        """(id, tenant, embedder, at, embedding) of every example."""
        ...


class Retriever:
    """One index per tenant, made when it is first needed. Belongs to one thread, like the store it reads."""

    def __init__(
        self,
        store: StoreReader,
        embedder: Embedder,
        *,
        ttl_s: float = 0.0,
        make_index: Callable[[int], VectorIndex] = FlatIndex,
    ) -> None:
        """`ttl_s`: older examples are not recalled; 0: no end."""
        self.store = store
        self.embedder = embedder
        self.ttl_s = ttl_s
        self.make_index = make_index
        self._indexes: dict[str, VectorIndex] = {}  # by tenant
        self._tenant: dict[str, str] = {}  # of each indexed example
        self._stale: dict[str, None] = {}  # ids in the order they are to be embedded anew

    def __len__(self) -> int:
        """Examples that can be found."""
        return len(self._tenant)

    def load(self) -> None:
        """Index everything in the store. Changes that follow are applied with `apply`."""
        self._indexes, self._tenant, self._stale = {}, {}, {}
        blocks: dict[str, list[tuple[str, Vector]]] = {}
        for id, tenant, embedder, _, vector in self.store.embeddings():
            if embedder != self.embedder.identity or vector.shape != (self.embedder.dim,):
                self._stale[id] = None
                continue
            block = blocks.setdefault(tenant, [])
            block.append((id, vector))
            if len(block) == BLOCK:
                self._add(tenant, blocks.pop(tenant))
        for tenant, block in blocks.items():
            self._add(tenant, block)

    def apply(self, changes: Sequence[Change]) -> None:
        """Follow the store: index what was added or replaced, forget what was deleted."""
        ids = list(dict.fromkeys(c.key for c in changes if c.kind is ChangeKind.EXAMPLE))
        if not ids:
            return
        present = {example.id: example for example in self.store.examples(ids)}
        for id in ids:
            example = present.get(id)
            if example is None or example.held is not None:
                self._forget(id)
            elif not self._comparable(example):
                self._forget(id)
                self._stale[id] = None
            else:
                if self._tenant.get(id, example.tenant) != example.tenant:
                    self._forget(id)
                self._stale.pop(id, None)
                self._add(example.tenant, [(id, example.embedding)])

    def embed(self, texts: Sequence[str]) -> Matrix:
        """(n, dim), unit rows."""
        return self.embedder.embed(texts)

    def recall(self, queries: Sequence[Query], now: float, not_from: Sequence[str | None] = ()) -> list[Recalled]:
        """The nearest examples for each query, best first; all texts are embedded as one batch.

        `now`: for the age of examples. `not_from[i]`: a request id whose own example is no answer to query i
        (asking an old request anew); none by default.
        """
        vectors = self.embed([query.text for query in queries])
        origins = list(not_from) or [None] * len(queries)
        wanted = [_Search(*each) for each in zip(queries, vectors, origins, strict=True)]
        open = [search for search in wanted if search.query.k > 0]
        while open:
            open = self._round(open, now)
        return [Recalled(search.vector, search.found) for search in wanted]

    def stale(self) -> list[str]:
        """Examples embedded by another model: they cannot be found until they are embedded anew."""
        return list(self._stale)

    def reembed(self, limit: int) -> list[tuple[str, Vector]]:
        """New embeddings for at most `limit` stale examples, to be written to the store.

        They are found as soon as `apply` sees that change. Asking again before goes on with the next ones.
        """
        ids = list(islice(self._stale, limit))
        examples = self.store.examples(ids)
        for id in ids:
            del self._stale[id]
        self._stale.update((example.id, None) for example in examples)
        vectors = self.embed([example.request for example in examples])
        return [(example.id, vector) for example, vector in zip(examples, vectors, strict=True)]

    def _round(self, searches: Sequence[_Search], now: float) -> list[_Search]:
        """Search, read all that was found at once, and say which searches have to reach further.

        What was indexed but is no longer usable leaves its index, so it is in the way only once.
        """
        hits = [self._search(search) for search in searches]
        ids = {id: None for hit in hits for id in hit}
        examples = {example.id: example for example in self.store.examples(list(ids))}
        usable = {e.id for e in examples.values() if e.held is None and self._comparable(e) and not self._old(e, now)}
        for id in ids:
            if id not in usable:
                self._forget(id)
        short = []
        for search, hit in zip(searches, hits, strict=True):
            search.take(examples[id] for id in hit if id in usable)
            if len(search.found) < search.query.k and len(hit) == search.reach:
                search.reach *= 2
                short.append(search)
        return short

    def _search(self, search: _Search) -> list[str]:
        index = self._indexes.get(search.query.tenant)
        return [id for id, _ in index.search(search.vector, search.reach)] if index is not None else []

    def _comparable(self, example: Example) -> bool:
        return example.embedder == self.embedder.identity and example.embedding.shape == (self.embedder.dim,)

    def _old(self, example: Example, now: float) -> bool:
        return self.ttl_s > 0 and now - example.at > self.ttl_s

    def _add(self, tenant: str, block: Sequence[tuple[str, Vector]]) -> None:
        if tenant not in self._indexes:
            self._indexes[tenant] = self.make_index(self.embedder.dim)
        self._indexes[tenant].add_many([id for id, _ in block], np.stack([vector for _, vector in block]))
        self._tenant.update((id, tenant) for id, _ in block)

    def _forget(self, id: str) -> None:
        self._stale.pop(id, None)
        tenant = self._tenant.pop(id, None)
        if tenant is not None:
            self._indexes[tenant].remove(id)
            if len(self._indexes[tenant]) == 0:
                del self._indexes[tenant]


class _Search:
    """One query on its way."""

    def __init__(self, query: Query, vector: Vector, not_from: str | None) -> None:
        self.query = query
        self.vector = vector
        self.not_from = not_from
        self.reach = query.k + (not_from is not None)  # how many to ask the index for
        self.found: list[tuple[Example, float]] = []

    def take(self, examples: Iterable[Example]) -> None:
        """Keep the best that belong here, with their cosine as the store's embedding has it, not the index's."""
        own = [e for e in examples if e.tenant == self.query.tenant and e.request_id != self.not_from]
        cosines = (np.stack([e.embedding for e in own]) @ self.vector).clip(-1.0, 1.0).tolist() if own else []
        self.found = sorted(zip(own, cosines, strict=True), key=lambda pair: -pair[1])[: self.query.k]
