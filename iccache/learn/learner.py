"""Exchange -> record -> example -> quality -> router, after the reply and never in the client's way.

The store is the truth: what this process knows, it has read back from the store's changes, as every other process does.

    record.py      exchanges into the store
    admit.py       the fit ones into examples
    verdicts.py    feedback, made durable
    witness.py     what can be seen without being told: failed checks, questions asked again
    watch.py       whether there are any
    follow.py      the store's changes into index, router and utility model
    upkeep.py      what is due now and then
    reembed.py     examples of another embedding model, embedded anew
    eviction.py    the cache within its capacity
    lessons.py     what replay has learned, taken over
    trace.py       examples that spoil answers, held
    sessions.py spending.py counting.py     what is remembered, spent and measured of each answer
    access.py background.py                 the store's two connections; work that nobody waits for
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from iccache import config
from iccache.errors import StoreError
from iccache.examples.redact import Redactor
from iccache.examples.store import ExampleStore
from iccache.examples.utility import UtilityModel
from iccache.examples.writer import Writer
from iccache.learn.access import Access, InForce
from iccache.learn.background import Background
from iccache.learn.counting import Counting
from iccache.learn.eviction import Evictor
from iccache.learn.follow import Follower
from iccache.learn.lessons import Lessons
from iccache.learn.record import Recorder
from iccache.learn.sessions import Sessions
from iccache.learn.spending import Spending
from iccache.learn.upkeep import Upkeep
from iccache.learn.verdicts import Verdicts
from iccache.learn.watch import Watch
from iccache.learn.witness import Witness
from iccache.metrics import Metrics
from iccache.plan import Directory, Plan
from iccache.select import Select
from iccache.types import Answer, Ask, DecisionKind, Exchange, Keeping, Usage, Verdict
from router.floor import Floor, Standing
from router.routing import Router

log = logging.getLogger(__name__)
T = TypeVar("T")


class Learner:
    """What the rest of the proxy sees of all this: one call for each thing that may happen to an exchange."""

    def __init__(
        self,
        directory: Directory,
        writer: Writer,
        select: Select,
        store: ExampleStore,
        redactor: Redactor,
        router: Router,
        floor: Floor,
        utility: UtilityModel,
        metrics: Metrics,
        wall: Callable[[], float] = time.time,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`store`: a reading connection; it belongs to the thread of `select`. `draw`: a number in [0, 1)."""
        self.wall = wall
        self.in_force = InForce(directory, redactor, router, floor)
        self.access = Access(writer, select, store)
        self.background = Background()
        self.spending = Spending(self.in_force, self.access, wall)
        self.sessions = Sessions(self.in_force, self.access)
        self.counting = Counting(self.in_force, metrics, self.spending)
        self.follower = Follower(self.in_force, self.access, utility, self.counting)
        news = self.follower.kicked.set
        self.recorder = Recorder(self.in_force, self.access, self.counting, self.background, news)
        self.verdicts = Verdicts(self.in_force, self.access, self.recorder, metrics, wall, news)
        self.witness = Witness(self.access, self.recorder, self.background, metrics, wall, news, draw)
        self.evictor = Evictor(self.in_force, self.access, metrics, wall, news)
        self.lessons = Lessons(self.access, wall)
        self.upkeep = Upkeep(
            self.in_force,
            self.access,
            self.recorder,
            self.spending,
            self.follower,
            self.evictor,
            self.lessons,
            metrics,
            wall,
        )

    def use(self, directory: Directory, redactor: Redactor, router: Router, floor: Floor) -> None:
        """Put new settings in force."""
        self.in_force.directory, self.in_force.redactor = directory, redactor
        self.in_force.router, self.in_force.floor = router, floor

    # ---- its life

    async def start(self) -> None:
        """Load what other lives of this store have learned, and catch up with it."""
        await self.follower.load()
        await self.spending.reload()
        await self.follower.catch_up()
        loop, kicked = asyncio.get_running_loop(), self.follower.kicked
        self.watch = Watch(
            self.access.store.reader,
            lambda: self.follower.cursor,
            self.access.select.current,
            lambda: loop.call_soon_threadsafe(kicked.set),
        )
        self.watch.start()

    async def follow(self) -> None:
        """Apply the store's changes as they come, until cancelled."""
        await self.follower.follow(self.upkeep)

    async def catch_up(self) -> None:
        """Everything up to the newest change is applied when it returns."""
        await self.follower.catch_up()

    async def stop(self, seconds: float) -> None:
        """Finish what was begun."""
        await asyncio.to_thread(self.watch.stop)
        await self.background.drain(seconds)
        await self.evictor.stop()
        try:
            await self.follower.catch_up()
            if self.follower.learned_since_snapshot:
                await self.follower.snapshot()
        except StoreError as exc:
            log.warning("the store cannot be followed: %s", exc)

    # ---- one exchange

    def begin(self, exchange: Exchange, ask: Ask) -> None:
        """The headers are about to go out: from here on, feedback may come."""
        if ask.controls.store:
            self.recorder.begin(exchange)

    def finish(
        self,
        exchange: Exchange,
        ask: Ask,
        plan: Plan | None = None,
        answer: Answer | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        """The last byte went out, or the client left. Returns at once.

        Without an `answer` (it came from the record) nothing becomes an example. `keeping` is what identical requests
        may be answered with, where they may.
        """
        self.counting.exchange(exchange, plan.reason if plan is not None and plan.kind is DecisionKind.BYPASS else None)
        if plan is not None and plan.decision is not None:
            self.counting.decision(plan.decision)
        self.sessions.remember(exchange)
        if ask.controls.store:
            self.recorder.finish(exchange, ask, answer, keeping)
            if answer is not None:
                self.witness.look(exchange, ask, answer)

    def count_passed(
        self, tenant: str, backend: config.Backend, decision: DecisionKind, status: int, usage: Usage
    ) -> None:
        """A request that was passed through without being read. It is not recorded, but it counts and it costs."""
        self.counting.passed(tenant, backend, decision, status, usage)

    def count_lost(self, tenant: str, backend: config.Backend, usage: Usage) -> None:
        """An answer broke off and another was asked for: it took something all the same."""
        self.counting.lost_answer(tenant, backend, usage)

    async def feedback(self, tenant: str, verdict: Verdict) -> None:
        """Durable when it returns. Raises RequestError 404 for an exchange that is unknown, unrecorded or another's."""
        await self.verdicts.take(tenant, verdict)

    async def delete_examples(self, ids: Sequence[str]) -> int:
        """How many there were. When it returns, they are gone from the store and never shown by this process again."""
        count = await self.access.write(lambda store: store.delete_examples(ids))
        await self.follower.catch_up()
        return count

    # ---- what is known

    def standing(self, tenant: str, kind: str) -> Mapping[str, Standing]:
        """What the evidence says of the backends for requests of this kind."""
        return self.in_force.floor.standing(tenant, kind)

    async def session_backend(self, tenant: str, session: str | None) -> str | None:
        """The backend that last answered in this session."""
        return await self.sessions.backend(tenant, session)

    def name(self, name: str) -> str:
        """An end user's or a session's name, as it may be written down."""
        return self.in_force.redactor.name(name)

    def spent_today(self, tenant: str) -> float:
        """US dollars since midnight UTC."""
        return self.spending.today(tenant)

    async def read(self, fn: Callable[[ExampleStore], T]) -> T:
        """`fn` on the reading connection, in its thread."""
        return await self.access.read(fn)
