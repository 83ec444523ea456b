"""Embed, recall and rank, for all waiting requests at once, in the one thread that owns the index."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from iccache import config
from iccache.examples.batch import Batcher
from iccache.examples.fit import fits
from iccache.examples.recalls import Recalls
from iccache.examples.retriever import Retriever
from iccache.examples.selector import Selection, Selector
from iccache.examples.tokens import Tokenizer, count_prompt
from iccache.metrics import Metrics
from iccache.plan import Plan
from iccache.types import Answer, Ask, Match, Matrix, Query, Recalled, Usage, Vector
from router.types import ExampleSignals, Signals

COUNTED_CHARS = 500_000  # longer prompts fit no student, and counting them would hold up everybody else
CHARS_PER_TOKEN = 4
REPLY_TOKENS = 512  # kept free in a student's window where the client does not say how long the answer may be
WARM_UP = "The first embedding of a process is slow; this one is nobody's request."


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


class Select:
    """Stages embed, recall and rank behind one call."""

    def __init__(
        self,
        settings: config.Config,
        make_retriever: Callable[[], Retriever],
        selector: Selector,
        tokenizers: Mapping[str, Tokenizer],
        metrics: Metrics,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.use(settings, selector, tokenizers)
        self.make_retriever = make_retriever
        self.metrics = metrics
        self.clock = clock
        self.recalls = Recalls(clock)
        self.thread: Batcher[Job, Selected] = Batcher(self.run, settings.embedder.batch, "select")

    def use(self, settings: config.Config, selector: Selector, tokenizers: Mapping[str, Tokenizer]) -> None:
        """Put new settings in force. `tokenizers` by their setting's value, the dearest backend's first."""
        self.settings = settings
        self.selector = selector
        self.tokenizers = tokenizers

    async def start(self) -> None:
        """Load the model and the index, in the thread that will own them."""
        self.retriever = await self.thread.run(self._loaded)

    def _loaded(self) -> Retriever:
        retriever = self.make_retriever()
        retriever.embed([WARM_UP])
        retriever.load()
        return retriever

    async def embed(self, text: str) -> Vector:
        """(dim,), unit norm."""
        return await self.thread.run(lambda: self.retriever.embed([text])[0])

    async def embed_all(self, texts: Sequence[str]) -> Matrix:
        """(n, dim), unit rows."""
        return await self.thread.run(lambda: self.retriever.embed(texts))

    async def __call__(self, job: Job) -> Selected:
        started = self.clock()
        known = self.recalls.get(job.tenant, job.ask.task, self._wanted(job))
        if known is None:
            return await self.thread(job)
        selected = self._ranked(job, known)
        self.metrics.stage_seconds.labels("rank").observe(self.clock() - started)
        return selected

    def changed(self) -> None:
        """The store has changed: what was recalled before may not be what is nearest, or may be gone."""
        self.recalls.forget()

    def current(self) -> None:
        """All changes of the store that there are have been applied just now."""
        self.recalls.confirm()

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
        recalled = recalled._replace(nearest=[(e, s) for e, s in recalled.nearest if fits(e, job.ask)])
        ranked = {student.name: self._for(student, job, recalled) for student in job.students if recalled.nearest}
        return Selected(
            recalled.embedding,
            {name: tuple(s.shown) for name, s in ranked.items()},
            {name: tuple(s.considered) for name, s in ranked.items()},
        )

    def _for(self, student: config.Backend, job: Job, recalled: Recalled) -> Selection:
        reply = job.ask.max_output_tokens
        return self.selector.select(
            recalled,
            student_window_tokens=student.context_window_tokens,
            request_tokens=job.request_tokens,
            reply_tokens=REPLY_TOKENS if reply is None else reply,
            cap=job.ask.controls.examples,
            system=job.ask.system,
            now=job.now,
            student=student.name,
        )

    def count_prompt(self, ask: Ask) -> int:
        """Tokens of the request as it came, by the dearest backend's tokenizer; of a huge one, a guess."""
        if len(ask.prompt) > COUNTED_CHARS:
            return len(ask.prompt) // CHARS_PER_TOKEN
        return count_prompt(next(iter(self.tokenizers.values())), [ask.prompt])

    def count_pair(self, request: str, answer: str) -> int:
        """Tokens of an example's text."""
        tokenizer = next(iter(self.tokenizers.values()))
        return tokenizer.count(request) + tokenizer.count(answer)

    def usage(self, answer: Answer, ask: Ask, backend: config.Backend, shown: Sequence[Match], status: int) -> Usage:
        """Tokens of an exchange: as reported, else counted and marked so."""
        tokenizer = self.tokenizers[backend.tokenizer]
        example = sum(count_prompt(tokenizer, [m.example.request, m.example.answer]) for m in shown)
        if answer.usage is not None:
            return answer.usage._replace(example=example)
        if status >= 400:
            return Usage(0, 0, 0, estimated=True)
        return Usage(
            count_prompt(tokenizer, [ask.prompt]) + example, tokenizer.count(answer.text), example, estimated=True
        )


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
    similarity = np.array([m.similarity for m in shown])
    utility = np.array([m.utility for m in shown])
    return ExampleSignals(
        count=len(shown),
        similarity_max=float(similarity.max()),
        similarity_mean=float(similarity.mean()),
        utility_max=float(utility.max()),
        utility_mean=float(utility.mean()),
        tokens=sum(m.example.tokens for m in shown),
    )
