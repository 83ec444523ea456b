"""Exact reuse: an identical request may be answered from the record. Off by default.

Identical means: the same tenant, endpoint, model, and the same body byte for byte. Nothing is ever answered from a
merely similar request. One that comes while the first is being answered waits for its record, or reads its stream
along (`live`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import Enum

from iccache import config
from iccache.dialects.dialect import Dialect
from iccache.errors import StoreError
from iccache.learn.learner import Learner
from iccache.live import Live, Reader
from iccache.types import Answer, Ask, Exchange, Keeping, Kept, Reason

log = logging.getLogger(__name__)

LARGEST_BYTES = 4_000_000
RECORDED_WITHIN_S = 5.0  # from an answer's end; those who wait longer for its record ask for themselves
AHEAD_S = 5.0  # that clocks of one store's proxies may differ
TELLING_HEADERS = ("anthropic-version", "anthropic-beta", "openai-beta", "x-iccache-backend", "x-iccache-examples")


class Unanswered(Enum):
    """Why those who waited for an identical request got nothing from it."""

    VAIN = "its answer is none to be handed out again"
    LEFT = "its client left before there was an answer"


class Landing:
    """What identical requests wait for from here on, until it is settled."""

    def __init__(self, key: bytes, under_way: dict[bytes, Landing]) -> None:
        self._key, self._under_way = key, under_way
        self._settled: Kept | Unanswered | None = None
        self._live: Live | None = None
        self._news = asyncio.Event()
        under_way[key] = self

    async def outcome(self) -> Kept | Unanswered | Reader:
        """Waits for it, or for a stream that can be read along from its first byte on."""
        while self._settled is None and self._live is None:
            await self._news.wait()
        if self._settled is not None:
            return self._settled
        assert self._live is not None
        return self._live.join() if self._live.joinable else Unanswered.VAIN

    def stream(self, live: Live | None) -> None:
        """The answer comes as a stream; None: it has come, and what is left is its record."""
        self._live = live
        self._tell()

    def settle(self, outcome: Kept | Unanswered) -> None:
        """The first time counts."""
        if self._settled is None:
            del self._under_way[self._key]
            self._settled = outcome
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news.clear()


@dataclass(slots=True)
class Turn:
    """One request's place among identical ones."""

    key: bytes | None = None  # None: nothing may be reused
    known: Kept | None = None  # the answer, where there is one
    fresh: Kept | None = None  # the answer that this request got, where it may be kept
    landing: Landing | None = None  # what the others wait for, where this is the one that is answered
    following: Reader | None = None  # the stream of another, which is read along

    def shared(
        self, exchange: Exchange, content_type: str, chunks: AsyncIterator[bytes], heard: Callable[[bytes], object]
    ) -> Reader | None:
        """The stream `chunks`, as others may read it too: `heard` is told of them as they come. None where nobody
        may."""
        if self.landing is None:
            return None
        live = Live(self._answer(exchange, content_type, b""), chunks, heard, LARGEST_BYTES)
        reader = live.join()
        self.landing.stream(live)
        return reader

    @property
    def keeping(self) -> Keeping | None:
        """`fresh`, to be recorded."""
        return Keeping(self.key, self.fresh, self.land) if self.key is not None and self.fresh is not None else None

    def keep(self, exchange: Exchange, answer: Answer, content_type: str, body: bytes | None) -> None:
        """Remember the answer for identical requests, if it is one to be handed out again. `body` None: too large."""
        good = exchange.complete and answer.finish_reason in (None, "stop") and not answer.has_tool_calls
        if self.key is not None and good and body is not None:
            self.fresh = self._answer(exchange, content_type, body)

    def land(self, answer: Kept | None) -> None:
        """It is settled what those who wait are given."""
        self._settle(Unanswered.VAIN if answer is None else answer)

    def leave(self) -> None:
        """Nobody was answered: one of those who wait takes this one's place."""
        self._settle(Unanswered.LEFT)

    def _settle(self, outcome: Kept | Unanswered) -> None:
        if self.landing is not None:
            self.landing.settle(outcome)

    def _answer(self, exchange: Exchange, content_type: str, body: bytes) -> Kept:
        return Kept(exchange.request_id, exchange.backend, exchange.at, content_type, body)


class Reuse:
    """Looks answers up, and lets identical requests wait for the one that is under way: being answered, or recorded."""

    def __init__(self, settings: config.Cache, learner: Learner) -> None:
        self.settings = settings
        self.learner = learner
        self.under_way: dict[bytes, Landing] = {}

    def turn(
        self, tenant: str, dialect: Dialect, query: str, headers: Mapping[str, str], ask: Ask
    ) -> AbstractAsyncContextManager[Turn]:
        """This request's turn: `known` is the answer, or there is none and others wait until this one's is recorded.

        Those who waited in vain ask for themselves, all at once. Nobody waits for a request that is not to be recorded.
        """
        key = self._key(tenant, dialect, query, headers, ask)
        return contextlib.nullcontext(Turn()) if key is None else self._turn(tenant, key, bool(ask.controls.store))

    @contextlib.asynccontextmanager
    async def _turn(self, tenant: str, key: bytes, stored: bool) -> AsyncIterator[Turn]:
        while (ahead := self.under_way.get(key)) is not None:
            outcome = await ahead.outcome()
            if isinstance(outcome, Reader):
                try:
                    yield Turn(following=outcome)
                finally:
                    outcome.leave()
                return
            if outcome is not Unanswered.LEFT:
                yield Turn(key, known=outcome if isinstance(outcome, Kept) else None)
                return
        if not stored:
            yield Turn(known=await self._kept(tenant, key))
            return
        turn = Turn(key, landing=Landing(key, self.under_way))
        try:
            turn.known = await self._kept(tenant, key)
            if turn.known is not None:
                turn.land(turn.known)
            yield turn
        except (asyncio.CancelledError, GeneratorExit):
            if turn.fresh is None:
                turn.leave()
            raise
        finally:
            assert turn.landing is not None
            turn.landing.stream(None)
            if turn.fresh is None:
                turn.land(None)
            else:
                asyncio.get_running_loop().call_later(RECORDED_WITHIN_S, turn.land, None)

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
        """Nothing from the future: where the clock was set back, nobody knows how old that is."""
        now = self.learner.wall()
        since = now - self.settings.reuse_ttl_s
        try:
            kept = await self.learner.read(lambda store: store.kept_answer(key, tenant=tenant, since=since))
        except StoreError as exc:
            log.warning("a kept answer cannot be looked up: %s", exc)
            return None
        return kept if kept is not None and kept.at <= now + AHEAD_S else None
