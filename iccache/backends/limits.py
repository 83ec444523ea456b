"""How much a backend may be asked per minute: token buckets, so that its own limit is kept and not run into."""

from __future__ import annotations

import math
from dataclasses import dataclass

from iccache import config

MINUTE_S = 60.0
BURST_S = 10.0  # of the rate may be spent at once: a minute's worth at once would be refused by most providers


@dataclass(slots=True)
class Bucket:
    """Fills at `per_minute` up to what `BURST_S` brings (at least 1); what is taken may put it below 0.

    Over any span of t seconds, requests of one token each number at most `BURST_S` worth + t * per_minute / 60 + 1.
    """

    per_minute: float
    level: float = math.nan  # nan: full
    seen: float = 0.0

    @property
    def most(self) -> float:
        return max(1.0, self.per_minute * BURST_S / MINUTE_S)

    def wait_s(self, now: float) -> float:
        """Until there is something in it again: 0 where there is."""
        self._fill(now)
        needed = min(1.0, self.most) - self.level
        return max(0.0, needed) * MINUTE_S / self.per_minute

    def take(self, amount: float, now: float) -> None:
        self._fill(now)
        self.level -= amount

    def _fill(self, now: float) -> None:
        """A clock that steps back counts as standing still."""
        if math.isnan(self.level):
            self.level, self.seen = self.most, now
        self.level = min(self.most, self.level + max(0.0, now - self.seen) * self.per_minute / MINUTE_S)
        self.seen = max(now, self.seen)


class Limits:
    """What one backend may still be asked, by requests and by tokens. Tokens are known, and taken, once an answer is
    there, so a limit of tokens may be overrun by what is in flight, and is then waited for."""

    def __init__(self, backend: config.Backend) -> None:
        self.requests = Bucket(backend.requests_per_minute) if backend.requests_per_minute else None
        self.tokens = Bucket(backend.tokens_per_minute) if backend.tokens_per_minute else None
        self.any = self.requests is not None or self.tokens is not None

    def take_over(self, known: Limits) -> None:
        """What was spent before the configuration was read again."""
        for mine, before in ((self.requests, known.requests), (self.tokens, known.tokens)):
            if mine is not None and before is not None:
                mine.level, mine.seen = min(mine.most, before.level), before.seen

    def wait_s(self, now: float) -> float:
        """How long this backend is better left alone; 0: it may be asked."""
        if not self.any:
            return 0.0
        return max((b.wait_s(now) for b in (self.requests, self.tokens) if b is not None), default=0.0)

    def asked(self, now: float) -> None:
        if self.requests is not None:
            self.requests.take(1.0, now)

    def used(self, tokens: int, now: float) -> None:
        if self.tokens is not None:
            self.tokens.take(tokens, now)
