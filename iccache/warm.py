"""Which backend has lately seen the beginning of a conversation, and so may have it in its prompt cache.

What counts is what the client sends: the text of a conversation up to its last question is what was asked before and
answered then. It is known in this process alone, for a while, and only as a digest.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from iccache.types import Ask, Exchange

KEPT = 100_000  # conversations


class Warm:
    """Conversations by the digest of all that was said in them."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._backends: OrderedDict[bytes, str] = OrderedDict()

    def remember(self, tenant: str, ask: Ask, exchange: Exchange) -> None:
        """What became of `ask`, where it came to a good end and may be remembered."""
        if not (exchange.complete and ask.controls.store):
            return
        key = _digest(tenant, ask.dialect, f"{ask.prompt}\n{exchange.answer}")
        self._backends[key] = exchange.backend
        self._backends.move_to_end(key)
        if len(self._backends) > self._kept:
            self._backends.popitem(last=False)

    def backend(self, tenant: str, ask: Ask) -> str | None:
        """Who answered the turn before this one; None where that is not known, or there was none."""
        return self._backends.get(_digest(tenant, ask.dialect, ask.before)) if ask.before else None


def _digest(*parts: str) -> bytes:
    return hashlib.blake2b("\x00".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
