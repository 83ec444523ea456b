"""The store: the truth about exchanges, feedback and examples, and the feed of what changed.

Everything in memory (vector index, router, utility model) follows the store by `changes` and can be rebuilt from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from iccache import postgres_url
from iccache.errors import ConfigError
from iccache.examples.credit import DECAY_PER_HOUR, QUALITY_FLOOR
from iccache.examples.restore import restore_file
from iccache.examples.sqlite.driver import MEMORY
from iccache.examples.sqlite.key import Key
from iccache.examples.sqlite.store import SqliteStore
from iccache.examples.tracing import Standing, Traced
from iccache.types import (
    Agreement,
    Change,
    ChangeKind,
    Daily,
    Example,
    Exchange,
    Feedback,
    Hold,
    Kept,
    Vector,
    Weighed,
)

SQLITE = "sqlite:///"


class ExampleStore(Protocol):
    """One connection to the store. It belongs to the thread that opened it; others open their own by `reader`.

    Every method raises StoreError, in one line that says what to do, when the store cannot be read or written.
    A write is durable when the outermost transaction around it has ended; a single write is its own transaction.
    """

    def transaction(self) -> AbstractContextManager[None]:
        """All that is written inside commits together, or not at all when the block raises.

        Inside another transaction: a part of it that can fail alone.
        """

    # exchanges and feedback

    def record(self, exchange: Exchange) -> None:
        """Insert `exchange`, or update the one with its request_id.

        It may be recorded early, because feedback came while the answer was still streaming, and again when complete:
        feedback and quality stay, and the shown examples' statistics follow what the record says now. An incomplete
        one never replaces a complete one. The first complete record adds 1 to `uses` of the shown examples, once.
        """

    def record_all(self, exchanges: Sequence[Exchange]) -> None:
        """`record` each, in their order; in few statements, of which each may wait for the interpreter. All or none."""

    def exchange(self, request_id: str) -> Exchange | None:
        """The exchange with its quality so far; None when it is unknown. Of any tenant: the caller compares."""

    def exchanges(self, since: float, tenant: str | None = None) -> Iterator[Exchange]:
        """Exchanges with `at >= since`, oldest first, in constant memory and without holding a snapshot."""

    def latest_scored(self, limit: int) -> list[Exchange]:
        """The newest exchanges whose quality is known, newest first."""

    def feedback(self, request_id: str) -> list[Feedback]:
        """All feedback on an exchange, ordered by source."""

    def add_feedback(
        self,
        feedback: Feedback,
        *,
        tenant: str,
        demonstration: str | None = None,
        embedding: Vector | None = None,
        embedder: str | None = None,
        tokens: int | None = None,
        held: Hold | None = None,
    ) -> bool:
        """Take in one judgement. False when the exchange is unknown or another tenant's.

        (request_id, source) is its identity: an identical repeat changes nothing, another value replaces the old.
        The exchange's quality is computed from all sources (credit.combined_quality); the statistics of the shown
        examples move to what the new value alone would have left; `own_quality` of the example that came from the
        exchange follows while its answer is still the exchange's; one QUALITY change is appended.

        A demonstration becomes the answer of the example that came from the exchange, with own_quality 1. Where there
        is none, one is made of the exchange's system prompt and task, backend "demonstration", for which `embedding`,
        `embedder` and `tokens` are needed; without them it waits for `admit`. That one is `held`.
        Raises ValueError for a score outside [0, 1], and for neither score nor demonstration.
        """

    def preference(self, winner_id: str, loser_id: str, tenant: str, at: float) -> bool:
        """A user preferred one answer: score 1 for it and 0 for the other, source "user".

        False, and nothing written, when either is unknown or another tenant's. Raises ValueError when they are one.
        """

    def reserve_judging(self, at: float, request_id: str, kind: str, most_nusd: int, budget_nusd: int) -> int | None:
        """Set aside the most that comparing answers costs at one step; returns the number of the reservation.

        None where the sum of the day (UTC), what is reserved included, would exceed the budget. It is one transaction,
        so the budget holds however many processes share the store. `kind`: "answer" or "judgement".
        """

    def settle_judging(self, number: int, nusd: int) -> None:
        """What it did cost. A reservation that is never settled counts as spent."""

    def judged_usd(self, since: float) -> float:
        """USD that comparing answers has cost since then, what is reserved included."""

    def agreements(self, since: float, tenant: str | None = None, limit: int = 20_000) -> list[Agreement]:
        """How each source scored, and how far from users on the same exchanges, over the newest `limit` exchanges with
        `at >= since`."""

    def spent_today(self, tenant: str, now: float) -> float:
        """USD that the tenant's exchanges of today (UTC) have cost."""

    def session_backend(self, tenant: str, session: str) -> str | None:
        """The backend of the session's last exchange."""

    # exact reuse

    def keep_answer(self, key: bytes, answer: Kept, *, tenant: str, expired_before: float) -> None:
        """Keep a whole answer under the digest of its request, and forget those that came before `expired_before`.

        The exchange it belongs to has to be recorded.
        """

    def kept_answer(self, key: bytes, *, tenant: str, since: float) -> Kept | None:
        """The answer kept under `key`, if it came at or after `since` and nobody has said that it is bad."""

    # examples

    def admit(self, example: Example) -> str:
        """Add an example and return its id; appends an EXAMPLE change.

        A duplicate (same tenant, system prompt and request text, whatever the dialect) keeps the id and the statistics
        of the one there is. An answer that agrees confirms it (see `confirm`). One that does not takes its place, with
        its provenance and own quality, unless the old one has confirmations left, of which it takes one: an answer
        stays while more writers gave it than contradicted it. An answer known to be poor goes at once. An answer put
        there by a demonstration or by replay is better than a routine one: it stays, and only `at` moves on.
        A demonstration given for `example.request_id` before takes the place of the answer.
        """

    def confirm(self, id: str, witness: Example) -> None:
        """Another exchange, as the example it would be, has the same answer: example `id` is as fresh as that one.

        It counts as a confirmation when its writer is somebody else, once for each; writers without a subject cannot
        be told apart, and each of theirs counts. What is in quarantine is released by standing.ENOUGH of them.
        Feedback on the witness is feedback on the example's answer from now on. Appends an EXAMPLE change.
        """

    def hold(self, ids: Sequence[str], reason: Hold) -> list[str]:
        """Keep examples, and what was derived from them, from being shown; returns those not held before."""

    def release(self, ids: Sequence[str]) -> list[str]:
        """Let held examples be shown; returns those that were held."""

    def derive(self, id: str, sources: Sequence[str]) -> None:
        """Example `id` was made from these: it is held and deleted with any of them."""

    def judged_tenants(self) -> list[str]:
        """Tenants with a scored exchange."""

    def judged(self, tenant: str, limit: int) -> list[Traced]:
        """The newest `limit` scored exchanges of a tenant, oldest first."""

    def standings(self, tenant: str) -> dict[str, Standing]:
        """What tracing has to know of a tenant's examples, by id."""

    def held_near(self, tenant: str, vector: Vector, embedder: str, k: int) -> list[tuple[str, float]]:
        """(id, cosine) of at most `k` examples in quarantine, best first, among the newest standing.HELD_SEARCHED."""

    def examples(self, ids: Sequence[str]) -> list[Example]:
        """The examples that exist, with their statistics as of now, in the order asked. One SELECT."""

    def example_of(self, request_id: str) -> Example | None:
        """The example that came from an exchange."""

    def list_examples(
        self, tenant: str | None = None, subject: str | None = None, *, limit: int = 100, offset: int = 0
    ) -> list[Example]:
        """Examples, newest first."""

    def each_example(self, tenant: str | None = None, subject: str | None = None) -> Iterator[Example]:
        """Examples in the order they were first admitted, in constant memory and without holding a snapshot."""

    def answer_to(self, tenant: str, system: str, request: str) -> str | None:
        """The answer of the example that `admit` would take for a duplicate of these; None when there is none."""

    def count_examples(self, tenant: str | None = None) -> int:
        """How many examples there are."""

    def embeddings(self) -> Iterator[tuple[str, str, str, float, Vector]]:
        """(id, tenant, embedder, at, embedding) of every example that is not held, in constant memory.

        Not one snapshot: read `last_change` first, then this, then follow `changes` from there.
        """

    def weighed(self) -> Iterator[Weighed]:
        """What every example weighs and brought, in constant memory and without holding a snapshot."""

    def example_bytes(self) -> tuple[int, int]:
        """Bytes of the examples' text, and of their embeddings. One scan of an index: some 50 ms for a million."""

    def update_example(
        self,
        id: str,
        *,
        expected_answer: str | None = None,
        answer: str | None = None,
        backend: str | None = None,
        own_quality: float | None = None,
        replays: int | None = None,
        gain: float | None = None,
        tokens: int | None = None,
        embedder: str | None = None,
        embedding: Vector | None = None,
    ) -> bool:
        """Set what is given. False, and nothing written, when there is no such example or its answer is no longer
        `expected_answer` (when given): somebody changed it meanwhile.

        A new answer or embedding appends an EXAMPLE change. Setting the gain begins the record anew, as a new answer
        needs it: credit and its quality are 0, and feedback replaced later on earlier answers no longer moves them.
        """

    def delete_examples(self, ids: Sequence[str], *, keep_exchanges: bool = False) -> int:
        """Delete text, embedding and statistics, and the text of the exchanges they came from; returns how many, with
        those that were derived from them, which go too: nothing else would find them when a source's writer is erased.

        `keep_exchanges` (for eviction, which saves space and hides nothing) leaves the exchanges' text. Freed bytes
        are overwritten in the file, in the snapshot of the vectors beside it too, and the log is emptied after the
        commit (see `checkpoint`). Appends changes.
        """

    def purge(self, tenant: str, subject: str | None = None, *, dry_run: bool = False) -> dict[str, int]:
        """Erase a tenant, or one subject of it: examples as by `delete_examples`, and of the exchanges text, subject,
        session and extra. What remains of an exchange are its numbers.

        Returns {"examples": deleted, "exchanges": erased}; with `dry_run` what it would be. The states that followers
        kept of what they learned are deleted, and `erasures` counts.
        """

    def erasures(self) -> tuple[int, float]:
        """How often text was erased so far, and when last. A follower that learned before has to begin anew."""

    def expire(self, tenant: str, before: float, limit: int = 1000) -> int:
        """Erase exchanges and examples of a tenant from before that time, at most `limit` of each; returns how many."""

    # the feed of changes, and what followers keep

    def changes(self, since: int, limit: int = 1000) -> list[Change]:
        """Changes with `seq > since`, in order."""

    def next_change(self, kind: ChangeKind, since: int) -> int | None:
        """The seq of the first change of `kind` with `seq > since`; None when there is none."""

    def last_change(self) -> int:
        """The seq of the newest change ever made; 0 when there was none."""

    def oldest_change(self) -> int:
        """The lowest seq that `changes` can still give; last_change() + 1 when none is left.

        A follower whose cursor is below oldest_change() - 1 has missed something and must rebuild.
        """

    def trim_changes(self, before: int) -> int:
        """Forget changes with `seq < before`; returns how many."""

    def restored_at(self) -> int:
        """The change after which everything was different, because a backup took the place of what there was; 0: never.

        A follower whose cursor is lower knows another content: it must forget what it learned and rebuild. Its cursor
        is below oldest_change() - 1 then.
        """

    def save_state(self, name: str, cursor: int, blob: bytes) -> bool:
        """Keep a follower's state as of change `cursor`, unless a newer one is kept already: then False."""

    def load_state(self, name: str) -> tuple[int, bytes] | None:
        """(cursor, blob) as last saved."""

    # upkeep

    def daily(self, since: float, tenant: str | None = None) -> list[Daily]:
        """Sums over the exchanges with `at >= since`, by day, backend and decision, in that order."""

    def trim(self, now: float, keep_days: float, limit: int = 5000) -> int:
        """Delete exchanges (and their feedback) and changes older than `keep_days`, 0 keeping them; returns how many.

        At most `limit` of each, so that nobody waits long for the write lock: call until it returns 0. Examples and
        their statistics stay.
        """

    def size_bytes(self) -> dict[str, int]:
        """Bytes by part: "examples" and "exchanges" (their text), "embeddings", "other" (indexes, numbers, feed, free
        pages), "wal" and "index" (the snapshot of the vectors). They sum to the size of the store's files.
        """

    def writable(self) -> bool:
        """Whether a write goes through now. Costs one small commit."""

    def checkpoint(self) -> bool:
        """Move the write-ahead log into the file and empty it. False when a reader or a transaction is in the way.

        After an erasure the store does so by itself, at once or with a later commit.
        """

    def backup(self, path: Path | str) -> None:
        """Write a consistent copy to `path` while others write; a file there is replaced only when the copy is whole.

        For any thread: it opens a connection of its own.
        """

    def reader(self) -> ExampleStore:
        """A connection for reading only, for the thread that calls this."""

    def close(self) -> None:
        """Close this connection."""


