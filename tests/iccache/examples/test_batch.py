"""The batcher: every waiter gets its own answer, whatever happens to the others."""

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from iccache.errors import SelectionError
from iccache.examples.batch import Batcher


class Doubler:
    """Doubles numbers, one batch at a time, and only while the gate is open."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.threads.add(threading.get_ident())
        self.begun.set()
        assert self.gate.wait(10)
        if 13 in items:
            raise ValueError("thirteen")
        return [2 * item for item in items]


@pytest.fixture
def doubler() -> Doubler:
    return Doubler()


@pytest.fixture
def batcher(doubler: Doubler) -> Iterator[Batcher[int, int]]:
    batcher = Batcher(doubler, 8, "doubler")
    yield batcher
    doubler.gate.set()
    batcher.close(5)


async def hold(batcher: Batcher[int, int], doubler: Doubler) -> asyncio.Task[int]:
    """A first batch that is under way and does not end before the gate is opened."""
    doubler.gate.clear()
    first = asyncio.ensure_future(batcher(0))
    await asyncio.to_thread(doubler.begun.wait, 5)
    return first


async def test_each_waiter_gets_its_own_answer(batcher: Batcher[int, int], doubler: Doubler) -> None:
    numbers = range(100, 600)
    assert await asyncio.gather(*(batcher(i) for i in numbers)) == [2 * i for i in numbers]
    assert [i for batch in doubler.batches for i in batch] == list(numbers)
    assert max(map(len, doubler.batches)) <= 8
    assert len(doubler.threads) == 1
    assert threading.get_ident() not in doubler.threads


async def test_what_waits_is_taken_as_one_batch(batcher: Batcher[int, int], doubler: Doubler) -> None:
    first = await hold(batcher, doubler)
    rest = [asyncio.ensure_future(batcher(i)) for i in range(1, 11)]
    await asyncio.sleep(0)
    doubler.gate.set()
    await asyncio.gather(first, *rest)
    assert doubler.batches == [[0], [1, 2, 3, 4, 5, 6, 7, 8], [9, 10]]


async def test_an_exception_reaches_its_batch_and_nobody_else(batcher: Batcher[int, int], doubler: Doubler) -> None:
    first = await hold(batcher, doubler)
    unlucky = [asyncio.ensure_future(batcher(i)) for i in range(8, 16)]
    lucky = asyncio.ensure_future(batcher(16))
    await asyncio.sleep(0)
    doubler.gate.set()
    results = await asyncio.gather(first, *unlucky, lucky, return_exceptions=True)
    assert results[0] == 0
    assert [str(r) for r in results[1:9]] == ["thirteen"] * 8
    assert results[9] == 32
    assert await batcher(1) == 2


async def test_who_stopped_waiting_is_skipped(batcher: Batcher[int, int], doubler: Doubler) -> None:
    first = await hold(batcher, doubler)
    tasks = [asyncio.ensure_future(batcher(i)) for i in range(1, 5)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    tasks[2].cancel()
    await asyncio.sleep(0)
    doubler.gate.set()
    assert await asyncio.gather(first, tasks[0], tasks[3]) == [0, 2, 8]
    assert tasks[1].cancelled() and tasks[2].cancelled()
    assert doubler.batches == [[0], [1, 4]]


async def test_who_stops_waiting_during_the_work_hurts_nobody(batcher: Batcher[int, int], doubler: Doubler) -> None:
    held = threading.Event()
    holding = asyncio.ensure_future(batcher.run(lambda: held.wait(10)))
    doubler.gate.clear()
    leaving, staying = asyncio.ensure_future(batcher(1)), asyncio.ensure_future(batcher(2))
    await asyncio.sleep(0)
    held.set()
    await asyncio.to_thread(doubler.begun.wait, 5)
    assert doubler.batches == [[1, 2]]
    leaving.cancel()
    await asyncio.sleep(0)
    doubler.gate.set()
    assert await asyncio.wait_for(staying, 5) == 4
    assert leaving.cancelled()
    assert await holding


async def test_run_is_done_in_order_in_the_same_thread(batcher: Batcher[int, int], doubler: Doubler) -> None:
    first = await hold(batcher, doubler)
    seen: list[tuple[int, list[list[int]]]] = []

    def note() -> str:
        seen.append((threading.get_ident(), list(doubler.batches)))
        return "noted"

    before = asyncio.ensure_future(batcher(1))
    noted = asyncio.ensure_future(batcher.run(note))
    after = asyncio.ensure_future(batcher(2))
    await asyncio.sleep(0)
    doubler.gate.set()
    assert await noted == "noted"
    await asyncio.gather(first, before, after)
    assert seen == [(*doubler.threads, [[0], [1]])]
    assert doubler.batches == [[0], [1], [2]]


async def test_what_need_not_be_alone_is_run_while_somebody_else_is_busy(batcher: Batcher[int, int]) -> None:
    with batcher.busy:
        assert await asyncio.wait_for(batcher.run(threading.get_ident, alone=False), 10) != threading.get_ident()
        waits = asyncio.ensure_future(batcher.run(threading.get_ident))
        await asyncio.sleep(0.05)
        assert not waits.done()
    await waits


async def test_run_passes_exceptions_on(batcher: Batcher[int, int]) -> None:
    with pytest.raises(ZeroDivisionError):
        await batcher.run(lambda: 1 // 0)
    assert await batcher(1) == 2


@pytest.mark.parametrize("error", [StopIteration, SystemExit, KeyboardInterrupt, MemoryError])
async def test_the_thread_survives_whatever_is_raised(batcher: Batcher[int, int], error: type[BaseException]) -> None:
    def fail() -> None:
        raise error

    with pytest.raises((RuntimeError, MemoryError)):
        await batcher.run(fail)
    assert await batcher(1) == 2


@pytest.mark.parametrize("wrong", [[], [1, 2], None])
async def test_a_wrong_number_of_results_is_an_error_not_a_hang(wrong: list[int]) -> None:
    batcher: Batcher[int, int] = Batcher(lambda _: wrong, 8, "wrong")
    with pytest.raises((SelectionError, TypeError)):
        await asyncio.wait_for(batcher(1), 5)
    batcher.close(5)


async def test_the_loop_keeps_ticking_while_the_work_is_slow() -> None:
    def slow(items: list[int]) -> list[int]:
        time.sleep(0.3)
        return items

    batcher = Batcher(slow, 8, "slow")
    waiting = asyncio.ensure_future(batcher(1))
    longest = 0.0
    while not waiting.done():
        before = time.perf_counter()
        await asyncio.sleep(0.005)
        longest = max(longest, time.perf_counter() - before)
    assert longest < 0.15
    batcher.close(5)


async def test_closing_finishes_what_was_asked_and_refuses_the_rest(doubler: Doubler) -> None:
    batcher = Batcher(doubler, 8, "doubler")
    first = await hold(batcher, doubler)
    waiting = [asyncio.ensure_future(batcher(i)) for i in range(1, 13)]
    await asyncio.sleep(0)
    doubler.gate.set()
    batcher.close(5)
    batcher.close(5)
    assert not batcher._thread.is_alive()
    assert await asyncio.gather(first, *waiting) == [2 * i for i in range(13)]
    with pytest.raises(SelectionError, match="doubler is closed"):
        await batcher(1)


def test_several_loops_may_share_it(batcher: Batcher[int, int]) -> None:
    results: list[int] = []

    async def ask(base: int) -> None:
        for i in range(base, base + 50):
            results.append(await batcher(i) - 2 * i)

    threads = [threading.Thread(target=lambda base=base: asyncio.run(ask(base))) for base in range(100, 900, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [0] * 400


def test_a_loop_that_is_gone_hurts_nobody(batcher: Batcher[int, int], doubler: Doubler) -> None:
    async def leave() -> None:
        await hold(batcher, doubler)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    for task in asyncio.all_tasks(loop):
        task.cancel()
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    doubler.gate.set()
    assert asyncio.run(asyncio.wait_for(batcher(4), 5)) == 8


async def test_no_wake_up_is_lost_under_cancellations_and_bursts() -> None:
    batcher: Batcher[int, int] = Batcher(lambda items: [-i for i in items], 4, "negator")

    async def one(i: int) -> int:
        if i % 3 == 0:
            await asyncio.sleep(0.0001 * (i % 7))
        task = asyncio.ensure_future(batcher(i) if i % 5 else batcher.run(lambda: -i))
        if i % 4 == 0:
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return -i
        return await task

    async with asyncio.timeout(20):
        assert await asyncio.gather(*(one(i) for i in range(3000))) == [-i for i in range(3000)]
    batcher.close(5)
