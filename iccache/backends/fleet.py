"""The backends together: who is in flight, whose circuit is open, and who answers when one fails."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from iccache import config
from iccache.backends.circuit import Circuit
from iccache.backends.client import BackendClient, Upstream
from iccache.errors import BackendError, BackendTimeout
from iccache.metrics import Metrics
from iccache.types import Reason
from router.load import LoadTracker

RETRIABLE = frozenset({408, 429})  # and every 5xx: the next backend may do better
KEPT_ERROR_BYTES = 1_000_000


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


@dataclass(slots=True)
class Reply:
    """An upstream's answer, begun: its head and first bytes are here."""

    backend: config.Backend
    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]
    fell_back: Reason | None  # why an earlier choice did not answer

    @property
    def streams(self) -> bool:
        """Whether the body is to be forwarded piece by piece."""
        return is_stream(self.headers)


@dataclass(slots=True)
class Member:
    """One backend with its state."""

    config: config.Backend
    client: BackendClient
    circuit: Circuit = field(default_factory=Circuit)
    in_flight: int = 0


class Fleet:
    """All backends of one process."""

    def __init__(
        self,
        members: Sequence[Member],
        load: LoadTracker,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.members = {m.config.name: m for m in members}
        self.load = load
        self.metrics = metrics
        self.clock = clock

    @asynccontextmanager
    async def send(self, post: Post, order: Sequence[str]) -> AsyncIterator[Reply]:
        """The first of `order` that answers, from its first byte to its last.

        A backend fails by not connecting, breaking or being slow before its first byte, or with 408, 429 or 5xx.
        Backends whose circuit is open come last. Where all fail, the last error that an upstream gave is the reply;
        where none gave any, the last BackendError is raised.
        """
        async with AsyncExitStack() as stack:
            yield await self._first_answer(post, order, stack)

    async def _first_answer(self, post: Post, order: Sequence[str], stack: AsyncExitStack) -> Reply:
        failed: Reason | None = None
        error: BackendError | None = None
        answered: Reply | None = None
        for member in self._willing(order):
            if failed is None and member.config.name != order[0]:
                failed = Reason.CIRCUIT
            attempt = AsyncExitStack()
            try:
                upstream = await attempt.enter_async_context(self._one(member, post))
            except BackendError as exc:
                self._judge(member, ok=False)
                error, failed = exc, failed or exc.reason
                continue
            reply = Reply(member.config, upstream.status, upstream.headers, self._watched(member, upstream), failed)
            if not is_failure(upstream.status):
                stack.push_async_exit(attempt.pop_all())
                return reply
            failed = failed or Reason.STATUS
            if len(order) == 1:
                stack.push_async_exit(attempt.pop_all())
                return reply
            answered = await _kept(reply)
            await attempt.aclose()
        if answered is not None:
            return answered
        assert error is not None
        raise error

    def _willing(self, order: Sequence[str]) -> Iterator[Member]:
        """The members in order; those whose circuit is open come last."""
        left_alone = []
        for name in order:
            member = self.members[name]
            if member.circuit.allows(self.clock()):
                yield member
            else:
                left_alone.append(member)
        yield from left_alone

    @asynccontextmanager
    async def _one(self, member: Member, post: Post) -> AsyncIterator[Upstream]:
        name = member.config.name
        self._entered(member)
        try:
            async with member.client.send(
                post.method, post.path, query=post.query, headers=post.headers, body=post.body(member.config)
            ) as upstream:
                self._judge(member, ok=upstream.status < 500)
                yield upstream
        finally:
            member.in_flight -= 1
            self.load.end(name, self.clock())
            self.metrics.in_flight.labels(name).dec()

    def _entered(self, member: Member) -> None:
        member.in_flight += 1
        self.load.begin(member.config.name, self.clock())
        self.metrics.in_flight.labels(member.config.name).inc()

    async def _watched(self, member: Member, upstream: Upstream) -> AsyncIterator[bytes]:
        """The chunks, and what a break among them says of the backend."""
        try:
            async for chunk in upstream.chunks():
                yield chunk
        except BackendError:
            self._judge(member, ok=False)
            raise

    def _judge(self, member: Member, *, ok: bool) -> None:
        now = self.clock()
        if ok:
            member.circuit.succeeded(now)
        else:
            member.circuit.failed(now)
        self.metrics.circuit_open.labels(member.config.name).set(int(member.circuit.is_open(now)))


def is_failure(status: int) -> bool:
    """Whether another backend should be asked instead."""
    return status in RETRIABLE or status >= 500


def is_stream(headers: Mapping[str, str]) -> bool:
    """Whether these are the headers of server-sent events."""
    return headers.get("Content-Type", "").startswith("text/event-stream")


def status_of(error: BackendError) -> int:
    """The status a client sees where no backend answered: 504 where it was time that ran out, else 502."""
    return 504 if isinstance(error, BackendTimeout) else 502


async def _kept(reply: Reply) -> Reply:
    """`reply`, read whole, so that its connection can be given back."""
    body = bytearray()
    try:
        async for chunk in reply.chunks:
            body += chunk
            if len(body) > KEPT_ERROR_BYTES:
                break
    except BackendError:
        pass  # what has come of an error's text is enough

    async def whole() -> AsyncIterator[bytes]:
        yield bytes(body)

    return Reply(reply.backend, reply.status, reply.headers, whole(), reply.fell_back)
