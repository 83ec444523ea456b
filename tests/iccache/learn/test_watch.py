"""The store is looked at while nobody has time for it."""

import threading
from pathlib import Path

from iccache.examples.sqlite.store import SqliteStore
from iccache.learn.watch import Watch
from tests.factories import make_example


def test_it_confirms_what_was_applied_and_tells_of_what_was_not(tmp_path: Path) -> None:
    with_news, confirmed, again = threading.Event(), threading.Event(), threading.Event()
    store = SqliteStore(tmp_path / "store.db")
    seen = [store.last_change()]
    watch = Watch(
        store.reader, lambda: seen[0], lambda: (again if with_news.is_set() else confirmed).set(), with_news.set, 0.01
    )
    watch.start()
    assert confirmed.wait(30) and not with_news.is_set()
    store.admit(make_example("e1"))
    assert with_news.wait(30)
    seen[0] = store.last_change()
    again.clear()
    assert again.wait(30)
    watch.stop()
    assert not watch._thread.is_alive()
    store.close()


def test_what_is_not_applied_is_not_confirmed(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.db")
    store.admit(make_example("e1"))
    confirmed: list[bool] = []
    looked = threading.Semaphore(0)
    watch = Watch(store.reader, lambda: 0, lambda: confirmed.append(True), looked.release, 0.01)
    watch.start()
    assert all(looked.acquire(timeout=30) for _ in range(3))
    watch.stop()
    assert confirmed == []
    store.close()


def test_it_may_be_stopped_before_it_began(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "store.db")
    Watch(store.reader, lambda: 0, list, list).stop()
    store.close()
