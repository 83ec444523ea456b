from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, wait
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from iccache.errors import StoreError
from iccache.examples.sqlite.store import SqliteStore
from iccache.examples.store import ExampleStore, open_store
from iccache.examples.writer import Writer
from tests.factories import make_example, make_exchange

ROOT = Path(__file__).parents[3]  # where processes of these tests start


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/s.db"


def hold(writer: Writer) -> tuple[threading.Event, Future[bool]]:
    """Keep the writer busy until the event is set."""
    started, go_on = threading.Event(), threading.Event()

    def wait_for_it(_: ExampleStore) -> bool:
        started.set()
        return go_on.wait(10)

    future = writer.submit(wait_for_it)
    assert started.wait(10)
    return go_on, future


def test_what_is_submitted_is_committed_when_its_future_resolves(url: str) -> None:
    writer = Writer(partial(open_store, url))
    try:
        assert writer.submit(lambda store: store.admit(make_example("e1"))).result(10) == "e1"
        with closing(open_store(url)) as other:
            assert other.count_examples() == 1
    finally:
        assert writer.close(10)


def test_what_cannot_be_opened_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        Writer(partial(open_store, f"sqlite:///{tmp_path}/no/s.db"))


def test_everything_that_waits_shares_a_commit(url: str) -> None:
    writer = Writer(partial(open_store, url), max_batch=64)
    go_on, held = hold(writer)
    futures = [writer.submit(lambda s, i=i: s.record(make_exchange(f"r{i}"))) for i in range(100)]  # type: ignore[misc]
    assert writer.waiting() == 100
    assert not any(f.done() for f in futures)
    go_on.set()
    for future in [held, *futures]:
        future.result(10)
    assert writer.commits == 3  # the one that held, 64, 36
    assert writer.close(10)
    with closing(open_store(url)) as store:
        assert sum(1 for _ in store.exchanges(0)) == 100


def test_a_function_that_raises_fails_alone(url: str) -> None:
    writer = Writer(partial(open_store, url))
    go_on, _ = hold(writer)

    def half(store: ExampleStore) -> None:
        store.admit(make_example("half"))
        raise ZeroDivisionError("mine")

    before = writer.submit(lambda s: s.admit(make_example("before")))
    failing = writer.submit(half)
    after = writer.submit(lambda s: s.admit(make_example("after")))
    go_on.set()
    assert (before.result(10), after.result(10)) == ("before", "after")
    with pytest.raises(ZeroDivisionError, match="mine"):
        failing.result(10)
    assert {e.id for e in writer.submit(lambda s: s.list_examples()).result(10)} == {"before", "after"}
    writer.close(10)


def test_a_full_queue_refuses_at_once(url: str) -> None:
    writer = Writer(partial(open_store, url), max_queue=3)
    go_on, _ = hold(writer)
    futures = [writer.submit(lambda s: s.count_examples()) for _ in range(5)]
    for future in futures[3:]:
        with pytest.raises(StoreError, match="wait"):
            future.result(0)
    go_on.set()
    assert [f.result(10) for f in futures[:3]] == [0, 0, 0]
    writer.close(10)


def test_what_was_taken_in_cannot_be_cancelled(url: str) -> None:
    writer = Writer(partial(open_store, url))
    go_on, _ = hold(writer)
    future = writer.submit(lambda s: s.admit(make_example("e1")))
    assert not future.cancel()
    go_on.set()
    assert future.result(10) == "e1"
    writer.close(10)


def test_closing_writes_what_waits(url: str) -> None:
    writer = Writer(partial(open_store, url), max_batch=7)
    go_on, _ = hold(writer)
    futures = [writer.submit(lambda s, i=i: s.record(make_exchange(f"r{i}"))) for i in range(50)]  # type: ignore[misc]
    threading.Timer(0.05, go_on.set).start()
    assert writer.close(10)
    assert all(f.done() and f.exception() is None for f in futures)
    with pytest.raises(StoreError, match="closed"):
        writer.submit(lambda s: None).result(0)
    assert writer.close(1)


def test_closing_in_vain_leaves_nobody_waiting(url: str) -> None:
    writer = Writer(partial(open_store, url))
    go_on, held = hold(writer)
    future = writer.submit(lambda s: s.admit(make_example("e1")))
    assert not writer.close(0.05)
    with pytest.raises(StoreError, match="before this was written"):
        future.result(0)
    go_on.set()
    held.result(10)


