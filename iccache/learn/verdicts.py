"""What clients say of answers, made durable."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from iccache.errors import RequestError, StoreError
from iccache.examples.admission import MAX_BYTES, Refusal, unfit
from iccache.examples.store import ExampleStore
from iccache.learn.access import Access, InForce
from iccache.learn.record import Recorder
from iccache.metrics import Metrics
from iccache.types import Feedback, Hold, Verdict

PATIENCE_S = (0.03, 0.07, 0.15, 0.25, 0.5)  # between looks for an exchange that another worker may still be recording


class Verdicts:
    """Takes feedback. What follows from it is learned where the store's changes are followed."""

    def __init__(
        self,
        in_force: InForce,
        access: Access,
        recorder: Recorder,
        metrics: Metrics,
        wall: Callable[[], float],
        news: Callable[[], object],
    ) -> None:
        """`news` is called when there is something to follow."""
        self.in_force = in_force
        self.access = access
        self.recorder = recorder
        self.metrics = metrics
        self.wall = wall
        self.news = news

    async def take(self, tenant: str, verdict: Verdict) -> None:
        """Durable when it returns. Raises RequestError 404 for an exchange that is unknown, unrecorded or another's."""
        now = self.wall()
        try:
            for request_id in filter(None, (verdict.request_id, verdict.preferred_over)):
                await self.recorder.make_durable(request_id)
            known = await self.access.write(await self._judgement(tenant, verdict, now))
            for pause in PATIENCE_S if self.in_force.directory.settings.server.workers > 1 else ():
                if known:
                    break
                await asyncio.sleep(pause)
                known = await self.access.write(await self._judgement(tenant, verdict, now))
            if not known:
                raise await self._unknown(tenant, verdict)
        except StoreError as exc:
            raise RequestError(
                503, f"the feedback could not be stored: {exc}", type="server_error", code="store_unavailable"
            ) from exc
        self.metrics.feedback.labels("demonstration" if verdict.demonstration else "user").inc()
        self.news()

    async def _unknown(self, tenant: str, verdict: Verdict) -> RequestError:
        """Names the one that is not this tenant's: of another's it is not told that there is such a request."""
        param = "request_id"
        if verdict.preferred_over is not None:
            exchange = await self.access.read(lambda store: store.exchange(verdict.request_id))
            if exchange is not None and exchange.tenant == tenant:
                param = "preferred_over"
        return RequestError(404, "no such request is recorded", param=param, code="not_found")

    async def _judgement(self, tenant: str, verdict: Verdict, now: float) -> Callable[[ExampleStore], bool]:
        if verdict.preferred_over is not None:
            loser = verdict.preferred_over
            return lambda store: store.preference(verdict.request_id, loser, tenant=tenant, at=now)
        if verdict.demonstration is None:
            row = Feedback(verdict.request_id, "user", verdict.score, now)
            return lambda store: store.add_feedback(row, tenant=tenant)
        return await self._demonstration(tenant, verdict, now)

    async def _demonstration(self, tenant: str, verdict: Verdict, now: float) -> Callable[[ExampleStore], bool]:
        exchange = await self.access.read(lambda store: store.exchange(verdict.request_id))
        if exchange is None or exchange.tenant != tenant:
            return lambda store: False
        given, directory = verdict.demonstration or "", self.in_force.directory
        too_long = len(given) > MAX_BYTES  # not even gone through
        answer = "" if too_long else self.in_force.redactor.redact(given)
        refusal = Refusal.TOO_LONG if too_long else unfit(exchange.task, answer, directory.settings.cache.screen)
        if refusal is not None:
            raise RequestError(
                400, f"the demonstration cannot become an example: {refusal.value}", param="demonstration"
            )
        select = self.access.select
        embedding = await select.embed(exchange.task)
        row = Feedback(verdict.request_id, "demonstration", None, now)
        return lambda store: store.add_feedback(
            row,
            tenant=tenant,
            demonstration=answer,
            embedding=embedding,
            embedder=select.retriever.embedder.identity,
            tokens=select.count_pair(exchange.task, answer),
            held=Hold.QUARANTINE if directory.quarantines(tenant) else None,
        )
