"""The nearest examples of a request's own tenant.

The store is the truth. The indexes only say where to look: whatever they name is read from the store before it
is used, or was read lately and has not changed since (see `at_hand`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from iccache.errors import IccacheError
from iccache.examples.at_hand import AtHand
from iccache.examples.catalogue import BLOCK, Catalogue
from iccache.examples.embed import Embedder
from iccache.examples.index import VectorIndex
from iccache.examples.index.flat import FlatIndex
from iccache.examples.index.snapshot import SnapshotError
from iccache.examples.snapshots import Snapshots, Source, apply
from iccache.types import Change, Example, Matrix, Query, Recalled, Vector

log = logging.getLogger(__name__)

CHANGES_AT_ONCE = 100  # applied to a catalogue that is to be taken over: a few milliseconds
QUICK_CHARS = 2000  # of a text that is embedded and looked for without changing threads, where its embedder is quick
QUICK_SEARCH = 50_000  # examples: among more, a search may wait for the disk
WAIT_FOR_FIRST = 50_000  # examples: with more, and no snapshot, a process waits for one before it takes requests


class Retriever:
    """Finds examples by one catalogue, and puts a better one in its place. Belongs to one thread, like its store."""

    def __init__(
        self,
        store: Source,
        embedder: Embedder,
        *,
        ttl_s: float = 0.0,
        snapshots: Snapshots | None = None,
        make_index: Callable[[int], VectorIndex] = FlatIndex,
        at_hand: AtHand | None = None,
    ) -> None:
        """`ttl_s`: older examples are not recalled; 0: no end. Without `snapshots`, all are compared with all.

        `at_hand`: examples read lately; None: every one is read from the store each time.
        """
        self.store = store
        self.embedder = embedder
        self.ttl_s = ttl_s
        self.snapshots = snapshots
        self.make_index = make_index
        self.at_hand = AtHand(capacity=0) if at_hand is None else at_hand
        self.catalogue = self._empty()
        self.loaded_at = 0  # changes up to this one are in the catalogue
        self._next: Catalogue | None = None  # made meanwhile; not yet up to date
        self._outdated = False  # the catalogue in use has missed changes: it only bridges the time to the next

    def __len__(self) -> int:
        """Examples that can be found."""
        return len(self.catalogue)

    def load(self) -> None:
        """Index everything in the store. Changes that follow are applied with `apply`.

        From the snapshot, or where there is none that fits, from the embeddings in the store. Where these are many, a
        process that has just begun waits for a new snapshot, and one that has long served goes on as before meanwhile.
        """
        self.at_hand.clear()
        if self.snapshots is None:
            self.catalogue = self._read_all()
            return
        newest = self.store.last_change()
        try:
            self.catalogue = self.snapshots.open(self.store)
        except SnapshotError as exc:
            log.info("no snapshot to begin with: %s", exc)
            if len(self.catalogue) > WAIT_FOR_FIRST:
                self._outdated = True
                self.snapshots.start()
                return
            self.catalogue = self._made() if self.store.count_examples() > WAIT_FOR_FIRST else self._read_all()
        self.loaded_at = newest

    def look_after(self) -> None:
        """Take over a catalogue that was made meanwhile; have one made where that would pay. To be called often."""
        if self.snapshots is None:
            return
        self._next = self.snapshots.finished() or self._next
        if self._next is not None:
            self._take_over(self._next)
        elif not self.snapshots.at_work() and self._outdated:
            self.catalogue, self._outdated = self._read_all(), False
        elif self.catalogue.is_worn() or not self._is_of_newest():
            self.snapshots.start()

    def apply(self, changes: Sequence[Change]) -> list[Example]:
        """Follow the store: index what was added or replaced, forget what was deleted. Returns those of the changed
        examples that may be recalled now.
        """
        self.at_hand.forget(change.key for change in changes)
        present = apply(self.catalogue, [change for change in changes if change.seq > self.loaded_at], self.store)
        return [example for example in present if self._findable(example)]

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

    def is_quick(self, query: Query) -> bool:
        """Whether its first half takes neither the store nor long."""
        return self.embedder.quick and len(query.text) <= QUICK_CHARS and len(self.catalogue) <= QUICK_SEARCH

    def begin(self, query: Query) -> Begun | None:
        """The first half of `recall` for one query, where it takes neither the store nor long; else None."""
        if not self.is_quick(query):
            return None
        search = _Search(query, self.embed([query.text])[0], None)
        hit = self._search(search) if query.k else []
        return Begun(search, hit, self.at_hand.get(hit))

    def read(self, ids: Sequence[str]) -> dict[str, Example]:
        """Those of `ids` that exist; they are at hand from then on. In the store's thread, whatever is done with the
        rest of this meanwhile.
        """
        read = self.store.examples(ids)
        self.at_hand.put(read)
        return {example.id: example for example in read}

    def end(self, begun: Begun, read: Mapping[str, Example], now: float) -> Recalled | None:
        """The second half, with the examples that were not at hand; None where `recall` has to look further."""
        examples = [example for id in begun.hit if (example := begun.at_hand.get(id) or read.get(id)) is not None]
        if len(self._usable(examples, now)) < len(begun.hit):
            return None
        begun.search.take(examples)
        return Recalled(begun.search.vector, begun.search.found)

    def stale(self) -> list[str]:
        """Examples embedded by another model: they cannot be found until they are embedded anew."""
        return list(self.catalogue.stale)

    def count_stale(self) -> int:
        return len(self.catalogue.stale)

    def reembed(self, limit: int) -> list[tuple[str, Vector]]:
        """New embeddings for at most `limit` stale examples, to be written to the store.

        They are found as soon as `apply` sees that change. Asking again before goes on with the next ones.
        """
        ids = list(islice(self.catalogue.stale, limit))
        examples = self.store.examples(ids)
        for id in ids:
            del self.catalogue.stale[id]
        self.catalogue.stale.update((example.id, None) for example in examples)
        vectors = self.embed([example.request for example in examples])
        return [(example.id, vector) for example, vector in zip(examples, vectors, strict=True)]

    def _round(self, searches: Sequence[_Search], now: float) -> list[_Search]:
        """Search, read all that was found at once, and say which searches have to reach further.

        What was indexed but is no longer usable leaves its index, so it is in the way only once.
        """
        hits = [self._search(search) for search in searches]
        ids = {id: None for hit in hits for id in hit}
        examples = self._examples(ids)
        usable = self._usable(examples.values(), now)
        for id in ids:
            if id not in usable:
                self.catalogue.forget(id)
        short = []
        for search, hit in zip(searches, hits, strict=True):
            search.take(examples[id] for id in hit if id in usable)
            if len(search.found) < search.query.k and len(hit) == search.reach:
                search.reach *= 2
                short.append(search)
        return short

    def _examples(self, ids: Iterable[str]) -> dict[str, Example]:
        """Those of `ids` that exist."""
        examples = self.at_hand.get(ids)
        missing = [id for id in ids if id not in examples]
        if missing:
            examples.update(self.read(missing))
        return examples

    def _usable(self, examples: Iterable[Example], now: float) -> set[str]:
        return {e.id for e in examples if self._findable(e) and not self._old(e, now)}

    def _findable(self, example: Example) -> bool:
        return example.held is None and self.catalogue.comparable(example)

    def _search(self, search: _Search) -> list[str]:
        return self.catalogue.search(search.query.tenant, search.vector, search.reach)

    def _old(self, example: Example, now: float) -> bool:
        return self.ttl_s > 0 and now - example.at > self.ttl_s

    def _empty(self) -> Catalogue:
        return Catalogue(self.embedder.identity, self.embedder.dim, self.make_index)

    def _read_all(self) -> Catalogue:
        """From the embeddings in the store."""
        catalogue = self._empty()
        blocks: dict[str, list[tuple[str, Vector]]] = {}
        for id, tenant, embedder, _, vector in self.store.embeddings():
            if embedder != self.embedder.identity or vector.shape != (self.embedder.dim,):
                catalogue.stale[id] = None
                continue
            block = blocks.setdefault(tenant, [])
            block.append((id, vector))
            if len(block) == BLOCK:
                _add(catalogue, tenant, blocks.pop(tenant))
        for tenant, block in blocks.items():
            _add(catalogue, tenant, block)
        return catalogue

    def _made(self) -> Catalogue:
        """By way of a new snapshot; without one where it cannot be written."""
        assert self.snapshots is not None
        try:
            return self.snapshots.make(self.store)
        except (IccacheError, OSError) as exc:
            log.warning("no snapshot can be made, every search compares with all examples: %s", exc)
            return self._read_all()

    def _take_over(self, made: Catalogue) -> None:
        """Put a finished catalogue in the place of the one in use, once it lacks nothing; a few changes at a time."""
        changes = self.store.changes(made.cursor, CHANGES_AT_ONCE)
        apply(made, changes, self.store)
        if len(changes) < CHANGES_AT_ONCE:
            self.catalogue, self._next, self._outdated = made, None, False
            self.loaded_at = made.cursor

    def _is_of_newest(self) -> bool:
        """Whether the snapshot in use, if any, is the one that has the name."""
        snapshot = self.catalogue.snapshot
        return snapshot is None or snapshot.is_current()


def _add(catalogue: Catalogue, tenant: str, block: Sequence[tuple[str, Vector]]) -> None:
    catalogue.add(tenant, [id for id, _ in block], np.stack([vector for _, vector in block]))


class Begun(NamedTuple):
    """A recall of which the examples are wanted."""

    search: _Search
    hit: Sequence[str]  # ids
    at_hand: Mapping[str, Example]

    @property
    def missing(self) -> list[str]:
        return [id for id in self.hit if id not in self.at_hand]


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
        if not own:
            self.found = []
            return
        rows = np.concatenate([e.embedding for e in own]).reshape(len(own), -1)
        cosines = np.minimum(np.maximum(rows @ self.vector, -1.0), 1.0).tolist()
        self.found = sorted(zip(own, cosines, strict=True), key=itemgetter(1), reverse=True)[: self.query.k]
