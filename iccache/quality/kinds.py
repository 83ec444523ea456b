"""Which requests are of one kind: evidence on one is evidence on the others."""

from __future__ import annotations

import hashlib

from iccache.types import Exchange

KIND, WITHHELD, HELD_OUT = "kind", "withheld", "held_out"  # in an exchange's `extra`


def kind_of(system: str) -> str:
    """Requests under one system prompt are one kind, all without one are another: "". A digest, so no text is kept."""
    return hashlib.blake2b(system.encode("utf-8", "replace"), digest_size=8).hexdigest() if system else ""


def kind_of_record(exchange: Exchange) -> str:
    """As it was when the request came: the record's own system prompt is redacted."""
    kept = exchange.extra.get(KIND)
    return kept if isinstance(kept, str) else kind_of(exchange.system)
