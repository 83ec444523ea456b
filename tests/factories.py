"""Small, valid instances of the shared words. Name only what a test is about."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from iccache.types import DecisionKind, Example, ExampleStats, Exchange, Feedback, Usage, Vector

AT = 1_700_000_000.0
DIM = 8


def make_exchange(request_id: str = "r1", **given: Any) -> Exchange:
    """A complete, routed and offloaded exchange of tenant "t"."""
    fields: dict[str, Any] = {
        "tenant": "t",
        "subject": None,
        "session": None,
        "at": AT,
        "dialect": "chat",
        "model": "auto",
        "stream": False,
        "backend": "small",
        "decision": DecisionKind.ROUTED,
        "reason": None,
        "status": 200,
        "complete": True,
        "offloaded": True,
        "relative_cost": 0.5,
        "system": "Be brief.",
        "task": f"the question of {request_id}",
        "answer": f"the answer of {request_id}",
        "usage": Usage(10, 5),
        "cost_usd": 0.001,
    }
    return Exchange(request_id=request_id, **{**fields, **given})


def make_example(id: str = "e1", **given: Any) -> Example:
    """An example of tenant "t" that the large backend answered; its embedding follows from its request."""
    request = given.get("request", f"the question of {id}")
    fields: dict[str, Any] = {
        "tenant": "t",
        "subject": None,
        "request_id": f"request-{id}",
        "at": AT,
        "dialect": "chat",
        "system": "",
        "request": request,
        "answer": f"the answer of {id}",
        "backend": "large",
        "embedder": "test",
        "embedding": make_vector(request),
        "tokens": 12,
        "stats": ExampleStats(),
    }
    return Example(id=id, **{**fields, **given})


def make_feedback(request_id: str = "r1", score: float | None = 1.0, source: str = "user", at: float = AT) -> Feedback:
    return Feedback(request_id, source, score, at)


def make_vector(text: str, dim: int = DIM) -> Vector:
    """A unit vector that depends on `text` alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    vector = np.random.default_rng(seed).normal(size=dim).astype(np.float32)
    return vector / np.linalg.norm(vector)
