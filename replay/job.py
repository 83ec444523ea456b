"""One pass over the examples worth asking again. Start reading at `Job._replay`: what happens to one of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

from iccache import config
from iccache.backends.judge import VERDICT_TOKENS, BackendJudge, Verdict
from iccache.errors import BackendError, IccacheError, StoreError
from iccache.examples.admission import unfit
from iccache.examples.tokens import Tokenizer
from iccache.examples.traits import USUAL_QUALITY
from iccache.types import Example, Reason
from replay import plan
from replay.best import By, Form, Vote, agreement, form_of, normal
from replay.calls import ANSWER, JUDGEMENT, Caller, Model, Refused, Unanswerable
from replay.cutoff import CutOff, Round, recovered
from replay.doubt import Doubt
from replay.ledger import LEASE_S, Item, Ledger, Money, OutOfBudget, Result
from replay.load import Overloaded
from replay.plan import Candidate
from replay.prices import Message, Prompt
from replay.store import ReplayStore

log = logging.getLogger(__name__)

TEMPERATURE = 0.7  # of an answer that should differ from what the same model said before
GREEDY = 0.0
MISSES_UNTIL_OUT = 5  # examples in a row that the rest of the budget does not cover
FAILURES_UNTIL_DOWN = 3  # examples in a row at which an upstream failed
BEST_BY_JUDGE = 0.9  # own quality that a judge's word alone can give: 1 is for users


class Crowded(IccacheError):
    """The budget does not cover the next call beside what the other workers have reserved: leave it to them."""


class Stop(StrEnum):
    """Why a run ended. A closed list."""

    NOTHING_LEFT = "nothing_left"
    BUDGET = "budget"
    LOAD = "load"
    CUT_OFF = "cut_off"
    INTERRUPTED = "interrupted"
    ERROR = "error"


class Best(NamedTuple):
    """The answer that stays, how sure that is, and by what."""

    answer: str
    preference: float  # that it is the better one, in (0.5, 1]; the share of the votes; 0.5 where nothing is known
    by: By


class Progress(Protocol):
    """Who wants to know how far it is."""

    def begin(self, total: int) -> None: ...

    def step(self, result: Result | None, money: Money) -> None:
        """One candidate is done with; None: it was left alone."""


class Job:
    """Replays candidates, several at once, until there are none or something says stop."""

    def __init__(
        self,
        settings: config.Replay,
        store: ReplayStore,
        ledger: Ledger,
        caller: Caller,
        teacher: Model,
        judge: Model,
        tokenizer: Tokenizer,
        progress: Progress,
        pays_in_money: bool = False,
    ) -> None:
        """`pays_in_money`: whether a good answer of a student costs less than the dearest backend's."""
        self.settings = settings
        self.store = store
        self.ledger = ledger
        self.caller = caller
        self.teacher = teacher
        self.judge = judge
        self.tokenizer = tokenizer
        self.progress = progress
        self.verdicts: Counter[Verdict] = Counter()
        self.decided: Counter[By] = Counter()
        self._forms: dict[tuple[str, str], Form | None] = {}  # by tenant and system prompt
        self.stopped: Stop | None = None
        self.error: str | None = None
        self.cut_off = CutOff(pays_in_money)
        self.recovered = recovered(store.recoveries())
        self._at_work = 0  # workers
        self._misses = 0
        self._missed = False
        self._failures = 0
        self._last_failure: str | None = None

    def stop(self, why: Stop, error: str | None = None) -> None:
        """Begin nothing more, and wait for no load to fall. The first reason counts."""
        if self.stopped is None:
            self.stopped, self.error = why, error
            self.caller.gate.give_up()

    async def run(self, candidates: Sequence[Candidate], workers: int = 1) -> Stop:
        """Why it ended. Raises StoreError."""
        waiting = deque(candidates)
        self.progress.begin(len(waiting))
        try:
            async with self._alive(), asyncio.TaskGroup() as group:
                for _ in range(min(workers, len(waiting))):
                    group.create_task(self._work(waiting))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        if self._missed:
            self._out_of_budget()
        self.stop(Stop.NOTHING_LEFT)
        assert self.stopped is not None
        return self.stopped

    async def _work(self, waiting: deque[Candidate]) -> None:
        self._at_work += 1
        while waiting and self.stopped is None:
            candidate = waiting.popleft()
            item = self.ledger.claim(candidate.id, self.settings.max_rounds)
            try:
                result = None if item is None else await self._guarded(item, candidate)
            except Crowded:
                waiting.appendleft(candidate)
                break
            self.progress.step(result, self.ledger.money())
            await asyncio.sleep(0)  # a run that finds nothing to do still hears signals
        self._at_work -= 1

    async def _guarded(self, item: Item, candidate: Candidate) -> Result | None:
        """The result of one round; None when the item was given back undone. Raises Crowded."""
        try:
            result = await self._replay(item, candidate.doubt)
        except OutOfBudget:
            self.ledger.release(item)
            if self._at_work > 1:
                raise Crowded from None
            self._missed = True
            self._misses += 1
            if self._misses >= MISSES_UNTIL_OUT:
                self._out_of_budget()
            return None
        except Overloaded as exc:
            self.ledger.release(item)
            self.stop(Stop.LOAD, str(exc))
            return None
        except Unanswerable as exc:
            log.warning("example %s: %s", item.example_id, exc)
            result = self._refuse(item)
        except (BackendError, Refused) as exc:
            return self._failed(item, exc)
        self._misses = self._failures = 0
        potential = self.recovered * candidate.lost_nusd
        self.cut_off.add(Round(result is Result.IMPROVED, potential, self.ledger.spent_on(item)))
        if self.cut_off.reached:
            self.stop(Stop.CUT_OFF)
        return result

    async def _replay(self, item: Item, doubt: Doubt) -> Result:
        """Ask the teacher again, keep the best of old and new."""
        example = self._example(item.example_id)
        if example is None:
            return Result.OVERTAKEN
        others = self._others(example, doubt)
        answers = await self._answers(item, example, others)
        if not answers:
            return self._refuse(item)
        best = await self._best(item, example, answers, others)
        return self._keep(item, example, best.answer, _quality_of(best, example), best.by)

    async def _answers(self, item: Item, example: Example, others: Sequence[Vote]) -> list[str]:
        """The usable ones of up to `samples` new answers; no more are asked for than it takes to agree."""
        answers: list[str] = []
        for sample in range(self.settings.samples):
            answer = await self._answer(item, example, sample)
            if unfit(example.request, answer) is None:
                answers.append(answer)
            if agreement(answers, others, wanted=self.settings.samples) is not None:
                break
        return answers

    async def _best(self, item: Item, example: Example, answers: Sequence[str], others: Sequence[Vote]) -> Best:
        """Of the old answer and the new ones. See best.py for the order of what decides."""
        old, form = example.answer, self._form(example)
        if {normal(old)} == {normal(a) for a in answers}:
            agreed = agreement(answers, others, wanted=self.settings.samples)
            return Best(old, 0.5 if agreed is None else agreed.share, By.SAME)
        fitting = [a for a in answers if form is None or form.met_by(a)]
        if not fitting:
            return Best(old, 0.5, By.CHECK)
        agreed = agreement(fitting, others, wanted=self.settings.samples)
        if form is not None and not form.met_by(old):
            return Best(fitting[0] if agreed is None else agreed.answer, 1.0, By.CHECK)
        if agreed is not None:
            return Best(old if normal(agreed.answer) == normal(old) else agreed.answer, agreed.share, By.AGREEMENT)
        return await self._judged(item, example, fitting)

    async def _judged(self, item: Item, example: Example, answers: Sequence[str]) -> Best:
        """The winner of one comparison after another, beginning with the old answer."""
        best, preference = example.answer, 0.5
        tried = {normal(best)}
        for answer in answers:
            if normal(answer) not in tried:
                tried.add(normal(answer))
                said = await self._judge(item).prefer(_question(example), answer, best)
                if said > 0.5:
                    best, preference = answer, said
        return Best(best, preference, By.JUDGE)

    def _others(self, example: Example, doubt: Doubt) -> list[Vote]:
        """The votes beside the new samples: the old answer, which is one sample more where the teacher gave it, and
        what the nearest examples agree on.
        """
        sample = example.backend == self.teacher.backend.name
        votes = [Vote(example.answer, 1.0 if sample else 1.0 - doubt.wrong)]
        return votes if doubt.consensus is None else [*votes, Vote(*doubt.consensus)]

    def _form(self, example: Example) -> Form | None:
        """What the answers under the example's system prompt have in common; looked up once."""
        whose = example.tenant, example.system
        if whose not in self._forms:
            self._forms[whose] = form_of(self.store.peers(*whose))
        return self._forms[whose]

    async def _answer(self, item: Item, example: Example, sample: int) -> str:
        system = (Message("system", example.system),) if example.system else ()
        room = plan.output_tokens(example.tokens, len(example.system.encode()), self.teacher.backend)
        prompt = Prompt(
            messages=(*system, Message("user", example.request)),
            max_output_tokens=room or plan.LEAST_OUTPUT_TOKENS,
            temperature=temperature(example.backend == self.teacher.backend.name, item.round, sample),
            sample=sample,
        )
        return await self.caller.ask(item, ANSWER, self.teacher, prompt)

    def _judge(self, item: Item) -> BackendJudge:
        async def ask(question: str) -> str:
            prompt = Prompt((Message("user", question),), VERDICT_TOKENS, GREEDY)
            return await self.caller.ask(item, JUDGEMENT, self.judge, prompt)

        return BackendJudge(ask, self.verdicts)

    def _keep(self, item: Item, example: Example, best: str, quality: float | None, by: By) -> Result:
        """Put the outcome down, in one commit. An example that somebody changed meanwhile is left as they want it."""
        with self.store.transaction():
            result = self._outcome(example, best)
            if not self.ledger.settle(item, result):
                return Result.OVERTAKEN
            self.decided[by] += 1
            if result is Result.KEPT:
                learned = quality if best == example.answer and self._quality(example.id) is None else None
                self.store.update_example(example.id, own_quality=learned, replays=item.round)
            elif result is Result.IMPROVED:
                self.store.update_example(
                    example.id,
                    expected_answer=example.answer,
                    answer=best,
                    backend=self.teacher.backend.name,
                    own_quality=quality,
                    replays=item.round,
                    gain=0.0,  # what was measured is of the old answer: the record begins anew
                    tokens=self.tokenizer.count(example.request) + self.tokenizer.count(best),
                )
            return result

    def _outcome(self, example: Example, best: str) -> Result:
        """What `best` means for the example as it is now."""
        now = self._example(example.id)
        if now is None or now.answer != example.answer:
            return Result.OVERTAKEN
        return Result.KEPT if best == example.answer or now.stats.own_quality == 1.0 else Result.IMPROVED

    def _refuse(self, item: Item) -> Result:
        """No answer could be used. It counts as a round: else it would be tried for ever."""
        with self.store.transaction():
            if not self.ledger.settle(item, Result.REFUSED):
                return Result.OVERTAKEN
            self.store.update_example(item.example_id, replays=item.round)
            return Result.REFUSED

    def _out_of_budget(self) -> None:
        """Where calls of unknown end have used it up and nothing came of the latest, that is what has to be told."""
        if self._failures:
            self.stop(Stop.ERROR, f"the budget is reserved for calls that failed: {self._last_failure}")
        self.stop(Stop.BUDGET)

    def _failed(self, item: Item, exc: BackendError | Refused) -> Result | None:
        """An upstream did not answer. One that refuses everybody, or fails again and again, ends the run."""
        log.warning("example %s: %s", item.example_id, exc)
        down = exc.reason is Reason.CONNECT if isinstance(exc, BackendError) else not exc.retriable
        given_up = self.ledger.release(item, failed=not down)
        self._failures += 1
        self._last_failure = str(exc)
        if down or self._failures >= FAILURES_UNTIL_DOWN:
            self.stop(Stop.ERROR, str(exc))
        return self._refuse(item) if given_up else None

    def _example(self, id: str) -> Example | None:
        return next(iter(self.store.examples([id])), None)

    def _quality(self, id: str) -> float | None:
        example = self._example(id)
        return None if example is None else example.stats.own_quality

    @contextlib.asynccontextmanager
    async def _alive(self) -> AsyncIterator[None]:
        """Renews the leases as long as the block runs."""

        async def beat() -> None:
            while True:
                await asyncio.sleep(LEASE_S / 4)
                try:
                    self.ledger.beat()
                except StoreError as exc:
                    log.warning("the leases could not be renewed: %s", exc)

        task = asyncio.create_task(beat(), name="renew leases")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def temperature(same_model: bool, round: int, sample: int) -> float:
    """Greedy for the first answer that this teacher ever gives to the request, since that is its best guess.

    The teacher that gave the old answer would, greedily, say the same again; so would later samples and rounds.
    """
    return TEMPERATURE if same_model or round > 1 or sample > 0 else GREEDY


def _quality_of(best: Best, example: Example) -> float | None:
    """The quality that the answer of `example` has from now on, None where nothing is known of it.

    Of unknown quality, an answer that the samples agree on is at least as good as a teacher's usually are: else the
    example, whose record begins anew, would give way to those that nobody looked at.
    """
    known = example.stats.own_quality
    if known is None and best.by in (By.AGREEMENT, By.SAME) and best.preference > 0.5:
        return USUAL_QUALITY + (BEST_BY_JUDGE - USUAL_QUALITY) * (2.0 * best.preference - 1.0)
    return known if best.answer == example.answer else _risen(known, best.preference)


def _risen(quality: float | None, preference: float) -> float | None:
    """The quality of an answer preferred, with `preference` in (0.5, 1], over one of `quality`, where that is known.

    q + (2p - 1) * (1 - q), but not above BEST_BY_JUDGE.
    """
    if quality is None:
        return None
    return max(quality, min(BEST_BY_JUDGE, quality + (2.0 * preference - 1.0) * (1.0 - quality)))


def _question(example: Example) -> str:
    return f"{example.system}\n\n{example.request}" if example.system else example.request