def test_many_threads_submit(url: str) -> None:
    writer = Writer(partial(open_store, url))
    writer.submit(lambda s: s.admit(make_example("e1"))).result(10)
    futures: list[Future[None]] = []

    def submit(name: int) -> None:
        for i in range(50):
            exchange = make_exchange(f"{name}-{i}", shown=("e1",))
            futures.append(writer.submit(lambda s, e=exchange: s.record(e)))  # type: ignore[misc]

    threads = [threading.Thread(target=submit, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wait(futures, 20).not_done
    assert writer.submit(lambda s: s.examples(["e1"])[0].stats.uses).result(10) == 400
    writer.close(10)


def test_a_transaction_that_broke_takes_nothing_more(tmp_path: Path) -> None:
    """SQLite may undo a whole transaction in the middle; what a function does after that must not be written alone."""
    writer = Writer(lambda: SqliteStore(tmp_path / "s.db"))
    go_on, _ = hold(writer)

    def break_and_go_on(store: ExampleStore) -> str:
        assert isinstance(store, SqliteStore)
        store._db.conn.execute("ROLLBACK")
        return store.admit(make_example("stray"))

    futures = [
        writer.submit(lambda s: s.admit(make_example("before"))),
        writer.submit(break_and_go_on),
        writer.submit(lambda s: s.admit(make_example("after"))),
    ]
    go_on.set()
    for future in futures:
        with pytest.raises(StoreError, match="undone"):
            future.result(10)
    assert writer.submit(lambda s: s.count_examples()).result(10) == 0
    assert writer.submit(lambda s: s.admit(make_example("later"))).result(10) == "later"
    writer.close(10)


FULL_DISK = """
import resource, sys
from functools import partial
from iccache.errors import StoreError
from iccache.examples.store import open_store
from iccache.examples.writer import Writer
from tests.factories import make_exchange

url = sys.argv[1]
writer = Writer(partial(open_store, url), max_batch=8)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

def record(i, size=5000):
    return writer.submit(lambda s: s.record(make_exchange(f"r{i}", answer="x" * size)))

assert record(0).exception(10) is None
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
outcomes = {i: record(i) for i in range(1, 401)}
failed = [i for i, f in outcomes.items() if f.exception(30) is not None]
assert 0 < len(failed) < 400, len(failed)
for i in failed:
    error = outcomes[i].exception()
    assert isinstance(error, StoreError) and "full" in str(error), repr(error)
assert writer.submit(lambda s: s.exchange("r0").answer).result(10)[0] == "x"  # reading goes on
assert record(500, 700_000).exception(10) is not None
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
assert record(600, 700_000).exception(10) is None
assert writer.close(10)
print(*[i for i in range(1, 401) if i not in failed], 0, 600)
"""


def test_a_full_disk_fails_writes_and_not_the_writer(tmp_path: Path, url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, url], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    with closing(open_store(url)) as store:
        assert {e.request_id for e in store.exchanges(0)} == {f"r{i}" for i in done.stdout.split()}
    with closing(sqlite3.connect(tmp_path / "s.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


ACKNOWLEDGE = """
import sys
from functools import partial
from iccache.examples.store import open_store
from iccache.examples.writer import Writer
from tests.factories import make_exchange, make_feedback

url, name = sys.argv[1:]
writer = Writer(partial(open_store, url))

def acknowledge(id, future):
    if future.exception() is None:
        sys.stdout.write(id + "\\n")
        sys.stdout.flush()

def write(id, store):
    store.record(make_exchange(id, shown=("e1",)))
    assert store.add_feedback(make_feedback(id, 0.5), tenant="t")

for i in range(1_000_000):
    future = writer.submit(partial(write, f"{name}-{i}"))
    future.add_done_callback(partial(acknowledge, f"{name}-{i}"))
    if i % 50 == 49:
        future.result()
"""


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path, url: str) -> None:
    chance = random.Random(7)
    with closing(open_store(url)) as store:
        store.admit(make_example("e1"))
    acknowledged: list[str] = []
    for round_ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", ACKNOWLEDGE, url, str(round_)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        acknowledged.append(process.stdout.readline().strip())
        time.sleep(chance.uniform(0.0, 0.25))
        os.kill(process.pid, signal.SIGKILL)
        rest, _ = process.communicate()
        acknowledged += [line for line in rest.split("\n")[:-1] if line]  # the last line may be cut
    assert len(acknowledged) > 100
    with closing(sqlite3.connect(tmp_path / "s.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with closing(open_store(url)) as store:
        lost = [id for id in acknowledged if not store.feedback(id)]
        assert lost == []
        recorded = sum(1 for _ in store.exchanges(0))
        stats = store.examples(["e1"])[0].stats
        assert (stats.uses, stats.credit) == (recorded, pytest.approx(recorded))
