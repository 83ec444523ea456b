"""Every metric: its name, labels and sentence. The README's table follows. prometheus-client lives here alone."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SHORT = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
LAG = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1)

CHILDREN = 4096  # label values of one metric that are kept at hand; more only cost time


class Row(NamedTuple):
    """One line of the README's table."""

    name: str
    type: str
    labels: str
    sentence: str


class Tally:
    """A sample of a counter or gauge, written in one go for many steps, of which each takes the library long."""

    def __init__(self, sample: Counter | Gauge) -> None:
        self._sample = sample
        self._pending = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self._pending += amount

    def dec(self, amount: float = 1.0) -> None:
        self._pending -= amount

    def flush(self) -> None:
        pending, self._pending = self._pending, 0.0
        if pending:
            self._sample.inc(pending)


class Distribution:
    """A histogram's sample, likewise; `observe` may be called in any thread, `flush` in one."""

    def __init__(self, sample: Histogram) -> None:
        self._sample = sample
        self._values: deque[float] = deque()
        self.observe: Callable[[float], None] = self._values.append

    def flush(self) -> None:
        """Written as the library's own `observe` does, but once for all values; what it needs is private there."""
        if not self._values:
            return
        buckets, bounds, total = self._sample._buckets, self._sample._upper_bounds, 0.0
        found = [0] * len(buckets)
        while self._values:
            value = self._values.popleft()
            found[bisect_left(bounds, value)] += 1
            total += value
        self._sample._sum.inc(total)
        for bucket, count in zip(buckets, found, strict=True):
            if count:
                bucket.inc(count)


S = TypeVar("S", bound=Tally | Distribution)


class Buffered(Generic[S]):
    """A metric with labels whose samples are written by `Metrics.flush`."""

    def __init__(self, metric: Any, kind: Callable[[Any], S], samples: list[Tally | Distribution]) -> None:
        self._metric = metric
        self._kind = kind
        self._samples = samples
        self.labels: Callable[..., S] = lru_cache(maxsize=CHILDREN)(self._sample)

    def _sample(self, *values: str) -> S:
        made = self._kind(self._metric.labels(*values))
        self._samples.append(made)
        return made


