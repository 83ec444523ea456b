"""An upstream that costs next to nothing: one asyncio Protocol, one fixed answer, streams in a fixed beat.

    python -m tests.bench.mock_upstream PORT

Every event of a stream carries the time at which it was sent (CLOCK_MONOTONIC, the same in all processes), so that its
delay through a proxy is a true one-way delay. `max_tokens` says how many events, STEP_S apart.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import cast

import uvloop

STEP_S = 0.005
TEXT = "lorem ipsum dolor sit amet " * 20
_USAGE = {"prompt_tokens": 40, "completion_tokens": 100, "total_tokens": 140}
_MESSAGE = {"role": "assistant", "content": TEXT}
_WHOLE = {
    "id": "chatcmpl-mock", "object": "chat.completion", "created": 1_700_000_000, "model": "mock",
    "choices": [{"index": 0, "message": _MESSAGE, "finish_reason": "stop", "logprobs": None}], "usage": _USAGE,
}  # fmt: skip
_BODY = json.dumps(_WHOLE).encode()
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"chatcmpl-mock","object":"chat.completion.chunk","created":1700000000,"model":"mock",'
    b'"choices":[{"index":0,"delta":{"content":"%.6f "},"finish_reason":null}]}\n\n'
)
LAST = b'data: {"id":"chatcmpl-mock","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_EVENTS = re.compile(rb'"max_tokens": ?(\d+)')


class Upstream(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.data = b""

    def data_received(self, data: bytes) -> None:
        self.data += data
        while (end := self.data.find(b"\r\n\r\n")) >= 0:
            found = _LENGTH.search(self.data, 0, end)
            whole = end + 4 + (int(found[1]) if found else 0)
            if len(self.data) < whole:
                return
            body, self.data = self.data[end + 4 : whole], self.data[whole:]
            if b'"stream": true' in body or b'"stream":true' in body:
                asked = _EVENTS.search(body)
                self.transport.write(HEAD)
                self.step(int(asked[1]) if asked else 20)
            else:
                self.transport.write(WHOLE)

    def step(self, left: int) -> None:
        if self.transport.is_closing():
            return
        event = EVENT % time.monotonic() if left else LAST
        self.transport.write(b"%x\r\n%b\r\n%b" % (len(event), event, b"" if left else b"0\r\n\r\n"))
        if left:
            asyncio.get_running_loop().call_later(STEP_S, self.step, left - 1)


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
