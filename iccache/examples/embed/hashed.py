"""An embedder without a model."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from iccache.examples.embed.embedder import CHARS_READ, ends, well_formed
from iccache.types import Matrix, Vector


class HashEmbedder:
    """Words, word pairs and pieces of words, hashed into a vector: no model, no memory, the same everywhere.

    Texts that share words lie near each other, rarer (longer) words counting more. It knows no synonyms.
    """

    quick = True

    def __init__(self, dim: int = 384) -> None:
        self.dim = dim
        self.identity = f"hash-1:{dim}"

    def embed(self, texts: Sequence[str]) -> Matrix:
        return np.stack([self._one(text) for text in texts]) if texts else np.empty((0, self.dim), np.float32)

    def _one(self, text: str) -> Vector:
        vector = np.zeros(self.dim, np.float32)
        for gram, weight in _grams(ends(well_formed(text), CHARS_READ)):
            code = zlib.crc32(gram.encode())
            vector[code % self.dim] += weight if code & 0x8000_0000 else -weight
        vector = np.sign(vector) * np.sqrt(np.abs(vector))  # a word said ten times is not ten times the topic
        norm = float(np.linalg.norm(vector))
        if norm == 0.0:  # nothing but space: one fixed direction
            vector[0] = norm = 1.0
        return vector / np.float32(norm)


def _grams(text: str) -> Iterator[tuple[str, float]]:
    """What a text consists of, each with its weight."""
    words = re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFKC", text).lower())
    before = ""
    for word in words:
        weight = min(len(word), 8) / 8
        yield word, weight * weight
        yield f"{before} {word}", weight * 0.25
        for i in range(len(word) - 3):
            yield f"#{word[i : i + 4]}", 0.1
        before = word
