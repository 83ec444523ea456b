"""Comparing answers in the background: a served one with what another backend says to the same, by a judge.

What is compared: a share `judge.sample_rate` of the offloaded answers with the dearest backend's; as large a share of
the answers that the dearest gave only because of shadow mode or the floor, with those that were withheld; and of a
share `judge.duel_share` of the requests at which the router was of two minds, the two likeliest. An answer's score is 1
where it is at least as good as the other, 0 where it is worse, both orders counted: min(1, 2 * P(better)), so that an
equal is not taken for a mediocre one. The answer that no client saw is recorded too, as decision `compared`.

Before every step the most that it can cost is set aside in the store, so `judge.usd_per_day` holds over all processes.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import orjson
from numpy.typing import NDArray

from iccache import config
from iccache.backends.fleet import Fleet, Post
from iccache.backends.judge import VERDICT_TOKENS, BackendJudge, Verdict, position_bias
from iccache.dialects.chat import Chat
from iccache.dialects.dialect import AnswerReader, Dialect
from iccache.errors import BackendError, IccacheError, StoreError
from iccache.examples.admission import ENDED_WELL
from iccache.examples.store import ExampleStore
from iccache.learn.learner import Learner
from iccache.metrics import Metrics
from iccache.plan import Plan
from iccache.price import NUSD, most_nusd, nusd
from iccache.quality.duel import is_close, pair
from iccache.quality.kinds import KIND, kind_of
from iccache.select import Select
from iccache.types import Answer, Ask, DecisionKind, Exchange, Feedback, Usage

log = logging.getLogger(__name__)

SOURCE = "judge"
AT_ONCE = 4  # comparisons
WAITING = 64  # comparisons beyond which a new one is left out
QUIET_LOAD = 0.8  # of the dear backends, above which nothing is asked in the background
TRUSTED_AFTER, MOST_BIAS = 20, 0.5  # verdicts that name an answer; above it the judge goes by the place, not the answer
COMPARED_WITH = "compared_with"  # in an exchange's `extra`
PLAIN = {"max_tokens": VERDICT_TOKENS, "temperature": 0}
NEWER = {"max_completion_tokens": VERDICT_TOKENS}  # of models that refuse the others


class OutOfBudget(IccacheError):
    """The day's money does not cover the next step."""


class Nothing(IccacheError):
    """The comparison comes to nothing."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that was answered, with what it takes to ask another backend the same."""

    exchange: Exchange
    ask: Ask
    plan: Plan
    answer: Answer
    dialect: Dialect
    post: Post
    features: Callable[[config.Backend], NDArray[np.float64] | None]


