"""Signals of a request and one arm -> a bounded vector."""

import hashlib
import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from router.types import NO_EXAMPLES, Arm, Matrix, Signals, Vector

N_PROJECTED = 64  # fewer blur kinds of request into each other, more make each decision dearer
PROJECTED_LIMIT = 4.0  # a projected coordinate of a unit vector has variance 1: four standard deviations

NAMES: tuple[str, ...] = (
    "constant",
    *(f"embedding_{i}" for i in range(N_PROJECTED)),
    "log_tokens",
    "turns",
    "examples",
    "similarity_max",
    "similarity_mean",
    "utility_max",
    "utility_mean",
    "example_tokens",
)


def features(signals: Signals, arm: Arm) -> Vector:
    """(n_features,) in the order of `NAMES`: the constant is 1, embedding coordinates are within
    +-`PROJECTED_LIMIT`, everything else within +-1."""
    examples = signals.examples.get(arm.name, NO_EXAMPLES)
    for name, value in (
        ("tokens", signals.tokens),
        ("turns", signals.turns),
        ("example count", examples.count),
        ("example tokens", examples.tokens),
    ):
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, not {value}")
    x = np.zeros(len(NAMES))
    x[0] = 1.0
    if signals.embedding is not None:
        x[1 : 1 + N_PROJECTED] = project(signals.embedding)
    x[1 + N_PROJECTED :] = (
        _unit(math.log((1 + signals.tokens) / 101) / 5),  # 0 at 100 tokens
        _unit(math.log1p(max(0, signals.turns - 1)) / math.log(33)),  # 0 at one turn, 1 at 33
        _unit(examples.count / 5),
        _unit(examples.similarity_max),
        _unit(examples.similarity_mean),
        _unit(examples.utility_max),
        _unit(examples.utility_mean),
        _unit(math.log1p(examples.tokens) / math.log1p(4096)),
    )
    if not np.isfinite(x).all():
        bad = [name for name, value in zip(NAMES, x, strict=True) if not math.isfinite(value)]
        raise ValueError(f"signals give features that are not finite: {', '.join(bad)}")
    return x


def project(embedding: NDArray[np.floating]) -> Vector:
    """(dim,) of unit norm -> (N_PROJECTED,) of about unit variance, clipped to +-`PROJECTED_LIMIT`."""
    if embedding.ndim != 1 or not embedding.size:
        raise ValueError(f"an embedding has one axis and at least one entry, not shape {embedding.shape}")
    if not np.isfinite(embedding).all():
        raise ValueError("an embedding's entries must be finite")
    projected = projection(embedding.size) @ embedding.astype(np.float64)
    return np.clip(projected, -PROJECTED_LIMIT, PROJECTED_LIMIT)


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


def _unit(value: float) -> float:
    return value if math.isnan(value) else min(1.0, max(-1.0, value))
