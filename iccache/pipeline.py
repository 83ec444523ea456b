"""THE PATH OF ONE REQUEST: start reading here.

authenticate -> parse -> embed -> recall -> rank -> route -> compose -> answer (stream) -> record -> learn
api/            `answer`, below                                                           learn/
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from multidict import CIMultiDict

from iccache import config
from iccache.backends.fleet import Fleet, Post, Reply, is_stream, status_of
from iccache.backends.headers import forwardable
from iccache.backends.wire import Sink
from iccache.dialects.answer import beginning_of
from iccache.dialects.dialect import AnswerReader, Dialect
from iccache.dialects.packed import is_packed, unpacker
from iccache.errors import BackendError, RequestError
from iccache.learn.counting import LOST_USD
from iccache.learn.learner import Learner
from iccache.live import Reader
from iccache.metrics import Metrics
from iccache.plan import Directory, Plan, read_controls
from iccache.price import as_usd, cost, price
from iccache.quality.judging import Answered, Judging
from iccache.quality.kinds import HELD_OUT, KIND, MEANT, WITHHELD, kind_of
from iccache.reuse import LARGEST_BYTES, Reuse
from iccache.select import Job, Select, signals
from iccache.types import Answer, Ask, DecisionKind, Exchange, Kept, Match, Reason, Shot
from iccache.warm import Warm
from router.features import features
from router.routing import Router
from router.types import Arm
from router.types import Vector as Features

log = logging.getLogger(__name__)

UNREAD_BYTES = 16_384  # of a stream that has gone out; a reading takes less than half a millisecond


@dataclass(slots=True)
class Call:
    """A request as it came through the door, its sender known."""

    request_id: str
    tenant: str
    dialect: Dialect
    query: str
    headers: Mapping[str, str]
    body: bytes
    at: float  # Unix seconds
    arrived: float  # on the pipeline's clock, s
    sent: float | None = None  # when it went upstream, on the same clock
    lost_usd: float = 0.0  # what answers took that broke off
    out: Sink | None = None  # takes the bytes of a stream in the callback in which they come; None: they are yielded


class Tap:
    """Looks at an answer's bytes as they pass; keeps them all only where `whole` is asked for, up to a limit."""

    def __init__(self, reader: AnswerReader, whole: bool, unpacked: Callable[[bytes], bytes] | None = None) -> None:
        self.reader = reader
        self.unpacked = unpacked
        self.chunks: list[bytes] | None = [] if whole else None
        self._room = LARGEST_BYTES
        self._answer: Answer | None = None
        self._unread: list[bytes] = []
        self._unread_bytes = 0

    def feed(self, chunk: bytes) -> bytes:
        self.reader.feed(chunk if self.unpacked is None else self.unpacked(chunk))
        self._answer = None
        if self.chunks is not None:
            self._room -= len(chunk)
            if self._room < 0:
                self.chunks = None
            else:
                self.chunks.append(chunk)
        return chunk

    def later(self, chunk: bytes) -> None:
        """`feed`, of several at once: reading each costs more than passing it on."""
        self._unread.append(chunk)
        self._unread_bytes += len(chunk)
        if self._unread_bytes > UNREAD_BYTES:
            self._catch_up()

    def _catch_up(self) -> None:
        unread, self._unread, self._unread_bytes = b"".join(self._unread), [], 0
        self.feed(unread)

    def answer(self) -> Answer:
        """What has come so far, understood once."""
        if self._unread:
            self._catch_up()
        if self._answer is None:
            self._answer = self.reader.answer()
        return self._answer

    def body(self) -> bytes | None:
        """What was kept; None where that was not asked for, or is too large."""
        return None if self.chunks is None else b"".join(self.chunks)


class Tapped:
    """A sink whose bytes a tap looks at."""

    def __init__(self, tap: Tap, sink: Sink) -> None:
        self.drained = sink.drained
        self._later, self._write = tap.later, sink.write

    def write(self, data: bytes) -> bool:
        self._later(data)
        return self._write(data)


