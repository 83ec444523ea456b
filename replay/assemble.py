"""Configuration -> objects -> a report. The only place that names concrete classes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

from iccache import config
from iccache.backends.client import make_session
from iccache.backends.judge import Verdict
from iccache.errors import BackendError
from iccache.examples import eviction
from iccache.examples.redact import Redactor
from iccache.examples.tokens import make_tokenizer
from replay import distil, lessons, merge, plan, report
from replay.best import By
from replay.calls import Caller, Pace, Refused, Unanswerable, make_model
from replay.doubt import Doubt, doubts
from replay.job import Job, Progress, Stop
from replay.ledger import Ledger
from replay.load import LoadGate, Overloaded, load_of_proxy
from replay.plan import Candidate, Models
from replay.prices import NUSD, most_nusd
from replay.report import PlanReport, Report
from replay.store import ReplayStore, open_replay_store

log = logging.getLogger(__name__)

DOUBTED = 10_000  # examples that are compared with their peers: some ten seconds


class Options(NamedTuple):
    """What the command line adds to the configuration."""

    tenant: str | None = None
    limit: int | None = None
    workers: int = 1
    max_wait_s: float = 600.0
    pace: Pace = Pace()


def planned(settings: config.Config, options: Options) -> PlanReport:
    """What `run` would do. Raises ConfigError, StoreError."""
    models = plan.models(settings)
    with closing(open_replay_store(settings)) as store:
        return PlanReport(
            models=models,
            budget_nusd=int(settings.replay.usd_budget * NUSD),
            candidates=ranked(store, settings, models, options),
            due=eviction.plan(store.weighed(), settings.cache, time.time()),
            capacity_bytes=settings.cache.capacity_bytes,
            guidance=[
                most_nusd(models.teacher, work.prompt)
                for work in (distil.due(store, options.tenant) if settings.replay.distil else ())
            ],
        )


def ranked(store: ReplayStore, settings: config.Config, models: Models, options: Options) -> list[Candidate]:
    """The examples worth asking again, best first: ranked without doubts, and the first DOUBTED of them with."""
    records = list(store.records(options.tenant))
    rank = partial(plan.rank, records, settings.replay, models, now=time.time(), shown=settings.selection.max_examples)
    return rank(options.limit, doubts=doubts(store, [c.id for c in rank(DOUBTED, usual=Doubt(1.0))]))


class Run:
    """One invocation at work: what its steps share, and what they have to tell."""

    def __init__(
        self,
        settings: config.Config,
        options: Options,
        store: ReplayStore,
        ledger: Ledger,
        models: Models,
        job: Job,
    ) -> None:
        self.settings = settings
        self.options = options
        self.store = store
        self.ledger = ledger
        self.models = models
        self.job = job
        self.considered = 0
        self.interrupted = False
        self.told: dict[str, Any] = {}  # by a step's name: what it adds to the report, as JSON


async def ask_again(run: Run) -> None:
    """Replay the examples worth it, best first."""
    candidates = ranked(run.store, run.settings, run.models, run.options)
    run.considered = len(candidates)
    await run.job.run(candidates, min(run.options.workers, run.models.teacher.max_in_flight))


async def merge_duplicates(run: Run) -> None:
    """Make one of those that say the same."""
    if run.settings.replay.merge:
        run.told["merged"] = merge.merge(run.store, run.options.tenant)


async def distil_guidance(run: Run) -> None:
    """Let the teacher write guidance, where it is asked for."""
    if not run.settings.replay.distil or run.job.stopped in (Stop.ERROR, Stop.LOAD):
        return
    job = run.job
    distiller = distil.Distiller(run.store, run.ledger, job.caller, job.teacher, job.tokenizer, time.time())
    try:
        await distiller.run(run.options.tenant)
    except (BackendError, Refused, Unanswerable, Overloaded) as exc:
        log.warning("guidance: %s", exc)
    run.told["distilled"] = distiller.written


async def teach(run: Run) -> None:
    """Train what serving expects of examples, choose its threshold, and build shared sets."""
    trained = lessons.train(run.store)
    if trained is not None:
        run.told["trained"] = trained
    threshold = lessons.choose_threshold(run.store, {b.name: b for b in run.settings.backends})
    if threshold is not None:
        run.told["threshold"] = threshold._asdict()
    run.told["shared_sets"] = lessons.build_sets(run.store, run.options.tenant)


async def evict(run: Run) -> None:
    """Expire, evict and trim."""
    done = eviction.upkeep(run.store, run.settings, time.time())
    run.store.delete_orphans()
    run.ledger.upkept(expired=done.expired, evicted=done.evicted, evicted_bytes=done.bytes, trimmed=done.trimmed)


Step = Callable[[Run], Awaitable[None]]
# In this order; after a signal no more of them is begun. A step that has something to tell puts it into `run.told`.
STEPS: tuple[Step, ...] = (ask_again, merge_duplicates, distil_guidance, evict, teach)


async def run(
    settings: config.Config, options: Options, progress: Progress, environ: Mapping[str, str] | None = None
) -> Report:
    """One run, begun or joined. Raises ConfigError, StoreError."""
    models = plan.models(settings)
    asked = (models.teacher, models.judge)
    keys = {b.name: _key(b, os.environ if environ is None else environ) for b in asked}
    # no connection is used twice: what was sent on one that had just closed would go out, and be billed, a second time
    with closing(open_replay_store(settings)) as store:
        async with make_session(reuse=False) as session:
            began = time.monotonic()
            ledger = Ledger(store, settings.replay.usd_budget)
            gate = LoadGate(
                load_of_proxy(settings.server, session.http), settings.replay.pause_above_load, options.max_wait_s
            )
            redactor = Redactor.of(settings.privacy)
            job = Job(
                settings.replay,
                store,
                ledger,
                Caller(ledger, gate, redactor, options.pace),
                teacher=make_model(models.teacher, keys[models.teacher.name], session),
                judge=make_model(models.judge, keys[models.judge.name], session),
                tokenizer=make_tokenizer(settings.by_price()[-1].tokenizer),
                progress=progress,
                pays_in_money=models.pays_in_money,
            )
            ledger.enter()
            at_work = Run(settings, options, store, ledger, models, job)
            with _stopped_by_signals(at_work):
                for step in STEPS:
                    if not at_work.interrupted:
                        await step(at_work)
        seconds = time.monotonic() - began
        ledger.leave(seconds)
        return _reported(at_work, seconds)


def _reported(run: Run, seconds: float) -> Report:
    job = run.job
    assert job.stopped is not None
    return report.collect(
        run.store,
        run.ledger,
        tenant=run.options.tenant,
        seconds=seconds,
        stopped=job.stopped,
        error=job.error,
        considered=run.considered,
        verdicts=Counter[Verdict](job.verdicts),
        decided=Counter[By](job.decided),
        cut_off=job.cut_off,
        recovered=job.recovered,
        cache=eviction.plan(run.store.weighed(), run.settings.cache, time.time()),
        capacity_bytes=run.settings.cache.capacity_bytes,
        told=run.told,
    )


def _key(backend: config.Backend, environ: Mapping[str, str]) -> str | None:
    return config.secret(environ, backend.key_env, f"backends: {backend.name}") if backend.key_env else None


@contextlib.contextmanager
def _stopped_by_signals(run: Run) -> Iterator[None]:
    """The first SIGTERM or SIGINT lets the calls in flight come to their end; a second one does not wait."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        run.interrupted = True
        run.job.stop(Stop.INTERRUPTED)
        _restore()

    def _restore() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        _restore()
