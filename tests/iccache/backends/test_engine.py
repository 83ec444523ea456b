import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from iccache import config
from iccache.backends.engine import EngineLoad, busy
from router.load import LoadTracker

VLLM = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 7.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 3.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5
"""
LLAMA = """# HELP llamacpp:requests_processing Number of requests processing.
# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 1
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 4
llamacpp:prompt_tokens_total 99
"""


@pytest.mark.parametrize(("page", "requests"), [(VLLM, 12.0), (LLAMA, 5.0), ("", None), ("up 1\n", None)])
def test_what_runs_and_waits_is_added_up(page: str, requests: float | None) -> None:
    assert busy(page) == requests


@pytest.mark.parametrize("page", ["vllm:num_requests_running x\n", 'vllm:num_requests_running{a="} 1\n'])
def test_a_page_that_is_none_is_refused(page: str) -> None:
    with pytest.raises(ValueError):
        busy(page)


class Engine:
    def __init__(self) -> None:
        self.page, self.status = VLLM, 200

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.page, status=self.status)


@asynccontextmanager
async def followed(engine: Engine) -> AsyncIterator[tuple[Callable[[], Awaitable[None]], LoadTracker]]:
    app = web.Application()
    app.router.add_get("/metrics", engine.metrics)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        backend = config.Backend(
            name="b", base_url="http://127.0.0.1:1/v1", model="m", metrics_url=str(server.make_url("/metrics"))
        )
        load = LoadTracker({"b": 10}, ["b"], smoothing_s=1e-6)
        engines = EngineLoad([backend], load, clock=lambda: 1.0)
        yield lambda: engines.ask(session, "b", engines.urls["b"]), load


async def test_an_engine_that_others_use_counts_with_all_it_has() -> None:
    async with followed(Engine()) as (ask, load):
        load.begin("b", 0.0)
        assert load.load(1.0) == pytest.approx(0.1)
        await ask()
        assert load.load(2.0) == pytest.approx(1.2)


@pytest.mark.parametrize(("page", "status"), [("nothing", 200), ("vllm:num_requests_running x\n", 200), (VLLM, 500)])
async def test_one_that_does_not_say_counts_by_what_is_in_flight_from_here(page: str, status: int) -> None:
    engine = Engine()
    async with followed(engine) as (ask, load):
        load.begin("b", 0.0)
        await ask()
        engine.page, engine.status = page, status
        await ask()
        assert load.load(2.0) == pytest.approx(0.1)


async def test_one_that_is_not_there_does_no_harm() -> None:
    backend = config.Backend(
        name="b", base_url="http://127.0.0.1:1/v1", model="m", metrics_url="http://127.0.0.1:1/metrics"
    )
    load = LoadTracker({"b": 10}, ["b"])
    following = asyncio.create_task(EngineLoad([backend], load, clock=lambda: 1.0).follow())
    await asyncio.sleep(0.1)
    assert not following.done() and load.load(2.0) == 0.0
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
