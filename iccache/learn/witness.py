"""What can be seen of an answer without being told: that a check fails, that the same is asked again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from iccache.errors import StoreError
from iccache.learn.access import Access
from iccache.learn.background import Background
from iccache.learn.record import Recorder
from iccache.metrics import Metrics
from iccache.quality import checks, reask
from iccache.types import Answer, Ask, Exchange, Feedback

log = logging.getLogger(__name__)


class Witness:
    """Looks at every recorded answer, after the reply, and makes feedback of what it sees."""

    def __init__(
        self,
        access: Access,
        recorder: Recorder,
        background: Background,
        metrics: Metrics,
        wall: Callable[[], float],
        news: Callable[[], object],
        draw: Callable[[], float],
    ) -> None:
        self.access = access
        self.recorder = recorder
        self.background = background
        self.metrics = metrics
        self.wall = wall
        self.news = news
        self.failing = checks.Shares(draw)
        self.dissatisfying = checks.Shares(draw)
        self.reasks = reask.Reasks()

    def look(self, exchange: Exchange, ask: Ask, answer: Answer) -> None:
        """Both what this answer shows of itself and what this question shows of the answer before. Returns at once."""
        earlier = self.reasks.notice(exchange)
        if earlier is None:
            self.dissatisfying.tell(exchange.backend, failed=False)
        elif self.dissatisfying.tell(earlier.backend, failed=True):
            self._tell(exchange.tenant, Feedback(earlier.request_id, reask.SOURCE, reask.SCORE, self.wall()))
        if ask.form is None:
            self._take_in(exchange, checks.failure(exchange, ask, answer))
        else:  # a schema may take some milliseconds
            self.background.start(self._validate(exchange, ask, answer), f"check {exchange.request_id}")

    async def _validate(self, exchange: Exchange, ask: Ask, answer: Answer) -> None:
        self._take_in(exchange, await asyncio.to_thread(checks.failure, exchange, ask, answer))

    def _take_in(self, exchange: Exchange, found: checks.Failure | None) -> None:
        if not exchange.complete:
            return
        if self.failing.tell(exchange.backend, failed=found is not None) and found is not None:
            row = Feedback(exchange.request_id, checks.SOURCE, checks.SCORES[found], self.wall())
            self._tell(exchange.tenant, row)

    def _tell(self, tenant: str, feedback: Feedback) -> None:
        self.background.start(self._write(tenant, feedback), f"{feedback.source} {feedback.request_id}")

    async def _write(self, tenant: str, feedback: Feedback) -> None:
        if self.recorder.full:
            return
        try:
            await self.recorder.make_durable(feedback.request_id)
            known = await self.access.write(lambda store: store.add_feedback(feedback, tenant=tenant))
        except StoreError as exc:
            log.warning("what was seen of %s could not be stored: %s", feedback.request_id, exc)
            return
        if known:
            self.metrics.feedback.labels(feedback.source).inc()
            self.news()