def open_store(
    url: str,
    *,
    key: Key | None = None,
    decay_per_hour: float = DECAY_PER_HOUR,
    quality_floor: float = QUALITY_FLOOR,
) -> ExampleStore:
    """The store at `url`, made or migrated where needed.

    sqlite:///relative/path, sqlite:////absolute/path, or sqlite:///:memory: (a new, empty one that ends with its last
    connection); or postgresql://user@host/database. `key`: what a file is encrypted with. Raises ConfigError for
    another kind of url or where what it needs is not installed, StoreVersionError for a newer version's store,
    StoreError.
    """
    if postgres_url.is_postgres(url):
        refuse_key(key)
        from iccache.examples.postgres.store import PostgresStore  # noqa: PLC0415 - an extra

        return PostgresStore(url, decay_per_hour=decay_per_hour, quality_floor=quality_floor)
    name = _name(url)
    path = MEMORY if name == MEMORY else Path(name)
    return SqliteStore(path, key=key, decay_per_hour=decay_per_hour, quality_floor=quality_floor)


def restore_store(url: str, backup: Path, *, keep: bool = True, key: Key | None = None) -> Path | None:
    """Put the content of `backup` in the place of the store's, while others use it. Returns where the old content is.

    All of it at once: others see the old content or the new one, and followers rebuild (see `restored_at`). What was
    there is kept beside the store unless `keep` is False. A store that cannot be read is moved there, files and all.
    Raises StoreError, leaving everything as it was, when `backup` is damaged, another program's, of a newer version, or
    when it or the store has another key.
    """
    if postgres_url.is_postgres(url):
        raise ConfigError("store.url: PostgreSQL is restored by its own means: stop every iccache, pg_restore --clean")
    name = _name(url)
    if name == MEMORY:
        raise ConfigError("store.url: a store in memory ends with its process: nothing can be restored to it")
    return restore_file(Path(name).absolute(), Path(backup).absolute(), keep=keep, key=key)


def file_of(url: str) -> Path | None:
    """The file of the store at `url`; None where it has none that lasts."""
    if postgres_url.is_postgres(url):
        return None
    name = _name(url)
    return None if name == MEMORY else Path(name).absolute()


def is_there(url: str) -> bool:
    """Whether there is a store at `url`. Raises ConfigError, StoreError."""
    if postgres_url.is_postgres(url):
        from iccache.examples.postgres.store import holds_store  # noqa: PLC0415 - an extra

        return holds_store(url)
    file = file_of(url)
    return file is not None and file.exists()


def shown(url: str) -> str:
    """Where the store at `url` is, without what is nobody's business."""
    if postgres_url.is_postgres(url):
        return postgres_url.shown(url)
    file = file_of(url)
    return url if file is None else str(file)


def refuse_key(key: Key | None) -> None:
    """Raises ConfigError where a store in PostgreSQL has a key."""
    if key is not None:
        raise ConfigError(postgres_url.NO_KEY)


def _name(url: str) -> str:
    name = url.removeprefix(SQLITE)
    if name == url or not name:
        raise ConfigError(f"store.url: is neither sqlite:///FILE nor postgresql://HOST/DATABASE (here: {url!r})")
    return name
