"""Exchange -> record -> example -> quality -> router, after the reply and never in the client's way.

The store is the truth: what this process knows, it has read back from the store's changes, as every other process does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from iccache import config
from iccache.errors import IccacheError, RequestError, StoreError
from iccache.examples.admission import admissible, to_example, unfit
from iccache.examples.redact import Redactor
from iccache.examples.store import ExampleStore
from iccache.examples.utility import NAMES, UtilityModel
from iccache.examples.writer import Writer
from iccache.metrics import Metrics
from iccache.plan import Directory, Plan
from iccache.price import cost
from iccache.select import Select
from iccache.types import (
    Answer,
    Ask,
    Change,
    ChangeKind,
    DecisionKind,
    Exchange,
    Feedback,
    Kept,
    Reason,
    Usage,
    Verdict,
)
from router.routing import Router
from router.types import Decision

log = logging.getLogger(__name__)
T = TypeVar("T")

ROUTER_STATE = "router"
UTILITY_STATE = "utility"
FOLLOW_EVERY_S = 0.2
FOLLOW_AGAIN_S = 1.0  # after a failure
UPKEEP_EVERY_S = 5.0
REEMBEDDED_AT_ONCE = 16
SNAPSHOT_EVERY = 100  # learned outcomes
CHANGES_AT_ONCE = 1000
SESSIONS_KEPT = 100_000
QUALITY_MEMORY = 0.05  # weight of the newest in the moving average that is exported


class Outcome(NamedTuple):
    """A quality that became known, with what is needed to learn from it."""

    backend: str
    examples: int  # that were shown for it
    features: NDArray[np.float64] | None
    old: float | None
    new: float | None


class News(NamedTuple):
    """What the store's changes say."""

    cursor: int  # of the last change it includes
    outcomes: Sequence[Outcome]
    begin: tuple[bytes, bytes] | None = None  # forget what was learned: states of router and utility to go on from


