"""Two ways to read an answer, which have to come to the same: asked for piece by piece, or poured into a sink."""

from __future__ import annotations

import asyncio

from iccache.backends.client import Upstream


class Bucket:
    """Takes `room` pieces before it has to be emptied, which takes `slow_s`; 0: any number."""

    def __init__(self, room: int = 0, slow_s: float = 0.0) -> None:
        self.room, self.slow_s = room, slow_s
        self.pieces: list[bytes] = []
        self.full = 0  # how often

    def write(self, data: bytes) -> bool:
        assert data
        self.pieces.append(data)
        return not self.room or len(self.pieces) % self.room != 0

    async def drained(self) -> None:
        self.full += 1
        await asyncio.sleep(self.slow_s)


async def body_of(answer: Upstream, *, poured: bool) -> bytes:
    if not poured:
        return b"".join([chunk async for chunk in answer.chunks()])
    bucket = Bucket()
    await answer.pour(bucket)
    return b"".join(bucket.pieces)
