"""Make the static table of iccache/examples/embed/table anew: `python -m tests.bench.distill [FOLDER]`.

Every token of all-MiniLM-L6-v2's vocabulary goes through the model by itself, [CLS] token [SEP], and is represented by
the mean of the three outputs; the 384 dimensions become DIM by PCA; each row is multiplied by a / (a + p), p being the
token's share by Zipf's law (the vocabulary is in order of frequency). Rows become int8 with one factor each. About two
minutes of one core, no data. The idea is model2vec's (Minish Lab); the weight is SIF's (Arora et al., 2017).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from iccache.examples.embed.sentence_transformer import packaged_folder
from iccache.examples.embed.static import PACKAGED_TABLE

DIM = 256
SHARDS = 4  # files, each with a quarter of the columns, none above 2 MB
A = 1e-3  # SIF's a: tokens that are much more frequent count less
FIRST = 999  # ids below it are unused places and special tokens
Rows = NDArray[np.float32]


def token_vectors(folder: Path) -> Rows:
    """(tokens, 384): every token of the vocabulary by itself through the model in `folder`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch  # noqa: PLC0415 - needed here only
    import transformers  # noqa: PLC0415

    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    with torch.inference_mode():
        for ids in np.array_split(np.arange(len(tokenizer)), len(tokenizer) // 512):
            batch = torch.tensor([[tokenizer.cls_token_id, i, tokenizer.sep_token_id] for i in ids])
            outputs = model(input_ids=batch, attention_mask=torch.ones_like(batch)).last_hidden_state
            found.append(outputs.mean(1).numpy())
    return np.concatenate(found)


def principal(rows: Rows, dim: int) -> Rows:
    """(n, dim): centred, the directions of most variance first."""
    centred = rows - rows.mean(0)
    _, directions = np.linalg.eigh(centred.T @ centred)
    return centred @ directions[:, ::-1][:, :dim]


def weights(n: int) -> Rows:
    """(n,): SIF's weight of each token of a vocabulary in order of frequency."""
    shares = 1.0 / np.arange(1, n + 1)
    shares /= shares.sum()
    return (A / (A + shares)).astype(np.float32)


def table(rows: Rows) -> Rows:
    """(tokens, DIM) from (tokens, 384)."""
    made = np.zeros((len(rows), DIM), np.float32)
    made[FIRST:] = principal(rows[FIRST:], DIM) * weights(len(rows) - FIRST)[:, np.newaxis]
    return made


def write(rows: Rows, source: Path, folder: Path) -> None:
    """The table and its tokenizer, which knows no special token but [UNK]: whatever is sent is only text."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = spec["model"]["vocab"]
    special = {token["content"] for token in spec["added_tokens"]}
    kept = [t for t in sorted(vocabulary, key=vocabulary.__getitem__) if t not in special and not _unused(t)]
    spec["model"]["vocab"] = {token: i for i, token in enumerate(["[UNK]", *kept])}
    spec |= {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
    with (folder / "tokenizer.json").open("w", encoding="utf-8") as file:
        file.write(json.dumps(spec, ensure_ascii=False, separators=(",", ":")) + "\n")
    rows = np.concatenate([np.zeros((1, rows.shape[1]), np.float32), rows[[vocabulary[token] for token in kept]]])
    scales = np.maximum(np.abs(rows).max(1) / 127, 1e-6).astype(np.float16)
    quantised = np.rint(rows / scales.astype(np.float32)[:, np.newaxis]).clip(-127, 127).astype(np.int8)
    for i, shard in enumerate(np.array_split(quantised, SHARDS, axis=1)):
        np.save(folder / f"rows-{i}.npy", np.ascontiguousarray(shard))
    np.save(folder / "scales.npy", scales)


def _unused(token: str) -> bool:
    return token.startswith("[unused")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.distill", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=PACKAGED_TABLE)
    folder = parser.parse_args().folder
    source = packaged_folder()
    write(table(token_vectors(source)), source, folder)
    print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
