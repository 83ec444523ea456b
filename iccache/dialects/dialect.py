"""The APIs that are understood: how a request is read and rewritten, and how an answer and an error look.

dialect         this seam, and the table of its implementations
chat, responses, messages
body            what every request body has to be
conversation    turns -> what is asked now, and what stands in the way of examples
compose         the body for one backend
answer          the answer, understood while it passes
errors          our own errors
splice, sse     edits of JSON bytes; events out of stream bytes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from iccache.config import Placement
from iccache.dialects.chat import Chat
from iccache.dialects.messages import Messages
from iccache.dialects.responses import Responses
from iccache.errors import RequestError
from iccache.types import Answer, Ask, Shot


class AnswerReader(Protocol):
    """Understands one answer of an upstream. Never raises; keeps a bounded amount."""

    def feed(self, chunk: bytes) -> None: ...

    def answer(self) -> Answer:
        """What has come so far. `finish_reason` is in the words of chat completions, whatever the dialect."""


class Dialect(Protocol):
    @property
    def name(self) -> str:
        """As in a backend's `dialects`."""

    @property
    def path(self) -> str: ...

    def read(self, body: bytes) -> Ask:
        """Understand a request. Raises RequestError(400) for what no upstream could serve either.

        JSON of a shape that is not known is not refused: its `bypass` says that it passes through.
        """

    def compose(self, ask: Ask, *, model: str | None, shots: Sequence[Shot], placement: Placement = "start") -> bytes:
        """The body for one backend; `ask.body` itself when nothing has to change.

        `model` replaces the client's unless None. `shots` become turns after the system and developer messages that
        open the conversation, or before its last question. The body's `iccache` object is taken out. Every other byte
        stays.
        """

    def reader(self, stream: bool) -> AnswerReader:
        """For an answer that comes as server-sent events, or as one JSON body."""

    def error(self, error: RequestError) -> bytes:
        """The JSON body of an error."""

    def error_event(self, error: RequestError) -> bytes:
        """What to append to a stream that broke."""


DIALECTS: Mapping[str, Dialect] = MappingProxyType({d.path: d for d in (Chat(), Responses(), Messages())})
