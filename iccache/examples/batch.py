"""One worker thread, reached from the event loop; what waits meanwhile is done together."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Generic, NamedTuple, TypeVar

from iccache.errors import SelectionError

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")


class _Job(NamedTuple):
    """An item for the batch function or, where there is a `call`, a function to be run by itself: `alone`, or while
    somebody else may hold `busy`.
    """

    future: asyncio.Future[Any]
    item: Any
    call: Callable[[], Any] | None
    alone: bool = True


class Batcher(Generic[T, R]):
    """`await batcher(item)` runs `fn` on all items that wait, at most `max_batch`, in a thread of its own.

    Jobs are begun in the order they came. An exception reaches those of its batch and nobody else; who stopped
    waiting before the work began is skipped. What `fn` uses may belong to that thread: make it there, with `run`.
    `busy` is held while it works: who has got hold of it has that to himself meanwhile.
    """

    def __init__(self, fn: Callable[[list[T]], Sequence[R]], max_batch: int, name: str) -> None:
        self.fn = fn
        self.max_batch = max_batch
        self.name = name
        self.busy = threading.Lock()
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()  # guards the one above and the one below
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def __call__(self, item: T) -> R:
        """What `fn` returns for `item`."""
        result: R = await self._put(item, None)
        return result

    async def run(self, call: Callable[[], S], *, alone: bool = True) -> S:
        """What `call` returns; run between two batches, in order. Where it need not be `alone`, without `busy`."""
        result: S = await self._put(None, call, alone)
        return result

    def close(self, timeout_s: float | None = None) -> None:
        """Finish what was asked for, then end the thread; blocks, at most `timeout_s`. What comes later is refused."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _put(self, item: Any, call: Callable[[], Any] | None, alone: bool = True) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._closed:
                raise SelectionError(f"{self.name} is closed")
            self._jobs.append(_Job(future, item, call, alone))
            self._changed.notify()
        return future

    def _work(self) -> None:
        while batch := self._next():
            with self.busy if batch[0].alone else nullcontext():
                done = self._do(batch)
            _deliver(batch, *done)

    def _next(self) -> list[_Job]:
        """Waits for work: one call, or items up to the next call. Empty at the end."""
        with self._changed:
            while True:
                batch: list[_Job] = []
                while self._jobs and len(batch) < self.max_batch:
                    if batch and self._jobs[0].call is not None:
                        break
                    job = self._jobs.popleft()
                    if job.future.cancelled():
                        continue
                    batch.append(job)
                    if job.call is not None:
                        break
                if batch or self._closed:
                    return batch
                self._changed.wait()

    def _do(self, batch: Sequence[_Job]) -> tuple[Sequence[Any], Exception | None]:
        """The results in order, or what went wrong."""
        try:
            call = batch[0].call
            results = [call()] if call is not None else self.fn([job.item for job in batch])
            if len(results) != len(batch):
                raise SelectionError(f"{self.name}: {len(results)} results for {len(batch)} items")
            return results, None
        except BaseException as exc:  # whatever it is, somebody waits for it, and the thread goes on
            if isinstance(exc, Exception) and not isinstance(exc, StopIteration):
                return (), exc
            return (), RuntimeError(f"{self.name}: {exc!r}")  # a future cannot carry the others


def _deliver(batch: Sequence[_Job], results: Sequence[Any], error: Exception | None) -> None:
    """Wake the waiters, with one hop for each loop."""
    futures = [job.future for job in batch]
    for loop in {future.get_loop() for future in futures}:
        try:
            loop.call_soon_threadsafe(_settle, loop, futures, results, error)
        except RuntimeError:  # that loop is closed: nobody waits there any more
            continue


def _settle(
    loop: asyncio.AbstractEventLoop,
    futures: Sequence[asyncio.Future[Any]],
    results: Sequence[Any],
    error: Exception | None,
) -> None:
    for i, future in enumerate(futures):
        if future.done() or future.get_loop() is not loop:
            continue
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(results[i])
