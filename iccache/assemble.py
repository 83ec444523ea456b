"""Configuration -> objects. The only place that names concrete classes."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TypeVar
from urllib.parse import urlsplit

import numpy as np

from iccache import config
from iccache.api.auth import Gate
from iccache.backends.client import BackendClient, make_session
from iccache.backends.engine import EngineLoad
from iccache.backends.fleet import Fleet, Member
from iccache.backends.judge import Verdict
from iccache.backends.retry import Retries
from iccache.errors import ConfigError, IccacheError, StoreError
from iccache.examples.at_hand import AtHand
from iccache.examples.embed import make_embedder
from iccache.examples.redact import Redactor
from iccache.examples.retriever import Retriever
from iccache.examples.selector import Selector
from iccache.examples.snapshots import InMemory, Snapshots
from iccache.examples.sqlite.key import key_of
from iccache.examples.store import ExampleStore, file_of, open_store
from iccache.examples.tokens import make_tokenizer
from iccache.examples.utility import LearnedUtility
from iccache.examples.ways import Ways
from iccache.examples.writer import Writer
from iccache.learn.learner import Learner
from iccache.loop_lag import LoopLag
from iccache.metrics import Metrics
from iccache.pipeline import Pipeline
from iccache.plan import Directory
from iccache.quality.judging import Judging
from iccache.reuse import Reuse
from iccache.select import Select
from iccache.turns import Turns
from iccache.warm import Warm
from router.floor import Floor
from router.linear import LinearThompson, LinearThreshold, LinearUcb
from router.load import LoadTracker
from router.neural import NeuralThompson
from router.policy import Always, Policy, Uniform
from router.routing import Router

log = logging.getLogger(__name__)
T = TypeVar("T")

REACHABLE_FOR_S = 2.0  # how long a successful probe of the backends is believed
PROBE_TIMEOUT_S = 1.0
WRITES_WAITING = 10_000


class Proxy:
    """Everything that lives as long as the process."""

    def __init__(
        self,
        settings: config.Config,
        environ: Mapping[str, str] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        seed: int | None = None,
    ) -> None:
        """Raises ConfigError for a key that is missing. Opens nothing yet."""
        self.environ = os.environ if environ is None else environ
        self.clock = clock
        self.wall = wall
        self.rng = np.random.default_rng(seed)
        self.metrics = Metrics()
        self.requests = 0  # that came so far
        self.open_requests = 0
        self.draining = False
        self.loaded = False
        self.utility = LearnedUtility()
        self.ways = Ways()
        self.policies: dict[str, Policy] = {}
        self.warm = Warm()
        self.turns = Turns()
        self.loop_lag = LoopLag(self._looked)
        self.verdicts: Counter[Verdict] = Counter()
        self.asking: asyncio.Task[None] | None = None
        self._reachable_until = 0.0
        self.store_key = key_of(settings.store, self.environ)
        self.snapshots: Snapshots
        self._use(settings)

    def _use(self, settings: config.Config) -> None:
        """Take over what needs no opening. Raises ConfigError and changes nothing where a key is missing."""
        gate, keys = with_keys(settings, self.environ)
        admin_key = config.key_in(self.environ, settings.server.admin_key_env)
        tokenizers = {b.tokenizer: make_tokenizer(b.tokenizer) for b in reversed(settings.by_price())}
        before: Gate | None = getattr(self, "gate", None)
        if before is not None:
            gate.continue_from(before)
        self.settings, self.gate, self.keys, self.tokenizers = settings, gate, keys, tokenizers
        self.directory = Directory(settings)
        self.admin_key = admin_key

    async def start(self) -> None:
        """Open the store, load the model and the index. Raises StoreError or ConfigError."""
        settings = self.settings
        self.writer = await asyncio.to_thread(lambda: Writer(self._open_store, max_queue=WRITES_WAITING))
        self.select = Select(
            settings,
            self._retriever,
            self._selector(),
            self.tokenizers,
            self.metrics,
            self.ways,
            np.random.default_rng(self.rng.integers(2**63)),
            turns=self.turns,
        )
        await self.select.start()
        self.session = make_session()
        self._wire()
        self.learner = Learner(
            self.directory,
            self.writer,
            self.select,
            self.store,
            self._redactor(),
            self.router,
            self.floor,
            self.utility,
            self.metrics,
            self.wall,
            self.rng.random,
        )
        self.pipeline = self._pipeline()
        await self.learner.start()
        self.following = asyncio.create_task(self.learner.follow(), name="follow the store")
        self._ask_engines()
        self.loaded = True

    def _open_store(self) -> ExampleStore:
        store, cache = self.settings.store, self.settings.cache
        return open_store(
            store.url, key=self.store_key, decay_per_hour=cache.decay_per_hour, quality_floor=cache.quality_floor
        )

    def _retriever(self) -> Retriever:
        """With its own reading connection, in the thread that calls this."""
        self.store = self._open_store().reader()
        ttl_s = self.settings.cache.ttl_days * 86400
        embedder = make_embedder(self.settings.embedder)
        file = file_of(self.settings.store.url)
        if file is not None and self.store_key is not None:
            self.snapshots = InMemory(self.store.reader, embedder.identity, embedder.dim, file, self.store_key)
        else:
            self.snapshots = Snapshots(self.store.reader, embedder.identity, embedder.dim, file)
        return Retriever(self.store, embedder, ttl_s=ttl_s, snapshots=self.snapshots, at_hand=AtHand())

    def _selector(self) -> Selector:
        return Selector(self.utility, self.settings.selection)

    def _wire(self) -> None:
        """Backends and router for the settings in force. Statistics and circuits of the same backend live on."""
        settings = self.settings
        known = getattr(self, "fleet", None)
        capacity = {b.name: b.max_in_flight for b in settings.backends}
        load = LoadTracker(capacity, self.directory.teachers)
        members = []
        for backend in settings.backends:
            member = Member(backend, BackendClient(backend, self.keys[backend.name], self.session))
            if known is not None and backend.name in known.members:
                member.take_over(known.members[backend.name])
            members.append(member)
        self.fleet = Fleet(members, load, self.metrics, self.clock, self._retries(known), self.wall)
        r = settings.routing
        self.router = Router(
            self._policy(r.policy),
            exploration=r.exploration if r.policy in config.LEARNING_POLICIES else 0.0,
            quality_target=r.quality_target,
            theta=r.theta,
            lambda0=r.lambda0,
            gamma=r.gamma,
            holdout_share=r.holdout_share,
            shadow=r.shadow,
            certify_first=r.certify_first,
            probe_share=r.probe_share,
            rng=self.rng,
        )
        before: Floor | None = getattr(self, "floor", None)
        self.floor = Floor(self.directory.by_price[-1].name, quality_target=r.quality_target, confidence=r.confidence)
        if before is not None:
            self.floor.ledgers_ = before.ledgers_

    def _retries(self, known: Fleet | None) -> Retries:
        """What is left of the budget lives on."""
        share = self.settings.routing.retry_share
        same = known is not None and known.retries.budget.share == share
        return known.retries if known is not None and same else Retries(share, clock=self.clock)

    def _policy(self, name: str) -> Policy:
        if name not in self.policies:
            cheapest, dearest = self.directory.by_price[0].name, self.directory.by_price[-1].name
            makers: dict[str, Callable[[], Policy]] = {
                "linear-thompson": LinearThompson,
                "linear-ucb": LinearUcb,
                "neural-thompson": NeuralThompson,
                "threshold": LinearThreshold,
                "uniform": Uniform,
                "teacher": lambda: Always(dearest),
                "student": lambda: Always(cheapest),
            }
            self.policies[name] = makers[name]()
        return self.policies[name]

    def _redactor(self) -> Redactor:
        return Redactor.of(self.settings.privacy)

    def _pipeline(self) -> Pipeline:
        return Pipeline(
            self.directory,
            self.fleet,
            self.select,
            self.router,
            self.learner,
            Reuse(self.settings.cache, self.learner),
            self.warm,
            Judging(self.settings, self.fleet, self.select, self.learner, self.metrics, self.rng, self.verdicts),
            self.metrics,
            self.clock,
        )

    def reload(self, settings: config.Config) -> None:
        """Put a new configuration in force for requests that come from now on. Raises ConfigError, changing nothing."""
        if not self.loaded:
            raise ConfigError("it is still being put in force: try again when /readyz answers")
        refuse_fixed(self.settings, settings)
        self._use(settings)
        self._wire()
        self.select.use(settings, self._selector(), self.tokenizers)
        self.learner.use(self.directory, self._redactor(), self.router, self.floor)
        self.pipeline = self._pipeline()
        self._ask_engines()

    def _ask_engines(self) -> None:
        """Follow what the engines say of their load, those of the configuration in force."""
        if self.asking is not None:
            self.asking.cancel()
        engines = EngineLoad(self.settings.backends, self.fleet.load, self.clock)
        self.asking = asyncio.create_task(engines.follow(), name="ask the engines") if engines.urls else None

    def _looked(self, late_s: float, held_s: float) -> None:
        """Fifty times a second."""
        self.metrics.loop_lag_seconds.observe(late_s)
        self.metrics.loop_held_seconds.observe(held_s)
        self.metrics.flush()

    async def stop(self) -> None:
        """Finish the records that are under way, keep the statistics, close everything."""
        self.loop_lag.stop()
        if self.asking is not None:
            self.asking.cancel()
        self.following.cancel()
        await asyncio.gather(self.following, return_exceptions=True)
        await self.learner.stop(self.settings.server.drain_s)
        await asyncio.to_thread(self.writer.close, self.settings.server.drain_s)
        await asyncio.to_thread(self.snapshots.close)
        await asyncio.to_thread(self.select.thread.close)
        await self.session.close()
        self.metrics.flush()

    async def read(self, fn: Callable[[ExampleStore], T]) -> T:
        """`fn` on the reading connection, in its thread."""
        return await self.learner.read(fn)

    async def problems(self) -> list[str]:
        """Why this process should get no requests; empty when it should."""
        found = []
        if self.draining:
            found.append("shutting down")
        if not self.loaded:
            found.append("the index is not loaded")
        if not await self._store_writable():
            found.append("the store is not writable")
        if not await self._any_reachable():
            found.append("no backend is reachable")
        return found

    async def _store_writable(self) -> bool:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                return await asyncio.wrap_future(self.writer.submit(lambda store: store.writable()))
        except (StoreError, TimeoutError):
            return False

    async def _any_reachable(self) -> bool:
        if self.clock() < self._reachable_until:
            return True
        probes = [asyncio.create_task(_connects(b.base_url)) for b in self.settings.backends]
        try:
            for probe in asyncio.as_completed(probes):
                if await probe:
                    self._reachable_until = self.clock() + REACHABLE_FOR_S
                    return True
            return False
        finally:
            for probe in probes:
                probe.cancel()

    async def measure(self) -> None:
        """Bring the gauges up to date that nobody sets as it happens."""
        now = self.clock()
        self.metrics.load.set(self.fleet.load.load(now))
        kind = "keyed" if self.settings.tenants else "default"
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                count, parts = await self.read(lambda s: (s.count_examples(), s.size_bytes()))
        except (IccacheError, TimeoutError) as exc:
            log.warning("the store cannot be measured: %s", exc)
            return
        self.metrics.examples.labels(kind).set(count)
        for part, size in parts.items():
            self.metrics.store_bytes.labels(part).set(size)


def with_keys(settings: config.Config, environ: Mapping[str, str]) -> tuple[Gate, dict[str, str | None]]:
    """Who may come in, and each backend's key. Raises ConfigError where something is missing that serving needs."""
    if not settings.backends:
        raise ConfigError("backends: none is configured; at least one [[backends]] table is required")
    gate = Gate.of(settings, environ)
    keys = {
        b.name: config.secret(environ, b.key_env, f"backends: {b.name}") if b.key_env else None
        for b in settings.backends
    }
    return gate, keys


def refuse_fixed(before: config.Config, settings: config.Config) -> None:
    """Raise ConfigError where `settings` change what a running process cannot."""
    fixed = [name for name in ("store", "embedder") if getattr(settings, name) != getattr(before, name)]
    if (settings.server.host, settings.server.port, settings.server.workers) != (
        before.server.host, before.server.port, before.server.workers,
    ):  # fmt: skip
        fixed.append("server.host, port or workers")
    if fixed:
        raise ConfigError(f"{', '.join(fixed)}: takes a restart to change")


async def _connects(base_url: str) -> bool:
    """Whether anything listens there."""
    url = urlsplit(base_url)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            _, writer = await asyncio.open_connection(url.hostname, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
