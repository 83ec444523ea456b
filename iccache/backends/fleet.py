"""The backends together: who is in flight, whose circuit is open, and who answers when one fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Protocol

from multidict import CIMultiDict

from iccache import config
from iccache.backends.circuit import Circuit
from iccache.backends.client import BackendClient, Upstream
from iccache.backends.limits import Limits
from iccache.backends.retry import LONGEST_REST_S, Retries, retry_after_s
from iccache.backends.wire import Sink
from iccache.errors import BackendError, BackendTimeout
from iccache.metrics import Metrics
from iccache.types import Reason
from router.load import LoadTracker

SHOULD_RETRY = "x-should-retry"  # the official clients obey it
RETRIABLE = frozenset({408, 429})  # and every 5xx: the next backend may do better
KEPT_ERROR_BYTES = 1_000_000
KEPT_WITHIN_S = 1.0  # the next backend does not wait longer for the rest of an error


def _nothing() -> None:
    """There is nothing to close."""


def _as_it_comes(reply: Reply) -> bool:
    return False


def _unheeded(backend: config.Backend, body: bytes) -> None:
    """Nobody counts what was lost."""


class Outgoing(Protocol):
    """What goes upstream, for one backend."""

    def __call__(self, backend: config.Backend) -> bytes | AsyncIterator[bytes] | None: ...


@dataclass(frozen=True, slots=True)
class Post:
    """One request as it goes upstream, whichever backend takes it."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: Outgoing
    repeatable: bool = True  # it may go to one backend more than once
    whole: Callable[[Reply], bool] = _as_it_comes  # an answer that counts only once it is here to its last byte
    lost: Callable[[config.Backend, bytes], None] = _unheeded  # told what had come of such an answer that broke off
    any_length: bool = False  # one that is longer than it may be goes out as it comes; else it is a failure


@dataclass(slots=True)
class Reply:
    """An upstream's answer, begun: its head and first bytes are here."""

    backend: config.Backend
    status: int
    headers: CIMultiDict[str]
    chunks: AsyncIterator[bytes]
    fell_back: Reason | None  # why an earlier choice did not answer
    close: Callable[[], None] = _nothing  # what has not come yet is not wanted
    body: bytes | None = None  # what `chunks` gives, where it is here to its last byte
    pour: Callable[[Sink], Awaitable[None]] | None = None  # instead of `chunks`, where it is none of it

    @property
    def streams(self) -> bool:
        """Whether the body is to be forwarded piece by piece."""
        return is_stream(self.headers)


class Held:
    """The one connection that is kept open, and how to let go of it."""

    def __init__(self) -> None:
        self._end: Callable[[], None] | None = None

    def take(self, end: Callable[[], None]) -> None:
        self._end = end

    def let_go(self) -> None:
        end, self._end = self._end, None
        if end is not None:
            end()


class Sending:
    """`async with` around a reply: begun on entering, closed on leaving."""

    def __init__(self, begin: Coroutine[Any, Any, Reply]) -> None:
        self._begin = begin

    async def __aenter__(self) -> Reply:
        self._reply = await self._begin
        return self._reply

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reply.close()


@dataclass(slots=True)
class Member:
    """One backend with its state."""

    config: config.Backend
    client: BackendClient
    circuit: Circuit = field(default_factory=Circuit)
    in_flight: int = 0
    rests_until: float = 0.0  # it asked to be left alone (Retry-After), on the fleet's clock
    limits: Limits = field(init=False)
    told_open: bool | None = None  # what the metrics say of its circuit
    breaks: int = 0  # answers in a row that broke off after their first byte

    def __post_init__(self) -> None:
        self.limits = Limits(self.config)

    def ended(self) -> None:
        """An answer came whole."""
        self.breaks = 0

    def take_over(self, known: Member) -> None:
        """What was known of the backend before the configuration was read again."""
        self.circuit, self.rests_until = known.circuit, known.rests_until
        self.limits.take_over(known.limits)


@dataclass(slots=True)
class Round:
    """What became of asking the backends in turn: an answer, or why there is none."""

    reply: Reply | None = None  # the answer; where all failed, the last error that an upstream gave
    error: BackendError | None = None  # where none gave any
    why: Reason | None = None  # why the first choice did not answer
    again: tuple[str, ...] = ()  # who may be asked once more
    wait_s: float = 0.0  # but not sooner

    @property
    def pause_s(self) -> float | None:
        """How long to wait before another round; None where there is to be none."""
        return self.wait_s if self.again else None


