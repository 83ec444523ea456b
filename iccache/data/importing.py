"""`iccache import`: pairs from a file become examples, under the same rules as live exchanges.

Each batch is one commit, together with the place in the file that it reaches: whatever ends a run, the next one goes
on after the last commit.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import orjson

from iccache.data import lines
from iccache.data.lines import Bad, Line, Pair
from iccache.errors import IccacheError, StoreError
from iccache.examples.admission import unfit
from iccache.examples.embed import Embedder
from iccache.examples.redact import Redactor
from iccache.examples.store import ExampleStore
from iccache.examples.tokens import Tokenizer
from iccache.types import Example, ExampleStats, Vector

BATCH = 256  # lines in one commit
BAD_NAMED = 1000  # bad lines whose numbers are kept; beyond it they are counted
SYSTEMS_KEPT = 64  # redacted system prompts, which repeat
BACKEND = "import"  # who answered, as far as is known


@dataclass
class Counts:
    """What became of the lines so far, those of earlier runs over the same file included."""

    lines: int = 0  # that hold anything
    added: int = 0
    updated: int = 0  # the question was there already, with another answer
    known: int = 0  # question and answer were there already
    bad: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    bad_lines: list[tuple[int, str]] = field(default_factory=list)

    def add_bad(self, number: int, reason: str) -> None:
        self.bad += 1
        self.reasons[reason] += 1
        if len(self.bad_lines) < BAD_NAMED:
            self.bad_lines.append((number, reason))


class Place(NamedTuple):
    """How far a file has been imported."""

    line: int = 0
    at: int = 0  # byte of the uncompressed file


class Progress(Protocol):
    """Who is told."""

    def bad(self, number: int, reason: str) -> None: ...

    def step(self, counts: Counts, share: float) -> None:
        """`share`: how much of the file has been read."""


@dataclass(frozen=True)
class Options:
    tenant: str
    subject: str | None  # of every line; None: what the line says
    most_line_bytes: int
    most_store_bytes: int  # 0: no limit
    screen: bool = True  # cache.screen


class Importer:
    """Fills the cache of one tenant from files."""

    def __init__(
        self,
        store: ExampleStore,
        embedder: Embedder,
        redactor: Redactor,
        tokenizer: Tokenizer,
        options: Options,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self.embedder = embedder
        self.tokenizer = tokenizer
        self.options = options
        self.wall = wall
        self._clean, self._called = redactor.redact, redactor.name
        self._clean_system = lru_cache(SYSTEMS_KEPT)(redactor.redact)

    def run(self, path: Path, progress: Progress) -> tuple[Counts, int]:
        """What became of the lines, and after which line an earlier run had been broken off; 0: there was none.

        Raises IccacheError when the file cannot be read to its end or the store cannot be written. What was committed
        until then stays, and the next run goes on there.
        """
        with lines.opened(path, self.options.most_line_bytes) as source:
            file = _digest(path)
            bookmark = Bookmark(self.store, self._name(file))
            place, counts = bookmark.read()
            begun = place.line
            pending = source.lines(*place)
            while batch := list(islice(pending, BATCH)):
                self._refuse_when_full()
                last = batch[-1]
                reached = partial(bookmark.write, Place(last.number, last.end), counts)
                self._take(batch, file, counts, progress, reached)
                progress.step(counts, source.position / max(source.size, 1))
            with self.store.transaction():
                bookmark.close()
            return counts, begun

    def _name(self, file: str) -> str:
        """Of the bookmark. It does not tell the subject."""
        whose = orjson.dumps([self.options.tenant, self.options.subject, file])
        return f"import:{hashlib.sha256(whose).hexdigest()}"

    def _take(
        self, batch: list[Line], file: str, counts: Counts, progress: Progress, reached: Callable[[], None]
    ) -> None:
        """One commit. `counts` include it when it is there, and `progress` hears of it before."""
        good: list[tuple[int, Pair]] = []
        for line in batch:
            counts.lines += 1
            found = self._fit(lines.read(line))
            if isinstance(found, Bad):
                counts.add_bad(line.number, found.reason)
                progress.bad(line.number, found.reason)
            else:
                good.append((line.number, found))
        new = [pair.task for _, pair in good if self._there(pair) != pair.answer]
        vectors: dict[str, Vector] = dict(zip(new, self.embedder.embed(new), strict=True))
        tokens = {pair: self._tokens(pair) for _, pair in good if pair.task in vectors}
        with self.store.transaction():
            for number, pair in good:
                there = self._there(pair)
                if there == pair.answer:
                    counts.known += 1
                    continue
                vector = vectors[pair.task] if pair.task in vectors else self.embedder.embed([pair.task])[0]
                count = tokens[pair] if pair in tokens else self._tokens(pair)
                self.store.admit(self._example(pair, vector, count, f"import:{file[:16]}:{number}"))
                if there is None:
                    counts.added += 1
                else:
                    counts.updated += 1
            reached()

    def _fit(self, found: Pair | Bad) -> Pair | Bad:
        """As it may be written, where it may."""
        if isinstance(found, Bad):
            return found
        subject = self.options.subject or found.subject
        safe = found._replace(
            system=self._clean_system(found.system),
            task=self._clean(found.task),
            answer=self._clean(found.answer),
            subject=None if subject is None else self._called(subject),
        )
        refusal = unfit(safe.task, safe.answer, self.options.screen)
        return safe if refusal is None else Bad(refusal.value)

    def _there(self, pair: Pair) -> str | None:
        return self.store.answer_to(self.options.tenant, pair.system, pair.task)

    def _tokens(self, pair: Pair) -> int:
        return self.tokenizer.count(pair.task) + self.tokenizer.count(pair.answer)

    def _example(self, pair: Pair, vector: Vector, tokens: int, request_id: str) -> Example:
        return Example(
            id=f"ex_{uuid.uuid4().hex}",
            tenant=self.options.tenant,
            subject=pair.subject,
            request_id=request_id,
            at=self.wall(),
            dialect="chat",
            system=pair.system,
            request=pair.task,
            answer=pair.answer,
            backend=BACKEND,
            embedder=self.embedder.identity,
            embedding=vector,
            tokens=tokens,
            stats=ExampleStats(),
        )

    def _refuse_when_full(self) -> None:
        most = self.options.most_store_bytes
        if most and sum(self.store.size_bytes().values()) > most:
            raise StoreError(f"the store is larger than store.max_bytes = {most}: make room, then run it again")


class Bookmark:
    """The place that a file has been imported to, kept in the store. Closed when all of it has been."""

    def __init__(self, store: ExampleStore, name: str) -> None:
        self._store = store
        self._name = name
        self._writes = 0  # ever: what tells a newer place from an older one, also when the file is imported again

    def read(self) -> tuple[Place, Counts]:
        state = self._store.load_state(self._name)
        if state is None:
            return Place(), Counts()
        self._writes = state[0]
        kept: dict[str, Any] = orjson.loads(state[1])
        if not kept:
            return Place(), Counts()
        counts = Counts(**kept["counts"])
        counts.reasons = Counter(counts.reasons)
        counts.bad_lines = [(number, reason) for number, reason in counts.bad_lines]
        return Place(*kept["place"]), counts

    def write(self, place: Place, counts: Counts) -> None:
        """Raises IccacheError when another process is at the same file."""
        self._save({"place": list(place), "counts": counts})

    def close(self) -> None:
        self._save({})

    def _save(self, kept: dict[str, Any]) -> None:
        self._writes += 1
        if not self._store.save_state(self._name, self._writes, orjson.dumps(kept)):
            raise IccacheError("another import of this file is under way")


def _digest(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def result(counts: Counts, begun: int, seconds: float) -> dict[str, Any]:
    """For --json."""
    return {
        "lines": counts.lines,
        "resumed_after_line": begun or None,
        "added": counts.added,
        "updated": counts.updated,
        "known": counts.known,
        "bad": counts.bad,
        "reasons": dict(counts.reasons),
        "bad_lines": [{"line": n, "reason": r, "message": lines.REASONS[r]} for n, r in counts.bad_lines],
        "seconds": round(seconds, 3),
    }