class Metrics:
    """The numbers of one process. No tenant, model text or request id ever becomes a label.

    Those that every request touches are buffered: `flush` writes them, fifty times a second and before they are read.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._all: list[MetricWrapperBase] = []
        self._buffered: list[Tally | Distribution] = []
        self.requests = self._tallied(
            "iccache_requests",
            "Requests answered; backend and decision are none where no backend did.",
            ["backend", "decision", "status"],
        )
        self.request_seconds = self._distribution(
            "iccache_request_seconds", "From a request's arrival to its last byte.", ["backend"], SECONDS
        )
        self.first_byte_seconds = self._distribution(
            "iccache_time_to_first_byte_seconds",
            "From a request's arrival to the first byte of its answer.",
            ["backend"],
            SECONDS,
        )
        self.overhead_seconds = self._unlabelled(
            "iccache_overhead_seconds", "Time spent here before a request went upstream.", SHORT
        )
        self.stage_seconds = self._distribution(
            "iccache_stage_seconds", "Time of each stage: embed, recall, rank, route, compose.", ["stage"], SHORT
        )
        self.loop_lag_seconds = self._histogram(
            "iccache_loop_lag_seconds",
            "How late the event loop was, fifty times a second; above 0.02: something blocks, or no core is free.",
            [],
            LAG,
        )
        self.loop_held_seconds = self._histogram(
            "iccache_loop_held_seconds",
            "The part of that lateness that this process made: without what its thread waited for a core (Linux).",
            [],
            LAG,
        )
        self.bypass = self._tallied("iccache_bypass", "Requests that bypassed the cache, by reason.", ["reason"])
        self.examples_shown = self._unlabelled(
            "iccache_examples_shown", "Examples shown per request to a student.", (0, 1, 2, 3, 4, 5, 8, 12, 16)
        )
        self.examples = self._gauge(
            "iccache_examples",
            "Examples in the cache, of tenants with keys (keyed) and without (default).",
            ["tenant_class"],
        )
        self.reembed_pending = self._gauge(
            "iccache_reembed_pending",
            "Examples of another embedding model that are still to be embedded anew; they cannot be found until then.",
        )
        self.store_bytes = self._gauge("iccache_store_bytes", "Bytes of the store, by part.", ["part"])
        self.tokens = self._tallied(
            "iccache_tokens", "Tokens by kind: input (examples included), output, example.", ["backend", "kind"]
        )
        self.cost_usd = self._tallied("iccache_cost_usd", "Cost of answers in US dollars.", ["backend"])
        self.saved_usd = self._gauge(
            "iccache_saved_usd_total",
            "What the dearest backend would have cost, less what was paid; falls when examples cost more.",
            sum_of_processes=True,
        )
        in_flight = self._gauge("iccache_in_flight", "Requests being answered.", ["backend"], sum_of_processes=True)
        self.in_flight = Buffered(in_flight, Tally, self._buffered)
        self.load = self._gauge("iccache_load", "Smoothed load of the dear backends; 1 is full.")
        self.load_bias = self._gauge(
            "iccache_load_bias",
            "What load takes from a backend's score; persistently above 0: add capacity.",
            ["backend"],
        )
        self.feedback = self._counter("iccache_feedback", "Feedback accepted.", ["source"])
        self.quality = self._gauge("iccache_quality", "Moving average of known quality.", ["backend"])
        self.feedback_bias = self._gauge(
            "iccache_feedback_bias",
            "Mean score of a source less the users' score of the same answers, of the last day.",
            ["source"],
        )
        self.judging_usd = self._counter(
            "iccache_judging_usd", "Cost of comparing answers in the background in US dollars.", []
        )
        self.judge_position_bias = self._gauge(
            "iccache_judge_position_bias",
            "How much the judge prefers the answer shown first (1) or second (-1); beyond 0.5 it is not believed.",
        )
        self.floor_held = self._gauge(
            "iccache_floor_held",
            "Tenants and kinds of request for which a backend is held back because it falls short.",
            ["backend"],
        )
        self.dropped = self._counter(
            "iccache_dropped", "Exchanges or examples that could not be recorded, by cause.", ["cause"]
        )
        self.evicted = self._counter(
            "iccache_evicted", "Examples that left the cache by themselves: expired, or for space.", ["cause"]
        )
        self.circuit_open = self._gauge(
            "iccache_circuit_open", "1 while a backend is left alone after repeated failures.", ["backend"]
        )
        self.retries = self._counter(
            "iccache_retries", "Backends asked once more after all that may answer had failed.", ["backend"]
        )

    def render(self) -> bytes:
        """All metrics in Prometheus' text format; of every worker where there are several."""
        self.flush()
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            return generate_latest(registry)
        return generate_latest(self.registry)

    def rows(self) -> Iterator[Row]:
        """Name, type, labels and sentence of every metric, in order of definition."""
        for metric in self._all:
            suffix = "_total" if metric._type == "counter" else ""
            yield Row(
                metric._name + suffix, metric._type or "", ", ".join(metric._labelnames), metric._documentation or ""
            )

    def flush(self) -> None:
        """Write what is buffered. Always in the same thread."""
        for sample in self._buffered:
            sample.flush()

    def _tallied(self, name: str, sentence: str, labels: list[str]) -> Buffered[Tally]:
        return Buffered(self._counter(name, sentence, labels), Tally, self._buffered)

    def _distribution(
        self, name: str, sentence: str, labels: list[str], buckets: tuple[float, ...]
    ) -> Buffered[Distribution]:
        return Buffered(self._histogram(name, sentence, labels, buckets), Distribution, self._buffered)

    def _unlabelled(self, name: str, sentence: str, buckets: tuple[float, ...]) -> Distribution:
        made = Distribution(self._histogram(name, sentence, [], buckets))
        self._buffered.append(made)
        return made

    def _counter(self, name: str, sentence: str, labels: list[str]) -> Counter:
        metric = Counter(name, sentence, labels, registry=self.registry)
        self._keep(metric)
        return metric

    def _gauge(
        self, name: str, sentence: str, labels: list[str] | None = None, *, sum_of_processes: bool = False
    ) -> Gauge:
        mode = "livesum" if sum_of_processes else "livemax"
        metric = Gauge(name, sentence, labels or [], registry=self.registry, multiprocess_mode=mode)  # type: ignore[arg-type]
        self._keep(metric)
        return metric

    def _histogram(self, name: str, sentence: str, labels: list[str], buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(name, sentence, labels, registry=self.registry, buckets=buckets)
        self._keep(metric)
        return metric

    def _keep(self, metric: MetricWrapperBase) -> None:
        """List it, and keep its children at hand: to find one costs more than to count."""
        self._all.append(metric)
        metric.__dict__["labels"] = lru_cache(maxsize=CHILDREN)(metric.labels)


def forget_process(pid: int) -> None:
    """One of several workers has ended: what it held counts no longer. Its counters stay."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        mark_process_dead(pid)  # type: ignore[no-untyped-call]
