"""all-MiniLM-L6-v2, or another model of sentence-transformers, in ONNX Runtime: no torch once it has been exported.

`python -m iccache.examples.embed.onnx` exports and quantises the packaged model ahead of the first start.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tokenizers

from iccache.errors import ConfigError
from iccache.examples.embed.embedder import CHARS_READ, digest, ends, first_line, well_formed
from iccache.examples.embed.sentence_transformer import load, packaged_folder
from iccache.types import Matrix, Vector

if TYPE_CHECKING:
    import onnxruntime

Precision = Literal["fp32", "int8"]
FILES: dict[Precision, str] = {"fp32": "model.onnx", "int8": "model-int8.onnx"}
SPECIAL = 2  # [CLS] and [SEP]
OPSET = 17


class OnnxEmbedder:
    """A model from a folder as `export` writes it. Texts go one by one: int8's scales follow what runs together."""

    quick = False

    def __init__(self, folder: Path | None = None, precision: Precision = "int8", threads: int = 1) -> None:
        """`folder` None: the packaged model, exported on first use. Raises ConfigError."""
        source = packaged_folder() if folder is None else folder
        self.folder = exported(source) if folder is None else folder
        if not (self.folder / FILES[precision]).is_file():  # before all that is there is read
            raise ConfigError(f"embedder.model: {self.folder} has no {FILES[precision]}")
        self.identity = f"onnx-{precision}:{digest(source)}"
        self._session = _session(self.folder / FILES[precision], threads)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            self._window = int(json.loads((self.folder / "window.json").read_text())["tokens"]) - SPECIAL
        except Exception as exc:  # tokenizers raises Exception itself
            raise ConfigError(f"embedder.model: {self.folder} cannot be loaded: {first_line(exc)}") from exc
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._frame = self._tokenizer.encode("").ids
        self.dim = int(self._session.get_outputs()[0].shape[1])

    def embed(self, texts: Sequence[str]) -> Matrix:
        return np.stack([self._one(text) for text in texts]) if texts else np.empty((0, self.dim), np.float32)

    def _one(self, text: str) -> Vector:
        ids = self._tokenizer.encode(ends(well_formed(text), CHARS_READ), add_special_tokens=False).ids
        if len(ids) > self._window:
            ids = ids[: self._window // 2] + ids[-(self._window // 2) :]
        fed = np.array([[self._frame[0], *ids, self._frame[-1]]], np.int64)
        vector: Vector = np.asarray(self._session.run(None, {"input_ids": fed})[0], np.float32)[0]
        vector /= np.linalg.norm(vector)
        return vector


def exported(source: Path, folder: Path | None = None) -> Path:
    """The folder with the model of `source` in both precisions; written on the first call, then found.

    `folder` None: in the user's cache. Raises ConfigError where torch or the onnx extra is missing.
    """
    target = cache_folder() / f"onnx-{digest(source)}" if folder is None else folder
    if (target / "window.json").is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=target.parent) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            _export(source, made)
            os.replace(made, target)
    except OSError as exc:
        if not (target / "window.json").is_file():  # else another process was faster
            raise ConfigError(f"embedder.model: {target} cannot be written: {exc.strerror or exc}") from exc
    return target


def cache_folder() -> Path:
    """Where files are kept that can be made anew: $XDG_CACHE_HOME/iccache or ~/.cache/iccache."""
    named = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(named).expanduser() if named else Path.home() / ".cache") / "iccache"


def _export(source: Path, folder: Path) -> None:
    """Pooling and norm go into the graph: token ids (1, n) in, a unit vector (1, dim) out."""
    model = load(source, threads=1)
    try:
        import torch  # noqa: PLC0415 - takes seconds, and is needed only here
        from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415
    except ImportError as exc:
        raise ConfigError(f"embedder.backend: exporting needs pip install 'iccache[onnx]': {first_line(exc)}") from exc
    whole, small = (str(folder / FILES[precision]) for precision in ("fp32", "int8"))

    class Graph(torch.nn.Module):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any) -> Any:
            found = self.model({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)})
            return torch.nn.functional.normalize(found["sentence_embedding"])

    with torch.inference_mode():
        torch.onnx.export(
            Graph().eval(),
            (torch.tensor([[101, 7592, 2088, 102]]),),
            whole,
            input_names=["input_ids"],
            output_names=["embedding"],
            dynamic_axes={"input_ids": {1: "tokens"}},
            opset_version=OPSET,
            dynamo=False,
        )
    quantize_dynamic(whole, small, weight_type=QuantType.QInt8, per_channel=True)
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (folder / "window.json").write_text(json.dumps({"tokens": int(model.max_seq_length or 512)}) + "\n")


def _session(file: Path, threads: int) -> onnxruntime.InferenceSession:
    try:
        import onnxruntime  # noqa: PLC0415 - an extra
    except ImportError as exc:
        raise ConfigError(f"embedder.backend: onnx needs pip install 'iccache[onnx]': {first_line(exc)}") from exc
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as exc:  # the library has its own tree of errors, below RuntimeError and Exception
        raise ConfigError(f"embedder.model: {file} cannot be loaded: {first_line(exc)}") from exc


def main() -> int:
    """Export and quantise the packaged model."""
    try:
        print(exported(packaged_folder()))
    except ConfigError as exc:
        print(f"iccache: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
