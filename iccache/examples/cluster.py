"""Clustering a store's examples in a process of its own: `python -m iccache.examples.cluster STORE IDENTITY DIM`.

Of an encrypted store there is a fourth argument, the descriptor of the memory to write to, and standard input begins
with a line that is the key. When standard input ends, so does this: whoever started it is gone.

A process that serves must not do it: it takes a minute of CPU and a gigabyte for a million examples, and what holds the
interpreter for a moment holds up every request. `Snapshots.make` starts this where there are many.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

from iccache.errors import IccacheError
from iccache.examples.index.snapshot import Memory
from iccache.examples.snapshots import NICENESS, STOPS_WITHIN_S, Snapshots, write_snapshot
from iccache.examples.sqlite.key import Key
from iccache.examples.store import SQLITE, open_store

log = logging.getLogger(__name__)


def main(store: str, identity: str, dim: str, descriptor: str | None = None) -> int:
    """Exit code 0: the snapshot is there."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    with suppress(AttributeError, OSError):
        os.nice(NICENESS)
    key = None if descriptor is None else Key(sys.stdin.readline().removesuffix("\n"))
    with closing(open_store(f"{SQLITE}{store}", key=key)) as opened, closing(opened.reader()) as source:
        snapshots = Snapshots(opened.reader, identity, int(dim), Path(store))
        signal.signal(signal.SIGTERM, lambda *_: snapshots.stop())
        threading.Thread(target=_end_with_the_other, args=[snapshots], daemon=True).start()
        try:
            if descriptor is None:
                snapshots.make_here(source)
            else:
                write_snapshot(source, Memory(int(descriptor)), identity, int(dim), snapshots.go_on)
        except (IccacheError, OSError) as exc:
            log.warning("%s", exc)
            return 1
    return 0


def _end_with_the_other(snapshots: Snapshots) -> None:
    """Nobody wants what is being made; what is half written is removed, if that is soon."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    snapshots.stop()
    time.sleep(STOPS_WITHIN_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
