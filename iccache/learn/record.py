"""Exchanges into the store, redacted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NamedTuple

from iccache.errors import StoreError
from iccache.examples.store import ExampleStore
from iccache.learn.access import Access, InForce
from iccache.learn.admit import Admission, Recorded
from iccache.learn.background import Background
from iccache.learn.counting import Counting
from iccache.types import Answer, Ask, Exchange, Keeping, Kept

log = logging.getLogger(__name__)

TICK_S = 0.05  # what ends within it is written together
AT_ONCE = 256  # exchanges in one transaction
MOST_CHARS = 65_536  # kept of a text, four times as many of a system prompt; no example may be as long
CUT_OFF = 512  # at the end of what is kept of a longer one: where something to redact may have been cut in two
CUT = "[CUT]"
_values = attrgetter(*Exchange.__slots__)
MOST_WAITING = 10_000  # exchanges that wait; further ones are dropped, and counted


class Ended(NamedTuple):
    """An exchange whose last byte went out, and what its record takes."""

    exchange: Exchange
    ask: Ask
    answer: Answer | None
    keeping: Keeping | None


class Written(NamedTuple):
    """An exchange as it stands in the store, and what identical requests may be given from now on."""

    exchange: Exchange
    again: Kept | None


class Recorder:
    """Writes what happened. A store that cannot take it is counted, and never in a client's way."""

    def __init__(
        self,
        in_force: InForce,
        access: Access,
        counting: Counting,
        background: Background,
        news: Callable[[], object] = lambda: None,
    ) -> None:
        """`news` is called when there is something to follow."""
        self.in_force = in_force
        self.access = access
        self.counting = counting
        self.background = background
        self.admission = Admission(in_force, access, counting, background, news, self.behind)
        self._ended: list[Ended] = []  # not yet given to the writer
        self._writing = False
        self._hurry = asyncio.Event()
        self.open: dict[str, Exchange] = {}  # exchanges whose headers are out and whose record is not yet durable
        self.full = False  # the store is larger than it may be

    def begin(self, exchange: Exchange) -> None:
        self.open[exchange.request_id] = exchange

    def finish(self, exchange: Exchange, ask: Ask, answer: Answer | None, keeping: Keeping | None) -> None:
        """Have it recorded soon, and made an example where there is an `answer` that may be one. Returns at once."""
        ended = Ended(exchange, ask, answer, keeping)
        if self.full or len(self._ended) >= MOST_WAITING:
            self._let_go(ended, None if self.full else StoreError(f"{MOST_WAITING} exchanges wait for the store"))
            return
        self._ended.append(ended)
        if keeping is not None:
            self._hurry.set()  # identical requests wait for it
        if not self._writing:
            self._writing = True
            self.background.start(self._write_all(), "record")

    async def _write_all(self) -> None:
        """Everything that ends within a tick goes to the writer together, and is one transaction there."""
        try:
            while self._ended:
                if not self.behind():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(TICK_S):
                            await self._hurry.wait()
                self._hurry.clear()
                batch, self._ended = self._ended[:AT_ONCE], self._ended[AT_ONCE:]
                try:
                    await self._record(batch)
                except Exception:  # nothing that one batch holds may keep the next from being written
                    log.exception("exchanges could not be recorded")
                    self.counting.lost(len(batch))
                finally:
                    for ended in batch:
                        self.open.pop(ended.exchange.request_id, None)
                        if ended.keeping is not None:
                            ended.keeping.told(None)  # unless it has been told already
        finally:
            self._writing = False

    async def _record(self, batch: Sequence[Ended]) -> None:
        try:
            outcomes = await self.access.write(lambda store: self._recorded(store, batch))
        except StoreError as exc:
            outcomes = [exc for _ in batch]
        safe: list[Recorded] = []
        for ended, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._let_go(ended, outcome)
                continue
            if ended.keeping is not None:
                ended.keeping.told(outcome.again)
            if ended.answer is not None:
                safe.append(Recorded(outcome.exchange, ended.ask, ended.answer))
        self.admission.consider(safe)

    def _let_go(self, ended: Ended, why: Exception | None) -> None:
        """It is not recorded, and counted as that. `why` None: the store is full. Those who wait for the answer get it
        all the same."""
        exchange, keeping = ended.exchange, ended.keeping
        self.open.pop(exchange.request_id, None)
        if why is None:
            self.counting.full()
        else:
            self.counting.dropped(why, exchange.request_id)
        if keeping is not None:
            safe = self._may_come_again(exchange, self.redacted(exchange), keeping.answer)
            keeping.told(keeping.answer if safe else None)

    def behind(self) -> bool:
        """Whether more wait to be written than one transaction takes."""
        return len(self._ended) > AT_ONCE

    async def make_durable(self, request_id: str) -> None:
        """Record an exchange that is still being answered, so that feedback on it has something to stand on. Raises
        StoreError where that fails; when the answer has ended, it is recorded again, or counted as dropped."""
        exchange = self.open.get(request_id)
        if exchange is not None:
            early = self.redacted(exchange)
            await self.access.write(lambda store: store.record(early))

    def _recorded(self, store: ExampleStore, batch: Sequence[Ended]) -> Sequence[Written | Exception]:
        """What was recorded of each, or why nothing could be. Together, and where that fails, each for itself: the
        others of its batch do not mind."""
        try:
            return self._together(store, batch)
        except Exception as exc:
            return [exc] if len(batch) == 1 else [one for ended in batch for one in self._recorded(store, [ended])]

    def _together(self, store: ExampleStore, batch: Sequence[Ended]) -> Sequence[Written]:
        with store.transaction():
            safe = [self.redacted(ended.exchange) for ended in batch]
            store.record_all(safe)
            return [self._kept(store, e.exchange, s, e.keeping) for e, s in zip(batch, safe, strict=True)]

    def _kept(self, store: ExampleStore, exchange: Exchange, safe: Exchange, keeping: Keeping | None) -> Written:
        if keeping is None or not self._may_come_again(exchange, safe, keeping.answer):
            return Written(safe, None)
        since = exchange.at - self.in_force.directory.settings.cache.reuse_ttl_s
        store.keep_answer(keeping.key, keeping.answer, tenant=exchange.tenant, expired_before=since)
        return Written(safe, store.kept_answer(keeping.key, tenant=exchange.tenant, since=since))

    def _may_come_again(self, exchange: Exchange, safe: Exchange, answer: Kept) -> bool:
        """Whether nothing of the answer was redacted, nor left out for its length."""
        return safe.answer == exchange.answer and self._is_clean(answer.body)

    def redacted(self, exchange: Exchange) -> Exchange:
        """`exchange` as it may be written. Of very long texts no more than their beginning, since a regular expression
        holds up the whole process for as long as it runs."""
        safe = Exchange(*_values(exchange))  # `dataclasses.replace` takes five times as long
        safe.task = self._clean(exchange.task, MOST_CHARS)
        safe.answer = self._clean(exchange.answer, MOST_CHARS)
        safe.system = self._clean(exchange.system, 4 * MOST_CHARS)
        return safe

    def _clean(self, text: str, most: int) -> str:
        if len(text) <= most:
            return self.in_force.redactor.redact(text)
        return self.in_force.redactor.redact(text[:most])[:-CUT_OFF] + CUT

    def _is_clean(self, body: bytes) -> bool:
        text = body.decode("utf-8", "replace")
        return self.in_force.redactor.redact(text) == text
