"""A memory in front of any embedder."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from iccache.examples.embed.embedder import Embedder
from iccache.types import Matrix, Vector


class CachedEmbedder:
    """Remembers the latest `entries` texts by their hash; what repeats within one call is embedded once."""

    def __init__(self, inner: Embedder, entries: int) -> None:
        self.inner = inner
        self.identity = inner.identity
        self.dim = inner.dim
        self.quick = inner.quick
        self.entries = entries
        self._known: OrderedDict[bytes, Vector] = OrderedDict()

    def embed(self, texts: Sequence[str]) -> Matrix:
        if not texts:
            return np.empty((0, self.dim), np.float32)
        if len(texts) == 1:  # as nearly always while serving
            key = _key(texts[0])
            vector = self._known.get(key)
            if vector is None:
                vector = self.inner.embed(texts)[0]
            self._remember({key: vector})
            return vector[np.newaxis].copy()
        keys = [_key(text) for text in texts]
        found = {key: self._known[key] for key in keys if key in self._known}
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        if missing:
            found.update(zip(missing, self.inner.embed(list(missing.values())), strict=True))
        self._remember({key: found[key] for key in keys})
        return np.stack([found[key] for key in keys])

    def _remember(self, used: dict[bytes, Vector]) -> None:
        for key, vector in used.items():
            self._known[key] = vector
            self._known.move_to_end(key)
        while len(self._known) > self.entries:
            self._known.popitem(last=False)


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
