"""Whether the store holds anything new, looked at in a thread of its own.

What is remembered of the store may be used while it was seen to hold nothing new a moment ago. The event loop of a busy
process gets round to that too late: just when remembering would pay most, nothing remembered could be used.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import closing

from iccache.errors import StoreError
from iccache.examples.store import ExampleStore

log = logging.getLogger(__name__)

EVERY_S = 0.2


class Watch:
    """From `start` to `stop`."""

    def __init__(
        self,
        open_reader: Callable[[], ExampleStore],
        seen: Callable[[], int],
        confirm: Callable[[], object],
        news: Callable[[], object],
        every_s: float = EVERY_S,
    ) -> None:
        """`seen`: the change up to which the store was applied. `confirm` is called when there is none beyond, `news`
        when there is; both in the thread."""
        self._open_reader = open_reader
        self._seen = seen
        self._confirm = confirm
        self._news = news
        self._every_s = every_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            with closing(self._open_reader()) as store:
                while not self._stopping.wait(self._every_s):
                    self._look(store)
        except StoreError as exc:
            log.warning("the store cannot be watched, it is followed a little later: %s", exc)

    def _look(self, store: ExampleStore) -> None:
        try:
            newest = store.last_change()
        except StoreError as exc:
            log.debug("the store cannot be looked at: %s", exc)
            return
        if newest == self._seen():
            self._confirm()
        else:
            self._news()
