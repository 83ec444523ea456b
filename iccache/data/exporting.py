"""`iccache export`: examples as chat JSONL, in constant memory."""

from __future__ import annotations

import gzip
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from iccache import private
from iccache.data import lines
from iccache.errors import IccacheError
from iccache.examples.store import ExampleStore


def export(store: ExampleStore, path: Path | None, tenant: str | None, subject: str | None) -> tuple[int, int]:
    """How many lines and bytes were written to `path`; None: standard output. What is held stays here.

    A file there is replaced when the new one is whole. A name that ends in .gz is compressed.
    """
    count = size = 0
    with _written(path) as out:
        for example in store.each_example(tenant, subject):
            if example.held is not None:
                continue
            line = lines.write(example)
            out.write(line)
            count, size = count + 1, size + len(line)
        out.flush()
    return count, size


@contextmanager
def _written(path: Path | None) -> Generator[BinaryIO]:
    if path is None:
        yield sys.stdout.buffer
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with private.make(partial).open("wb") as raw:
            if path.suffix == ".gz":
                with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as compressed:
                    yield compressed  # type: ignore[misc]  # it writes bytes
            else:
                yield raw
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(partial, path)
    except OSError as exc:
        raise IccacheError(f"{path}: cannot be written: {exc.strerror}") from exc
    finally:
        partial.unlink(missing_ok=True)
