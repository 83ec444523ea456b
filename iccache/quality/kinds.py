"""Which requests are of one kind: evidence on one is evidence on the others."""

from __future__ import annotations

import hashlib

from iccache.types import Exchange

KIND, WITHHELD, HELD_OUT, MEANT = "kind", "withheld", "held_out", "meant"  # in an exchange's `extra`


def kind_of(system: str) -> str:
    """Requests under one system prompt are one kind, all without one are another: "". A digest, so no text is kept."""
    return hashlib.blake2b(system.encode("utf-8", "replace"), digest_size=8).hexdigest() if system else ""


def kind_of_record(exchange: Exchange) -> str:
    """As it was when the request came: the record's own system prompt is redacted."""
    kept = exchange.extra.get(KIND)
    return kept if isinstance(kept, str) else kind_of(exchange.system)


def meant(exchange: Exchange) -> float:
    """In [0, 1]: the share that the policy had in the choice of the backend; the rest is uniform exploration."""
    kept = exchange.extra.get(MEANT, 1.0)
    return min(1.0, max(0.0, float(kept))) if isinstance(kept, int | float) else 1.0
