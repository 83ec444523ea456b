from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from iccache import config
from iccache.backends.client import make_session
from replay.job import Stop
from replay.load import LoadGate, Overloaded, load_of_proxy, parse
from tests.replay.world import World, bad, fill, make_settings, replayed


class Time:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def make_gate(loads: Iterable[float | None], max_wait_s: float = 10.0) -> tuple[LoadGate, Time]:
    told, time = iter(loads), Time()

    async def read() -> float | None:
        return next(told)

    return LoadGate(read, 0.5, max_wait_s, clock=time.clock, sleep=time.sleep), time


@pytest.mark.parametrize("load", [None, 0.0, 0.5])
async def test_calls_pass_at_once_where_the_load_is_low_or_no_proxy_runs(load: float | None) -> None:
    gate, time = make_gate([load])
    await gate.wait()
    await gate.wait()  # believed for a second: not read again
    assert time.now == 0


async def test_calls_wait_until_the_load_has_fallen() -> None:
    gate, time = make_gate([0.9, 0.8, 0.4])
    await gate.wait()
    assert time.now == 4.0


async def test_the_wait_is_bounded_over_the_whole_run() -> None:
    gate, time = make_gate([0.9, 0.9, 0.4, *[0.9] * 9])
    await gate.wait()
    time.now += 100
    with pytest.raises(Overloaded, match="load is 0"):
        await gate.wait()
    assert gate.waited_s == 10.0


async def test_nobody_waits_any_longer_when_the_run_stops() -> None:
    gate, time = make_gate([0.9] * 9)
    gate.give_up()
    with pytest.raises(Overloaded):
        await gate.wait()
    assert time.now == 0


@pytest.mark.parametrize(
    ("page", "load"),
    [
        (b"# HELP iccache_load x\n# TYPE iccache_load gauge\niccache_load 0.25\n", 0.25),
        (b'iccache_load{pid="1"} 0.25\niccache_load{pid="2"} 0.75\n', 0.75),
        (b'iccache_load_bias{backend="b"} 0.9\n', None),
        (b"iccache_load junk\n", None),
        (b"", None),
    ],
)
def test_the_load_is_read_from_the_metrics(page: bytes, load: float | None) -> None:
    assert parse(page) == load


async def test_a_busy_proxy_stops_a_run_cleanly(world: World, tmp_path: Path) -> None:
    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text="iccache_load 0.9\n")

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    async with TestServer(app) as proxy:
        settings = make_settings(tmp_path, world.upstream.base_url, server={"port": proxy.port})
        fill(settings, [bad(0)])
        report = await replayed(settings, max_wait_s=0)
    assert report.stopped is Stop.LOAD
    assert not world.billed
    assert (await replayed(settings)).improved == 1, "nobody listens there any more"


async def test_something_else_on_the_port_is_no_limit(tmp_path: Path) -> None:
    async with TestServer(web.Application()) as other, make_session() as session:
        assert await load_of_proxy(config.Server(port=other.port or 0), session.http)() is None
