"""One answer that several read while it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from iccache.errors import BackendError, BackendTimeout
from iccache.live import AHEAD_BYTES, Live, Reader
from iccache.types import Kept, Reason

HEAD = Kept("req_1", "large", 0.0, "text/event-stream", b"")
PIECE = bytes(AHEAD_BYTES // 4)
MOST = 8 * AHEAD_BYTES


class Source:
    """Pieces, numbered by their first byte, as fast as they are wanted."""

    def __init__(self, pieces: int, error: Exception | None = None) -> None:
        self.pieces, self.error = pieces, error
        self.given = 0
        self.heard: list[bytes] = []

    async def chunks(self) -> AsyncIterator[bytes]:
        for number in range(self.pieces):
            self.given += 1
            yield bytes([number]) + PIECE
            await asyncio.sleep(0)
        if self.error is not None:
            raise self.error

    def live(self, most: int = MOST) -> Live:
        return Live(HEAD, self.chunks(), self.heard.append, most)


async def numbers(reader: Reader) -> list[int]:
    return [chunk[0] async for chunk in reader]


async def settled() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


async def test_each_gets_all_of_it_whenever_it_came_and_however_slow_it_is() -> None:
    source = Source(20)
    live = source.live()
    first, second = live.join(), live.join()
    assert (await anext(first))[0] == 0
    late = live.join()
    assert await asyncio.gather(numbers(first), numbers(second), numbers(late)) == [
        list(range(1, 20)),
        list(range(20)),
        list(range(20)),
    ]
    assert [chunk[0] for chunk in source.heard] == list(range(20))


async def test_it_is_read_no_faster_than_the_fastest_takes_it() -> None:
    source = Source(100)
    live = source.live()
    slow, fast = live.join(), live.join()
    await settled()
    assert source.given <= 6, "nobody has taken anything"
    for _ in range(10):
        await anext(fast)
    await settled()
    assert 10 <= source.given <= 16
    assert (await anext(slow))[0] == 0


async def test_who_falls_too_far_behind_is_cut_off_and_the_others_are_not() -> None:
    source = Source(100)
    live = source.live()
    slow, fast = live.join(), live.join()
    assert live.joinable
    assert await numbers(fast) == list(range(100))
    assert not live.joinable
    assert sum(map(len, live._kept)) <= MOST
    with pytest.raises(BackendTimeout, match="not taken in time"):
        await anext(slow)


async def test_it_ends_when_the_last_one_leaves() -> None:
    source = Source(100)
    live = source.live()
    one, other = live.join(), live.join()
    await anext(one)
    leaving = asyncio.create_task(one.leave_to_others())
    await anext(other)
    assert not leaving.done()
    other.leave()
    await leaving
    given = source.given
    await settled()
    assert source.given == given < 20


async def test_whoever_waits_for_its_end_may_be_told_to_stop() -> None:
    source = Source(100)
    live = source.live()
    one, other = live.join(), live.join()
    leaving = asyncio.create_task(one.leave_to_others())
    await settled()
    leaving.cancel()
    await leaving
    given = source.given
    await settled()
    assert source.given == given < 20
    with pytest.raises(BackendError):
        await numbers(other)


async def test_what_breaks_it_is_told_to_all_after_what_came() -> None:
    live = Source(3, BackendError("large broke off", Reason.RESET)).live()
    readers = [live.join(), live.join()]
    for reader in readers:
        for number in range(3):
            assert (await anext(reader))[0] == number
        with pytest.raises(BackendError, match="broke off"):
            await anext(reader)
    assert not live.joinable
