"""What was recorded and is fit for it becomes an example: beside the records, and after them where both would write."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

from iccache.errors import StoreError
from iccache.examples.admission import admissible, to_example, twin_of
from iccache.examples.store import ExampleStore
from iccache.learn.access import Access, InForce
from iccache.learn.background import Background
from iccache.learn.counting import Counting
from iccache.types import Answer, Ask, Example, Exchange, Hold

log = logging.getLogger(__name__)

TWINS = 4  # examples in quarantine that a new one is compared with
COMPARED_AT_ONCE = 4  # in the thread of selection, which requests wait for: a few milliseconds
WRITTEN_AT_ONCE = 64  # in one transaction
WAIT_S = 0.05  # for the records that are to be written first
MOST_WAITING = 1_000  # further ones become no examples, and are counted


class Recorded(NamedTuple):
    """An exchange as it stands in the store, with what it was asked and answered."""

    exchange: Exchange
    ask: Ask
    answer: Answer


class Entering(NamedTuple):
    """An example to be, and the nearest there are."""

    example: Example
    nearest: Sequence[tuple[Example, float]]


class Admission:
    """Takes what was recorded; nobody waits for it."""

    def __init__(
        self,
        in_force: InForce,
        access: Access,
        counting: Counting,
        background: Background,
        news: Callable[[], object],
        behind: Callable[[], bool],
    ) -> None:
        """`news` is called when there is something to follow; `behind` says whether many records wait to be written."""
        self.in_force = in_force
        self.access = access
        self.counting = counting
        self.background = background
        self.news = news
        self.behind = behind
        self._waiting: list[Recorded] = []
        self._at_work = False

    def consider(self, recorded: Sequence[Recorded]) -> None:
        """Have those that may become examples do so soon. Returns at once."""
        room = MOST_WAITING - len(self._waiting)
        for left_out in recorded[room:]:
            self.counting.crowded_out(left_out.exchange.request_id)
        self._waiting += recorded[:room]
        if self._waiting and not self._at_work:
            self._at_work = True
            self.background.start(self._admit_all(), "admit")

    async def _admit_all(self) -> None:
        try:
            while self._waiting:
                while self.behind():  # noqa: ASYNC110 - polled, so that records pay nothing
                    await asyncio.sleep(WAIT_S)
                batch, self._waiting = self._waiting[:WRITTEN_AT_ONCE], self._waiting[WRITTEN_AT_ONCE:]
                try:
                    await self._admit(batch)
                except Exception:  # nothing that one batch holds may keep the next from entering
                    log.exception("exchanges could not become examples")
                    self.counting.lost(len(batch))
        finally:
            self._at_work = False

    async def _admit(self, batch: Sequence[Recorded]) -> None:
        entering: list[Entering] = []
        for at in range(0, len(batch), COMPARED_AT_ONCE):
            few = batch[at : at + COMPARED_AT_ONCE]
            entering += await self.access.select.thread.run(lambda few=few: self._compared(few))  # type: ignore[misc]
        if not entering:
            return
        limit = self.in_force.directory.settings.cache.merge_similarity
        try:
            await self.access.write(lambda store: _enter_all(store, entering, limit))
        except StoreError as exc:
            for one in entering:
                self.counting.dropped(exc, one.example.request_id)
        self.news()

    def _compared(self, recorded: Sequence[Recorded]) -> list[Entering]:
        """In the thread of selection: those that are fit, as examples."""
        fit = [exchange for exchange, ask, answer in recorded if self._is_fit(exchange, ask, answer)]
        if not fit:
            return []
        select, directory = self.access.select, self.in_force.directory
        recalled = select.near([(exchange.tenant, exchange.task) for exchange in fit], fit[-1].at)
        return [
            Entering(
                to_example(
                    exchange,
                    found.embedding,
                    id=f"ex_{uuid.uuid4().hex}",
                    embedder=select.retriever.embedder.identity,
                    tokens=select.count_pair(exchange.task, exchange.answer),
                    held=Hold.QUARANTINE if directory.quarantines(exchange.tenant) else None,
                ),
                found.nearest,
            )
            for exchange, found in zip(fit, recalled, strict=True)
        ]

    def _is_fit(self, exchange: Exchange, ask: Ask, answer: Answer) -> bool:
        directory = self.in_force.directory
        cache = directory.settings.cache
        refusal = admissible(exchange, ask, answer, directory.teachers, cache.admit, cache.screen)
        if refusal is not None:
            log.debug("%s does not become an example: %s", exchange.request_id, refusal)
        return refusal is None


def _enter(store: ExampleStore, example: Example, nearest: Sequence[tuple[Example, float]], limit: float) -> None:
    """Add an example, or let it confirm one that says the same already: one that is shown, else one in quarantine."""
    twin = twin_of(example, nearest, limit)
    if twin is None and example.held is not None:
        held = store.held_near(example.tenant, example.embedding, example.embedder, TWINS)
        similarity = dict(held)
        twin = twin_of(example, [(e, similarity[e.id]) for e in store.examples(list(similarity))], limit)
    if twin is not None and store.examples([twin.id]):
        store.confirm(twin.id, example)
    else:
        store.admit(example)


def _enter_all(store: ExampleStore, entering: Sequence[Entering], limit: float) -> None:
    for example, nearest in entering:
        _enter(store, example, nearest, limit)
