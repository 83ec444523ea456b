"""One answer that several read while it comes, each at its own pace: what identical requests share.

The first of them asks; the others get what has come so far, and from there on every piece as it comes. The answer goes
on as long as one of them is there. It is read as fast as the fastest takes it, and no more of it is kept than a limit:
whoever falls further behind is cut off, and beyond it nobody joins any more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from iccache.errors import BackendError, BackendTimeout
from iccache.types import Kept, Reason

AHEAD_BYTES = 1 << 17  # that are read before anybody takes them; more stays with the sender


class Live:
    """An answer under way, and who reads it. In the loop that serves it."""

    def __init__(
        self, head: Kept, chunks: AsyncIterator[bytes], heard: Callable[[bytes], object], most_bytes: int
    ) -> None:
        """`head`: whose answer it is, its body empty. `heard` is given every chunk, once, as it comes."""
        self.head = head
        self._most = most_bytes
        self._kept: deque[bytes] = deque()
        self._first = 0  # the number of the first chunk that is kept
        self._dropped = self._total = 0  # bytes
        self._over = False
        self._error: Exception | None = None
        self._readers: set[Reader] = set()
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._read(chunks, heard))

    @property
    def joinable(self) -> bool:
        """Whether all that has come is at hand, and will be for a while."""
        return self._total <= self._most // 2 and self._error is None

    def join(self) -> Reader:
        """One more who reads, from the first byte on."""
        reader = Reader(self)
        self._readers.add(reader)
        return reader

    def leave(self, reader: Reader) -> None:
        """When the last one leaves, the answer is not wanted any more."""
        self._readers.discard(reader)
        if not self._readers:
            self._task.cancel()
        _wake(self._room)

    async def ended(self) -> None:
        """Waits for its end. Being cancelled meanwhile ends it."""
        if self._task.done():
            return
        try:
            await asyncio.wait([self._task])
        except asyncio.CancelledError:  # whoever waits here has been cancelled before, and goes on to end
            self._task.cancel()
            await asyncio.wait([self._task])

    async def chunk(self, reader: Reader) -> bytes:
        """The next for `reader`. Raises StopAsyncIteration, and what the answer broke off with."""
        while reader.at >= self._first + len(self._kept):
            if self._error is not None:
                raise self._error
            if self._over:
                raise StopAsyncIteration
            await self._news.wait()
        if reader.at < self._first:
            raise BackendTimeout(f"the answer of {self.head.backend} was not taken in time", Reason.SLOW)
        return self._kept[reader.at - self._first]

    def taken(self) -> None:
        _wake(self._room)

    async def _read(self, chunks: AsyncIterator[bytes], heard: Callable[[bytes], object]) -> None:
        try:
            async for chunk in chunks:
                heard(chunk)
                self._kept.append(chunk)
                self._total += len(chunk)
                self._drop()
                _wake(self._news)
                while self._readers and self._total - max(r.bytes for r in self._readers) > AHEAD_BYTES:
                    await self._room.wait()
        except asyncio.CancelledError:
            self._error = BackendError(f"the answer of {self.head.backend} was broken off", Reason.RESET)
            raise
        except Exception as exc:  # handed on to all who read, whatever it is
            self._error = exc
        finally:
            self._over = True
            _wake(self._news)

    def _drop(self) -> None:
        """What is too far back for anybody to get it, once not all can be kept."""
        while self._total - self._dropped > self._most:
            self._dropped += len(self._kept.popleft())
            self._first += 1


class Reader:
    """One who reads: `async for`, then `leave`."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.at = 0  # the number of the chunk that comes next
        self.bytes = 0  # taken so far

    def __aiter__(self) -> Reader:
        return self

    async def __anext__(self) -> bytes:
        chunk = await self.live.chunk(self)
        self.at += 1
        self.bytes += len(chunk)
        self.live.taken()
        return chunk

    def leave(self) -> None:
        self.live.leave(self)

    async def leave_to_others(self) -> None:
        """Leave, and wait until nobody reads on or the answer has come whole."""
        self.leave()
        await self.live.ended()


def _wake(event: asyncio.Event) -> None:
    """All who wait for it now."""
    event.set()
    event.clear()
