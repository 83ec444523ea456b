"""Whether a backend is left alone for a while because it fails."""

from __future__ import annotations

FAILURES = 5  # in a row, until it opens
BASE_S = 5.0  # open that long the first time, twice that the second, ...
LONGEST_S = 60.0


class Circuit:
    """Closed, it lets everything through. After `FAILURES` failures in a row it opens: nothing passes for a while.

    Then it is half open: one request may try. Its success closes the circuit, its failure opens it again, longer. A
    trial that reports neither (its client left) gives way to another after as long a wait. `now` is any clock in
    seconds that does not go back.
    """

    def __init__(self, failures: int = FAILURES, base_s: float = BASE_S, longest_s: float = LONGEST_S) -> None:
        self._limit = failures
        self._base_s = base_s
        self._longest_s = longest_s
        self._failures = 0  # in a row, while closed
        self._opened = 0  # times, since it last worked
        self._until = 0.0  # while open: nothing passes before
        self._trying = False

    @property
    def closed(self) -> bool:
        """Whether all is well. Half open is not closed."""
        return self._opened == 0

    def is_open(self, now: float) -> bool:
        """Whether a request would be refused. Asking changes nothing."""
        return self._opened > 0 and now < self._until

    def allows(self, now: float) -> bool:
        """Whether a request may be sent now. True from a half-open circuit is its one trial: ask only to send."""
        if self.is_open(now):
            return False
        if self._opened:
            self._trying = True
            self._until = now + self._pause_s()
        return True

    def failed(self, now: float) -> None:
        if self._opened and not self._trying:
            return  # sent before it opened: known already
        self._failures += 1
        if self._trying or self._failures >= self._limit:
            self._opened += 1
            self._failures = 0
            self._trying = False
            self._until = now + self._pause_s()

    def succeeded(self, now: float) -> None:
        self._failures = self._opened = 0
        self._trying = False

    def _pause_s(self) -> float:
        return min(self._longest_s, self._base_s * self._opened)
