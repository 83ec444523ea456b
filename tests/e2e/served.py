"""`iccache serve` as a process of its own, between a test and two scripted upstreams in the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.world import READY_WITHIN_S, Answered, Process, World, settings, write
from tests.fakes import ScriptedUpstream


@dataclass
class Served(World):
    """A World whose proxy is another process: what is not in an answer is asked of /admin and /metrics."""

    file: Path
    store: Path
    process: Process

    log: bytes = b""  # what the process wrote to stderr, once it has ended

    async def start(self) -> None:
        self.url = await asyncio.to_thread(self.process.start)

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit code, or what the signal made of it."""
        self.process.process.send_signal(number)
        return await self.ended()

    async def ended(self) -> int:
        """Wait until the process ends by itself."""
        _, log = await asyncio.to_thread(self.process.process.communicate, timeout=READY_WITHIN_S)
        self.log += log.encode()
        return self.process.process.returncode

    async def kill(self) -> None:
        await self.stop(signal.SIGKILL)

    async def run(self, *command: str, environ: dict[str, str] | None = None) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of another command on the same configuration."""
        made = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "iccache", *command, "--config", str(self.file)),
            env=self.process.environ | (environ or {}),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(READY_WITHIN_S):
            out, err = await made.communicate()
        assert made.returncode is not None
        return made.returncode, out.decode(), err.decode()

    async def feedback(self, request_id: str, **verdict: Any) -> Answered:
        return await self.post("/v1/feedback", {"request_id": request_id} | verdict)

    async def teach(self, text: str, answer: str, headers: dict[str, str] | None = None, **body: Any) -> Answered:
        before = await self.examples()
        self.large.script.answer = answer
        answered = await self.ask(text, "large", headers, **body)
        self.large.script.answer = None
        await self.until(self.examples, lambda count: count > before)
        return answered

    async def examples(self) -> int:
        return len((await self.get("/admin/examples")).json["examples"])

    async def recorded(self, request_id: str) -> Any:
        """What /admin says of the exchange, as soon as it is in the store."""
        found = await self.until(lambda: self.get(f"/admin/exchanges/{request_id}"), lambda a: a.status == 200)
        return found.json

    async def metric(self, line: str) -> float:
        """The value of one sample, named as it stands in /metrics; 0 where there is none."""
        for row in (await self.get("/metrics")).body.decode().splitlines():
            if row.startswith(line + " "):
                return float(row.removeprefix(line))
        return 0.0


@contextlib.asynccontextmanager
async def served(
    tmp_path: Path, environ: dict[str, str] | None = None, *, start: bool = True, **sections: Any
) -> AsyncIterator[Served]:
    """A proxy in its own process, on a free port."""
    async with (
        ScriptedUpstream(models=["small-model"]) as small,
        ScriptedUpstream(models=["large-model"]) as large,
        aiohttp.ClientSession() as http,
    ):
        store = tmp_path / "ic.db"
        file = write(tmp_path / "iccache.toml", settings(small.base_url, large.base_url, store, **sections))
        process = Process(file, environ)
        made = Served(small, large, None, "", http, file, store, process)  # type: ignore[arg-type]
        try:
            if start:
                await made.start()
            yield made
        finally:
            if hasattr(process, "process"):
                await asyncio.to_thread(process.__exit__, None, None, None)


def only_read(command: list[str]) -> list[str]:
    """`command` without root's power to write everywhere."""
    if os.geteuid():
        return command
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("root writes everywhere, and there is no setpriv")
    return [setpriv, "--bounding-set=-dac_override,-dac_read_search", *command]
