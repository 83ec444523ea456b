"""Once more, where every backend that may answer has failed: RELIABILITY A2, 5 and 6."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from iccache.backends.circuit import Circuit
from iccache.backends.retry import BURST
from tests.e2e.world import Answered, World, world
from tests.fakes import Script

CHEAPEST = {"policy": "student"}
CLOCKS = {"first_token_timeout_s": 0.3, "connect_timeout_s": 1}


@pytest.fixture
async def w(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path, small=CLOCKS, large=CLOCKS, routing=CHEAPEST) as made:
        made.proxy.fleet.retries.draw = lambda: 0.0
        yield made


def counts(w: World) -> tuple[int, int]:
    return len(w.small.requests), len(w.large.requests)


def forget(w: World) -> None:
    for member in w.proxy.fleet.members.values():
        member.circuit, member.rests_until = Circuit(), 0.0
    w.small.requests.clear()
    w.large.requests.clear()


async def metric(w: World, name: str) -> float:
    text = (await w.get("/metrics")).body.decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [{"status": 503}, {"status": 429}, {"status": 408}, {"fault": "reset_before_head"}])
async def test_a_pinned_backend_that_stumbles_is_asked_once_more(
    w: World, script: dict[str, Any], stream: bool
) -> None:
    w.small.queue.append(Script(**script))
    answered = await w.ask("hello", "small", stream=stream)
    assert (answered.status, answered.header("decision"), counts(w)) == (200, "pinned", (2, 0))
    assert w.small.requests[0].body == w.small.requests[1].body
    assert await metric(w, 'iccache_retries_total{backend="small"}') == 1


async def test_all_are_asked_once_before_any_is_asked_twice(w: World) -> None:
    w.small.queue.append(Script(status=503))
    w.large.queue.append(Script(status=500))
    answered = await w.ask("hello")
    assert (answered.status, answered.header("backend"), answered.header("decision")) == (200, "small", "routed")
    assert counts(w) == (2, 1)
    assert w.small.requests[0].at < w.large.requests[0].at < w.small.requests[1].at


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422])
async def test_no_other_4xx_is_sent_again(w: World, status: int) -> None:
    w.small.script = Script(status=status)
    assert (await w.ask("hello", "small")).status == status
    assert counts(w) == (1, 0)


@pytest.mark.parametrize("fault", ["reset_midway", "truncate", "error_event"])
async def test_never_after_the_first_byte(w: World, fault: Any) -> None:
    w.small.script = Script(fault=fault)
    assert (await w.ask("one two three four", "small", stream=True)).status == 200
    assert counts(w) == (1, 0)


async def test_an_upload_is_not_sent_again(w: World) -> None:
    w.large.script = Script(status=503)
    async with w.http.post(w.url + "/v1/files", data=b"x" * 1000) as upload:
        assert upload.status == 503
    assert (await w.post("/v1/batches", {"x": 1})).status == 200  # the other backend's
    w.small.script = Script(status=503)
    forget(w)
    assert (await w.post("/v1/batches", {"x": 1})).status == 503
    assert counts(w) == (1, 1)
    w.small.queue.append(Script(status=503))
    w.small.script = Script()
    forget(w)
    assert (await w.post("/v1/embeddings", {"model": "small", "input": "x"})).status == 200
    assert counts(w) == (2, 0)


async def test_who_waited_long_does_not_wait_again(tmp_path: Path) -> None:
    slow = {"first_token_timeout_s": 6}
    async with world(tmp_path, small=slow, routing=CHEAPEST) as w:
        now = 0.0
        w.proxy.fleet.retries.clock = lambda: now
        w.small.script = Script(status=503, before_head_s=0.2)
        asked = asyncio.create_task(w.ask("hello", "small"))
        await asyncio.sleep(0.1)
        now = 6.0
        assert (await asked).status == 503
        assert counts(w) == (1, 0)


# ---- Retry-After


async def test_a_short_wait_is_kept(w: World) -> None:
    for headers in ({"Retry-After-Ms": "300"}, {"Retry-After": "0.3", "Retry-After-Ms": "x"}):
        w.small.queue.append(Script(status=429, headers=headers))
        assert (await w.ask("hello", "small")).status == 200
        first, second = w.small.requests
        assert 0.3 <= second.at - first.at < 2
        forget(w)


async def test_a_long_wait_is_the_clients(w: World) -> None:
    body = b'{"error": {"message":"slow down",  "odd": 1}}\n'
    w.small.script = Script(status=429, headers={"Retry-After": "7"}, body=body)
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    w.proxy.fleet.retries.sleep = sleep
    answered = await w.ask("hello", "small")
    assert (answered.status, answered.headers["Retry-After"], answered.body) == (429, "7", body)
    assert not slept
    assert "x-should-retry" not in answered.headers
    assert counts(w) == (1, 0)


async def test_who_asked_to_be_left_alone_is_until_then(w: World) -> None:
    now = 0.0
    w.proxy.fleet.clock = lambda: now
    w.small.queue.append(Script(status=429, headers={"Retry-After": "7"}))
    first, second = await w.ask("hello"), await w.ask("hello")
    assert (first.header("backend"), first.header("reason")) == ("large", "status")
    assert (second.header("backend"), second.header("reason")) == ("large", "retry_after")
    assert counts(w) == (1, 2)
    assert (await w.ask("hello", "small")).status == 200  # nobody else may answer
    w.large.queue.append(Script(status=500))
    assert (await w.ask("hello")).header("backend") == "small"  # nobody else can
    now = 7.0
    forget_requests = counts(w)
    assert (await w.ask("hello")).header("decision") == "routed"
    assert counts(w) == (forget_requests[0] + 1, forget_requests[1])


async def test_an_error_that_says_when_is_not_replaced_by_one_that_does_not(w: World) -> None:
    w.small.script = Script(status=500)
    w.large.script = Script(status=429, headers={"Retry-After": "9"})
    answered = await w.ask("hello")
    assert (answered.status, answered.headers["Retry-After"], counts(w)) == (429, "9", (2, 1))


# ---- the budget


async def test_retries_do_not_amplify(w: World) -> None:
    """All is 503: no upstream gets more than 1.1 times what was asked, and clients are told to stop."""
    w.small.script = w.large.script = Script(status=503)
    w.proxy.fleet.retries.sleep = lambda _: asyncio.sleep(0)
    offered = 300
    answers: list[Answered] = []
    for _ in range(offered // 10):
        answers += await asyncio.gather(*(w.ask("hello", stream=i % 2 == 1) for i in range(10)))
    assert {a.status for a in answers} == {503}
    assert all(offered <= n <= 1.1 * offered for n in counts(w)), counts(w)
    told = [a.headers.get("x-should-retry") for a in answers]
    assert told.count("false") == offered - (counts(w)[0] - offered)
    assert set(told) == {None, "false"}
    assert await metric(w, "iccache_retries_total") == sum(counts(w)) - 2 * offered


async def test_clients_are_told_to_stop_where_nobody_answered_too(w: World) -> None:
    w.small.script = Script(fault="reset_before_head")
    answers = [await w.ask("hello", "small") for _ in range(BURST + 1)]
    assert [a.status for a in answers] == [502] * (BURST + 1)
    assert [a.headers.get("x-should-retry") for a in answers] == [None] * BURST + ["false"]


async def test_a_share_of_0_turns_it_off(tmp_path: Path) -> None:
    async with world(tmp_path, routing={**CHEAPEST, "retry_share": 0}) as w:
        w.small.script = w.large.script = Script(status=503, headers={"x-should-retry": "true"})
        answered = await w.ask("hello")
        assert (answered.status, answered.headers["x-should-retry"], counts(w)) == (503, "true", (1, 1))


async def test_a_reload_keeps_what_is_left(w: World) -> None:
    w.small.script = Script(status=503)
    for _ in range(BURST):
        await w.ask("hello", "small")
    w.proxy.reload(w.proxy.settings)
    assert (await w.ask("hello", "small")).headers["x-should-retry"] == "false"


async def test_the_last_backend_is_always_asked(w: World) -> None:
    """However often all have failed: as soon as one works again, it answers."""
    w.small.script = w.large.script = Script(status=500)
    for _ in range(12):
        assert (await w.ask("hello")).status == 500
    assert all(m.circuit.is_open(w.proxy.clock()) for m in w.proxy.fleet.members.values())
    w.large.script = Script()
    answered = await w.ask("hello")
    assert (answered.status, answered.header("backend"), answered.header("decision")) == (200, "large", "fallback")


async def test_a_client_that_leaves_during_the_pause_is_not_sent_again(w: World) -> None:
    w.small.script = Script(status=503, headers={"Retry-After": "2"})
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await w.ask("hello", "small")
    await asyncio.sleep(2)
    assert counts(w) == (1, 0)

    async def idle() -> bool:
        return not w.proxy.open_requests and not w.proxy.fleet.members["small"].in_flight

    await w.until(idle, bool)
