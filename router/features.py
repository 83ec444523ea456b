"""Signals of a request and one arm -> a bounded vector."""

import hashlib
import math
import re
import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from router.types import Arm, ExampleSignals, Matrix, Signals, Vector

N_PROJECTED = 128  # fewer blur kinds of request into each other, more make each decision dearer
PROJECTED_LIMIT = 4.0  # a projected coordinate of a unit vector has variance 1: four standard deviations

N_SYSTEM = 16
SKETCHED_CHARS = 4096  # of a system prompt; what comes later is not looked at

NAMES: tuple[str, ...] = (
    "constant",
    *(f"embedding_{i}" for i in range(N_PROJECTED)),
    *(f"system_{i}" for i in range(N_SYSTEM)),
    "log_tokens",
    "turns",
    "examples",
    "similarity_max",
    "similarity_mean",
    "utility_max",
    "utility_mean",
    "example_tokens",
)
KIND = slice(1, 1 + N_PROJECTED + N_SYSTEM)  # the columns that tell kinds of request apart
_SIZE = KIND.stop  # here begin what is long and how many


def features(signals: Signals, arm: Arm) -> Vector:
    """(n_features,) in the order of `NAMES`: the constant is 1, embedding coordinates are within
    +-`PROJECTED_LIMIT`, everything else within +-1."""
    row: Vector = feature_rows(signals, [arm])[0]
    return row


def feature_rows(signals: Signals, arms: Sequence[Arm]) -> Matrix:
    """(n_arms, n_features): `features` of every arm. What they have in common is computed once."""
    if not (signals.tokens >= 0 and signals.turns >= 0):
        raise ValueError(f"tokens and turns must be >= 0, not {signals.tokens}, {signals.turns}")
    x = np.empty((len(arms), len(NAMES)))
    embedding = signals.embedding
    x[:, :_SIZE] = _kind(
        None if embedding is None else (embedding.tobytes(), embedding.dtype.char, embedding.shape),
        signals.system[:SKETCHED_CHARS],
    )
    size = _unit(math.log((1 + signals.tokens) / 101) / 5)  # 0 at 100 tokens
    turns = _unit(math.log1p(max(0, signals.turns - 1)) / math.log(33))  # 0 at one turn, 1 at 33
    known = [signals.examples.get(arm.name) for arm in arms]
    x[:, _SIZE:] = [(size, turns, *(_NO_EXAMPLES if one is None else _of_examples(one))) for one in known]
    return x


_NO_EXAMPLES = (0.0,) * (len(NAMES) - _SIZE - 2)


@lru_cache(maxsize=256)  # the same request again: 5 KB each, and as much of its system prompt as is looked at
def _kind(embedding: tuple[bytes, str, tuple[int, ...]] | None, system: str) -> Vector:
    """(KIND.stop,): the constant, and what tells kinds of request apart. Read-only."""
    row = np.zeros(KIND.stop)
    row[0] = 1.0
    if embedding is not None:
        row[1 : 1 + N_PROJECTED] = project(np.frombuffer(embedding[0], embedding[1]).reshape(embedding[2]))
    if system:
        row[1 + N_PROJECTED :] = sketch(system)
    row.flags.writeable = False
    return row


def _of_examples(examples: ExampleSignals) -> tuple[float, ...]:
    if not (examples.count >= 0 and examples.tokens >= 0):
        raise ValueError(f"example count and tokens must be >= 0, not {examples.count}, {examples.tokens}")
    given = (
        examples.count / 5,
        examples.similarity_max,
        examples.similarity_mean,
        examples.utility_max,
        examples.utility_mean,
        math.log1p(examples.tokens) / math.log1p(4096),
    )
    found = tuple(map(_unit, given))
    if math.isnan(sum(found)):
        bad = [name for name, value in zip(NAMES[_SIZE + 2 :], found, strict=True) if math.isnan(value)]
        raise ValueError(f"signals give features that are not finite: {', '.join(bad)}")
    return found


def project(embedding: NDArray[np.floating]) -> Vector:
    """(dim,) of unit norm -> (N_PROJECTED,) of about unit variance, clipped to +-`PROJECTED_LIMIT`."""
    if embedding.ndim != 1 or not embedding.size:
        raise ValueError(f"an embedding has one axis and at least one entry, not shape {embedding.shape}")
    projected = (_projection32(embedding.size) @ embedding.astype(np.float32, copy=False)).astype(np.float64)
    if not math.isfinite(projected @ projected):  # what is not finite makes every sum of signs so
        raise ValueError("an embedding's entries must be finite")
    return np.minimum(np.maximum(projected, -PROJECTED_LIMIT), PROJECTED_LIMIT)


def sketch(system: str) -> Vector:
    """(N_SYSTEM,) of +-1: which system prompt a request comes with. Two prompts agree in about (1 + J) / 2 of the
    places, J being the share of lines and sentences that both have of those that either has (b-bit minwise hashing, Li
    and König 2010). So the same prompt with another date in one line is nearly the same, and a new one is unlike all.
    """
    known: Vector = _sketch(system[:SKETCHED_CHARS])
    return known


@lru_cache(maxsize=256)
def _sketch(system: str) -> Vector:
    pieces = {piece.strip() for piece in re.split(r"[\n.;]+", system)} or {""}
    codes = np.array([zlib.crc32(piece.encode("utf-8", "surrogatepass")) for piece in pieces], dtype=np.uint64)
    mixed = (codes + np.uint64(1)) * _ODD[:, None]  # (N_SYSTEM, n_pieces), modulo 2^64
    mixed ^= mixed >> np.uint64(29)
    mixed *= _ODD[::-1, None]
    signs: Vector = (mixed.min(axis=1) * _ODD[0] >> np.uint64(63)).astype(np.float64) * 2 - 1
    signs.flags.writeable = False
    return signs


_ODD = np.array(
    [int.from_bytes(hashlib.sha256(b"router.features sketch %d" % i).digest()[:8], "big") | 1 for i in range(N_SYSTEM)],
    dtype=np.uint64,
)


@lru_cache(maxsize=8)
def projection(dim: int) -> Matrix:
    """(N_PROJECTED, dim) of random signs (Achlioptas 2003): keeps distances in the mean, whatever the embedder.

    The signs are bits of SHA-256, so every process, machine and numpy version has the same ones: logged
    features and stored statistics stay valid. Read-only.
    """
    blocks = -(-dim // 256)
    text = "router.features projection dim={} row={} block={}"
    rows = [
        b"".join(hashlib.sha256(text.format(dim, row, block).encode()).digest() for block in range(blocks))
        for row in range(N_PROJECTED)
    ]
    bits = np.unpackbits(np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(N_PROJECTED, -1), axis=1)
    signs = bits[:, :dim].astype(np.float64) * 2 - 1
    signs.flags.writeable = False
    return signs


@lru_cache(maxsize=8)
def _projection32(dim: int) -> NDArray[np.float32]:
    """`projection`, half as long to read: an embedding has no more digits than that."""
    return projection(dim).astype(np.float32)


def _unit(value: float) -> float:
    return value if math.isnan(value) else min(1.0, max(-1.0, value))
