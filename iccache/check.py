"""`iccache check`: try everything that serving needs, and say in one line each what is wrong."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import click
import orjson

from iccache import config
from iccache.api.auth import Gate
from iccache.backends.client import BackendClient, make_session
from iccache.dialects.dialect import DIALECTS
from iccache.errors import ConfigError, IccacheError
from iccache.examples.embed import make_embedder
from iccache.examples.sqlite.key import key_of
from iccache.examples.store import open_store, shown
from iccache.examples.tokens import make_tokenizer

ASKED = {
    "chat": {"messages": [{"role": "user", "content": "ping"}], "max_tokens": 1},
    "responses": {"input": "ping", "max_output_tokens": 16},
    "messages": {"messages": [{"role": "user", "content": "ping"}], "max_tokens": 1},
}
SHOWN_BYTES = 200


class Finding(NamedTuple):
    """One line of the report."""

    what: str
    ok: bool
    detail: str


def run(settings: config.Config, as_json: bool) -> int:
    """Print the findings; 0 when all is well, 2 when the configuration is at fault, else 1."""
    findings = []
    wrong_config = False
    for what, look in _checks(settings):
        try:
            findings.append(Finding(what, True, look()))
        except ConfigError as exc:
            wrong_config = True
            findings.append(Finding(what, False, str(exc)))
        except IccacheError as exc:
            findings.append(Finding(what, False, str(exc)))
        if not as_json:
            _say(findings[-1])
    failed = any(not f.ok for f in findings)
    if as_json:
        click.echo(orjson.dumps({"ok": not failed, "checks": [f._asdict() for f in findings]}).decode())
    return 2 if wrong_config else 1 if failed else 0


def _say(finding: Finding) -> None:
    detail = " ".join(finding.detail.split("\n"))
    click.echo(f"{'ok    ' if finding.ok else 'FAILED'} {finding.what}: {detail}")


def _checks(settings: config.Config) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "configuration", lambda: _roles(settings)
    yield "tenants", lambda: _tenants(settings)
    yield "embedder", lambda: _embedder(settings)
    yield "store", lambda: _store(settings)
    for backend in settings.backends:
        yield f"backend {backend.name}", lambda b=backend: asyncio.run(_backend(b))  # type: ignore[misc]


def _roles(settings: config.Config) -> str:
    if not settings.backends:
        raise ConfigError("no backend is configured; at least one [[backends]] table is required")
    teachers = ", ".join(b.name for b in settings.teachers())
    students = ", ".join(b.name for b in settings.students()) or "none: nothing can be offloaded"
    return f"teacher: {teachers}; student: {students}"


def _tenants(settings: config.Config) -> str:
    Gate.of(settings, os.environ)
    return f"{len(settings.tenants)} with keys" if settings.tenants else "none: no key is asked for, loopback only"


def _embedder(settings: config.Config) -> str:
    started = time.perf_counter()
    embedder = make_embedder(settings.embedder)
    embedder.embed(["does it work?"])
    for backend in settings.backends:
        make_tokenizer(backend.tokenizer).count("does it work?")
    return f"{embedder.identity}, {embedder.dim} dimensions, ready in {time.perf_counter() - started:.1f} s"


def _store(settings: config.Config) -> str:
    key = key_of(settings.store, os.environ)
    store = open_store(settings.store.url, key=key)
    try:
        if not store.writable():
            raise IccacheError(f"{shown(settings.store.url)} is not writable")
        return f"{shown(settings.store.url)}, {store.count_examples()} examples" + (", encrypted" if key else "")
    finally:
        store.close()


async def _backend(backend: config.Backend) -> str:
    """Ask for one token, as a request would."""
    key = config.secret(os.environ, backend.key_env, f"backends: {backend.name}") if backend.key_env else None
    dialect = next(d for d in DIALECTS.values() if d.name == backend.dialects[0])
    body = orjson.dumps({"model": backend.model} | ASKED[dialect.name])
    started = time.perf_counter()
    session = make_session()
    try:
        headers = {"Content-Type": "application/json"}
        client = BackendClient(backend, key, session)
        async with client.send("POST", dialect.path, query="", headers=headers, body=body) as upstream:
            answer = b"".join([chunk async for chunk in upstream.chunks()])
    finally:
        await session.close()
    if upstream.status >= 400:
        said = answer.decode("utf-8", "replace")
        said = (said.replace(key, "***") if key else said)[:SHOWN_BYTES]  # some repeat the key that they refuse
        raise IccacheError(f"{backend.model} answered {upstream.status}: {said}")
    return f"{backend.model} answered in {time.perf_counter() - started:.2f} s"