class Judging:
    """Draws what is compared, and compares it when nobody waits."""

    def __init__(
        self,
        settings: config.Config,
        fleet: Fleet,
        select: Select,
        learner: Learner,
        metrics: Metrics,
        rng: np.random.Generator,
        tally: Counter[Verdict],
    ) -> None:
        self.judge = settings.judge
        self.by_price = [b.name for b in settings.by_price()]
        self.judge_backend = settings.judge.backend or self.by_price[-1]
        self.fleet = fleet
        self.select = select
        self.learner = learner
        self.metrics = metrics
        self.rng = rng
        self.tally = tally
        self.fields: Mapping[str, object] = PLAIN
        self.waiting = 0
        self.limit = asyncio.Semaphore(AT_ONCE)

    @property
    def active(self) -> bool:
        """Whether any answer is ever compared."""
        return bool(self.judge.sample_rate or self.judge.duel_share)

    def consider(self, answered: Answered) -> None:
        """The answer is out. Returns at once."""
        names = self._drawn(answered)
        if names is None or self.waiting >= WAITING or self.learner.recorder.full:
            return
        if self.fleet.load.load(self.fleet.clock()) > QUIET_LOAD:
            return
        self.waiting += 1
        work = self._compare(answered, names)
        self.learner.background.start(work, f"compare {answered.exchange.request_id}")

    def _drawn(self, answered: Answered) -> tuple[str, str] | None:
        """Whose answers to compare; None: nobody's."""
        exchange, decision = answered.exchange, answered.plan.decision
        if decision is None or exchange.decision is not DecisionKind.ROUTED or not answered.ask.controls.store:
            return None
        if not _usable(answered.answer) or not exchange.complete or len(decision.names) < 2:
            return None
        served, dearest = exchange.backend, max(decision.names, key=self.by_price.index)
        sampled, duels = self.rng.random(2)
        if sampled < self.judge.sample_rate:
            other = dearest if served != dearest else decision.withheld
            if other is not None and other != served:
                return served, other
        if duels < self.judge.duel_share and is_close(decision.probabilities):
            return pair(decision.names, decision.probabilities, self.rng)
        return None

    async def _compare(self, answered: Answered, names: tuple[str, str]) -> None:
        try:
            async with self.limit:
                await self._compared(answered, names)
        except OutOfBudget as exc:
            log.debug("%s", exc)
        except (Nothing, BackendError, StoreError) as exc:
            log.info("%s is not compared: %s", answered.exchange.request_id, exc)
        finally:
            self.waiting -= 1

    async def _compared(self, answered: Answered, names: tuple[str, str]) -> None:
        recorder = self.learner.recorder
        served = recorder.redacted(answered.exchange)
        pairs = [served if n == served.backend else await self._asked(answered, n) for n in names]
        if any(e.answer.strip() == "" for e in pairs):
            raise Nothing("an answer is empty")
        a, b = pairs
        preferred = await self._prefer(served, a.answer, b.answer)
        scores = (min(1.0, 2 * preferred), min(1.0, 2 * (1 - preferred)))
        await recorder.make_durable(served.request_id)
        now = self.learner.wall()

        def write(store: ExampleStore) -> int:
            written = 0
            for exchange, score in zip(pairs, scores, strict=True):
                if exchange is not served:
                    store.record(exchange)
                written += store.add_feedback(Feedback(exchange.request_id, SOURCE, score, now), tenant=exchange.tenant)
            return written

        self.metrics.feedback.labels(SOURCE).inc(await self.learner.access.write(write))
        self.learner.follower.kicked.set()

    async def _asked(self, answered: Answered, name: str) -> Exchange:
        """What the backend `name` answers to the same, as an exchange. Raises OutOfBudget, Nothing, BackendError."""
        ask, backend = answered.ask, self.fleet.members[name].config
        body = answered.post.body(backend)
        assert isinstance(body, bytes)
        room = backend.context_window_tokens
        most = most_nusd(backend, len(body), ask.turns + 16, min(ask.max_output_tokens or room, room))
        number = await self._reserve(answered.exchange.request_id, "answer", most)
        started = self.fleet.clock()
        post = replace(answered.post, body=lambda _: body, repeatable=False)
        status, answer = await self._sent(number, post, name, answered.dialect.reader)
        shown, taken = answered.plan.shown.get(name, ()), answered.plan.taken.get(name)
        way = {} if taken is None else {"way": taken._asdict()}
        usage = self.select.usage(answer, ask, backend, shown, status)
        await self._settle(number, 0 if status >= 400 else nusd(backend, usage))
        if status != 200 or not _usable(answer):
            raise Nothing(f"{name} gave no answer that could be compared ({status})")
        return self.learner.recorder.redacted(
            replace(
                answered.exchange,
                request_id=f"req_{uuid.uuid4().hex}",
                session=None,
                at=self.learner.wall(),
                backend=name,
                decision=DecisionKind.COMPARED,
                reason=None,
                status=status,
                complete=answer.complete,
                offloaded=False,
                answer=answer.text,
                finish_reason=answer.finish_reason,
                usage=usage,
                cost_usd=0.0,  # what was paid is in the ledger of judging
                latency_s=self.fleet.clock() - started,
                first_byte_s=None,
                overhead_s=0.0,
                propensity=None,
                features=answered.features(backend),
                shown=[m.example.id for m in shown],
                considered=(),
                backends=(),
                quality=None,
                extra={KIND: kind_of(ask.system), COMPARED_WITH: answered.exchange.request_id, **way},
            )
        )

    async def _prefer(self, served: Exchange, a: str, b: str) -> float:
        """P(`a` is better), ties counted half. Raises Nothing where the judge says nothing, or is not to be trusted."""
        if a.strip() == b.strip():
            return 0.5
        request = f"{served.system}\n\n{served.task}" if served.system else served.task
        found: Counter[Verdict] = Counter()

        async def ask(prompt: str) -> str:
            return await self._question(served.request_id, prompt)

        preferred = await BackendJudge(ask, found).prefer(request, a, b)
        self.tally.update(found)
        if found[Verdict.UNREADABLE]:
            raise Nothing(f"the judge {self.judge_backend} gave no verdict")
        bias = position_bias(self.tally)
        if bias is not None and self.tally[Verdict.FIRST] + self.tally[Verdict.SECOND] >= TRUSTED_AFTER:
            self.metrics.judge_position_bias.set(bias)
            if abs(bias) > MOST_BIAS:
                raise Nothing(f"the judge {self.judge_backend} goes by the place of an answer ({bias:+.2f})")
        return preferred

    async def _question(self, request_id: str, prompt: str) -> str:
        """What the judge says. Raises OutOfBudget, Nothing, BackendError."""
        backend = self.fleet.members[self.judge_backend].config
        for fields in dict.fromkeys((tuple(self.fields.items()), tuple(NEWER.items()))):
            asked = {"model": backend.model, "messages": [{"role": "user", "content": prompt}], **dict(fields)}
            status, answer = await self._said(request_id, backend, orjson.dumps(asked), len(prompt.encode()))
            if status == 200:
                self.fields = dict(fields)
                return answer.text
            if status != 400:
                break
        raise Nothing(f"the judge {self.judge_backend} answered {status}")

    async def _said(
        self, request_id: str, backend: config.Backend, body: bytes, prompt_bytes: int
    ) -> tuple[int, Answer]:
        most = most_nusd(backend, prompt_bytes, 1, VERDICT_TOKENS)
        number = await self._reserve(request_id, "judgement", most)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        post = Post("POST", Chat.path, "", headers, lambda _: body, repeatable=False)
        status, answer = await self._sent(number, post, backend.name, lambda _: Chat().reader(stream=False))
        bound = Usage(prompt_bytes, VERDICT_TOKENS)
        await self._settle(number, 0 if status >= 400 else nusd(backend, answer.usage or bound))
        return status, answer

    async def _sent(
        self, number: int, post: Post, name: str, make_reader: Callable[[bool], AnswerReader]
    ) -> tuple[int, Answer]:
        """Status and answer of the backend `name`, for which `number` is reserved. Raises BackendError."""
        try:
            async with self.fleet.send(post, (name,)) as reply:
                reader = make_reader(reply.streams)
                async for chunk in reply.chunks:
                    reader.feed(chunk)
        except BackendError as exc:
            await self._unanswered(number, exc)
            raise
        return reply.status, reader.answer()

    async def _reserve(self, request_id: str, kind: str, most: int) -> int:
        budget, now = int(self.judge.usd_per_day * NUSD), self.learner.wall()
        number = await self.learner.access.write(
            lambda store: store.reserve_judging(now, request_id, kind, most, budget)
        )
        if number is None:
            raise OutOfBudget("judge.usd_per_day does not cover the next step")
        return number

    async def _settle(self, number: int, cost: int) -> None:
        self.metrics.judging_usd.inc(cost / NUSD)
        await self.learner.access.write(lambda store: store.settle_judging(number, cost))

    async def _unanswered(self, number: int, exc: BackendError) -> None:
        """What may have been billed stays set aside."""
        if exc.unbilled:
            await self._settle(number, 0)


def _usable(answer: Answer) -> bool:
    """A whole answer in text that came to its own end."""
    ended = answer.finish_reason is None or answer.finish_reason.lower() in ENDED_WELL
    return answer.complete and ended and not answer.has_tool_calls and bool(answer.text.strip())