class Background:
    """Work after the reply: named, referenced, counted when it fails, drained at the end."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(self._logged(work, name), name=name)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def drain(self, seconds: float) -> None:
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=seconds)

    async def _logged(self, work: Coroutine[Any, Any, None], name: str) -> None:
        try:
            await work
        except Exception:
            log.exception("%s failed", name)


class Learner:
    """Records exchanges, admits examples, takes feedback, and follows the store's changes."""

    def __init__(
        self,
        directory: Directory,
        writer: Writer,
        select: Select,
        store: ExampleStore,
        redactor: Redactor,
        router: Router,
        utility: UtilityModel,
        metrics: Metrics,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.use(directory, redactor, router)
        self.writer = writer
        self.select = select
        self.store = store  # a reading connection; it belongs to the thread of `select`
        self.utility = utility
        self.metrics = metrics
        self.wall = wall
        self.background = Background()
        self.open: dict[str, Exchange] = {}  # exchanges whose headers are out and whose record is not yet durable
        self.sessions: OrderedDict[tuple[str, str], str] = OrderedDict()
        self.spent: dict[str, float] = {}
        self.spent_on = ""
        self.unlearned = router.state(), utility.state()
        self.cursor = 0
        self.learned_since_snapshot = 0
        self.quality: dict[str, float] = {}
        self.full = False  # the store is larger than it may be
        self.looked_after = 0.0
        self.kicked = asyncio.Event()
        self.following = asyncio.Lock()

    def use(self, directory: Directory, redactor: Redactor, router: Router) -> None:
        """Put new settings in force."""
        self.directory = directory
        self.redactor = redactor
        self.router = router

    # ---- one exchange

    def begin(self, exchange: Exchange, ask: Ask) -> None:
        """The headers are about to go out: from here on, feedback may come."""
        if ask.controls.store:
            self.open[exchange.request_id] = exchange

    def finish(
        self,
        exchange: Exchange,
        ask: Ask,
        plan: Plan | None = None,
        answer: Answer | None = None,
        kept: tuple[bytes, Kept] | None = None,
    ) -> None:
        """The last byte went out, or the client left. Returns at once.

        Without an `answer` (it came from the record) nothing becomes an example. `kept` is what an identical request
        may be answered with, under the digest of the request.
        """
        self._count(exchange)
        if plan is not None and plan.decision is not None:
            self._count_decision(plan.decision)
        self._remember_session(exchange)
        if ask.controls.store:
            self.background.start(self._record(exchange, ask, answer, kept), f"record {exchange.request_id}")

    async def _record(
        self, exchange: Exchange, ask: Ask, answer: Answer | None, kept: tuple[bytes, Kept] | None
    ) -> None:
        try:
            if self.full:
                self.metrics.dropped.labels("max_bytes").inc()
                return
            safe = await self._write(lambda store: self._redacted_and_recorded(store, exchange, kept))
        except StoreError as exc:
            self._dropped(exc, exchange.request_id)
            return
        finally:
            self.open.pop(exchange.request_id, None)
        if answer is not None:
            await self._admit(safe, ask, answer)

    def _redacted_and_recorded(
        self, store: ExampleStore, exchange: Exchange, kept: tuple[bytes, Kept] | None
    ) -> Exchange:
        safe = self._redacted(exchange)
        store.record(safe)
        if kept is not None and safe.answer == exchange.answer and self._is_clean(kept[1].body):
            expired_before = exchange.at - self.directory.settings.cache.reuse_ttl_s
            store.keep_answer(*kept, tenant=exchange.tenant, expired_before=expired_before)
        return safe

    def _redacted(self, exchange: Exchange) -> Exchange:
        clean = self.redactor.redact
        return replace(
            exchange, task=clean(exchange.task), answer=clean(exchange.answer), system=clean(exchange.system)
        )

    def _is_clean(self, body: bytes) -> bool:
        text = body.decode("utf-8", "replace")
        return self.redactor.redact(text) == text

    async def _admit(self, exchange: Exchange, ask: Ask, answer: Answer) -> None:
        admit = self.directory.settings.cache.admit
        refusal = admissible(exchange, ask, answer, self.directory.teachers, admit)
        if refusal is not None:
            log.debug("%s does not become an example: %s", exchange.request_id, refusal)
            return
        example = to_example(
            exchange,
            await self.select.embed(exchange.task),
            id=f"ex_{uuid.uuid4().hex}",
            embedder=self.select.retriever.embedder.identity,
            tokens=self.select.count_pair(exchange.task, exchange.answer),
        )
        try:
            await self._write(lambda store: store.admit(example))
        except StoreError as exc:
            self._dropped(exc, exchange.request_id)
        self.kicked.set()

    # ---- feedback

    async def feedback(self, tenant: str, verdict: Verdict) -> None:
        """Durable when it returns. Raises RequestError 404 for an exchange that is unknown, unrecorded or another's."""
        for request_id in filter(None, (verdict.request_id, verdict.preferred_over)):
            await self._make_durable(request_id)
        now = self.wall()
        try:
            known = await self._write(await self._judgement(tenant, verdict, now))
        except StoreError as exc:
            raise RequestError(
                503, f"the feedback could not be stored: {exc}", type="server_error", code="store_unavailable"
            ) from exc
        if not known:
            raise RequestError(404, "no such request is recorded", param="request_id", code="not_found")
        self.metrics.feedback.labels("demonstration" if verdict.demonstration else "user").inc()
        self.kicked.set()

    async def _judgement(self, tenant: str, verdict: Verdict, now: float) -> Callable[[ExampleStore], bool]:
        if verdict.preferred_over is not None:
            loser = verdict.preferred_over
            return lambda store: store.preference(verdict.request_id, loser, tenant=tenant, at=now)
        if verdict.demonstration is None:
            row = Feedback(verdict.request_id, "user", verdict.score, now)
            return lambda store: store.add_feedback(row, tenant=tenant)
        return await self._demonstration(tenant, verdict, now)

    async def _demonstration(self, tenant: str, verdict: Verdict, now: float) -> Callable[[ExampleStore], bool]:
        exchange = await self.read(lambda store: store.exchange(verdict.request_id))
        if exchange is None or exchange.tenant != tenant:
            return lambda store: False
        answer = self.redactor.redact(verdict.demonstration or "")
        refusal = unfit(exchange.task, answer)
        if refusal is not None:
            raise RequestError(
                400, f"the demonstration cannot become an example: {refusal.value}", param="demonstration"
            )
        embedding = await self.select.embed(exchange.task)
        row = Feedback(verdict.request_id, "demonstration", None, now)
        return lambda store: store.add_feedback(
            row,
            tenant=tenant,
            demonstration=answer,
            embedding=embedding,
            embedder=self.select.retriever.embedder.identity,
            tokens=self.select.count_pair(exchange.task, answer),
        )

    async def _make_durable(self, request_id: str) -> None:
        """Record an exchange that is still being answered, so that feedback on it has something to stand on."""
        exchange = self.open.get(request_id)
        if exchange is not None:
            early = self._redacted(exchange)
            try:
                await self._write(lambda store: store.record(early))
            except StoreError as exc:
                self._dropped(exc, request_id)

    # ---- examples

    async def delete_examples(self, ids: Sequence[str]) -> int:
        """How many there were. When it returns, they are gone from the store and never shown by this process again."""
        count = await self._write(lambda store: store.delete_examples(ids))
        await self.catch_up()
        return count

    # ---- following the store

    async def start(self) -> None:
        """Load what other lives of this store have learned, then follow it."""
        states = await self.read(lambda store: (store.load_state(ROUTER_STATE), store.load_state(UTILITY_STATE)))
        if states[0] is not None and states[1] is not None and states[0][0] == states[1][0]:
            try:
                self.router.restore(states[0][1])
                self.utility.restore(states[1][1])
                self.cursor = states[0][0]
            except ValueError as exc:
                log.warning("the kept statistics cannot be used, learning from the whole history again: %s", exc)
        await self._reload_spending()
        await self.catch_up()

    async def follow(self) -> None:
        """Apply the store's changes as they come, until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):  # not wait_for: in Python 3.11 it may swallow being cancelled
                async with asyncio.timeout(FOLLOW_EVERY_S):
                    await self.kicked.wait()
            self.kicked.clear()
            try:
                await self.catch_up()
                await self._upkeep()
            except StoreError as exc:
                log.warning("the store cannot be followed: %s", exc)
                await asyncio.sleep(FOLLOW_AGAIN_S)
            except Exception:  # whatever it is: a process that no longer follows would be wrong from then on
                log.exception("the store's changes could not be applied")
                await asyncio.sleep(FOLLOW_AGAIN_S)

    async def _upkeep(self) -> None:
        """What is due now and then: the size of the store, examples that another model embedded, spending."""
        now = self.wall()
        if abs(now - self.looked_after) >= UPKEEP_EVERY_S:
            self.looked_after = now
            await self._measure_store()
            await self._reload_spending()
            if self.learned_since_snapshot:
                await self.snapshot()
        await self._reembed()

    async def _measure_store(self) -> None:
        limit = self.directory.settings.store.max_bytes
        if not limit:
            self.full = False
            return
        parts = await self.read(lambda store: store.size_bytes())
        full = sum(parts.values()) > limit
        if full and not self.full:
            log.warning("the store is larger than store.max_bytes = %d: nothing is recorded until it shrinks", limit)
        self.full = full

    async def _reembed(self) -> None:
        """A few of the examples that were embedded by another model; the rest at the next turns."""
        rows = await self.select.thread.run(lambda: self.select.retriever.reembed(REEMBEDDED_AT_ONCE))
        if not rows:
            return
        identity = self.select.retriever.embedder.identity

        def write(store: ExampleStore) -> None:
            for id, vector in rows:
                store.update_example(id, embedding=vector, embedder=identity)

        await self._write(write)
        self.kicked.set()

    async def catch_up(self) -> None:
        """Everything up to the newest change is applied when it returns."""
        async with self.following:
            while True:
                news = await self.select.thread.run(lambda: self._read_changes(self.cursor))
                if news.begin is not None:
                    self._restore(*news.begin)
                for outcome in news.outcomes:
                    self._learn(outcome)
                if news.cursor == self.cursor:
                    break
                self.cursor = news.cursor
            if self.learned_since_snapshot >= SNAPSHOT_EVERY:
                await self.snapshot()

    def _read_changes(self, cursor: int) -> News:
        """In the thread that owns the index: bring it up to date, and look up what became known."""
        store = self.store
        changes = store.changes(cursor, CHANGES_AT_ONCE)
        if cursor < store.oldest_change() - 1:  # looked at last: what came before may be of another content
            return self._rebuild(cursor)
        if not changes:
            return News(cursor, [])
        self.select.retriever.apply([c for c in changes if c.kind is ChangeKind.EXAMPLE])
        outcomes = [o for c in changes if c.kind is ChangeKind.QUALITY and (o := _outcome(store, c))]
        return News(changes[-1].seq, outcomes)

    def _rebuild(self, cursor: int) -> News:
        """Changes are missing: they were trimmed before this process saw them, or a backup took the store's place."""
        store = self.store
        newest, restored, oldest = store.last_change(), store.restored_at(), store.oldest_change()
        router, utility = store.load_state(ROUTER_STATE), store.load_state(UTILITY_STATE)
        self.select.retriever.load()
        if cursor >= restored:
            return News(newest, [])
        log.warning("the store was restored from a backup: beginning anew with what it holds")
        if router is None or utility is None or router[0] != utility[0] or router[0] < restored:
            return News(oldest - 1, [], self.unlearned)
        return News(max(router[0], oldest - 1), [], (router[1], utility[1]))

    def _restore(self, router: bytes, utility: bytes) -> None:
        try:
            self.router.restore(router)
            self.utility.restore(utility)
        except ValueError as exc:
            log.warning("the restored statistics cannot be used, going on with those there are: %s", exc)
        self.learned_since_snapshot = 0

    def _learn(self, outcome: Outcome) -> None:
        """Router, utility model and the exported quality take in one outcome. A replaced one is taken back first."""
        if outcome.new is None:
            return
        self._export_quality(outcome.backend, outcome.new)
        if outcome.examples:
            old = [] if outcome.old is None else [outcome.old]
            rows = np.zeros((1 + len(old), len(NAMES)))
            self.utility.partial_fit(
                rows, [outcome.new, *old], sample_weight=[1.0, *(-1.0 for _ in old)], student=outcome.backend
            )
        if outcome.features is None:
            return
        try:
            self.router.learn(outcome.backend, outcome.features, outcome.new, outcome.old)
        except ValueError as exc:
            log.warning("an outcome of %s cannot be learned from: %s", outcome.backend, exc)
            return
        self.learned_since_snapshot += 1

    def _export_quality(self, backend: str, quality: float) -> None:
        before = self.quality.get(backend, quality)
        self.quality[backend] = before + QUALITY_MEMORY * (quality - before)
        self.metrics.quality.labels(backend).set(self.quality[backend])

    async def snapshot(self) -> None:
        """Keep the statistics of router and utility model, so that a new process need not read the whole history."""
        cursor, states = self.cursor, {ROUTER_STATE: self.router.state(), UTILITY_STATE: self.utility.state()}
        self.learned_since_snapshot = 0

        def write(store: ExampleStore) -> None:
            for name, state in states.items():
                store.save_state(name, cursor, state)

        try:
            await self._write(write)
        except StoreError as exc:
            log.warning("the statistics could not be kept: %s", exc)

    async def stop(self, seconds: float) -> None:
        """Finish what was begun."""
        await self.background.drain(seconds)
        try:
            await self.catch_up()
            if self.learned_since_snapshot:
                await self.snapshot()
        except StoreError as exc:
            log.warning("the store cannot be followed: %s", exc)

    # ---- sessions and spending

    async def session_backend(self, tenant: str, session: str | None) -> str | None:
        """The backend that last answered in this session."""
        if session is None:
            return None
        known = self.sessions.get((tenant, session))
        if known is not None:
            return known
        try:
            async with asyncio.timeout(self.directory.settings.routing.decision_timeout_ms / 1000):
                return await self.read(lambda store: store.session_backend(tenant, session))
        except (IccacheError, TimeoutError) as exc:
            log.warning("the session cannot be looked up: %s", exc)
            return None

    def _remember_session(self, exchange: Exchange) -> None:
        if exchange.session is None or not exchange.complete:
            return
        key = (exchange.tenant, exchange.session)
        self.sessions[key] = exchange.backend
        self.sessions.move_to_end(key)
        if len(self.sessions) > SESSIONS_KEPT:
            self.sessions.popitem(last=False)

    def spent_today(self, tenant: str) -> float:
        """US dollars since midnight UTC."""
        self._new_day()
        return self.spent.get(tenant, 0.0)

    def _new_day(self) -> None:
        today = time.strftime("%Y-%m-%d", time.gmtime(self.wall()))
        if today != self.spent_on:
            self.spent, self.spent_on = {}, today

    async def _reload_spending(self) -> None:
        self._new_day()
        now = self.wall()
        for tenant in self.directory.settings.tenants:
            stored = await self.read(lambda s, name=tenant.name: s.spent_today(name, now))  # type: ignore[misc]
            self.spent[tenant.name] = max(stored, self.spent.get(tenant.name, 0.0))  # not all that costs is recorded

    # ---- counting

    def _count(self, exchange: Exchange) -> None:
        m, backend = self.metrics, exchange.backend
        m.requests.labels(backend, exchange.decision.value, str(exchange.status)).inc()
        m.request_seconds.labels(backend).observe(exchange.latency_s)
        if exchange.first_byte_s is not None:
            m.first_byte_seconds.labels(backend).observe(exchange.first_byte_s)
        m.overhead_seconds.observe(exchange.overhead_s)
        if exchange.decision is DecisionKind.BYPASS and exchange.reason is not None:
            m.bypass.labels(exchange.reason.value).inc()
        if backend in self.directory.students:
            m.examples_shown.observe(len(exchange.shown))
        self._spend(exchange.tenant, backend, exchange.usage, exchange.cost_usd)
        if exchange.offloaded:
            m.saved_usd.inc(self._saved(exchange))

    def _count_decision(self, decision: Decision) -> None:
        for name, bias in zip(decision.names, decision.load_bias, strict=True):
            self.metrics.load_bias.labels(name).set(float(bias))

    def count_passed(
        self, tenant: str, backend: config.Backend, decision: DecisionKind, reason: Reason, status: int, usage: Usage
    ) -> None:
        """A request that was passed through without being read. It is not recorded, but it counts and it costs."""
        self.metrics.requests.labels(backend.name, decision.value, str(status)).inc()
        if decision is DecisionKind.BYPASS:
            self.metrics.bypass.labels(reason.value).inc()
        self._spend(tenant, backend.name, usage, cost(backend, usage))

    def _spend(self, tenant: str, backend: str, usage: Usage, cost_usd: float) -> None:
        for kind, count in (("input", usage.input), ("output", usage.output), ("example", usage.example)):
            self.metrics.tokens.labels(backend, kind).inc(count)
        self.metrics.cost_usd.labels(backend).inc(cost_usd)
        self._new_day()
        self.spent[tenant] = self.spent.get(tenant, 0.0) + cost_usd

    def _saved(self, exchange: Exchange) -> float:
        """What the dearest backend would have cost for the same request and answer, less what was paid."""
        dearest = self.directory.by_price[-1]
        plain = exchange.usage.input - exchange.usage.example
        return (
            plain * dearest.usd_per_million_input_tokens + exchange.usage.output * dearest.usd_per_million_output_tokens
        ) / 1e6 - exchange.cost_usd

    def _dropped(self, exc: StoreError, request_id: str) -> None:
        self.metrics.dropped.labels("store").inc()
        log.error("%s is not recorded: %s", request_id, exc)

    # ---- threads

    async def _write(self, fn: Callable[[ExampleStore], T]) -> T:
        future: Future[T] = self.writer.submit(fn)
        return await asyncio.wrap_future(future)

    async def read(self, fn: Callable[[ExampleStore], T]) -> T:
        """`fn` on the reading connection, in its thread."""
        return await self.select.thread.run(lambda: fn(self.store))


def _outcome(store: ExampleStore, change: Change) -> Outcome | None:
    exchange = store.exchange(change.key)
    if exchange is None:
        return None
    return Outcome(exchange.backend, len(exchange.shown), exchange.features, change.old, change.new)
