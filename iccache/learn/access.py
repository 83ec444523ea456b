"""What every room of `learn` shares: the way to the store's two connections, and the settings in force."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from iccache.examples.redact import Redactor
from iccache.examples.store import ExampleStore
from iccache.examples.writer import Writer
from iccache.plan import Directory
from iccache.select import Select
from router.floor import Floor
from router.routing import Router

T = TypeVar("T")


@dataclass(slots=True)
class InForce:
    """What a reload replaces. Read when it is needed, never kept."""

    directory: Directory
    redactor: Redactor
    router: Router
    floor: Floor


class Access:
    """The store from the event loop: each connection in the thread that owns it."""

    def __init__(self, writer: Writer, select: Select, store: ExampleStore) -> None:
        self.writer = writer
        self.select = select
        self.store = store  # a reading connection; it belongs to the thread of `select`

    async def write(self, fn: Callable[[ExampleStore], T]) -> T:
        """`fn` on the writing connection; durable when it returns. Raises StoreError."""
        future: Future[T] = self.writer.submit(fn)
        return await asyncio.wrap_future(future)

    async def read(self, fn: Callable[[ExampleStore], T]) -> T:
        """`fn` on the reading connection, in its thread."""
        return await self.select.thread.run(lambda: fn(self.store), alone=False)
