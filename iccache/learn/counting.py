"""What an answer leaves in the metrics."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping

from iccache import config
from iccache.learn.access import InForce
from iccache.learn.spending import Spending
from iccache.metrics import Metrics
from iccache.price import cost
from iccache.types import DecisionKind, Exchange, Reason, Usage
from router.types import Decision

log = logging.getLogger(__name__)

SAID_EVERY_S = 1.0
LOST_USD = "lost_usd"  # in an exchange's `extra`: what attempts took that broke off
QUALITY_MEMORY = 0.05  # weight of the newest in the moving average that is exported


class Counting:
    """Requests, tokens, money and quality, counted once each."""

    def __init__(
        self,
        in_force: InForce,
        metrics: Metrics,
        spending: Spending,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.in_force = in_force
        self.metrics = metrics
        self.spending = spending
        self.clock = clock
        self._said_at = -math.inf  # when a record that was not made was last told of
        self._unsaid = 0  # how many were not made since
        self._quality: dict[str, float] = {}
        self._bias: dict[str, float] = {}  # as it is exported

    def exchange(self, exchange: Exchange, bypassed: Reason | None = None) -> None:
        """`bypassed`: why it went past the cache, whoever then answered; None where it did not."""
        m, backend = self.metrics, exchange.backend
        m.requests.labels(backend, exchange.decision.value, str(exchange.status)).inc()
        m.request_seconds.labels(backend).observe(exchange.latency_s)
        if exchange.first_byte_s is not None:
            m.first_byte_seconds.labels(backend).observe(exchange.first_byte_s)
        m.overhead_seconds.observe(exchange.overhead_s)
        if bypassed is not None:
            m.bypass.labels(bypassed.value).inc()
        if backend in self.in_force.directory.students:
            m.examples_shown.observe(len(exchange.shown))
        lost = exchange.extra.get(LOST_USD, 0.0)  # is counted already
        self._spend(exchange.tenant, backend, exchange.usage, exchange.cost_usd - lost)
        if exchange.offloaded:
            m.saved_usd.inc(self._saved(exchange))

    def decision(self, decision: Decision) -> None:
        for name, bias in zip(decision.names, decision.load_bias.tolist(), strict=True):
            if self._bias.get(name) != bias:
                self._bias[name] = bias
                self.metrics.load_bias.labels(name).set(bias)

    def passed(self, tenant: str, backend: config.Backend, decision: DecisionKind, status: int, usage: Usage) -> None:
        """A request that was passed through without being read. It is not recorded, but it counts and it costs."""
        self.metrics.requests.labels(backend.name, decision.value, str(status)).inc()
        self.metrics.bypass.labels(Reason.ENDPOINT.value).inc()
        self._spend(tenant, backend.name, usage, cost(backend, usage))

    def lost_answer(self, tenant: str, backend: config.Backend, usage: Usage) -> None:
        """What came of an answer that broke off and reached nobody. It is no request of its own, but it costs."""
        self._spend(tenant, backend.name, usage, cost(backend, usage))

    def quality(self, backend: str, quality: float) -> None:
        before = self._quality.get(backend, quality)
        self._quality[backend] = before + QUALITY_MEMORY * (quality - before)
        self.metrics.quality.labels(backend).set(self._quality[backend])

    def held(self, held: Mapping[str, int]) -> None:
        for name in self.in_force.directory.names:
            self.metrics.floor_held.labels(name).set(held.get(name, 0))

    def full(self) -> None:
        """An exchange that is not recorded because the store is larger than it may be."""
        self.metrics.dropped.labels("max_bytes").inc()

    def dropped(self, exc: Exception, request_id: str) -> None:
        """Told of once a second at most: a full disk drops every exchange, and may be the log's own."""
        self.metrics.dropped.labels("store").inc()
        self._say(f"{request_id} is not recorded: {exc}")

    def crowded_out(self, request_id: str) -> None:
        """An exchange that was recorded, and becomes no example because too many wait for that already."""
        self.metrics.dropped.labels("busy").inc()
        self._say(f"{request_id} does not become an example: too many wait for that already")

    def _say(self, what: str) -> None:
        now = self.clock()
        if now - self._said_at < SAID_EVERY_S:
            self._unsaid += 1
            return
        others = f" (and {self._unsaid} before it)" if self._unsaid else ""
        log.error("%s%s", what, others)
        self._said_at, self._unsaid = now, 0

    def lost(self, count: int) -> None:
        """Exchanges that are not recorded for a reason that nobody foresaw."""
        self.metrics.dropped.labels("store").inc(count)

    def _spend(self, tenant: str, backend: str, usage: Usage, cost_usd: float) -> None:
        labels = self.metrics.tokens.labels
        labels(backend, "input").inc(usage.input)
        labels(backend, "output").inc(usage.output)
        labels(backend, "example").inc(usage.example)
        self.metrics.cost_usd.labels(backend).inc(cost_usd)
        self.spending.add(tenant, cost_usd)

    def _saved(self, exchange: Exchange) -> float:
        """What the dearest backend would have cost for the same request and answer, less what was paid."""
        dearest = self.in_force.directory.by_price[-1]
        plain = exchange.usage.input - exchange.usage.example
        return (
            plain * dearest.usd_per_million_input_tokens + exchange.usage.output * dearest.usd_per_million_output_tokens
        ) / 1e6 - exchange.cost_usd
