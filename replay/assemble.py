"""Configuration -> objects -> a report. The only place that names concrete classes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import NamedTuple

from iccache import config
from iccache.backends.client import make_session
from iccache.backends.judge import Verdict
from iccache.examples.redact import Redactor
from iccache.examples.tokens import make_tokenizer
from replay import eviction, plan, report
from replay.calls import Caller, Pace, make_model
from replay.job import Job, Progress, Stop
from replay.ledger import Ledger
from replay.load import LoadGate, load_of_proxy
from replay.prices import NUSD
from replay.report import PlanReport, Report
from replay.store import ReplayStore, open_replay_store


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
            candidates=plan.rank(store.records(options.tenant), settings.replay, models, options.limit),
            due=eviction.plan(store.weighed(), settings.cache, time.time()),
            capacity_bytes=settings.cache.capacity_bytes,
        )


async def run(
    settings: config.Config, options: Options, progress: Progress, environ: Mapping[str, str] | None = None
) -> Report:
    """One run, begun or joined. Raises ConfigError, StoreError."""
    models = plan.models(settings)
    keys = {b.name: _key(b, os.environ if environ is None else environ) for b in models}
    # no connection is used twice: what was sent on one that had just closed would go out, and be billed, a second time
    with closing(open_replay_store(settings)) as store:
        async with make_session(reuse=False) as session:
            began = time.monotonic()
            ledger = Ledger(store, settings.replay.usd_budget)
            gate = LoadGate(
                load_of_proxy(settings.server, session), settings.replay.pause_above_load, options.max_wait_s
            )
            redactor = Redactor(settings.privacy.redact, settings.privacy.patterns)
            job = Job(
                settings.replay,
                store,
                ledger,
                Caller(ledger, gate, redactor, options.pace),
                teacher=make_model(models.teacher, keys[models.teacher.name], session),
                judge=make_model(models.judge, keys[models.judge.name], session),
                tokenizer=make_tokenizer(settings.by_price()[-1].tokenizer),
                progress=progress,
            )
            ledger.enter()
            candidates = plan.rank(store.records(options.tenant), settings.replay, models, options.limit)
            with _stopped_by_signals(job):
                stopped = await job.run(candidates, min(options.workers, models.teacher.max_in_flight))
        if stopped is not Stop.INTERRUPTED:
            done = eviction.upkeep(store, settings, time.time())
            ledger.upkept(expired=done.expired, evicted=done.evicted, evicted_bytes=done.bytes, trimmed=done.trimmed)
        seconds = time.monotonic() - began
        ledger.leave(seconds)
        return _reported(store, ledger, settings, options, job, len(candidates), seconds)


def _reported(
    store: ReplayStore,
    ledger: Ledger,
    settings: config.Config,
    options: Options,
    job: Job,
    considered: int,
    seconds: float,
) -> Report:
    assert job.stopped is not None
    return report.collect(
        store,
        ledger,
        tenant=options.tenant,
        seconds=seconds,
        stopped=job.stopped,
        error=job.error,
        considered=considered,
        verdicts=Counter[Verdict](job.verdicts),
        cache=eviction.plan(store.weighed(), settings.cache, time.time()),
        capacity_bytes=settings.cache.capacity_bytes,
    )


def _key(backend: config.Backend, environ: Mapping[str, str]) -> str | None:
    return config.secret(environ, backend.key_env, f"backends: {backend.name}") if backend.key_env else None


@contextlib.contextmanager
def _stopped_by_signals(job: Job) -> Iterator[None]:
    """The first SIGTERM or SIGINT lets the calls in flight come to their end; a second one does not wait."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        job.stop(Stop.INTERRUPTED)
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