class Head(NamedTuple):
    """What goes to the client before the first byte of the answer."""

    status: int
    headers: CIMultiDict[str]


class Pipeline:
    """One request at a time, from understanding it to learning from it. Holds no state of its own."""

    def __init__(
        self,
        directory: Directory,
        fleet: Fleet,
        select: Select,
        router: Router,
        learner: Learner,
        reuse: Reuse,
        warm: Warm,
        judging: Judging,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = directory
        self.settings = directory.settings
        self.fleet = fleet
        self.select = select
        self.turns = select.turns
        self.router = router
        self.learner = learner
        self.reuse = reuse
        self.warm = warm
        self.judging = judging
        self.metrics = metrics
        self.clock = clock

    async def answer(self, call: Call) -> AsyncGenerator[Head | bytes]:
        """A Head, then the answer's bytes as they come, but for those of a stream that `call.out` takes. Raises
        RequestError or BackendError before the Head."""
        ask = self.renamed(self.parse(call))
        async with self.reuse.turn(call.tenant, call.dialect, call.query, call.headers, ask) as turn:
            if turn.known is not None:
                yield self.repeat(call, ask, turn.known)
                yield turn.known.body
                return
            if turn.following is not None:
                async with aclosing(self.follow(call, ask, turn.following)) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            plan = await self.decide(call, ask)
            async with self.fleet.send(self.compose(call, ask, plan), plan.order) as reply:
                await self.turns.room(begun=True)  # answers may come together
                exchange, streams = self.begin(call, ask, plan, reply), reply.streams
                content_type, packed = reply.headers.get("Content-Type", ""), is_packed(reply.headers)
                whole = turn.key is not None and not packed  # what is kept is kept without its coding
                tap = Tap(call.dialect.reader(streams), whole, unpacker(reply.headers) if packed else None)
                shared: Reader | None = None
                try:
                    if streams:
                        yield self.head(call, exchange, reply.headers)
                        if whole and reply.status == 200:
                            shared = turn.shared(exchange, content_type, reply.chunks, tap.feed)
                        else:
                            turn.land(None)
                        if shared is None and reply.pour is not None and call.out is not None:
                            await reply.pour(Tapped(tap, call.out))
                            await self.turns.room(begun=True)
                        else:
                            async for chunk in shared or reply.chunks:
                                if shared is None:
                                    tap.feed(chunk)
                                yield chunk
                    else:
                        body = b"".join([tap.feed(chunk) async for chunk in reply.chunks])
                        self.account(exchange, ask, plan, tap.answer())
                        yield self.head(call, exchange, reply.headers)
                        yield body
                except BackendError as exc:
                    if not streams:
                        raise
                    log.warning("%s: the stream from %s broke: %s", call.request_id, reply.backend.name, exc)
                    yield call.dialect.error_event(broken_stream(exc))
                finally:
                    if shared is not None:
                        await shared.leave_to_others()
                    answer = tap.answer()
                    self.account(exchange, ask, plan, answer)
                    exchange.latency_s = self.clock() - call.arrived
                    turn.keep(exchange, answer, content_type, tap.body())
                    self.warm.remember(call.tenant, ask, exchange)
                    self.learner.finish(exchange, ask, plan, answer, turn.keeping)
                    if self.judging.active:
                        self.judging.consider(self.answered(call, ask, plan, exchange, answer))

    def parse(self, call: Call) -> Ask:
        """The body, understood; what the headers ask of iccache laid over what the body asks."""
        ask = call.dialect.read(call.body)
        controls = read_controls(call.headers, ask.controls)
        if not self.directory.keeps(call.tenant):
            controls = controls._replace(store=False)
        ask.controls = controls
        return ask

    def renamed(self, ask: Ask) -> Ask:
        """`ask` with the names of its end user and its session as they may be written down."""
        subject, session, name = ask.subject, ask.controls.session, self.learner.name
        if (subject is None or name(subject) == subject) and (session is None or name(session) == session):
            return ask
        return replace(
            ask,
            subject=None if subject is None else name(subject),
            controls=ask.controls._replace(session=None if session is None else name(session)),
        )

    async def decide(self, call: Call, ask: Ask) -> Plan:
        """Embed, recall, rank and route: softly. What fails or takes too long leaves the request plain."""
        session = await self.learner.session_backend(call.tenant, ask.controls.session)
        tokens = self.select.guess(ask) if self.directory.needs_no_count(ask) else self.select.count_prompt(ask)
        plan = self.directory.plan(ask, session, tokens, self.warm.backend(call.tenant, ask))
        if plan.settled:
            return plan
        try:
            return self.route(call, ask, await self.choose_examples(call, ask, plan))
        except TimeoutError:
            return plan.plain(Reason.TIMEOUT, self.past_the_cache(plan))
        except Exception:
            log.exception("%s: no decision, going on without", call.request_id)
            return plan.plain(Reason.FAILED, self.past_the_cache(plan))

    async def choose_examples(self, call: Call, ask: Ask, plan: Plan) -> Plan:
        """Embed, recall, rank: the examples for each student that may answer."""
        job = Job(call.tenant, ask, plan.students, plan.request_tokens, call.at)
        selected = self.select.at_once(job)
        if selected is None:
            async with asyncio.timeout(self.settings.routing.decision_timeout_ms / 1000):
                selected = await self.select(job)
        plan = plan.again()
        plan.embedding, plan.shown = selected.embedding, selected.shown
        plan.considered, plan.taken = selected.considered, selected.taken
        return plan

    def route(self, call: Call, ask: Ask, plan: Plan) -> Plan:
        """Draw one of the candidates, where there is a choice."""
        if plan.kind is DecisionKind.PINNED or len(plan.candidates) < 2:
            return plan
        started = self.clock()
        may = [b for b in plan.candidates if self.fleet.within_limits(b.name)] or plan.candidates
        arms = [self.arm(b, plan) for b in may]
        standing = self.learner.standing(call.tenant, kind_of(ask.system))
        u = drawn_for(call.tenant, ask.controls.session)
        decision = self.router.route(signals(plan), arms, self.fleet.load.load(started), standing, u)
        self.metrics.stage_seconds.labels("route").observe(self.clock() - started)
        speaking = [b for b in self.directory.by_price if b.name in plan.order]
        order = self.directory.with_fallbacks(self.directory.names[decision.arm], speaking)
        plan = plan.again()
        plan.order, plan.decision = order, decision
        return plan

    def compose(self, call: Call, ask: Ask, plan: Plan) -> Post:
        """What goes upstream: the client's body, with the chosen examples where a student is asked."""

        def body(backend: config.Backend) -> bytes:
            if call.sent is None:
                call.sent = self.clock()
            started = self.clock()
            shots = [Shot(m.example.request, m.example.answer) for m in plan.shown.get(backend.name, ())]
            model = None if ask.model == backend.model else backend.model
            composed = call.dialect.compose(ask, model=model, shots=shots, placement=self.settings.selection.placement)
            self.metrics.stage_seconds.labels("compose").observe(self.clock() - started)
            return composed

        def lost(backend: config.Backend, came: bytes) -> None:
            said = Answer(text=beginning_of(came), complete=False)
            usage = self.select.usage(said, ask, backend, self.shown(plan, backend.name), 200)
            self.learner.count_lost(call.tenant, backend, usage)
            call.lost_usd += cost(backend, usage)

        return Post("POST", call.dialect.path, call.query, call.headers, body, whole=not_a_stream, lost=lost)

    def begin(self, call: Call, ask: Ask, plan: Plan, reply: Reply) -> Exchange:
        """The record of this request, as far as it is known when the answer begins."""
        first = self.clock()
        backend = reply.backend.name
        if reply.streams and backend == plan.order[0] and call.sent is not None:
            self.fleet.load.first_byte(backend, first - call.sent, first)
        drawn = plan.decision is not None and plan.decision.arm == backend
        kind = DecisionKind.FALLBACK if backend != plan.order[0] else plan.kind
        offloaded = kind in (DecisionKind.ROUTED, DecisionKind.FALLBACK) and backend != self.directory.by_price[-1].name
        exchange = Exchange(
            request_id=call.request_id,
            tenant=call.tenant,
            subject=ask.subject,
            session=ask.controls.session,
            at=call.at,
            dialect=ask.dialect,
            model=ask.model,
            stream=ask.stream,
            backend=backend,
            decision=kind,
            reason=reply.fell_back if kind is DecisionKind.FALLBACK else plan.reason,
            status=reply.status,
            complete=False,
            offloaded=offloaded,
            relative_cost=self.directory.relative_costs[backend],
            system=ask.system,
            task=ask.task,
            first_byte_s=first - call.arrived,
            overhead_s=(call.sent or first) - call.arrived,
            propensity=self.propensity(plan, drawn) if kind is DecisionKind.ROUTED else None,
            features=plan.decision.features if drawn and plan.decision else self.features(plan, reply.backend),
            shown=[m.example.id for m in self.shown(plan, backend)],
            considered=plan.considered_for(backend),
            backends=plan.scores(),
            extra=self.noted(call, ask, plan, backend, drawn),
        )
        self.learner.begin(exchange, ask)
        return exchange

    def repeat(self, call: Call, ask: Ask, known: Kept) -> Head:
        """The head of an answer from the record."""
        exchange = self.repeated(call, ask, known)
        exchange.complete = True
        self.learner.begin(exchange, ask)
        self.learner.finish(exchange, ask)
        return self.head(call, exchange, CIMultiDict({"Content-Type": known.content_type}))

    async def follow(self, call: Call, ask: Ask, following: Reader) -> AsyncGenerator[Head | bytes]:
        """The stream of an identical request, while it comes."""
        known = following.live.head
        exchange = self.repeated(call, ask, known)
        self.learner.begin(exchange, ask)
        try:
            yield self.head(call, exchange, CIMultiDict({"Content-Type": known.content_type}))
            async for chunk in following:
                yield chunk
            exchange.complete = True
        except BackendError as exc:
            log.warning("%s: the stream of %s, read along, broke: %s", call.request_id, known.request_id, exc)
            yield call.dialect.error_event(broken_stream(exc))
        finally:
            exchange.latency_s = self.clock() - call.arrived
            self.learner.finish(exchange, ask)

    def repeated(self, call: Call, ask: Ask, known: Kept) -> Exchange:
        """Of an answer to an identical request: an exchange of its own, which cost nothing and used nothing."""
        return Exchange(
            request_id=call.request_id,
            tenant=call.tenant,
            subject=ask.subject,
            session=ask.controls.session,
            at=call.at,
            dialect=ask.dialect,
            model=ask.model,
            stream=ask.stream,
            backend=known.backend,
            decision=DecisionKind.CACHED,
            reason=None,
            status=200,
            complete=False,
            system=ask.system,
            task=ask.task,
            overhead_s=self.clock() - call.arrived,
            latency_s=self.clock() - call.arrived,
            extra={"answered_by": known.request_id},
        )

    def account(self, exchange: Exchange, ask: Ask, plan: Plan, answer: Answer) -> None:
        """What the answer was, what it took and what it cost."""
        if exchange.complete:
            return  # known already: an answer that does not stream is understood before its head goes out
        backend = self.fleet.members[exchange.backend].config
        exchange.answer = answer.text
        exchange.finish_reason = answer.finish_reason
        exchange.complete = answer.complete and 200 <= exchange.status < 300
        exchange.usage = self.select.usage(answer, ask, backend, self.shown(plan, exchange.backend), exchange.status)
        exchange.cost_usd = cost(backend, exchange.usage) + exchange.extra.get(LOST_USD, 0.0)
        self.fleet.used(backend.name, exchange.usage.input + exchange.usage.output)

    def head(self, call: Call, exchange: Exchange, given: Mapping[str, str]) -> Head:
        """The status and headers of the answer: the upstream's own, and ours."""
        headers = forwardable(given)
        headers.update(
            {
                "x-request-id": call.request_id,
                "x-iccache-backend": exchange.backend,
                "x-iccache-decision": exchange.decision.value,
                "x-iccache-examples": str(len(exchange.shown)),
                "x-iccache-overhead-ms": f"{exchange.overhead_s * 1000:.3f}",
            }
        )
        if exchange.reason is not None:
            headers["x-iccache-reason"] = exchange.reason.value
        if exchange.shown:
            headers["x-iccache-example-ids"] = ",".join(exchange.shown)
        if exchange.propensity is not None:
            headers["x-iccache-propensity"] = f"{exchange.propensity:.6g}"
        if is_stream(given):
            headers.setdefault("Cache-Control", "no-cache")
            headers["X-Accel-Buffering"] = "no"
        else:
            headers["x-iccache-cost-usd"] = as_usd(exchange.cost_usd)
        return Head(exchange.status, headers)

    def past_the_cache(self, plan: Plan) -> tuple[str, ...]:
        """Whom to ask where no decision came about: the pinned, the session's, else the teacher."""
        if len(plan.candidates) == 1:
            return plan.order
        speaking = [b for b in self.directory.by_price if b.name in plan.order]
        return self.directory.with_fallbacks(self.directory.teacher(speaking), speaking)

    def answered(self, call: Call, ask: Ask, plan: Plan, exchange: Exchange, answer: Answer) -> Answered:
        """What it takes to ask another backend the same, when nobody waits."""
        post = self.compose(call, ask, plan)
        return Answered(exchange, ask, plan, answer, call.dialect, post, lambda backend: self.features(plan, backend))

    def noted(self, call: Call, ask: Ask, plan: Plan, backend: str, drawn: bool) -> dict[str, Any]:
        """What the record keeps beside: the kind of request, the way examples were shown, whether it is of the
        hold-out, who would have answered but for shadow mode or the floor, and what broke off before."""
        kept: dict[str, Any] = {KIND: kind_of(ask.system)}
        if call.lost_usd:
            kept[LOST_USD] = call.lost_usd
        if backend in plan.taken:
            kept["way"] = plan.taken[backend]._asdict()
        decision = plan.decision if drawn else None
        if decision is not None and decision.held_out:
            kept[HELD_OUT] = True
        if decision is not None and decision.withheld is not None:
            kept[WITHHELD] = decision.withheld
        if decision is not None and decision.meant < 1.0:
            kept[MEANT] = round(decision.meant, 4)
        return kept

    def features(self, plan: Plan, backend: config.Backend) -> Features | None:
        """What the router saw, or would have seen, of this request and the backend that answers."""
        return None if plan.embedding is None else features(signals(plan), self.arm(backend, plan))

    def shown(self, plan: Plan, backend: str) -> tuple[Match, ...]:
        return plan.shown.get(backend, ())

    def propensity(self, plan: Plan, drawn: bool) -> float:
        """Probability with which this backend was drawn; 1 where there was nothing to draw."""
        return plan.decision.propensity if drawn and plan.decision else 1.0

    def arm(self, backend: config.Backend, plan: Plan) -> Arm:
        """A backend as the router sees it, with what this request is expected to cost there."""
        usd = plan.expected_usd(backend, self.settings.selection.placement)
        return Arm(backend.name, usd, backend.name in self.directory.teachers, list_price=price(backend))


def drawn_for(tenant: str, session: str | None) -> float | None:
    """In [0, 1), uniform over sessions and the same for all of one: so that those of its requests which are routed at
    the same time, or by workers that do not know of each other's yet, are likely to meet at one backend."""
    if session is None:
        return None
    digest = hashlib.blake2b(f"{tenant}\0{session}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def not_a_stream(reply: Reply) -> bool:
    """Nothing of such an answer goes out before its last byte is here, so that another backend may still be asked."""
    return not reply.streams


def broken_stream(error: BackendError) -> RequestError:
    """What a client is told where a stream broke off."""
    code = f"upstream_{error.reason.value}"
    return RequestError(status_of(error), str(error), type="upstream_error", code=code, should_retry=error.should_retry)
