"""Embed, recall and rank, for all waiting requests at once, in the one thread that owns the index."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from iccache import config
from iccache.examples import showing
from iccache.examples.batch import Batcher
from iccache.examples.embed.unrelated import unrelated
from iccache.examples.fit import fits, fitting
from iccache.examples.recalls import Recalls
from iccache.examples.retriever import Begun, Retriever
from iccache.examples.selector import PAIR_TOKENS, Selection, Selector, example_tokens
from iccache.examples.shared import ExampleReader, SharedSets
from iccache.examples.showing import Offer
from iccache.examples.tokens import Tokenizer, count_pair, count_prompt
from iccache.examples.traits import application
from iccache.examples.trust import Showings, Trust
from iccache.examples.utility import Rows, candidate_rows
from iccache.examples.ways import Estimate, Local, Prior, Shown, Way, Ways
from iccache.metrics import Metrics
from iccache.plan import Plan
from iccache.price import expected
from iccache.turns import Turns
from iccache.types import Answer, Ask, Change, Example, Exchange, Match, Matrix, Query, Recalled, Taken, Usage, Vector
from router.types import ExampleSignals, Signals

COUNTED_CHARS = 500_000  # longer prompts fit no student, and counting them would hold up everybody else
CHARS_PER_TOKEN = 4
COMPARED = 4  # nearest examples that a new one is compared with
TRIES = 8  # to look for examples in the loop, before they are looked for in the thread
RANKINGS_KEPT = 4  # of one text: asked under several system prompts, say
REPLY_TOKENS = 512  # kept free in a student's window where the client does not say how long the answer may be


class Job(NamedTuple):
    """One request for which examples are wanted."""

    tenant: str
    ask: Ask
    students: Sequence[config.Backend]
    request_tokens: int
    now: float  # Unix seconds


class Selected(NamedTuple):
    """What was found for it."""

    embedding: Vector
    shown: Mapping[str, tuple[Match, ...]]  # by student, in the order to be shown
    considered: Mapping[str, tuple[Match, ...]]  # by student, best first
    taken: Mapping[str, Taken]  # by student: the way that was taken to show them


class Choice(NamedTuple):
    """What one student may be shown, ready to be drawn from."""

    estimate: Estimate
    offers: Mapping[Way, Offer]
    own: tuple[Match, ...]  # the request's own examples that were considered, best first
    sure: Showing | None = None  # what comes of it, where nothing is left to chance


class Ranking(NamedTuple):
    """What was ranked for a request, as long as nothing is learned that could rank otherwise."""

    revision: tuple[int, int, int]
    choices: Mapping[str, Choice]  # by student


class Showing(NamedTuple):
    """What one student is shown."""

    shown: tuple[Match, ...]
    considered: tuple[Match, ...]
    taken: Taken


class Select:
    """Stages embed, recall and rank behind one call."""

    def __init__(
        self,
        settings: config.Config,
        make_retriever: Callable[[], Retriever],
        selector: Selector,
        tokenizers: Mapping[str, Tokenizer],
        metrics: Metrics,
        ways: Ways | None = None,
        rng: np.random.Generator | None = None,
        clock: Callable[[], float] = time.perf_counter,
        turns: Turns | None = None,
    ) -> None:
        """`ways` learns in the thread of selection, and is asked there and in the event loop's."""
        self.ways = ways or Ways()
        self.rng = rng or np.random.default_rng()
        self.turns = turns or Turns()
        self.shared = SharedSets()
        self.threshold: float | None = None
        self.unrelated = -1.0
        self.revision = 0  # grows with every setting that ranking goes by
        self.showings = Showings()
        self.use(settings, selector, tokenizers)
        self.make_retriever = make_retriever
        self.metrics = metrics
        self.clock = clock
        self.recalls = Recalls(clock)
        self._to_read: dict[str, None] = {}  # ids of examples, by the reading after the one under way
        self._reading: asyncio.Task[Mapping[str, Example]] | None = None
        self._next_reading: asyncio.Task[Mapping[str, Example]] | None = None
        self.asked = 0  # requests so far
        self.thread: Batcher[Job, Selected] = Batcher(self.run, settings.embedder.batch, "select")

    def use(self, settings: config.Config, selector: Selector, tokenizers: Mapping[str, Tokenizer]) -> None:
        """Put new settings in force. `tokenizers` by their setting's value, the dearest backend's first."""
        self.settings = settings
        self.trust = Trust(settings.selection, self.showings)
        self.selector = selector
        self.selector.auto_threshold, self.selector.unrelated = self.threshold, self.unrelated
        self.tokenizers = tokenizers
        self.tokens_of = {name: counted_by(tokenizer) for name, tokenizer in list(tokenizers.items())[1:]}
        self.dearest = settings.by_price()[-1]
        self.revision += 1

    async def start(self) -> None:
        """Load the model and the index, in the thread that will own them."""
        self.retriever = await self.thread.run(self._loaded)

    def _loaded(self) -> Retriever:
        retriever = self.make_retriever()
        self.unrelated = self.selector.unrelated = unrelated(retriever.embedder)
        retriever.load()
        return retriever

    def apply(self, changes: Sequence[Change], store: ExampleReader) -> None:
        """Follow the store's examples, in the thread that owns the index: what was deleted is shown no more."""
        usable = self.retriever.apply(changes)
        self.recalls.follow({change.key for change in changes}, usable)
        self.shared.apply(changes, store)

    def use_prior(self, prior: Prior) -> None:
        """Put newly trained weights in force: one assignment each, so a request sees the old ones or the new."""
        self.ways.prior = prior
        self.selector.utility.use(prior)
        self.revision += 1

    def use_threshold(self, at: float) -> None:
        """What `selection.threshold = "auto"` means from now on, whatever settings are in force."""
        self.threshold = self.selector.auto_threshold = at
        self.revision += 1

    def learn(self, exchange: Exchange, ways: Ways | None = None) -> None:
        """An exchange was scored, or its score changed. In the thread that owns the index."""
        self.retriever.at_hand.forget_exchange(exchange.request_id, exchange.shown)
        self.recalls.drop([exchange.request_id, *exchange.shown])
        taken, ways = exchange.extra.get("way"), ways or self.ways
        if taken is None or exchange.quality is None or not exchange.task:
            return
        ways.learn(
            exchange.tenant,
            exchange.request_id,
            exchange.backend,
            self.retriever.embed([exchange.task])[0],
            exchange.system,
            Way(taken["way"]),
            exchange.quality,
            taken["expected"],
        )

    async def embed(self, text: str) -> Vector:
        """(dim,), unit norm."""
        return await self.thread.run(lambda: self.retriever.embed([text])[0])

    async def embed_all(self, texts: Sequence[str]) -> Matrix:
        """(n, dim), unit rows."""
        return await self.thread.run(lambda: self.retriever.embed(texts))

    def near(self, texts: Sequence[tuple[str, str]], now: float) -> list[Recalled]:
        """For each (tenant, text) its embedding and the few nearest examples: what new ones are compared with. In the
        thread that owns the index."""
        return self.retriever.recall([Query(tenant, text, COMPARED) for tenant, text in texts], now)

    async def __call__(self, job: Job) -> Selected:
        started = self.clock()
        self.asked += 1
        recalled = await self._recalled_here(job, started)
        if recalled is not None:
            return self._ranked_here(job, recalled)
        selected = await self.thread(job)
        await self.turns.room(begun=True)  # others of the same batch come back at the same time
        return selected

    def at_once(self, job: Job) -> Selected | None:
        """What calling this gives, where that is known without looking for it; else None."""
        recalled = self.recalls.get(job.tenant, job.ask.task, self._wanted(job))
        if recalled is None:
            return None
        self.asked += 1
        return self._ranked_here(job, recalled)

    def _ranked_here(self, job: Job, recalled: Recalled) -> Selected:
        started = self.clock()
        selected = self._ranked(job, recalled)
        self.metrics.stage_seconds.labels("rank").observe(self.clock() - started)
        return selected

    async def _recalled_here(self, job: Job, started: float) -> Recalled | None:
        """What is nearest, looked for without changing threads but to read what is not at hand; else None: where that
        would take long, or the thread was at work or the store has changed each time."""
        query = Query(job.tenant, job.ask.task, self._wanted(job))
        if not self.retriever.is_quick(query):
            return None
        for _ in range(TRIES):
            state, begun = self.recalls.state, self._begun(query)
            if begun is None:  # a batch of such requests would hold the interpreter, and make the next ones wait too
                await self.thread.run(_nothing, alone=False)
                await self.turns.room(begun=True)
                continue
            missing = begun.missing
            read: Mapping[str, Example] = {}
            if missing:
                read = await self._read(missing)
                await self.turns.room(begun=True)
            if self.recalls.state == state:
                recalled = self.retriever.end(begun, read, job.now)
                if recalled is not None:
                    self.recalls.put(state, query, recalled)
                    self.metrics.stage_seconds.labels("recall").observe(self.clock() - started)
                return recalled
        return None

    async def _read(self, ids: Sequence[str]) -> Mapping[str, Example]:
        """Examples from the store. What is asked for while a reading is under way is read together, as the next."""
        self._to_read.update(dict.fromkeys(ids))
        if self._next_reading is None:
            self._next_reading = asyncio.create_task(self._read_together(self._reading), name="read examples")
        return await asyncio.shield(self._next_reading)

    async def _read_together(self, before: asyncio.Task[Any] | None) -> Mapping[str, Example]:
        if before is not None:
            await asyncio.wait([before])
        ids, self._to_read = list(self._to_read), {}
        self._reading, self._next_reading = self._next_reading, None
        return await self.thread.run(lambda: self.retriever.read(ids), alone=False)

    def _begun(self, query: Query) -> Begun | None:
        """None where the thread that owns the index is at work."""
        if not self.thread.busy.acquire(blocking=False):
            return None
        try:
            return self.retriever.begin(query)
        finally:
            self.thread.busy.release()

    def learned(self) -> None:
        """The weights that ranking goes by have taken something in."""
        self.revision += 1

    def changed(self) -> None:
        """The store is another one: what was recalled before may not be what is nearest, or may be gone."""
        self.recalls.forget()

    def current(self) -> None:
        """All changes of the store that there are have been applied just now."""
        self.recalls.confirm()
        self.retriever.at_hand.confirm()

    def run(self, jobs: list[Job]) -> list[Selected]:
        """One batch, in the thread that owns the index."""
        started = self.clock()
        self.retriever.embed([job.ask.task for job in jobs])
        embedded = self.clock()
        queries = [Query(job.tenant, job.ask.task, self._wanted(job)) for job in jobs]
        state = self.recalls.state
        recalled = self.retriever.recall(queries, now=max(job.now for job in jobs))
        for query, nearest in zip(queries, recalled, strict=True):
            self.recalls.put(state, query, nearest)
        found = self.clock()
        selected = [self._ranked(job, r) for job, r in zip(jobs, recalled, strict=True)]
        for stage, took in (
            ("embed", embedded - started),
            ("recall", found - embedded),
            ("rank", self.clock() - found),
        ):
            self.metrics.stage_seconds.labels(stage).observe(took)
        return selected

    def _wanted(self, job: Job) -> int:
        shows = job.students and job.ask.controls.examples != 0 and self.settings.selection.max_examples
        return self.settings.selection.recall_k if shows else 0

    def _ranked(self, job: Job, recalled: Recalled) -> Selected:
        choices = self._choices(job, recalled)
        students = {student.name: self._drawn(choices[student.name]) for student in job.students}
        self._note_showings(job, students)
        return Selected(
            recalled.embedding,
            {name: s.shown for name, s in students.items() if s.shown},
            {name: s.considered for name, s in students.items() if s.considered},
            {name: s.taken for name, s in students.items()},
        )

    def _choices(self, job: Job, recalled: Recalled) -> Mapping[str, Choice]:
        """By student. Kept with what was recalled, so gone with it at the store's next change; and passed over once
        anything was learned or set that ranking goes by. Not kept where other writers' examples were found: what they
        may be shown depends on how often they were of late."""
        ask, revision = job.ask, (self.revision, self.ways.revision, self.shared.revision)
        tokens = {student.name: self._request_tokens(student, job) for student in job.students}
        cap = ask.controls.examples
        key = (tuple(tokens.items()), job.request_tokens, ask.max_output_tokens, cap, ask.system, ask.form, ask.stop)
        kept: dict[Any, Ranking] | None = recalled.__dict__.get("rankings")
        if kept is None:  # for the first time: most texts do not come again
            recalled.__dict__["rankings"] = {}
            return self._worked_out(job, recalled, tokens)
        known = kept.get(key)
        if known is not None and known.revision == revision:
            return known.choices
        choices = self._worked_out(job, recalled, tokens)
        if all(example.subject is None for example, _ in recalled.nearest):
            if len(kept) >= RANKINGS_KEPT:
                kept.clear()
            kept[key] = Ranking(revision, choices)
        return choices

    def _worked_out(self, job: Job, recalled: Recalled, tokens: Mapping[str, int]) -> Mapping[str, Choice]:
        """`tokens`: of the request, as each student counts."""
        recalled = recalled._replace(nearest=self.trust.sift(fitting(recalled.nearest, job.ask), job.ask.subject))
        rows = candidate_rows(recalled.nearest, request=job.ask.task, system=job.ask.system, now=job.now)
        return {student.name: self._for(student, job, recalled, rows, tokens[student.name]) for student in job.students}

    def _note_showings(self, job: Job, showings: Mapping[str, Showing]) -> None:
        for showing_ in showings.values():
            self.showings.add(job.tenant, job.ask.subject, [m.example for m in showing_.shown])

    def _for(self, student: config.Backend, job: Job, recalled: Recalled, rows: Rows, tokens: int) -> Choice:
        """Put the request's own examples and the shared set beside nothing."""
        ask = job.ask
        local = self.ways.near(job.tenant, student.name, recalled.embedding, ask.system)
        own = self._own(student, job, recalled, rows, local, tokens)
        offers = {Way.NONE: showing.NOTHING}
        seen: dict[Way, Shown] = {}
        if own.shown:
            offers[Way.OWN] = self._offer(student, job, own.shown, student.usd_per_million_input_tokens)
            seen[Way.OWN] = own.seen
        shared = self._shared(student, job, recalled, tokens)
        if shared:
            cached = student.usd_per_million_cached_input_tokens
            price = student.usd_per_million_input_tokens if cached is None else cached
            offers[Way.SHARED] = self._offer(student, job, shared, price)
            seen[Way.SHARED] = Shown([m.similarity for m in shared])
        choice = Choice(self.ways.estimate(local, student.name, len(ask.task), seen), offers, own.considered)
        return choice._replace(sure=self._drawn(choice)) if local.answers < showing.ENOUGH else choice

    def _drawn(self, choice: Choice) -> Showing:
        """Take one of the ways."""
        if choice.sure is not None:
            return choice.sure
        limits = self.settings.selection
        shown, taken = showing.draw(
            choice.estimate, choice.offers, self.rng, exploration=limits.exploration, leave_out=limits.leave_out_share
        )
        if taken.way != Way.SHARED:
            return Showing(shown, choice.own, taken)
        known = {m.example.id for m in choice.own}
        others = choice.offers[Way.SHARED].shown
        return Showing(shown, choice.own + tuple(m for m in others if m.example.id not in known), taken)

    def _own(
        self, student: config.Backend, job: Job, recalled: Recalled, rows: Rows, local: Local, tokens: int
    ) -> Selection:
        return self.selector.select(
            recalled,
            student_window_tokens=student.context_window_tokens,
            request_tokens=tokens,
            reply_tokens=self._reply(job),
            cap=job.ask.controls.examples,
            request=job.ask.task,
            system=job.ask.system,
            now=job.now,
            student=student.name,
            local=local.gain,
            asker=job.ask.subject,
            rows=rows,
            tokens_of=self.tokens_of.get(student.tokenizer),
        )

    def _request_tokens(self, student: config.Backend, job: Job) -> int:
        """By the student's tokenizer. Also what `count_prompt` guesses is left at that."""
        if student.tokenizer not in self.tokens_of or len(job.ask.prompt) > COUNTED_CHARS:
            return job.request_tokens
        return count_prompt(self.tokenizers[student.tokenizer], [job.ask.prompt])

    def _shared(self, student: config.Backend, job: Job, recalled: Recalled, tokens: int) -> tuple[Match, ...]:
        """The shared set as it may be shown for this request: whole, or not at all."""
        limits, cap = self.settings.selection, job.ask.controls.examples
        if not limits.shared_examples or not self._wanted(job):
            return ()
        examples = self.shared.of(job.tenant, application(job.ask.system), recalled.embedding)
        examples = examples[-limits.shared_examples :]
        window = student.context_window_tokens - tokens - self._reply(job)
        tokens_of = self.tokens_of.get(student.tokenizer, example_tokens)
        if (
            not examples
            or (cap is not None and cap < len(examples))
            or sum(map(tokens_of, examples)) > min(limits.max_tokens, window)
            or not all(fits(e, job.ask) and e.embedding.shape == recalled.embedding.shape for e in examples)
        ):
            return ()
        return tuple(Match(e, float(e.embedding @ recalled.embedding), 0.0) for e in examples)

    def _offer(self, student: config.Backend, job: Job, shown: tuple[Match, ...], usd_per_million: float) -> Offer:
        """With the price of its tokens at the student, against what an offload saves."""
        dearest, plain = self.dearest, {"request_tokens": job.request_tokens, "example_tokens": 0, "covered_tokens": 0}
        output = job.ask.max_output_tokens
        saved = expected(dearest, **plain, most_output=output) - expected(student, **plain, most_output=output)
        usd = sum(example_tokens(m.example) for m in shown) * usd_per_million / 1e6
        return Offer(shown, showing.price_of(usd, saved))

    def _reply(self, job: Job) -> int:
        return REPLY_TOKENS if job.ask.max_output_tokens is None else job.ask.max_output_tokens

    def count_prompt(self, ask: Ask) -> int:
        """Tokens of the request as it came, by the dearest backend's tokenizer; of a huge one, a guess."""
        if len(ask.prompt) > COUNTED_CHARS:
            return self.guess(ask)
        return count_prompt(next(iter(self.tokenizers.values())), [ask.prompt])

    def guess(self, ask: Ask) -> int:
        """About so many tokens, at once."""
        return len(ask.prompt) // CHARS_PER_TOKEN

    def count_pair(self, request: str, answer: str) -> int:
        """Tokens of an example's text, by the dearest backend's tokenizer."""
        return count_pair(next(iter(self.tokenizers.values())), request, answer)

    def usage(self, answer: Answer, ask: Ask, backend: config.Backend, shown: Sequence[Match], status: int) -> Usage:
        """Tokens of an exchange: as reported, else counted and marked so."""
        tokenizer = self.tokenizers[backend.tokenizer]
        example = sum(count_prompt(tokenizer, [m.example.request, m.example.answer]) for m in shown)
        if answer.usage is not None:
            return answer.usage._replace(example=min(example, answer.usage.input))  # some report less than they got
        if status >= 400:
            return Usage(0, 0, 0, estimated=True)
        return Usage(
            count_prompt(tokenizer, [ask.prompt]) + example, tokenizer.count(answer.text), example, estimated=True
        )


def _nothing() -> None:
    """What a thread is asked for by who only wants to know that it has time."""


def counted_by(tokenizer: Tokenizer) -> Callable[[Example], int]:
    """What showing an example adds to a prompt, by another tokenizer than the one that all examples were counted by."""
    return lambda example: count_pair(tokenizer, example.request, example.answer) + PAIR_TOKENS


def signals(plan: Plan) -> Signals:
    """What the router sees of a request."""
    return Signals(
        embedding=plan.embedding,
        tokens=plan.request_tokens,
        turns=plan.turns,
        examples={name: _example_signals(shown) for name, shown in plan.shown.items() if shown},
        system=plan.system,
    )


def _example_signals(shown: Sequence[Match]) -> ExampleSignals:
    similarity = [m.similarity for m in shown]
    utility = [m.utility for m in shown]
    return ExampleSignals(
        count=len(shown),
        similarity_max=max(similarity),
        similarity_mean=sum(similarity) / len(shown),
        utility_max=max(utility),
        utility_mean=sum(utility) / len(shown),
        tokens=sum(m.example.tokens for m in shown),
    )
