"""A table of token vectors: text to vector with no neural network at run time.

    meaning(text)  = sum over its distinct tokens t: (count of t)^POWER * row[t]
    spelling(text) = sum over its distinct tokens and pairs of neighbours g: sign(g) * weight(g)^POWER * unit(slot(g))
    v(text)        = sqrt(1 - SPELT) * meaning / |meaning|, sqrt(SPELT) * spelling / |spelling|

A row's length is its token's weight: frequent words count little. The second part, SLOTS dimensions with sign and slot
from a hash, says which very words were used in which order: among near neighbours it tells a name from a name.

The packaged table was distilled from all-MiniLM-L6-v2 (Apache-2.0) by `python -m tests.bench.distill`; how it does
beside that model is in the README.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from safetensors.numpy import load_file

from iccache.errors import ConfigError
from iccache.examples.embed.embedder import CHARS_READ, digest, ends, first_line, well_formed
from iccache.types import Matrix, Vector

PACKAGED_TABLE = Path(__file__).with_name("table")
POWER = 0.5  # a word said four times counts twice
VERSION = 2  # a new number where the arithmetic here changes what a text's vector is
WINDOW = 254  # tokens; of a longer text half of it from its beginning and half from its end
SPELT = 0.4  # share of a cosine that is about the very words
SLOTS = 128  # dimensions for it
A = 1e-2  # of a token with share p of all text, weight A / (A + p)
PAIR = 0.5  # weight of two neighbours, beside that of one token
GRAM = 3  # characters of the pieces of a word that the vocabulary does not have
GRAMS = 32  # of one word, at most

WORDS_REMEMBERED = 16_384
_ROOT_OF_PAIR = math.sqrt(PAIR)
_SHIFTS = tuple(map(np.uint64, (30, 27, 31)))
_FACTORS = tuple(map(np.uint64, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)))
_PIECE = re.compile(r"[a-z0-9]+|[^a-z0-9\s]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

Rows = NDArray[np.int8] | NDArray[np.floating[Any]]


class StaticEmbedder:
    """Tokens looked up in a table and added. Any thread may call it, several at once.

    A word whose script the vocabulary lacks is represented by its pieces of three characters, each a direction made
    of its hash: what is spelled alike lies near, and nothing is known of its meaning.
    """

    quick = True

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` None: the packaged table; else one of ours, of model2vec or sentence-transformers' StaticEmbedding.

        Raises ConfigError when there is none in it.
        """
        self.folder = PACKAGED_TABLE if folder is None else folder
        ours = (self.folder / "scales.npy").is_file()
        try:
            self._tokenizer = _tokenizer(self.folder)
            self._rows, self._scales = _own(self.folder) if ours else _foreign(self.folder)
        except ConfigError:
            raise
        except Exception as exc:  # the libraries raise whatever their many parts raise on a broken file
            raise ConfigError(f"embedder.model: {self.folder} cannot be loaded: {first_line(exc)}") from exc
        if len(self._rows) < self._tokenizer.get_vocab_size() or len(self._scales) != len(self._rows):
            raise ConfigError(f"embedder.model: {self.folder} has fewer rows than its vocabulary has tokens")
        self._spelt = SPELT if ours else 0.0
        self.dim = self._rows.shape[1] + (SLOTS if ours else 0)
        self.identity = f"static-{VERSION}:{digest(self.folder)}"
        self._roots = _weights(len(self._rows)) ** POWER
        codes = _mixed(np.arange(len(self._rows)))
        self._slots, self._signed = _slots(codes), _signs(codes) * self._roots
        self._power = np.float32(POWER if ours else 1.0)  # as a foreign table is meant to be read
        self._unknown = self._tokenizer.token_to_id("[UNK]") if ours else None
        self._splits_plainly = ours and _splits_plainly(self._tokenizer)
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
        self._special = re.compile("|".join(map(re.escape, special)) or "(?!)", re.IGNORECASE)
        self._known: dict[str, tuple[int, ...]] = {}  # tokens of a word
        self._pieces = self._tokenizer.model  # of one word, without what makes words of a text
        self._gram_weight = np.float32(self._usual_length() / np.sqrt(self._rows.shape[1] * GRAM))

    def embed(self, texts: Sequence[str]) -> Matrix:
        if len(texts) == 1:
            return self._one(texts[0])[np.newaxis]
        return np.stack([self._one(text) for text in texts]) if texts else np.empty((0, self.dim), np.float32)

    def _one(self, text: str) -> Vector:
        text = ends(well_formed(text), CHARS_READ)
        ids, encoded = self._plain_ids(text), None
        if ids is None:
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
            ids = encoded.ids
        half = WINDOW // 2
        read = ids if len(ids) <= WINDOW else ids[:half] + ids[-half:]
        counts = Counter(read)
        unknown = counts.pop(self._unknown, 0) if self._unknown is not None else 0
        meaning = self._sum(counts)
        if unknown and encoded is not None:
            offsets = encoded.offsets if len(ids) <= WINDOW else encoded.offsets[:half] + encoded.offsets[-half:]
            words = [place for id, place in zip(read, offsets, strict=True) if id == self._unknown]
            meaning += self._of_unknown(text[a:b] for a, b in words)
        if not self._spelt:
            return _unit(meaning)
        vector = np.empty(self.dim, np.float32)
        _share(vector[: len(meaning)], meaning, math.sqrt(1.0 - self._spelt))
        _share(vector[len(meaning) :], self._spelling(np.array(read, np.int64), counts), math.sqrt(self._spelt))
        return vector

    def _plain_ids(self, text: str) -> list[int] | None:
        """The tokens of plain text, most of whose words were seen lately: the tokenizer's own, sooner.

        None where it takes the tokenizer to say: BERT's splits ASCII text at space and around punctuation, and each
        piece by itself, but for its special tokens.
        """
        if not self._splits_plainly or not text.isascii() or _CONTROL.search(text) or self._special.search(text):
            return None
        known = self._known
        ids: list[int] = []
        for word in _PIECE.findall(text.lower()):
            found = known.get(word)
            if found is None:
                found = tuple([token.id for token in self._pieces.tokenize(word)])
                if self._unknown in found:
                    return None
                if len(known) >= WORDS_REMEMBERED:
                    self._known = known = {}
                known[word] = found
            ids += found
        return ids

    def _spelling(self, ids: NDArray[np.int64], counts: Counter[int]) -> Vector:
        """(SLOTS,): which tokens and which pairs of neighbours there are."""
        distinct = np.fromiter(counts.keys(), np.intp, len(counts))
        signed = self._signed.take(distinct)
        if len(distinct) < len(ids):
            signed *= np.sqrt(np.fromiter(counts.values(), np.float64, len(counts)))
        pairs = ids[:-1] * len(self._roots)
        pairs += ids[1:]
        pairs += len(self._roots)
        roots = self._roots.take(ids)
        weights = np.sqrt(roots[:-1] * roots[1:])
        weights *= _ROOT_OF_PAIR
        if len(set(pairs.tolist())) < len(pairs):
            pairs, first, count = np.unique(pairs, return_index=True, return_counts=True)
            weights = weights[first] * np.sqrt(count)
        codes = _mixed(pairs)
        slots = np.concatenate([self._slots.take(distinct), _slots(codes)])
        return np.bincount(slots, np.concatenate([signed, _signs(codes) * weights]), SLOTS).astype(np.float32)

    def _sum(self, counts: Counter[int]) -> Vector:
        ids = np.fromiter(counts.keys(), np.intp, len(counts))
        weights = np.fromiter(counts.values(), np.float32, len(counts)) ** self._power * self._scales[ids]
        summed: Vector = weights @ self._rows[ids].astype(np.float32)
        return summed

    def _of_unknown(self, words: Iterable[str]) -> Vector:
        """The sum over their pieces, about as long as that of as many known words."""
        counts = Counter(gram for word in words for gram in _grams(word))
        total = np.zeros(self._rows.shape[1], np.float32)
        for gram, count in counts.items():
            total += count**POWER * self._direction(gram)
        return total * self._gram_weight

    def _direction(self, gram: str) -> Vector:
        """-1 and 1, by its hash."""
        dim = self._rows.shape[1]
        bits = np.frombuffer(hashlib.shake_128(gram.encode()).digest(-(-dim // 8)), np.uint8)
        return np.unpackbits(bits)[:dim].astype(np.float32) * 2.0 - 1.0

    def _usual_length(self) -> float:
        """Median length of a row."""
        rows = self._rows[::16].astype(np.float32) * self._scales[::16, np.newaxis]
        return float(np.median(np.linalg.norm(rows, axis=1)))


def _unit(vector: Vector) -> Vector:
    return vector / _length(vector)


def _share(into: Vector, vector: Vector, length: float) -> None:
    """Put `vector` there, with that length."""
    np.divide(vector, _length(vector), out=into)
    into *= length


def _length(vector: Vector) -> np.float32:
    norm = math.sqrt(vector @ vector)
    if norm == 0.0:  # nothing but space: one fixed direction
        vector[0] = norm = 1.0
    return np.float32(norm)


def _weights(n: int) -> NDArray[np.float64]:
    """(n,): of each token of a vocabulary in order of frequency, by Zipf's law; 0 for the first, [UNK]."""
    shares = 1.0 / np.arange(1, n)
    shares /= shares.sum()
    return np.concatenate([[0.0], A / (A + shares)])


def _mixed(codes: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A hash of each, the same everywhere: the end of splitmix64 (S. Vigna)."""
    x = codes.astype(np.uint64)
    x ^= x >> _SHIFTS[0]
    x *= _FACTORS[0]
    x ^= x >> _SHIFTS[1]
    x *= _FACTORS[1]
    x ^= x >> _SHIFTS[2]
    return x


def _slots(codes: NDArray[np.uint64]) -> NDArray[np.intp]:
    return (codes & np.uint64(SLOTS - 1)).view(np.intp)


def _signs(codes: NDArray[np.uint64]) -> NDArray[np.float64]:
    return (codes >> np.uint64(40) & np.uint64(1)).astype(np.float64) * 2.0 - 1.0


def _splits_plainly(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether it is BERT's, in lower case."""
    bert = isinstance(tokenizer.normalizer, tokenizers.normalizers.BertNormalizer)
    pieces = isinstance(tokenizer.pre_tokenizer, tokenizers.pre_tokenizers.BertPreTokenizer)
    return bert and pieces and bool(tokenizer.normalizer.lowercase)


def _grams(word: str) -> list[str]:
    padded = f" {word.lower()} "
    return [padded[i : i + GRAM] for i in range(max(1, len(padded) - GRAM + 1))][:GRAMS]


def _tokenizer(folder: Path) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_file(str(_file(folder, "tokenizer.json")))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _file(folder: Path, name: str) -> Path:
    """The file in `folder`, or where sentence-transformers puts it. Raises ConfigError."""
    for file in (folder / name, folder / "0_StaticEmbedding" / name):
        if file.is_file():
            return file
    raise ConfigError(f"embedder.model: {folder} is not the folder of a static table: there is no {name}")


def _own(folder: Path) -> tuple[Rows, Vector]:
    """A table as `tests.bench.distill` writes it: rows (n, dim) int8 in files of columns, factors (n,)."""
    shards = sorted(folder.glob("rows-*.npy"))
    scales = np.load(folder / "scales.npy").astype(np.float32)
    return np.ascontiguousarray(np.concatenate([np.load(shard) for shard in shards], axis=1)), scales


def _foreign(folder: Path) -> tuple[Rows, Vector]:
    """A table of model2vec (embeddings, perhaps weights and mapping) or StaticEmbedding (embedding.weight)."""
    tensors = load_file(_file(folder, "model.safetensors"))
    rows = tensors.get("embeddings", tensors.get("embedding.weight"))
    if rows is None or rows.ndim != 2:
        raise ConfigError(f"embedder.model: {folder} holds {', '.join(sorted(tensors)) or 'nothing'}, not a table")
    if "mapping" in tensors:
        rows = rows[tensors["mapping"]]
    return rows, np.asarray(tensors.get("weights", np.ones(len(rows))), np.float32)
