"""The load, in a process of its own: what it costs is not the contestants'. Speaks just enough HTTP.

    python -m tests.bench.load PORT <<< '{"phase": "open", ...}'

Reads phases as JSON lines and answers each with one. Phases: `open` (a fixed rate, latency counted from the time at
which a request was due), `closed` (so many connections, each with its next request as soon as it has an answer).
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import Any, cast

import uvloop

_STAMP = re.compile(rb'"content":"(\d+\.\d+) "')
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Client(asyncio.Protocol):
    """One connection. An answer is: its status, the time of its first event, its end, and the delay of every event."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.answer: asyncio.Future[tuple[int, float, list[float]]] | None = None

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, float, list[float]]]:
        self.answer = asyncio.get_running_loop().create_future()
        self.data = b""
        self.end = -1
        self.first = 0.0
        self.delays: list[float] = []
        self.transport.write(request)
        return self.answer

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        stamps = _STAMP.findall(data)
        if stamps:
            self.first = self.first or now
            self.delays += [now - float(stamp) for stamp in stamps]
        self.data += data
        if self.end < 0 and (head := self.data.find(b"\r\n\r\n")) >= 0:
            found = _LENGTH.search(self.data, 0, head)
            self.end = head + 4 + int(found[1]) if found else 0
        chunked = self.end == 0
        if self.data.endswith(b"\r\n0\r\n\r\n") if chunked else 0 < self.end <= len(self.data):
            self.done()

    def done(self) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_result((int(self.data[9:12]), self.first, self.delays))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_result((0, 0.0, []))


class Load:
    """Requests whose prompts are new each time, or come from a few."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.count = 0
        self.bypassed = 0
        self.free: list[Client] = []

    def request(self, phase: dict[str, Any]) -> bytes:
        self.count += 1
        number = self.count % phase["prompts"] if phase["prompts"] else time.time_ns() // 1000 + self.count
        topic = phase["topics"][number % len(phase["topics"])]
        document = {
            "model": phase["model"],
            "messages": [
                {"role": "system", "content": "You are a helpful assistant. Answer briefly."},
                {"role": "user", "content": f"Case {number}: {topic}"},
            ],
            "temperature": 0,
        }
        if phase.get("events"):
            document |= {"stream": True, "max_tokens": phase["events"]}
        body = json.dumps(document).encode()
        more = "".join(f"{name}: {value}\r\n" for name, value in phase["headers"].items())
        head = (
            f"POST {phase['path']} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer sk-bench\r\nUser-Agent: OpenAI/Python 3.54.0\r\nAccept: application/json\r\n{more}"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def client(self) -> Client:
        while self.free:
            client = self.free.pop()
            if not client.transport.is_closing():
                return client
        _, made = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", self.port)
        return made

    async def one(self, phase: dict[str, Any], due: float, into: list[tuple[int, float, float, list[float]]]) -> None:
        client = await self.client()
        status, first, delays = await client.ask(self.request(phase))
        self.bypassed += b"x-iccache-decision: bypass" in client.data
        into.append((status, time.monotonic() - due, first - due, delays))
        self.free.append(client)

    async def open(self, phase: dict[str, Any]) -> list[tuple[int, float, float, list[float]]]:
        done: list[tuple[int, float, float, list[float]]] = []
        began = time.monotonic()
        tasks = []
        for i in range(phase["requests"]):
            due = began + i / phase["rate"]
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.create_task(self.one(phase, due, done)))
        await asyncio.gather(*tasks)
        return done

    async def closed(self, phase: dict[str, Any]) -> list[tuple[int, float, float, list[float]]]:
        done: list[tuple[int, float, float, list[float]]] = []
        until = time.monotonic() + phase["seconds"]
        left = phase.get("requests", 10**9)

        async def worker() -> None:
            nonlocal left
            while time.monotonic() < until and left > 0:
                left -= 1
                await self.one(phase, time.monotonic(), done)

        await asyncio.gather(*(worker() for _ in range(phase["connections"])))
        return done


async def main(port: int) -> None:
    load = Load(port)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        phase = json.loads(line)
        began = time.monotonic()
        load.bypassed = 0
        done = await (load.open if phase["phase"] == "open" else load.closed)(phase)
        good = [d for d in done if d[0] == 200]
        said = {
            "seconds": time.monotonic() - began,
            "answered": len(good),
            "failed": len(done) - len(good),
            "bypassed": load.bypassed,
            "latency": [d[1] for d in good],
            "first": [d[2] for d in good if d[3]],
            "delays": [delay for d in good for delay in d[3][1:]],
            "events": sum(len(d[3]) for d in good),
        }
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