class Fleet:
    """All backends of one process."""

    def __init__(
        self,
        members: Sequence[Member],
        load: LoadTracker,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        retries: Retries | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.members = {m.config.name: m for m in members}
        self.load = load
        self.metrics = metrics
        self.clock = clock
        self.retries = retries or Retries(0.0)
        self.wall = wall

    def send(self, post: Post, order: Sequence[str]) -> Sending:
        """The first of `order` that answers, from its first byte to its last.

        A backend fails by not connecting, breaking or being slow before its first byte (before its last, where the
        answer is to be `whole`), by an answer that is too large for that, with a redirect, or with 408, 429 or 5xx.
        Backends whose circuit is open, or that asked to be left alone, come last; but somebody is always asked. Where
        all fail, they may be asked once more (`retry`). Where they fail again, the last error that an upstream gave is
        the reply; where none gave any, the last BackendError is raised.
        """
        return Sending(self.begin(post, order))

    async def begin(self, post: Post, order: Sequence[str]) -> Reply:
        """`send` for those who close the reply themselves."""
        held = Held()  # the connection whose answer it is to be
        before: Round | None = None

        async def ask_all() -> Round:
            nonlocal before
            before = await self._round(post, order, held, before)
            return before

        try:
            done, refused = await self.retries.run(ask_all, _pause)
        except BaseException:
            held.let_go()
            raise
        if done.reply is None:
            assert done.error is not None
            done.error.should_retry = not refused
            raise done.error
        if refused:
            done.reply.headers = CIMultiDict(done.reply.headers)
            done.reply.headers[SHOULD_RETRY] = "false"
        done.reply.close = held.let_go
        return done.reply

    async def _round(self, post: Post, order: Sequence[str], held: Held, before: Round | None) -> Round:
        """Ask everyone in turn until one answers; after a first round `before`, those who may be asked once more.

        The connection of the reply stays open in `held`, unless it has been read. An error stands whose backend is not
        asked again.
        """
        found = Round() if before is None else Round(before.reply, before.error, before.why)
        stands = before is not None and before.reply is not None and before.reply.backend.name not in before.again
        waits: dict[str, float] = {}
        willing = list(order) if before is None else [n for n in order if n in before.again]
        for member in self._willing(willing):
            name = member.config.name
            if found.why is None and name != order[0]:
                found.why = self._left_alone_because(order[0])
            if before is not None:
                self.metrics.retries.labels(name).inc()
            if await self._answers(member, post, held, found, stands=stands):
                return found
            if found.error is None or not found.error.lasting:
                waits[name] = self._rest_s(member)
        if post.repeatable and waits:
            found.wait_s = min(waits.values())
            found.again = tuple(name for name, wait in waits.items() if wait <= found.wait_s)
        return found

    async def _answers(self, member: Member, post: Post, held: Held, found: Round, *, stands: bool) -> bool:
        """Ask one backend; what comes of it goes into `found`. Whether it is an answer."""
        if found.reply is not None:
            found.reply = await _kept(found.reply)
        held.let_go()
        found.error = None
        try:
            upstream = await self._begun(member, post)
        except BackendError as exc:
            self._judge(member, ok=False)
            found.error, found.why = exc, found.why or exc.reason
            return False
        failed = is_failure(upstream.status)
        if failed and stands:
            self._over(member, upstream)
        else:
            held.take(lambda: self._over(member, upstream))
            broke = partial(self._broke, member)
            chunks = upstream.chunks(broke, member.ended)
            reply = Reply(member.config, upstream.status, upstream.headers, chunks, found.why)
            reply.pour = partial(upstream.pour, broken=broke, ended=member.ended)
            if not failed and post.whole(reply):
                try:
                    reply = await _whole(reply, post)
                except BackendError as exc:
                    held.let_go()
                    if exc.reason is Reason.TOO_LARGE:
                        self._broke(member)
                    found.error, found.why = exc, found.why or exc.reason
                    return False
            found.reply = reply
        if failed:
            found.why = found.why or Reason.STATUS
            asked = min(retry_after_s(upstream.headers, self.wall()) or 0.0, LONGEST_REST_S)
            member.rests_until = max(member.rests_until, self.clock() + asked)
        return not failed

    def _willing(self, order: Sequence[str]) -> Iterator[Member]:
        """The members in order; those that are left alone come last."""
        left_alone = []
        for name in order:
            member = self.members[name]
            if not self._rest_s(member) and (member.circuit.closed or member.circuit.allows(self.clock())):
                yield member
            else:
                left_alone.append(member)
        yield from left_alone

    def _left_alone_because(self, name: str) -> Reason:
        now, member = self.clock(), self.members[name]
        if member.rests_until > now:
            return Reason.RETRY_AFTER
        return Reason.LIMIT if member.limits.wait_s(now) else Reason.CIRCUIT

    def _rest_s(self, member: Member) -> float:
        """How long it is still to be left alone because it asked to be, or because its minute is used up."""
        now = self.clock()
        if member.rests_until <= now and not member.limits.any:
            return 0.0
        return max(0.0, member.rests_until - now, member.limits.wait_s(now))

    def within_limits(self, name: str) -> bool:
        """Whether the backend may be asked now, by the limits that its configuration sets."""
        return not self.members[name].limits.wait_s(self.clock())

    def used(self, name: str, tokens: int) -> None:
        """An answer of the backend took so many tokens, prompt included."""
        limits = self.members[name].limits
        if limits.any:
            limits.used(tokens, self.clock())

    async def _begun(self, member: Member, post: Post) -> Upstream:
        """Its answer, which counts as in flight until it is `_over`."""
        name = member.config.name
        now = self.clock()
        member.in_flight += 1
        member.limits.asked(now)
        self.load.begin(name, now)
        self.metrics.in_flight.labels(name).inc()
        try:
            upstream = await member.client.begin(
                post.method, post.path, query=post.query, headers=post.headers, body=post.body(member.config)
            )
        except BaseException:
            self._over(member, None)
            raise
        self._judge(member, ok=upstream.status < 500)
        return upstream

    def _broke(self, member: Member) -> None:
        """Its answer broke off. What it began well makes up for no earlier one that did: all its answers may."""
        member.breaks += 1
        for _ in range(member.breaks):
            self._judge(member, ok=False)

    def _over(self, member: Member, upstream: Upstream | None) -> None:
        if upstream is not None:
            upstream.close()
        member.in_flight -= 1
        self.load.end(member.config.name, self.clock())
        self.metrics.in_flight.labels(member.config.name).dec()

    def _judge(self, member: Member, *, ok: bool) -> None:
        now = self.clock()
        if ok:
            member.circuit.succeeded(now)
        else:
            member.circuit.failed(now)
        is_open = member.circuit.is_open(now)
        if is_open is not member.told_open:
            member.told_open = is_open
            self.metrics.circuit_open.labels(member.config.name).set(int(is_open))


def _pause(found: Round) -> float | None:
    return found.pause_s


def is_failure(status: int) -> bool:
    """Whether another backend should be asked instead."""
    return status in RETRIABLE or status >= 500


def is_stream(headers: Mapping[str, str]) -> bool:
    """Whether these are the headers of server-sent events."""
    return headers.get("Content-Type", "").lower().startswith("text/event-stream")


def status_of(error: BackendError) -> int:
    """The status a client sees where no backend answered: 504 where it was time that ran out, else 502."""
    return 504 if isinstance(error, BackendTimeout) else 502


async def _whole(reply: Reply, post: Post) -> Reply:
    """`reply` to its last byte; as it comes, where it is too large and may be. What has come is told to `post.lost`
    where that fails, or nobody waits any more."""
    pieces: list[bytes] = []
    reply.pour = None
    room = reply.backend.max_answer_bytes
    try:
        async for chunk in reply.chunks:
            pieces.append(chunk)
            room -= len(chunk)
            if room < 0 and post.any_length:
                reply.chunks = _resumed(pieces, reply.chunks)
                return reply
            if room < 0:
                raise _too_large(reply.backend)
    except BaseException:
        post.lost(reply.backend, b"".join(pieces))
        raise
    reply.body = body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    reply.chunks = _one(body)
    return reply


async def _one(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def _resumed(pieces: list[bytes], rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """`pieces`, which are given away one by one, and the rest."""
    pieces.reverse()
    while pieces:
        yield pieces.pop()
    async for chunk in rest:
        yield chunk


def _too_large(backend: config.Backend) -> BackendError:
    return BackendError(
        f"{backend.name} answered with more than {backend.max_answer_bytes} bytes (backends.max_answer_bytes)",
        Reason.TOO_LARGE,
        lasting=True,
    )


async def _kept(reply: Reply) -> Reply:
    """`reply`, read whole, so that its connection can be given back."""
    body = bytearray()
    try:
        async with asyncio.timeout(KEPT_WITHIN_S):
            async for chunk in reply.chunks:
                body += chunk
                if len(body) > KEPT_ERROR_BYTES:
                    break
    except (BackendError, TimeoutError):
        pass  # what has come of an error's text is enough

    return Reply(reply.backend, reply.status, reply.headers, _one(bytes(body)), reply.fell_back)
