"""Which backend has lately seen the beginning of a conversation, and so may have it in its prompt cache.

What counts is what the client sends: the text of a conversation up to its last question is what was asked before and
answered then. It is known in this process alone, for a while, and only as a digest.
"""

from __future__ import annotations

import hashlib

from iccache.types import Ask, Exchange

KEPT = 30_000  # conversations: ten minutes of fifty a second, about what engines keep of a prompt; 3 MB


class Warm:
    """Conversations by the digest of all that was said in them: the latest `kept`, at least half as many."""

    def __init__(self, kept: int = KEPT) -> None:
        self._half = kept // 2
        self._young: dict[bytes, str] = {}
        self._old: dict[bytes, str] = {}  # from before; an order of all would take twice the memory

    def remember(self, tenant: str, ask: Ask, exchange: Exchange) -> None:
        """What became of `ask`, where it came to a good end and may be remembered."""
        if not (exchange.complete and ask.controls.store):
            return
        key = _digest(tenant, ask.dialect, f"{ask.prompt}\n{exchange.answer}")
        self._young[key] = exchange.backend
        if len(self._young) >= self._half:
            self._young, self._old = {}, self._young

    def backend(self, tenant: str, ask: Ask) -> str | None:
        """Who answered the turn before this one; None where that is not known, or there was none."""
        if not ask.before:
            return None
        key = _digest(tenant, ask.dialect, ask.before)
        return self._young.get(key) or self._old.get(key)


def _digest(*parts: str) -> bytes:
    return hashlib.blake2b("\x00".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
