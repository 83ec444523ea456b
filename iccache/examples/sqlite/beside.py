"""Files beside a store: copies under way, and what a killed process has left of them."""

from __future__ import annotations

import os
from pathlib import Path

from iccache.processes import is_running

COMPANIONS = ("-journal", "-wal", "-shm")


def under_way(store: Path, what: str) -> Path:
    """The name of this process's copy of a store, while it is being written."""
    return store.with_name(f"{store.name}.{os.getpid()}.{what}")


def remove(path: Path) -> None:
    """A database with what SQLite may have put beside it."""
    for suffix in ("", *COMPANIONS):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def sweep(store: Path, what: str) -> None:
    """Remove copies `under_way` of processes that are no more."""
    for left in store.parent.glob(f"{store.name}.*.{what}"):
        pid = left.name.removeprefix(f"{store.name}.").removesuffix(f".{what}")
        if pid.isdecimal() and not is_running(int(pid)):
            remove(left)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
