"""Exact reuse: an identical request may be answered from the record. Off by default.

Identical means: the same tenant, endpoint, model, and the same body byte for byte. Nothing is ever answered from a
merely similar request.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from iccache import config
from iccache.dialects.dialect import Dialect
from iccache.errors import StoreError
from iccache.learn.learner import Learner
from iccache.types import Answer, Ask, Exchange, Kept, Reason

log = logging.getLogger(__name__)

LARGEST_BYTES = 4_000_000
TELLING_HEADERS = ("anthropic-version", "anthropic-beta", "openai-beta", "x-iccache-backend", "x-iccache-examples")


@dataclass(slots=True)
class Turn:
    """One request's place among identical ones."""

    key: bytes | None = None  # None: nothing may be reused
    known: Kept | None = None  # the answer, where there is one
    fresh: Kept | None = None  # the answer that this request got, where it may be kept

    @property
    def kept(self) -> tuple[bytes, Kept] | None:
        """`fresh` with its key."""
        return (self.key, self.fresh) if self.key is not None and self.fresh is not None else None

    def keep(self, exchange: Exchange, answer: Answer, content_type: str, body: bytes) -> None:
        """Remember the answer for identical requests, if it is one to be handed out again."""
        good = exchange.complete and answer.finish_reason in (None, "stop") and not answer.has_tool_calls
        if self.key is not None and good and len(body) <= LARGEST_BYTES:
            self.fresh = Kept(exchange.request_id, exchange.backend, exchange.at, content_type, body)


class Reuse:
    """Looks answers up, and lets identical requests wait for the one that is being answered."""

    def __init__(self, settings: config.Cache, learner: Learner) -> None:
        self.settings = settings
        self.learner = learner
        self.under_way: dict[bytes, asyncio.Future[Kept | None]] = {}

    def turn(
        self, tenant: str, dialect: Dialect, query: str, headers: Mapping[str, str], ask: Ask
    ) -> AbstractAsyncContextManager[Turn]:
        """This request's turn: `known` is the answer, or there is none and the others wait until this one ends.

        Those who waited in vain ask for themselves, all at once.
        """
        key = self._key(tenant, dialect, query, headers, ask)
        return contextlib.nullcontext(Turn()) if key is None else self._turn(tenant, key)

    @contextlib.asynccontextmanager
    async def _turn(self, tenant: str, key: bytes) -> AsyncIterator[Turn]:
        ahead = self.under_way.get(key)
        if ahead is not None:
            yield Turn(key, known=await asyncio.shield(ahead))
            return
        landed = self.under_way[key] = asyncio.get_running_loop().create_future()
        turn = Turn(key)
        try:
            turn.known = await self._kept(tenant, key)
            yield turn
        finally:
            del self.under_way[key]
            landed.set_result(turn.fresh or turn.known)

    def _key(self, tenant: str, dialect: Dialect, query: str, headers: Mapping[str, str], ask: Ask) -> bytes | None:
        """(32,) bytes, or None where nothing may be reused."""
        if self.settings.reuse == "off" or ask.has_tools or not ask.controls.reuse or ask.bypass is Reason.TOOL_LOOP:
            return None
        told = [headers.get(name, "") for name in TELLING_HEADERS]
        digest = hashlib.sha256(ask.body)
        for part in (tenant, dialect.path, query, *told):
            digest.update(b"\0" + part.encode("utf-8", "surrogateescape"))
        return digest.digest()

    async def _kept(self, tenant: str, key: bytes) -> Kept | None:
        since = self.learner.wall() - self.settings.reuse_ttl_s
        try:
            return await self.learner.read(lambda store: store.kept_answer(key, tenant=tenant, since=since))
        except StoreError as exc:
            log.warning("a kept answer cannot be looked up: %s", exc)
            return None
