"""A model of a serving engine: so many sequences at once, a queue in front, prefill and decode at stated rates."""

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Rates:
    """What one backend can do."""

    slots: int  # sequences at once
    prefill_tokens_per_s: float  # of one sequence
    decode_tokens_per_s: float  # of one sequence, alone
    slowdown: float  # a full batch decodes so much slower than one sequence: 0 not at all, 1 half as fast

    def seconds(self, prompt_tokens: float, output_tokens: float, running: int) -> float:
        """From its start to its last token, `running` sequences being in the batch with it."""
        rate = self.decode_tokens_per_s / (1.0 + self.slowdown * running / self.slots)
        return prompt_tokens / self.prefill_tokens_per_s + output_tokens / rate


class Work(NamedTuple):
    """One request, as far as an engine is concerned."""

    id: int
    at: float  # arrival, s
    prompt_tokens: float
    output_tokens: float


class Done(NamedTuple):
    work: Work
    at: float  # its last token, s


@dataclass(slots=True)
class Engine:
    """First come, first served. How full the batch is when a request starts decides how fast it decodes."""

    rates: Rates
    waiting: deque[Work] = field(default_factory=deque)
    running: list[tuple[float, int, Work]] = field(default_factory=list)  # a heap by the time of the last token

    def submit(self, work: Work) -> None:
        """At `work.at`, which never goes back; `until` has been called up to then."""
        if len(self.running) < self.rates.slots:
            self._start(work, work.at)
        else:
            self.waiting.append(work)

    def until(self, now: float) -> list[Done]:
        """What came to its end up to `now`, in order."""
        done = []
        while self.running and self.running[0][0] <= now:
            at, _, work = heapq.heappop(self.running)
            done.append(Done(work, at))
            if self.waiting:
                self._start(self.waiting.popleft(), at)
        return done

    def _start(self, work: Work, now: float) -> None:
        took = self.rates.seconds(work.prompt_tokens, work.output_tokens, len(self.running) + 1)
        heapq.heappush(self.running, (now + took, work.id, work))
