"""A whole proxy with two scripted upstreams, in this process or as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from multidict import CIMultiDictProxy

from iccache import config
from iccache.api.serve import serving
from iccache.assemble import Proxy
from tests.fakes import ScriptedUpstream

READY_WITHIN_S = 60


def settings(small: str, large: str, store: Path, /, **sections: Any) -> dict[str, Any]:
    """A configuration of two backends, `small` the cheap student and `large` the teacher, as the file would have it."""
    return {
        "server": {"port": 0, "drain_s": 2} | sections.pop("server", {}),
        "store": {"url": f"sqlite:///{store}"} | sections.pop("store", {}),
        "embedder": {"backend": "hash"} | sections.pop("embedder", {}),
        "backends": [
            {
                "name": "small",
                "base_url": small,
                "model": "small-model",
                "usd_per_million_input_tokens": 0.1,
                "usd_per_million_output_tokens": 0.4,
            }
            | sections.pop("small", {}),
            {
                "name": "large",
                "base_url": large,
                "model": "large-model",
                "usd_per_million_input_tokens": 1.0,
                "usd_per_million_output_tokens": 4.0,
            }
            | sections.pop("large", {}),
            *sections.pop("more_backends", []),
        ],
        **sections,
    }


@dataclass
class World:
    """What a test talks to."""

    small: ScriptedUpstream
    large: ScriptedUpstream
    proxy: Proxy
    url: str  # without /v1
    http: aiohttp.ClientSession

    async def ask(self, text: str, model: str = "auto", headers: dict[str, str] | None = None, **body: Any) -> Answered:
        """One chat completion, read whole."""
        document = {"model": model, "messages": [{"role": "user", "content": text}]} | body
        return await self.post("/v1/chat/completions", document, headers)

    async def post(self, path: str, document: Any, headers: dict[str, str] | None = None) -> Answered:
        async with self.http.post(self.url + path, json=document, headers=headers) as response:
            return Answered(response.status, response.headers, await response.read())

    async def get(self, path: str, headers: dict[str, str] | None = None) -> Answered:
        async with self.http.get(self.url + path, headers=headers) as response:
            return Answered(response.status, response.headers, await response.read())

    async def teach(self, text: str, answer: str, headers: dict[str, str] | None = None, **body: Any) -> Answered:
        """The teacher answers `text` with `answer`, and the pair becomes an example before this returns."""
        before = await self.examples()
        self.large.script.answer = answer
        answered = await self.ask(text, "large", headers, **body)
        self.large.script.answer = None
        await self.until(lambda: self.examples(), lambda count: count > before)
        await self.proxy.learner.catch_up()
        return answered

    async def examples(self) -> int:
        return await self.proxy.read(lambda store: store.count_examples())

    async def feedback(self, request_id: str, **verdict: Any) -> Answered:
        answered = await self.post("/v1/feedback", {"request_id": request_id} | verdict)
        await self.proxy.learner.catch_up()
        return answered

    async def recorded(self, request_id: str) -> Any:
        """The exchange, as soon as it is in the store."""
        return await self.until(
            lambda: self.proxy.read(lambda store: store.exchange(request_id)), lambda found: found is not None
        )

    async def until(self, look: Any, good: Any, seconds: float = 10) -> Any:
        """What `look` finds, as soon as it is `good`."""
        async with asyncio.timeout(seconds):
            while not good(found := await look()):  # noqa: ASYNC110 - whatever can be looked at, can be waited for
                await asyncio.sleep(0.01)
        return found


@dataclass
class Answered:
    """An answer, read whole."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return str(self.json["choices"][0]["message"]["content"])

    @property
    def id(self) -> str:
        return self.headers["x-request-id"]

    def header(self, name: str) -> str | None:
        """`x-iccache-NAME`."""
        return self.headers.get(f"x-iccache-{name}")


@contextlib.asynccontextmanager
async def world(
    tmp_path: Path, environ: dict[str, str] | None = None, seed: int = 0, **sections: Any
) -> AsyncIterator[World]:
    """A proxy in this process, on a free port, as `iccache serve` sets it up."""
    async with ScriptedUpstream(models=["small-model"]) as small, ScriptedUpstream(models=["large-model"]) as large:
        data = settings(small.base_url, large.base_url, tmp_path / "ic.db", **sections)
        proxy = Proxy(config.parse(data), environ or {}, seed=seed)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            async with serving(proxy, listener, last_word_s=1), aiohttp.ClientSession() as http:
                yield World(small, large, proxy, f"http://127.0.0.1:{port}", http)


class Process:
    """`iccache serve` as a user runs it. Always ended."""

    def __init__(self, file: Path, environ: dict[str, str] | None = None) -> None:
        self.file = file
        self.environ = os.environ | (environ or {})

    def start(self) -> str:
        """Its URL, once it listens."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "iccache", "serve", "--config", str(self.file)],
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("iccache listens on "):
            raise AssertionError(f"did not start: {line}{self.process.communicate(timeout=10)[1]}")
        return line.removeprefix("iccache listens on ").strip()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        self.process.communicate(timeout=READY_WITHIN_S)
        return self.process.returncode

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def write(file: Path, data: dict[str, Any]) -> Path:
    """`data` as a configuration file."""
    file.write_text(config.to_toml(config.parse(data)))
    return file


def lines(stream: bytes) -> Iterator[dict[str, Any]]:
    """The JSON events of a stream."""
    for line in stream.split(b"\n"):
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])
