"""The money and the turns: what a run may spend, and who is at which example.

Before a call its most is reserved; afterwards the truth replaces it. So at any moment

    confirmed + unconfirmed <= budget

where `unconfirmed` is the most of the calls whose end is not known: in flight, cut off by a kill, or timed out. It
holds however many invocations share the run, since each reservation is one transaction. (An upstream that bills more
than the limits it was given is charged as billed; nothing more is reserved then.)

A run goes on until an invocation comes to its end with no other at work. One that comes while another is at work joins
its run, and so its budget; one that comes after a kill takes the run up again, with what is left of the budget.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from iccache.errors import IccacheError
from iccache.examples.sql.connection import Row
from iccache.types import Usage
from replay.prices import NUSD
from replay.store import ReplayStore

LEASE_S = 120.0  # after so long without a sign, a worker is taken for dead
RESUME_WITHIN_S = 86_400.0  # an interrupted run that is older is left as it is: its budget was of another day
FAILURES_UNTIL_REFUSED = 3


class OutOfBudget(IccacheError):
    """The next call could exceed the budget."""


class Result(StrEnum):
    """What became of one round of one example."""

    IMPROVED = "improved"  # a new answer took the place of the old
    KEPT = "kept"  # none was better
    REFUSED = "refused"  # no new answer could be used
    OVERTAKEN = "overtaken"  # somebody else changed the example meanwhile: their answer stays


class Item(NamedTuple):
    """The right to replay one example."""

    example_id: str
    round: int
    attempt: int


class Money(NamedTuple):
    """In nanodollars."""

    confirmed: int
    unconfirmed: int

    @property
    def bound(self) -> int:
        return self.confirmed + self.unconfirmed


class Ledger:
    """One invocation's view of its run."""

    def __init__(
        self,
        store: ReplayStore,
        budget_usd: float,
        *,
        worker: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self.budget_nusd = int(budget_usd * NUSD)
        self.worker = worker or own_name()
        self.clock = clock
        self.run_id = ""
        self.resumed = False

    # the run

    def enter(self) -> None:
        """Begin a run, or join the one that is open."""
        now = self.clock()
        with self.store.transaction():
            self._bury_the_dead(now)
            run = self.store.row(
                "SELECT id FROM replay_runs WHERE completed_at IS NULL AND (seen_at > ? OR id IN"
                " (SELECT run_id FROM replay_workers)) ORDER BY started_at DESC LIMIT 1",
                [now - RESUME_WITHIN_S],
            )
            self.resumed = run is not None
            self.run_id = uuid.uuid4().hex if run is None else run["id"]
            if run is None:
                self.store.write(
                    "INSERT INTO replay_runs (id, started_at, seen_at) VALUES (?, ?, ?)", [self.run_id, now, now]
                )
            self.store.write(
                "UPDATE replay_runs SET seen_at = ?, invocations = invocations + 1 WHERE id = ?", [now, self.run_id]
            )
            self.store.write("INSERT INTO replay_workers VALUES (?, ?, ?)", [self.worker, self.run_id, now + LEASE_S])

    def leave(self, seconds: float) -> None:
        """This invocation is at its end. With it the run is, unless another is at work."""
        now = self.clock()
        with self.store.transaction():
            self._bury_the_dead(now)
            self.store.write("DELETE FROM replay_workers WHERE worker = ?", [self.worker])
            self.store.write(
                "UPDATE replay_runs SET seen_at = :now, seconds = seconds + :seconds, completed_at ="
                " CASE WHEN EXISTS (SELECT 1 FROM replay_workers WHERE run_id = :run) THEN NULL ELSE :now END"
                " WHERE id = :run",
                {"run": self.run_id, "now": now, "seconds": seconds},
            )

    def beat(self) -> None:
        """Still alive: renew all leases."""
        until = {"until": self.clock() + LEASE_S, "worker": self.worker}
        with self.store.transaction():
            self.store.write("UPDATE replay_workers SET lease_until = :until WHERE worker = :worker", until)
            self.store.write("UPDATE replay_items SET lease_until = :until WHERE worker = :worker", until)

    def _bury_the_dead(self, now: float) -> None:
        """Forget workers that are no more."""
        for row in self.store.rows("SELECT worker, lease_until FROM replay_workers"):
            if row["lease_until"] < now or is_gone(row["worker"]):
                self.store.write("DELETE FROM replay_workers WHERE worker = ?", [row["worker"]])

    # turns

    def claim(self, example_id: str, max_rounds: int) -> Item | None:
        """The right to replay an example; None when another has it, this run has had it, or its rounds are used up."""
        with self.store.transaction():
            stats = self.store.row("SELECT replays FROM example_stats WHERE example_id = ?", [example_id])
            if stats is None or stats["replays"] >= max_rounds:
                return None
            done = self.store.row(
                "SELECT 1 FROM replay_items WHERE example_id = ? AND run_id = ? AND result IS NOT NULL AND round > 0",
                [example_id, self.run_id],
            )
            return None if done is not None else self.claim_round(example_id, stats["replays"] + 1)

    def claim_round(self, example_id: str, round: int) -> Item | None:
        """The right to one named round; None when another has it. Rounds below 0 are not of replay: see distil.py."""
        now = self.clock()
        with self.store.transaction():
            old = self.store.row("SELECT * FROM replay_items WHERE example_id = ? AND round = ?", [example_id, round])
            if old is not None and _held(old, now):
                return None
            attempt = 1 if old is None else old["attempt"] + 1
            self.store.write(
                "INSERT INTO replay_items (example_id, round, run_id, worker, lease_until, attempt)"
                " VALUES (:example, :round, :run, :worker, :until, :attempt)"
                " ON CONFLICT (example_id, round) DO UPDATE SET run_id = :run, worker = :worker,"
                " lease_until = :until, attempt = :attempt, result = NULL",
                {"example": example_id, "round": round, "run": self.run_id, "worker": self.worker}
                | {"until": now + LEASE_S, "attempt": attempt},
            )
            return Item(example_id, round, attempt)

    def release(self, item: Item, *, failed: bool = False) -> bool:
        """Let go of an item that is not done. What was answered for it is kept for whoever takes it up.

        `failed`: an upstream failed at it. True when that has happened so often that it counts as a round of its own.
        """
        with self.store.transaction():
            mine = self.store.write(
                "UPDATE replay_items SET worker = NULL, failures = failures + ?"
                " WHERE example_id = ? AND round = ? AND attempt = ? AND result IS NULL",
                [int(failed), *item],
            )
            row = self.store.row(
                "SELECT failures FROM replay_items WHERE example_id = ? AND round = ?", [item.example_id, item.round]
            )
            return bool(mine and row is not None and row["failures"] >= FAILURES_UNTIL_REFUSED)

    def settle(self, item: Item, result: Result) -> bool:
        """Put down what became of an item. False, and nothing written, when it is no longer ours.

        Belongs into the transaction that changes the example, before the change: what its record is then is kept.
        """
        mine = self.store.write(
            "UPDATE replay_items SET worker = NULL, run_id = ?, result = ?, (credit_before, quality_before) ="
            " (SELECT credit, credited_quality FROM example_stats s WHERE s.example_id = replay_items.example_id)"
            " WHERE example_id = ? AND round = ? AND attempt = ? AND result IS NULL",
            [self.run_id, result.value, *item],
        )
        if not mine:
            return False
        self.store.write("DELETE FROM replay_answers WHERE example_id = ?", [item.example_id])
        replayed = result in (Result.IMPROVED, Result.KEPT)
        self.store.write(
            f"UPDATE replay_runs SET replayed = replayed + ?, {result.value} = {result.value} + 1 WHERE id = ?",  # noqa: S608 - a closed list
            [int(replayed), self.run_id],
        )
        return True

    def finish(self, item: Item, *, written: bool) -> bool:
        """Guidance was written, or what was said cannot be used. False when the item is no longer ours.

        Belongs into the transaction that writes it.
        """
        mine = self.store.write(
            "UPDATE replay_items SET worker = NULL, run_id = ?, result = ?"
            " WHERE example_id = ? AND round = ? AND attempt = ? AND result IS NULL",
            [self.run_id, "distilled" if written else "unusable", *item],
        )
        if mine:
            self.store.write(
                "DELETE FROM replay_answers WHERE example_id = ? AND round = ?", [item.example_id, item.round]
            )
        return bool(mine)

    # money

    def money(self) -> Money:
        row = self.store.row(
            "SELECT coalesce(sum(CASE state WHEN 'confirmed' THEN nusd END), 0),"
            " coalesce(sum(CASE state WHEN 'reserved' THEN reserved_nusd END), 0) FROM replay_calls WHERE run_id = ?",
            [self.run_id],
        )
        assert row is not None
        return Money(int(row[0]), int(row[1]))

    def spent_on(self, item: Item) -> int:
        """What this run spent on an item at most, in nanodollars: confirmed, or reserved where the end is not known."""
        row = self.store.row(
            "SELECT coalesce(sum(CASE state WHEN 'confirmed' THEN nusd WHEN 'reserved' THEN reserved_nusd END), 0)"
            " FROM replay_calls WHERE run_id = ? AND example_id = ? AND round = ?",
            [self.run_id, item.example_id, item.round],
        )
        assert row is not None
        return int(row[0])

    def left_nusd(self) -> int:
        return self.budget_nusd - self.money().bound

    def reserve(self, item: Item, kind: str, backend: str, most_nusd: int) -> int:
        """Set aside the most that a call can cost; returns its number. Raises OutOfBudget."""
        with self.store.transaction():
            if most_nusd > self.left_nusd():
                raise OutOfBudget(f"the budget of {self.budget_nusd / NUSD:g} USD does not cover the next call")
            row = self.store.row(
                "INSERT INTO replay_calls (run_id, example_id, round, kind, backend, at, reserved_nusd, state)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, 'reserved') RETURNING id",
                [self.run_id, item.example_id, item.round, kind, backend, self.clock(), most_nusd],
            )
            assert row is not None
            return int(row[0])

    def confirm(self, call: int, item: Item, usage: Usage, nusd: int, digest: bytes, text: str) -> None:
        """The call was answered: its price takes the place of what was reserved, and its answer is kept."""
        with self.store.transaction():
            self.store.write(
                "UPDATE replay_calls SET state = 'confirmed', nusd = ?, input_tokens = ?, output_tokens = ?,"
                " estimated = ? WHERE id = ?",
                [nusd, usage.input, usage.output, usage.estimated, call],
            )
            self.store.write(
                "INSERT INTO replay_answers SELECT id, ?, ?, ? FROM examples WHERE id = ?"
                " ON CONFLICT (example_id, round, digest) DO UPDATE SET text = excluded.text",
                [item.round, digest, text, item.example_id],
            )

    def free(self, call: int) -> None:
        """The call was certainly not billed."""
        with self.store.transaction():
            self.store.write("UPDATE replay_calls SET state = 'free' WHERE id = ?", [call])

    def answered(self, item: Item, digest: bytes) -> str | None:
        """What the same call said before, if it was asked for this item."""
        row = self.store.row(
            "SELECT text FROM replay_answers WHERE example_id = ? AND round = ? AND digest = ?",
            [item.example_id, item.round, digest],
        )
        return None if row is None else str(row["text"])

    def upkept(self, *, expired: int, evicted: int, evicted_bytes: int, trimmed: int) -> None:
        """Add what was cleared away to the run."""
        with self.store.transaction():
            self.store.write(
                "UPDATE replay_runs SET expired = expired + ?, evicted = evicted + ?,"
                " evicted_bytes = evicted_bytes + ?, trimmed = trimmed + ? WHERE id = ?",
                [expired, evicted, evicted_bytes, trimmed, self.run_id],
            )


def own_name() -> str:
    """Host and process namespace, process, when it began, and a random part: who a worker is, for itself and others."""
    pid = os.getpid()
    return "|".join((_here(), str(pid), _began(pid) or "", uuid.uuid4().hex[:8]))


def is_gone(worker: str) -> bool:
    """Whether a worker is certainly dead: it was a process of this machine, and is none now."""
    pid = _pid_here(worker)
    return pid is not None and not _is_running(pid, worker)


def is_alive(worker: str) -> bool:
    """Whether a worker is certainly a running process of this machine, whatever its lease says: clocks jump."""
    pid = _pid_here(worker)
    return pid is not None and _began(pid) is not None and _is_running(pid, worker)


def _pid_here(worker: str) -> int | None:
    """Its process, where that is one of this machine."""
    here, _, rest = worker.rpartition("|")[0].rpartition("|")[0].rpartition("|")
    return int(rest) if here == _here() and rest.isdecimal() else None


def _is_running(pid: int, worker: str) -> bool:
    """Whether `pid` runs and is not another that was given the same number since."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    began = _began(pid)
    return began is None or began == worker.rsplit("|", 2)[1]


def _began(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None where the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    return stat.rpartition(b")")[2].split()[19].decode()


def _here() -> str:
    """The same for processes that see each other's numbers."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}|{os.readlink(namespace) if namespace.is_symlink() else ''}"


def _held(item: Row, now: float) -> bool:
    """Whether somebody is at it."""
    worker, until = item["worker"], item["lease_until"]
    return worker is not None and (until >= now or is_alive(worker)) and not is_gone(worker)
