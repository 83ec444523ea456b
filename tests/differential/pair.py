"""One request twice, once straight to an upstream and once through the proxy, and everything that has to be equal."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from iccache.backends.circuit import Circuit
from tests.differential.bodies import same_json
from tests.differential.wire import Answered, Headers, Received, Script, Upstream, ask, kept
from tests.e2e.world import World, world

# What does not cross the proxy, each for a reason that backends/headers.py gives.
HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-authorization", "x-hop"}
NOT_UP = HOP | {
    "host", "content-length", "accept-encoding", "authorization", "x-api-key", "api-key", "cookie", "via", "expect",
}  # fmt: skip
NOT_DOWN = HOP | {
    "content-length", "date", "server", "set-cookie", "alt-svc", "strict-transport-security", "x-request-id",
}  # fmt: skip


def not_up(name: str) -> bool:
    return name in NOT_UP or name.startswith(("x-iccache-", "x-forwarded-"))


def not_down(name: str) -> bool:
    return name in NOT_DOWN or name.startswith("x-iccache-")


@dataclass(frozen=True)
class Way:
    """How a request goes through the proxy."""

    model: str
    headers: tuple[tuple[str, str], ...] = ()
    backend: str | None = None  # that has to take it; None: the router's choice


EXACT = Way("large-model", backend="large")  # the model needs no rewriting
TEACHER = Way("large", backend="large")
STUDENT = Way("small", (("x-iccache-examples", "0"),), backend="small")
STUDENTS_MODEL = Way("small-model", (("Cache-Control", "no-cache"),), backend="small")
PINNED = Way("auto", (("x-iccache-backend", "large"), ("x-iccache-examples", "0")), backend="large")
ROUTED = Way("auto")
WAYS = (EXACT, TEACHER, STUDENT, STUDENTS_MODEL, PINNED, ROUTED)
STORE_NOTHING = ("x-iccache-store", "no")


class Pair:
    """An upstream, a proxy in front of it, and a loop in which both live as long as the tests of a module."""

    def __init__(self, runner: asyncio.Runner, upstream: Upstream, w: World) -> None:
        self.runner = runner
        self.upstream = upstream
        self.world = w
        self.port = int(w.url.rpartition(":")[2])

    def run(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    async def direct(self, method: str, target: str, headers: Headers, body: bytes | None) -> tuple[Answered, Received]:
        self.upstream.requests.clear()
        answered = await ask(self.upstream.port, method, target, headers, body, self.upstream)
        return answered, self.upstream.requests[-1]

    async def through(
        self, method: str, target: str, headers: Headers, body: bytes | None
    ) -> tuple[Answered, list[Received]]:
        """What earlier requests said of the backends is forgotten, so that every one is a first."""
        self.upstream.requests.clear()
        for member in self.world.proxy.fleet.members.values():
            member.circuit = Circuit()
            member.rests_until = 0.0
        answered = await ask(self.port, method, target, headers, body, self.upstream)
        return answered, list(self.upstream.requests)

    async def settled(self) -> None:
        """Nothing that the requests left behind is under way any more."""
        await self.world.until(self._left, lambda left: left == (0, 0))

    async def _left(self) -> tuple[int, int]:
        proxy = self.world.proxy
        return proxy.open_requests, sum(m.in_flight for m in proxy.fleet.members.values())

    @classmethod
    async def made(cls, runner: asyncio.Runner, stack: AsyncExitStack, folder: Path, **sections: Any) -> Self:
        upstream = await stack.enter_async_context(Upstream())
        sections.setdefault("routing", {"policy": "uniform", "decision_timeout_ms": 10_000, "retry_share": 0})
        there = {"base_url": upstream.base_url}
        w = await stack.enter_async_context(world(folder, small=there, large=there, **sections))
        return cls(runner, upstream, w)


@contextmanager
def pair(**sections: Any) -> Iterator[Pair]:
    with asyncio.Runner() as runner, tempfile.TemporaryDirectory() as folder:
        stack = AsyncExitStack()
        try:
            yield runner.run(Pair.made(runner, stack, Path(folder), **sections))
        finally:
            runner.run(stack.aclose())


def check_answer(direct: Answered, proxied: Answered, script: Script) -> None:
    """The client sees the upstream's answer: status, bytes, framing that ends well, and the headers that it may see."""
    assert proxied.status == direct.status == script.status
    assert proxied.body == direct.body
    assert proxied.whole and direct.whole
    theirs = kept(direct.headers, not_down)
    ours = kept(proxied.headers, not_down)
    if not direct.all("content-type"):
        ours = [pair for pair in ours if pair[0] != "content-type"]
        assert proxied.one("content-type") in (None, "application/octet-stream")
    if (direct.one("content-type") or "").lower().startswith("text/event-stream"):
        assert ("x-accel-buffering", "no") in ours
        ours.remove(("x-accel-buffering", "no"))
        if not direct.all("cache-control"):
            ours.remove(("cache-control", "no-cache"))
    assert ours == theirs
    assert len(proxied.all("x-request-id")) == 1 and proxied.one("x-request-id") != "up-1"
    assert proxied.all("x-iccache-upstream-request-id") == direct.all("x-request-id")[-1:]


def check_request(direct: Received, proxied: Received) -> None:
    """The upstream sees the client's request: method, target and the headers that it may see."""
    assert (proxied.method, proxied.target) == (direct.method, direct.target)
    assert kept(proxied.headers, not_up) == kept(direct.headers, not_up)
    assert [v for n, v in proxied.headers if n.lower() == "accept-encoding"] == ["identity"]
    assert not [n for n, _ in proxied.headers if n.lower() in ("authorization", "x-api-key", "api-key", "cookie")]


def check_body(proxied: Received, wanted: bytes, *, exactly: bool) -> None:
    if exactly:
        assert proxied.body == wanted
    else:
        assert same_json(proxied.body, wanted)
