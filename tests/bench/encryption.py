"""What an encrypted store costs beside one in clear: recording, reading what was recalled, starting, encrypting.

    python -m tests.bench.encryption                  # 10,000 and 100,000 examples; some minutes, 1 GB of disk

The two take turns, a batch at a time. Times are this thread's CPU time, and for starting the whole process group's; the
quotient of the two is what another machine would find as well. Examples are 0.8 KB of text and 384 numbers, requests
1.6 KB.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from iccache.examples.retriever import Retriever
from iccache.examples.snapshots import InMemory, Snapshots
from iccache.examples.sqlite.encrypt import bring_to_key
from iccache.examples.sqlite.key import Key
from iccache.examples.sqlite.store import SqliteStore
from tests.bench.recall import IDENTITY, Dummy, all_cpu, fill
from tests.factories import make_example, make_exchange

SIZES = (10_000, 100_000)
DIM = 384
BATCH = 16  # requests that are committed together, as under load
BATCHES = 60
ALONE = 100  # requests that are committed alone
READ = 16  # examples that a request looks at
READS = 300
TEXT = "what people write to one another is not all alike: " * 8
KEY = Key(secrets.token_hex(32))
STARTS = 3
CONTESTANTS: dict[str, Key | None] = {"clear": None, "encrypted": KEY}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="examples in the store")
    arguments.add_argument("--json", action="store_true", help="print the figures as JSON")
    chosen = arguments.parse_args()
    rows = [row for n in chosen.sizes for row in measured(n)]
    if chosen.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'':44} {'examples':>8} {'clear':>10} {'encrypted':>10} {'ratio':>6}")
    for row in rows:
        ratio = f"{row['encrypted'] / row['clear']:.2f}" if row["clear"] else ""
        clear = f"{row['clear']:.2f}" if row["clear"] else ""
        print(f"{row['what']:44} {row['n']:8} {clear:>10} {row['encrypted']:10.2f} {ratio:>6}")


def measured(n: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="iccache-bench-") as folder:
        paths = {name: Path(folder) / f"{name}.db" for name in CONTESTANTS}
        stores = {name: SqliteStore(paths[name], key=key) for name, key in CONTESTANTS.items()}
        for store in stores.values():
            fill(store, "spread", np.zeros((1, DIM), np.float32), n)
            store.checkpoint()
        rows = [
            {"what": "a recorded request, 16 a commit, us", **taking_turns(stores, BATCHES, recorded(BATCH), BATCH)},
            {"what": "a recorded request, committed alone, us", **taking_turns(stores, ALONE, recorded(1), 1)},
            {"what": "reading 16 examples, anywhere, us", **taking_turns(stores, READS, read(n), 1)},
            {"what": "reading 16 examples, the same 16, us", **taking_turns(stores, READS, read(READ), 1)},
            *started(paths, stores),
        ]
        for store in stores.values():
            store.close()
        rows.append({"what": "the file, MB", **{name: path.stat().st_size / 1e6 for name, path in paths.items()}})
        begun = all_cpu()
        bring_to_key(paths["clear"], KEY)
        rows.append({"what": "`iccache encrypt`, s of CPU", "clear": None, "encrypted": all_cpu() - begun})
        return [{"n": n, **row} for row in rows]


Work = Callable[[SqliteStore, int], None]


def taking_turns(stores: dict[str, SqliteStore], times: int, work: Work, per: int) -> dict[str, float]:
    """Microseconds of CPU, the median of `times` turns, each divided by `per`; who begins alternates."""
    took: dict[str, list[float]] = {name: [] for name in stores}
    for turn in range(times):
        for name in sorted(stores, reverse=bool(turn % 2)):
            begun = time.thread_time()
            work(stores[name], turn)
            took[name].append((time.thread_time() - begun) / per * 1e6)
    return {name: statistics.median(values) for name, values in took.items()}


def recorded(count: int) -> Work:
    """A request and the example it becomes, as the writer has them."""
    vector = np.random.default_rng(2).standard_normal(DIM).astype(np.float32)

    def work(store: SqliteStore, turn: int) -> None:
        with store.transaction():
            for i in range(count):
                id = f"{count}-{turn}-{i}"
                store.record(make_exchange(id, task=TEXT + id, answer=TEXT, tenant="default"))
                store.admit(
                    make_example(
                        f"n{id}", request=TEXT + id, answer=TEXT, embedding=vector, request_id=id, embedder="n"
                    )
                )

    return work


def read(among: int) -> Work:
    def work(store: SqliteStore, turn: int) -> None:
        chosen = np.random.default_rng(turn).choice(among, READ, replace=False)
        assert len(store.examples([f"ex_{i:032x}" for i in chosen.tolist()])) == READ

    return work


def started(paths: dict[str, Path], stores: dict[str, SqliteStore]) -> list[dict[str, Any]]:
    """Until all examples can be found: CPU seconds, child processes included, and wall seconds."""
    cpu: dict[str, list[float]] = {name: [] for name in paths}
    wall: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(STARTS + 1):
        for name, key in CONTESTANTS.items():
            store = stores[name]
            kept = (
                Snapshots(store.reader, IDENTITY, DIM, paths[name])
                if key is None
                else InMemory(store.reader, IDENTITY, DIM, paths[name], key)
            )
            with closing(kept):
                if key is None and not turn:
                    kept.make(store)  # as a proxy that ran before has left it
                begun, then = all_cpu(), time.monotonic()
                retriever = Retriever(store, Dummy(DIM), snapshots=kept)
                retriever.load()
                assert len(retriever) > 0
                cpu[name].append(all_cpu() - begun)
                wall[name].append(time.monotonic() - then)
    return [
        {"what": "starting, s of CPU", **{name: statistics.median(values[1:]) for name, values in cpu.items()}},
        {"what": "starting, s", **{name: statistics.median(values[1:]) for name, values in wall.items()}},
    ]


if __name__ == "__main__":
    main()
