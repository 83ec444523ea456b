"""One question to one backend: paid for in advance, tried a few times, never asked twice.

What a failure costs is not always known. Certainly nothing: no connection, or a reply that refuses (4xx, 500, 503).
Perhaps everything: a connection that broke, a timeout, a gateway that says so (502, 504), or a 200 that nobody can
read. In the second case what was reserved stays reserved, and another try needs a reservation of its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
from tenacity import AsyncRetrying, RetryCallState, stop_after_attempt, wait_exponential_jitter

from iccache import config
from iccache.backends.client import BackendClient, Session
from iccache.dialects.answer import load, mapping
from iccache.dialects.chat import Chat
from iccache.errors import BackendError, IccacheError
from iccache.examples.admission import ENDED_WELL
from iccache.examples.redact import Redactor
from iccache.types import Answer, Reason, Usage
from replay.ledger import Item, Ledger
from replay.load import LoadGate
from replay.prices import Prompt, most_input_tokens, most_nusd, nusd, prompt_bytes

TRIES = 4
TRIES_PERHAPS_BILLED = 2  # since each may have been paid for
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
RETRIABLE = frozenset({408, 429})  # and every 5xx
ITS_FAULT = frozenset({400, 413, 422})  # of this one question; another may be answered
PERHAPS_BILLED = frozenset({408, 502, 504})
KEPT_ERROR_CHARS = 200
KEPT_ERROR_BYTES = 1 << 16
INSTEAD = {"max_tokens": "max_completion_tokens", "temperature": None}  # of a field that a model refuses


SENTENCE_END = re.compile(r"(?<!\d)[.!?\u3002][\"'*)\]]*(?=\s|$)")  # not of the number before an entry of a list

ANSWER, JUDGEMENT, GUIDANCE = "answer", "judgement", "guidance"  # kinds of calls


class Unanswerable(IccacheError):
    """The backend refuses this question, whenever it is asked."""


class Unreadable(BackendError):
    """A reply of 200 that is no answer. It was perhaps billed, and would hardly be better a second time."""


class Refused(IccacheError):
    """A reply other than 200."""

    def __init__(self, backend: str, status: int, body: bytes, retry_after_s: float | None = None) -> None:
        error = mapping(mapping(load(body)).get("error"))
        said = " ".join(str(error.get("message") or "").split())[:KEPT_ERROR_CHARS]
        super().__init__(f"{backend} answered {status}{': ' + said if said else ''}")
        self.status = status
        self.param = error.get("param")
        self.retry_after_s = retry_after_s

    @property
    def retriable(self) -> bool:
        return self.status in RETRIABLE or self.status >= 500


@dataclass
class Model:
    """A backend to ask, and what was learned about the fields it takes."""

    backend: config.Backend
    client: BackendClient
    names: dict[str, str | None] = field(default_factory=lambda: {name: name for name in INSTEAD})

    def body(self, prompt: Prompt) -> bytes:
        asked: dict[str, Any] = {
            "model": self.backend.model,
            "messages": [message._asdict() for message in prompt.messages],
        }
        for ours, value in (("max_tokens", prompt.max_output_tokens), ("temperature", prompt.temperature)):
            theirs = self.names[ours]
            if theirs is not None:
                asked[theirs] = value
        return orjson.dumps(asked)

    def adapt(self, refused: Refused) -> bool:
        """Whether the refusal was about a field that newer models name otherwise or do not take."""
        if refused.status != 400 or refused.param not in INSTEAD or self.names[refused.param] != refused.param:
            return False
        self.names[refused.param] = INSTEAD[refused.param]
        return True


class Pace(NamedTuple):
    """How often and how fast a call is tried again."""

    tries: int = TRIES
    first_pause_s: float = FIRST_PAUSE_S


class Caller:
    """Asks for one invocation of replay."""

    def __init__(self, ledger: Ledger, gate: LoadGate, redactor: Redactor, pace: Pace = Pace()) -> None:  # noqa: B008
        self.ledger = ledger
        self.gate = gate
        self.redactor = redactor
        self.pace = pace

    async def ask(self, item: Item, kind: str, model: Model, prompt: Prompt) -> str:
        """What `model` says, redacted; "" for an answer (not for a judgement) that is not whole, or not text. Of
        guidance that came to its limit, the whole sentences.

        Raises OutOfBudget, Overloaded, Unanswerable, and Refused or BackendError when all tries failed.
        """
        digest = identity(model, prompt)
        known = self.ledger.answered(item, digest)
        if known is not None:
            return known
        tries = AsyncRetrying(
            stop=stop_after_attempt(self.pace.tries),
            wait=self._pause,
            retry=_worth_another_try,
            reraise=True,
        )
        try:
            return await tries(self._adapting, item, kind, model, prompt, digest)
        except Refused as exc:
            if exc.status in ITS_FAULT:
                raise Unanswerable(str(exc)) from exc
            raise

    async def _adapting(self, item: Item, kind: str, model: Model, prompt: Prompt, digest: bytes) -> str:
        while True:
            try:
                return await self._once(item, kind, model, prompt, digest)
            except Refused as exc:
                if not model.adapt(exc):
                    raise

    async def _once(self, item: Item, kind: str, model: Model, prompt: Prompt, digest: bytes) -> str:
        await self.gate.wait()
        call = self.ledger.reserve(item, kind, model.backend.name, most_nusd(model.backend, prompt))
        try:
            answer = await _post(model, prompt)
        except BackendError as exc:
            if exc.unbilled:
                self.ledger.free(call)
            raise
        except Refused as exc:
            if exc.status not in PERHAPS_BILLED:
                self.ledger.free(call)
            raise
        usage = answer.usage or most_used(prompt, answer)
        text = self.redactor.redact(_said(kind, answer))
        self.ledger.confirm(call, item, usage, nusd(model.backend, usage.input, usage.output), digest, text)
        return text

    def _pause(self, state: RetryCallState) -> float:
        """Doubling, with jitter; as long as the upstream asks for, within reason."""
        pause = self.pace.first_pause_s
        jittered = wait_exponential_jitter(multiplier=pause, max=LONGEST_PAUSE_S, jitter=pause)
        error = state.outcome.exception() if state.outcome is not None else None
        asked = error.retry_after_s if isinstance(error, Refused) else None
        return max(jittered(state), min(asked or 0.0, LONGEST_PAUSE_S))


def identity(model: Model, prompt: Prompt) -> bytes:
    """Equal for calls of which one answer is enough."""
    asked = [list(message) for message in prompt.messages]
    what = orjson.dumps([model.backend.name, model.backend.model, asked, prompt.temperature, prompt.sample])
    return hashlib.blake2b(what, digest_size=16).digest()


def usable(answer: Answer) -> bool:
    """A whole answer in text that came to its own end, and says so: a limit was set, so silence proves nothing."""
    return answer.complete and not answer.has_tool_calls and (answer.finish_reason or "").lower() in ENDED_WELL


def _said(kind: str, answer: Answer) -> str:
    """What of an answer is used."""
    if kind == JUDGEMENT or usable(answer):
        return answer.text
    cut = kind == GUIDANCE and answer.finish_reason == "length" and not answer.has_tool_calls
    return whole_sentences(answer.text) if cut else ""


def whole_sentences(text: str) -> str:
    """`text` up to the end of its last sentence."""
    ends = [found.end() for found in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def most_used(prompt: Prompt, answer: Answer) -> Usage:
    """A bound on the tokens of a call whose usage was not reported."""
    made = min(prompt.max_output_tokens, most_input_tokens((len(answer.text.encode()),)))
    return Usage(most_input_tokens(prompt_bytes(prompt)), made, estimated=True)


async def _post(model: Model, prompt: Prompt) -> Answer:
    """The answer, read to its end. Raises BackendError, Refused."""
    reader = Chat().reader(stream=False)
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    async with model.client.send("POST", Chat.path, headers=headers, body=model.body(prompt)) as upstream:
        kept = bytearray()
        async for chunk in upstream.chunks():
            reader.feed(chunk)
            if upstream.status != 200 and len(kept) < KEPT_ERROR_BYTES:
                kept += chunk
        if upstream.status != 200:
            raise Refused(model.backend.name, upstream.status, bytes(kept), _retry_after(upstream.headers))
    answer = reader.answer()
    if not answer.complete:
        raise Unreadable(f"{model.backend.name} sent no whole answer", Reason.RESET)
    return answer


def _retry_after(headers: Mapping[str, str]) -> float | None:
    value = headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else None


def _worth_another_try(state: RetryCallState) -> bool:
    exc = state.outcome.exception() if state.outcome is not None else None
    if isinstance(exc, Refused) and exc.status not in PERHAPS_BILLED:
        return exc.retriable
    if isinstance(exc, BackendError) and exc.reason is Reason.CONNECT:
        return True
    billed = isinstance(exc, BackendError | Refused) and not isinstance(exc, Unreadable)
    return billed and state.attempt_number < TRIES_PERHAPS_BILLED


def make_model(backend: config.Backend, key: str | None, session: Session) -> Model:
    return Model(backend, BackendClient(backend, key, session))
