"""The one thread that writes to the store, and the only one that may.

Functions are sent to the connection. Everything that waits goes into one transaction and every caller learns the
outcome after its commit (group commit): durable writes at the price of one disk sync for many.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from iccache.errors import StoreError
from iccache.examples.store import ExampleStore

T = TypeVar("T")


class Job(NamedTuple):
    """A function that waits for the connection, and where its outcome goes."""

    function: Callable[[ExampleStore], Any]
    future: Future[Any]


class Outcome(NamedTuple):
    """What a function returned or raised, told after the commit."""

    value: Any = None
    error: BaseException | None = None


class Writer:
    """Owns the writing connection. `submit` from any thread."""

    def __init__(self, open: Callable[[], ExampleStore], *, max_queue: int = 10_000, max_batch: int = 256) -> None:
        """Start the thread and wait until `open` has returned in it; raises what `open` raises.

        `max_queue`: functions that may wait; `max_batch`: most of them in one transaction.
        """
        self._open = open
        self._max_queue = max_queue
        self._max_batch = max_batch
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.commits = 0  # transactions so far
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="store-writer", daemon=True)
        self._thread.start()
        opened.result()

    def submit(self, function: Callable[[ExampleStore], T]) -> Future[T]:
        """Run `function` in the next transaction. Its future resolves once that is committed.

        A function that raises undoes its own writes only. When the commit fails (a full disk) the future fails with
        StoreError, as it does at once when the queue is full or the writer is closed. What was taken in is done even
        when nobody waits for it any more: the future cannot be cancelled.
        """
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        with self._changed:
            if self._closed:
                refusal = "the store is closed"
            elif len(self._waiting) >= self._max_queue:
                refusal = f"{self._max_queue} writes wait for the store already: the disk is too slow for the load"
            else:
                self._waiting.append(Job(function, future))
                self._changed.notify()
                return future
        future.set_exception(StoreError(refusal))
        return future

    def waiting(self) -> int:
        """How many functions wait for a transaction."""
        return len(self._waiting)

    def close(self, timeout: float | None = None) -> bool:
        """Take nothing new, write what waits, close the store. False when that took longer than `timeout` seconds:
        what still waits then fails with StoreError."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        with self._changed:
            left = list(self._waiting)
            self._waiting.clear()
        for job in left:
            job.future.set_exception(StoreError("the store was closed before this was written"))
        return False

    def _run(self, opened: Future[None]) -> None:
        try:
            store = self._open()
        except BaseException as exc:
            opened.set_exception(exc)
            return
        opened.set_result(None)
        try:
            while batch := self._take():
                self._commit(store, batch)
        finally:
            store.close()

    def _take(self) -> list[Job]:
        """What waits, up to a batch; waits for the first. Nothing once closed and drained."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_batch))]

    def _commit(self, store: ExampleStore, batch: list[Job]) -> None:
        """One transaction for the batch; then every future gets its outcome."""
        outcomes: list[Outcome] = []
        failure: BaseException | None = None
        try:
            with store.transaction():
                for job in batch:
                    outcomes.append(_attempt(job, store))
        except BaseException as exc:  # whatever it is, nobody may be left waiting and the thread goes on
            failure = exc
        self.commits += failure is None
        for i, job in enumerate(batch):
            error = outcomes[i].error if i < len(outcomes) else None
            if failure is not None and error is None:
                error = StoreError(str(failure))
                error.__cause__ = failure
            if error is None:
                job.future.set_result(outcomes[i].value)
            else:
                job.future.set_exception(error)


def _attempt(job: Job, store: ExampleStore) -> Outcome:
    """Run one function as a part of the transaction that can fail alone."""
    try:
        with store.transaction():
            return Outcome(value=job.function(store))
    except BaseException as exc:  # handed to whoever asked, whatever it is
        return Outcome(error=exc)
