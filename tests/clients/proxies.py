"""The servers of a run: the upstreams, and `iccache serve` in front of each, all on free ports and always ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from iccache import config
from tests.clients.upstream import MODEL

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"CLIENT_KEY": "client-key", "UPSTREAM_KEY": "upstream-key"}
STEADY_READY_WITHIN_S = 120
SMALL_TALK = ("one two three", "What is 17 plus 25?", "Say hello", "one two", "And in Italian?", "one", "hello")


def started(command: Sequence[str | Path], log: Path) -> subprocess.Popen[str]:
    with log.open("a") as errors:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | KEYS,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )


def ended(process: subprocess.Popen[str]) -> None:
    """With whatever it started itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)


@contextlib.contextmanager
def running(command: Sequence[str | Path], log: Path) -> Iterator[str]:
    """A server that prints where it listens; that line."""
    process = started(command, log)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{command} did not start; see {log}")
        yield line
    finally:
        ended(process)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def scripted(log: Path) -> Iterator[str]:
    with running([sys.executable, "-m", "tests.clients.upstream"], log) as url:
        yield url


@contextlib.contextmanager
def steady(program: Path, document: Path, log: Path) -> Iterator[str]:
    """The mock server of the OpenAI SDKs' own tests, which answers by the published description of the API."""
    port = free_port()
    formats = [f"--validator-{a}-{b}-format=brackets" for a in ("query", "form") for b in ("array", "object")]
    process = started([program, "-q", "--host", "127.0.0.1", "-p", str(port), *formats, document], log)
    try:
        deadline = time.monotonic() + STEADY_READY_WITHIN_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_x-steady/health", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"steady did not start; see {log}") from None
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        ended(process)


@contextlib.contextmanager
def proxy(name: str, settings: dict[str, Any], folder: Path) -> Iterator[str]:
    """`iccache serve` with a new store."""
    for old in folder.glob(f"{name}.db*"):
        old.unlink()
    settings = {
        "server": {"port": 0, "drain_s": 1},
        "store": {"url": f"sqlite:///{folder / name}.db"},
        "embedder": {"backend": "hash"},
        **settings,
    }
    file = folder / f"{name}.toml"
    file.write_text(config.to_toml(config.parse(settings)))
    command = [sys.executable, "-m", "iccache", "serve", "--config", file]
    with running(command, folder / f"{name}.log") as line:
        yield line.removeprefix("iccache listens on ") + "/v1"


def two(upstream: str, models: tuple[str, str], **sections: Any) -> dict[str, Any]:
    """A student and a teacher, both the scripted upstream, behind a key."""
    prices = (0.1, 1.0)
    backends = [
        {
            "name": model,
            "base_url": upstream,
            "model": model,
            "key_env": "UPSTREAM_KEY",
            "usd_per_million_output_tokens": price,
        }
        for model, price in zip(models, prices, strict=True)
    ]
    return {"tenants": [{"name": "clients", "key_env": "CLIENT_KEY"}], "backends": backends, **sections}


def through(upstream: str, folder: Path) -> contextlib.AbstractContextManager[str]:
    """The model that clients name is the teacher's: it gets their bytes as they are."""
    return proxy("through", two(upstream, ("small-model", MODEL)), folder)


@contextlib.contextmanager
def routed(upstream: str, folder: Path) -> Iterator[str]:
    """The model that clients name is routed, always to the student, which is shown what the teacher said before."""
    sections = {"routing": {"models": ["auto", MODEL], "policy": "student", "decision_timeout_ms": 10_000}}
    with proxy("routed", two(upstream, ("small-model", "large-model"), **sections), folder) as url:
        for text in SMALL_TALK:
            teach(url, text)
        yield url


def any_model(upstream: str, folder: Path) -> contextlib.AbstractContextManager[str]:
    """Every name is routed, and there is nobody but one backend."""
    backend = {"name": "mock", "base_url": upstream, "model": MODEL}
    return proxy("any-model", {"backends": [backend], "routing": {"models": ["*"]}}, folder)


def teach(url: str, text: str) -> None:
    """Have the teacher answer, in chat completions, so that there is an example to show."""
    body = b'{"model": "large-model", "messages": [{"role": "user", "content": "%s"}]}' % text.encode()
    headers = {"Authorization": f"Bearer {KEYS['CLIENT_KEY']}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/chat/completions", body, headers)) as answer:
        answer.read()


def metric(url: str, name: str) -> float:
    """The sum of a metric over its labels."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + " ", name + "{")))
