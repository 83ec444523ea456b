"""Every answer a model ever gave, so that nothing is asked twice: `data/<model>.jsonl.xz`, a line an answer.

An answer is known by its prompt: the messages, and how long the answer may be. Asking is greedy, one request at a time,
one thread. New answers are appended to a plain file beside the packed one as they come; `pack` merges the two.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

DATA = Path(__file__).with_name("data")
TIMEOUT_S = 600

Messages = Sequence[dict[str, str]]


class Missing(LookupError):
    """An answer that is not on file, and nobody to ask."""


class Said(NamedTuple):
    """One answer, and what it took."""

    text: str
    prompt_tokens: int
    new_tokens: int  # of the prompt, those that the engine had not kept from the prompt before
    output_tokens: int
    prompt_ms: float  # the engine's own time for those: the time to the first token. As busy as the machine was
    output_ms: float


class Answers:
    """One model's answers; asks `base_url`, where one is given, for what is not on file."""

    def __init__(self, model: str, base_url: str | None = None, folder: Path = DATA) -> None:
        self.model = model
        self.packed = folder / f"{model}.jsonl.xz"
        self.fresh = folder / f"{model}.fresh.jsonl"
        self.asked = 0
        self._known = {key: Said(*said) for key, *said in self._lines()}
        self._url = urlsplit(base_url) if base_url else None
        self._connection: http.client.HTTPConnection | None = None

    def _lines(self) -> list[Any]:
        lines: list[str] = []
        if self.packed.exists():
            with lzma.open(self.packed, "rt", encoding="utf-8") as packed:
                lines += packed
        if self.fresh.exists():
            text = self.fresh.read_text(encoding="utf-8")
            lines += text[: text.rfind("\n") + 1].splitlines()  # the last line of a killed run may be half a line
        return [json.loads(line) for line in lines]

    def __len__(self) -> int:
        return len(self._known)

    def knows(self, messages: Messages, max_tokens: int) -> bool:
        return key(messages, max_tokens) in self._known

    def get(self, messages: Messages, max_tokens: int) -> Said:
        """The answer, asked for where it is not known. Raises Missing where nobody can be asked."""
        name = key(messages, max_tokens)
        if name not in self._known:
            if self._url is None:
                raise Missing(f"{self.model} was never asked: {messages[-1]['content'][:80]!r}")
            said = self.ask(messages, max_tokens)
            with self.fresh.open("a", encoding="utf-8") as out:
                out.write(json.dumps([name, *said], ensure_ascii=False) + "\n")
            self._known[name] = said
            self.asked += 1
        return self._known[name]

    def pack(self) -> None:
        """All that is known into the packed file, sorted, so that the same answers make the same file."""
        self.packed.parent.mkdir(exist_ok=True)
        with lzma.open(self.packed, "wt", encoding="utf-8", preset=9) as out:
            for name, said in sorted(self._known.items()):
                out.write(json.dumps([name, *said], ensure_ascii=False) + "\n")
        self.fresh.unlink(missing_ok=True)

    def ask(self, messages: Messages, max_tokens: int) -> Said:
        """Asked now, whether it is on file or not; nothing is written."""
        body = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0, "seed": 1}
        reply = self._post(json.dumps(body).encode())
        timings, usage = reply["timings"], reply["usage"]
        return Said(
            reply["choices"][0]["message"]["content"],
            usage["prompt_tokens"],
            timings["prompt_n"],
            usage["completion_tokens"],
            round(timings["prompt_ms"], 1),
            round(timings["predicted_ms"], 1),
        )

    def _post(self, body: bytes) -> dict[str, Any]:
        """One POST; a connection that the server has closed meanwhile is opened anew, once."""
        assert self._url is not None
        assert self._url.hostname is not None
        for last in (False, True):
            if self._connection is None:
                self._connection = http.client.HTTPConnection(self._url.hostname, self._url.port, timeout=TIMEOUT_S)
            try:
                self._connection.request(
                    "POST", f"{self._url.path}/chat/completions", body, {"Content-Type": "application/json"}
                )
                reply = self._connection.getresponse()
                content = reply.read()
            except (http.client.HTTPException, OSError):
                self._connection = None
                if last:
                    raise
                continue
            if reply.status != 200:
                raise RuntimeError(f"{self.model} answered {reply.status}: {content[:300]!r}")
            parsed: dict[str, Any] = json.loads(content)
            return parsed
        raise AssertionError


def key(messages: Messages, max_tokens: int) -> str:
    """16 hex digits that name a prompt."""
    text = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)
    return hashlib.blake2b(f"{max_tokens} {text}".encode(), digest_size=8).hexdigest()
