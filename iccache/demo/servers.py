"""Child processes of the demo: started with a log file, waited for until they answer, always ended."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from iccache.demo.models import Model
from iccache.errors import IccacheError

CONTEXT_TOKENS = 2048  # three short examples, the request and its answer, several times over
SLOTS = 2  # one for each task: the server goes on in the slot whose last prompt began alike
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 10.0
LAST_LINES = 3


class ServerError(IccacheError):
    """A server of the demo did not start, or ended on its own."""


@contextlib.contextmanager
def running(name: str, command: Sequence[str], log: Path, out: Path | None = None) -> Iterator[Child]:
    """`command` (python arguments) as a child process that outlives neither this block nor this process.

    What it prints goes to `log`, or to `out` unless it is an error.
    To be entered from the main thread: on Linux a child is tied to the thread that started it.
    """
    with log.open("ab") as errors, (out or log).open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "iccache.demo.leash", str(os.getpid()), sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=clean_environment(os.environ),
            start_new_session=True,  # a Ctrl-C on the terminal is ours to pass on
        )
    child = Child(name, process, log)
    try:
        yield child
    except IccacheError as exc:
        if child.process.poll() is None or isinstance(exc, ServerError):
            raise
        raise ServerError(f"{name} ended with {child.process.returncode}: {child.last_words()}") from exc
    finally:
        child.end()


class Child:
    """One child process."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log

    def end(self) -> None:
        """Ask it to end, then make it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    def wait_until_ready(self, url: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until `url` answers 200. Raises ServerError where it ends first or takes longer."""
        deadline = time.monotonic() + timeout_s
        while not answers(url):
            if self.process.poll() is not None:
                raise ServerError(f"{self.name} ended with {self.process.returncode}: {self.last_words()}")
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} does not answer at {url} after {timeout_s:.0f} s: {self.last_words()}")
            time.sleep(0.2)

    def last_words(self) -> str:
        """The end of its log, on one line."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return " | ".join([line.strip() for line in lines if line.strip()][-LAST_LINES:]) or "nothing in its log"


@contextlib.contextmanager
def model_server(model: Model, path: Path, logs: Path) -> Iterator[str]:
    """`model` behind an OpenAI-compatible server; its base URL."""
    port = free_port()
    command = ["-m", "iccache.demo.llama", "--model", str(path), "--name", model.name]
    command += ["--port", str(port), "--context", str(CONTEXT_TOKENS), "--slots", str(SLOTS)]
    with running(model.name, command, logs / f"{model.name}.log") as child:
        child.wait_until_ready(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}/v1"


@contextlib.contextmanager
def proxy_server(config: Path, port: int, logs: Path) -> Iterator[str]:
    """`iccache serve` with `config`, which names `port`; its base URL."""
    command = ["-m", "iccache", "serve", "--config", str(config)]
    with running("iccache serve", command, logs / "serve.log") as child:
        child.wait_until_ready(f"http://127.0.0.1:{port}/readyz")
        yield f"http://127.0.0.1:{port}/v1"


def run_to_end(name: str, command: Sequence[str], logs: Path) -> str:
    """What `command` prints. Raises ServerError where it fails."""
    out = logs / f"{name}.out"
    with running(name, command, logs / f"{name}.log", out) as child:
        code = child.process.wait()
    if code != 0:
        raise ServerError(f"{name} ended with {code}: {child.last_words()}")
    return out.read_text(encoding="utf-8")


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Without the variables that override iccache's configuration: the demo brings its own."""
    return {name: value for name, value in environ.items() if not (name.startswith("ICCACHE_") and "__" in name)}


def answers(url: str) -> bool:
    """Whether `url` answers 200 by now."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError, http.client.HTTPException):
        return False


def free_port() -> int:
    """A port of the loopback address that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
