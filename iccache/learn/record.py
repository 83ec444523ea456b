"""Exchanges into the store, redacted, and those that are fit for it into examples."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from dataclasses import replace

from iccache.errors import StoreError
from iccache.examples.admission import admissible, to_example
from iccache.examples.store import ExampleStore
from iccache.learn.access import Access, InForce
from iccache.learn.counting import Counting
from iccache.types import Answer, Ask, Exchange, Kept

log = logging.getLogger(__name__)


class Recorder:
    """Writes what happened. A store that cannot take it is counted, and never in a client's way."""

    def __init__(
        self, in_force: InForce, access: Access, counting: Counting, news: Callable[[], object] = lambda: None
    ) -> None:
        """`news` is called when there is something to follow."""
        self.in_force = in_force
        self.access = access
        self.counting = counting
        self.news = news
        self.open: dict[str, Exchange] = {}  # exchanges whose headers are out and whose record is not yet durable
        self.full = False  # the store is larger than it may be

    def begin(self, exchange: Exchange) -> None:
        self.open[exchange.request_id] = exchange

    async def record(
        self, exchange: Exchange, ask: Ask, answer: Answer | None, kept: tuple[bytes, Kept] | None
    ) -> None:
        """Redact, write, and make an example of it where there is an `answer` that may be one."""
        try:
            if self.full:
                self.counting.full()
                return
            safe = await self.access.write(lambda store: self._redacted_and_recorded(store, exchange, kept))
        except StoreError as exc:
            self.counting.dropped(exc, exchange.request_id)
            return
        finally:
            self.open.pop(exchange.request_id, None)
        if answer is not None:
            await self._admit(safe, ask, answer)

    async def make_durable(self, request_id: str) -> None:
        """Record an exchange that is still being answered, so that feedback on it has something to stand on."""
        exchange = self.open.get(request_id)
        if exchange is not None:
            early = self._redacted(exchange)
            try:
                await self.access.write(lambda store: store.record(early))
            except StoreError as exc:
                self.counting.dropped(exc, request_id)

    def _redacted_and_recorded(
        self, store: ExampleStore, exchange: Exchange, kept: tuple[bytes, Kept] | None
    ) -> Exchange:
        safe = self._redacted(exchange)
        store.record(safe)
        if kept is not None and safe.answer == exchange.answer and self._is_clean(kept[1].body):
            expired_before = exchange.at - self.in_force.directory.settings.cache.reuse_ttl_s
            store.keep_answer(*kept, tenant=exchange.tenant, expired_before=expired_before)
        return safe

    def _redacted(self, exchange: Exchange) -> Exchange:
        clean = self.in_force.redactor.redact
        return replace(
            exchange, task=clean(exchange.task), answer=clean(exchange.answer), system=clean(exchange.system)
        )

    def _is_clean(self, body: bytes) -> bool:
        text = body.decode("utf-8", "replace")
        return self.in_force.redactor.redact(text) == text

    async def _admit(self, exchange: Exchange, ask: Ask, answer: Answer) -> None:
        directory, select = self.in_force.directory, self.access.select
        refusal = admissible(exchange, ask, answer, directory.teachers, directory.settings.cache.admit)
        if refusal is not None:
            log.debug("%s does not become an example: %s", exchange.request_id, refusal)
            return
        example = to_example(
            exchange,
            await select.embed(exchange.task),
            id=f"ex_{uuid.uuid4().hex}",
            embedder=select.retriever.embedder.identity,
            tokens=select.count_pair(exchange.task, exchange.answer),
        )
        try:
            await self.access.write(lambda store: store.admit(example))
        except StoreError as exc:
            self.counting.dropped(exc, exchange.request_id)
        self.news()
