"""Real models behind a record: what they once said to a body they say again, at once and for nothing.

An upstream on loopback. A body that was asked before is answered from a file; another goes to the model's own server,
which is started when it is first needed, and the answer is added to the file. So a measurement that was stopped goes on
where it was, and one that is recorded whole needs no model. The n-th time that a run asks the same body it gets the
n-th answer where answers are sampled, and the first where they are greedy. The ledger is the upstream's own.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import aiohttp
import orjson
from aiohttp import web

from iccache.demo import models
from iccache.demo.servers import model_server

STARTS = 3  # of a model's server, where it breaks down


class Billed(NamedTuple):
    """One call, as the upstream counts it."""

    model: str
    input: int
    output: int


class Recorded:
    """Answers of `models.MODELS`, recorded in `file`: one JSON line for an answer, in gzip members."""

    def __init__(self, file: Path, scratch: Path) -> None:
        self.file = file
        self.scratch = scratch
        self.ledger: list[Billed] = []
        self.asked_models = 0  # answers that were not recorded
        self._known: dict[str, list[bytes]] = {}
        self._times: Counter[str] = Counter()
        self._urls: dict[str, str] = {}
        self._stack = contextlib.ExitStack()
        if file.exists():
            for line in gzip.decompress(file.read_bytes()).splitlines():
                row = orjson.loads(line)
                self._known.setdefault(row["key"], []).append(orjson.dumps(row["answer"]))

    def begin(self) -> None:
        """A new run: the n-th answer is the first again, and the ledger is empty."""
        self._times.clear()
        self.ledger.clear()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Its base URL."""
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        finally:
            await runner.cleanup()
            self._stack.close()

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        asked = orjson.loads(body)
        key = hashlib.blake2b(body, digest_size=12).hexdigest()
        nth = self._times[key] if asked.get("temperature") else 0  # a greedy answer is always the same
        self._times[key] += 1
        known = self._known.setdefault(key, [])
        if nth >= len(known):
            known.append(await self._asked(asked["model"], body))
            self._append(key, known[-1])
        answer = orjson.loads(known[nth])
        usage = answer["usage"]
        self.ledger.append(Billed(asked["model"], usage["prompt_tokens"], usage["completion_tokens"]))
        return web.Response(body=known[nth], content_type="application/json")

    async def _asked(self, model: str, body: bytes) -> bytes:
        self.asked_models += 1
        for _ in range(STARTS - 1):
            try:
                return await self._said(model, body)
            except aiohttp.ClientError:
                self._urls.pop(model)  # its server is gone: another is started
        return await self._said(model, body)

    async def _said(self, model: str, body: bytes) -> bytes:
        if model not in self._urls:
            self._urls[model] = self._stack.enter_context(self._server(model))
        timeout = aiohttp.ClientTimeout(total=600)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(f"{self._urls[model]}/chat/completions", data=body) as reply,
        ):
            said = await reply.json()
            if reply.status != 200:
                raise web.HTTPBadGateway(text=str(said))
        kept = {name: said[name] for name in ("model", "choices", "usage")}
        return orjson.dumps({"object": "chat.completion", **kept})

    def _server(self, name: str) -> contextlib.AbstractContextManager[str]:
        (model,) = (m for m in models.MODELS if m.name == name)
        (path,) = models.fetch(models.default_folder(), print, [model]).values()
        return model_server(model, path, self.scratch)

    def _append(self, key: str, answer: bytes) -> None:
        """One gzip member more: a run that is cut off has lost nothing."""
        line = orjson.dumps({"key": key, "answer": orjson.loads(answer)}) + b"\n"
        with self.file.open("ab") as file:
            file.write(gzip.compress(line))

    def compact(self) -> None:
        """The same content as one gzip member, which is a fraction of the size."""
        lines = b"".join(
            orjson.dumps({"key": key, "answer": orjson.loads(answer)}) + b"\n"
            for key, answers in sorted(self._known.items())
            for answer in answers
        )
        if lines:
            self.file.write_bytes(gzip.compress(lines, 9, mtime=0))


@contextlib.asynccontextmanager
async def asking(file: Path) -> AsyncIterator[tuple[Recorded, str, aiohttp.ClientSession]]:
    """The answers in `file`, the base URL they are had at, and a session to ask with; compacted at the end if there are
    new ones."""
    with tempfile.TemporaryDirectory() as scratch:
        recorded = Recorded(file, Path(scratch))
        timeout = aiohttp.ClientTimeout(total=600)
        async with recorded.serving() as base_url, aiohttp.ClientSession(timeout=timeout) as session:
            yield recorded, base_url, session
        if recorded.asked_models:
            recorded.compact()
