"""How finding examples scales: recall, time and memory of each kind of index, and of the cache's own, by size.

    python -m tests.bench.recall                                 # 1,000 to 100,000 examples, a few minutes
    python -m tests.bench.recall --sizes 1000000                 # a million: ten minutes, 3 GB of memory, 5 GB of disk
    python -m tests.bench.recall --table                         # what was measured so far, again

One thread. Times are its CPU time, which other work on the machine disturbs least, except where a table says "wall".
Results are kept (`--results`), a size at a time; what is there is not measured again. The contestants take turns, query
by query. Vectors are of two kinds: *texts* (what the embedder makes of the texts in this repository, moved along
differences of such vectors: the clusters and the few directions of real text at any size) and *spread* (48 directions
and noise, without clusters: hard for an inverted file).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np

from iccache import config
from iccache.examples.catalogue import Catalogue
from iccache.examples.embed import make_embedder
from iccache.examples.index.clustered import Clustering, clusters
from iccache.examples.retriever import Retriever
from iccache.examples.snapshots import Snapshots
from iccache.examples.sqlite.store import SqliteStore
from iccache.types import Matrix

ROOT = Path(__file__).parents[2]
TEXTS = {
    "iccache/demo/data/intent_recognition.jsonl": "input",
    "iccache/demo/data/linguistic_mappings.jsonl": "input",
    "tests/bench/data/multi_turn.jsonl": "question",
}
SIZES = (1_000, 10_000, 100_000)
HNSW_UP_TO = 100_000  # building takes 0.3 to 0.7 ms a vector, and nothing can be removed
QUERIES = 200
K = 10
JITTER = 0.35
CHANGES = 200  # adds and deletes that are timed
IDENTITY = "synthetic"
TEXT = "x" * 400
INSERT_EXAMPLE = (
    "INSERT INTO examples (id, tenant, request_id, at, dialect, backend, digest, original, tokens, text_bytes,"
    " embedder, embedding_bytes, embedding, system, request, answer)"
    " VALUES (?, 'default', ?, 0, 'chat', 'large', ?, 1, 200, 800, ?, ?, ?, '', ?, ?)"
)
INSERT_STATS = (
    "INSERT INTO example_stats (example_id, uses, credit, credited_quality, offloads, offloads_at, gain, replays)"
    " VALUES (?, 0, 0, 0, 0, 0, 0, 0)"
)
INSERT_CHANGE = "INSERT INTO changes (at, kind, key) VALUES (0, 'example', ?)"


# vectors


def embedded_texts(results: Path) -> Matrix:
    """(n, dim): the repository's texts, by the default embedder."""
    kept = results.with_suffix(".texts.npy")
    if not kept.exists():
        files = [((ROOT / file).read_text("utf-8"), key) for file, key in TEXTS.items()]
        lines = [json.loads(line)[key] for content, key in files for line in content.splitlines()]
        embedder = make_embedder(config.Embedder())
        np.save(kept, np.concatenate([embedder.embed(lines[i : i + 64]) for i in range(0, len(lines), 64)]))
    found: Matrix = np.load(kept)
    return found


def blocks(kind: str, texts: Matrix, n: int, seed: int, rows: int = 10_000) -> Iterator[Matrix]:
    """`n` unit vectors, `rows` at a time."""
    generator = np.random.default_rng(seed)
    dim = texts.shape[1]
    directions = np.random.default_rng(0).standard_normal((48, dim)).astype(np.float32)

    def some(m: int) -> Matrix:
        return texts[generator.integers(len(texts), size=m)]

    for start in range(0, n, rows):
        m = min(rows, n - start)
        if kind == "texts":
            vectors = some(m) + JITTER * (some(m) - some(m)) + JITTER / 2 * (some(m) - some(m))
            vectors += 0.01 * generator.standard_normal((m, dim)).astype(np.float32)
        else:
            vectors = generator.standard_normal((m, 48)).astype(np.float32) @ directions
            vectors += 0.5 * generator.standard_normal((m, dim)).astype(np.float32)
        yield vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# the kinds of index


class Contestant(NamedTuple):
    name: str
    search: Callable[[Matrix], Any]  # (1, dim) -> rows
    add: Callable[[Matrix, int], Any]  # one vector, its row
    remove: Callable[[int], Any] | None
    build_s: float  # CPU
    bytes_per_vector: float


def contestants(vectors: Matrix) -> Iterator[Contestant]:
    n, dim = vectors.shape
    inner = faiss.METRIC_INNER_PRODUCT

    def rows_of(index: Any) -> Callable[[Matrix], Any]:
        return lambda query: index.search(query, K)[1][0].tolist()

    flat = faiss.IndexIDMap2(faiss.IndexFlatIP(dim))
    spent = cpu(lambda: flat.add_with_ids(vectors, np.arange(n)))
    yield Contestant("flat fp32", rows_of(flat), _adder(flat), _remover(flat), spent, 4 * dim + 8)

    eight = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit, inner)
    sample = vectors[:20_000]

    def fill() -> None:
        eight.train(sample)
        eight.add(vectors)

    yield Contestant("flat SQ8", rows_of(eight), lambda v, _: eight.add(v), None, cpu(fill), dim)

    state: list[Any] = []

    def cluster() -> None:
        chosen = np.random.default_rng(1).choice(n, min(n, 64 * clusters(n)), replace=False)
        clustering = Clustering.learn(np.ascontiguousarray(vectors[np.sort(chosen)]), n)
        index = clustering.lists()
        index.set_direct_map_type(faiss.DirectMap.Hashtable)
        index.add_with_ids(vectors, np.arange(n))
        state.extend([clustering, index])

    spent = cpu(cluster)
    index = state[1]
    for probes in (1, 8, 32):
        name = f"IVF{clusters(n)} SQ8, {probes} probed"
        if probes <= clusters(n):
            yield Contestant(name, _probing(index, probes), _adder(index), _remover(index), spent, dim + 8)
    if n <= HNSW_UP_TO:
        graph = faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_8bit, 16, inner)
        graph.hnsw.efConstruction = 80

        def link() -> None:
            graph.train(sample)
            graph.add(vectors)

        spent = cpu(link)
        for width in (64, 256):
            yield Contestant(
                f"HNSW16 SQ8, width {width}", _wide(graph, width), lambda v, _: graph.add(v), None, spent, dim + 4 * 33
            )


def _probing(index: Any, probes: int) -> Callable[[Matrix], Any]:
    parameters = faiss.SearchParametersIVF(nprobe=probes)
    return lambda query: index.search(query, K, params=parameters)[1][0].tolist()


def _wide(index: Any, width: int) -> Callable[[Matrix], Any]:
    parameters = faiss.SearchParametersHNSW(efSearch=width)
    return lambda query: index.search(query, K, params=parameters)[1][0].tolist()


def _adder(index: Any) -> Callable[[Matrix, int], Any]:
    return lambda vector, row: index.add_with_ids(vector, np.array([row]))


def _remover(index: Any) -> Callable[[int], Any]:
    return lambda row: index.remove_ids(np.array([row]))


def compare(kind: str, texts: Matrix, n: int) -> Iterator[dict[str, Any]]:
    """Each contestant on the same vectors and queries, taking turns."""
    faiss.omp_set_num_threads(1)
    vectors = np.concatenate(list(blocks(kind, texts, n, seed=1)))
    queries = np.concatenate(list(blocks(kind, texts, QUERIES if n < 1_000_000 else QUERIES // 4, seed=2)))
    new = np.concatenate(list(blocks(kind, texts, CHANGES, seed=3)))
    field = list(contestants(vectors))
    nearest = [set(rows) for rows in faiss.knn(queries, vectors, K, metric=faiss.METRIC_INNER_PRODUCT)[1].tolist()]
    times: list[list[float]] = [[] for _ in field]
    hits = [0] * len(field)
    for query, true in zip(queries, nearest, strict=True):
        for i, contestant in enumerate(field):
            started = time.thread_time()
            rows = contestant.search(query[np.newaxis])
            times[i].append(time.thread_time() - started)
            hits[i] += len(true & set(rows))
    for contestant, took, hit in zip(field, times, hits, strict=True):
        adds = [clocked(contestant.add, new[i : i + 1], n + i) for i in range(CHANGES)]
        removes = [clocked(contestant.remove, n + i) for i in range(CHANGES)] if contestant.remove else []
        yield {
            "what": "index",
            "vectors": kind,
            "n": n,
            "dim": vectors.shape[1],
            "name": contestant.name,
            "recall": hit / len(queries) / K,
            "p50_ms": quantile(took, 0.5) * 1e3,
            "p99_ms": quantile(took, 0.99) * 1e3,
            "bytes": contestant.bytes_per_vector,
            "build_s": contestant.build_s,
            "add_us": quantile(adds, 0.5) * 1e6,
            "remove_us": quantile(removes, 0.5) * 1e6 if removes else None,
        }


# the cache itself


class Dummy:
    """Queries are vectors already."""

    identity = IDENTITY

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def embed(self, texts: Any) -> Matrix:
        raise NotImplementedError


def fill(store: SqliteStore, kind: str, texts: Matrix, n: int) -> None:
    """`n` examples of 0.8 KB, straight into the tables."""
    db = store._db
    for number, block in enumerate(blocks(kind, texts, n, seed=1)):
        ids = [f"ex_{number * 10_000 + i:032x}" for i in range(len(block))]
        rows = [
            (id, id, id.encode(), IDENTITY, 4 * block.shape[1], vector.tobytes(), TEXT, TEXT)
            for id, vector in zip(ids, block, strict=True)
        ]
        with store.transaction():
            db.conn.executemany(INSERT_EXAMPLE, rows)
            db.conn.executemany(INSERT_STATS, [(id,) for id in ids])
            db.conn.executemany(INSERT_CHANGE, [(id,) for id in ids])


def whole(kind: str, texts: Matrix, n: int, folder: Path) -> dict[str, Any]:
    """A store of `n` examples: clustering it, starting on it, and finding in it."""
    path = folder / f"{kind}-{n}.db"
    made: dict[str, Any] = {"what": "cache", "vectors": kind, "n": n, "dim": texts.shape[1]}
    with closing(SqliteStore(path)) as store:
        if store.count_examples() != n:
            made["fill_s"] = clocked(fill, store, kind, texts, n)
            store.checkpoint()
        dim = texts.shape[1]
        snapshots = Snapshots(store.reader, IDENTITY, dim, path)
        lag: list[float] = []
        if n >= 2000:
            snapshots.path.unlink(missing_ok=True)
            asyncio.run(watch(idle := [], lambda: len(idle) < 1500))
            made["cluster_wall_s"], made["cluster_cpu_s"] = in_background(snapshots, lag)
            for name, late in (("idle_late", idle), ("loop_late", lag)):
                made[f"{name}_max_ms"] = max(late) * 1e3
                made[f"{name}_p99_ms"] = quantile(late, 0.99) * 1e3
        gc.collect()
        before = private_mb()
        retriever = Retriever(store, Dummy(dim), snapshots=snapshots)
        started = time.monotonic()
        made["start_cpu_s"] = clocked(retriever.load)
        made["start_s"] = time.monotonic() - started
        made["private_mb"] = private_mb() - before
        made["probes"] = [index.probes for index in retriever.catalogue._clustered.values()]
        queries = np.concatenate(list(blocks(kind, texts, QUERIES, seed=2)))
        made.update(searches(retriever.catalogue, store, queries, texts, kind, n))
        changed = ids_of(n, 200)
        took = clocked(lambda: retriever.catalogue.follow(changed, store.examples(changed)))
        made["catch_up_us"] = took / len(changed) * 1e6
        made["bytes"] = store.size_bytes()
        removed = ids_of(n, 20)
        made["delete_us"] = clocked(lambda: [retriever.catalogue.forget(id) for id in removed]) / len(removed) * 1e6
        snapshots.close()
    return made


def ids_of(n: int, count: int) -> list[str]:
    return [f"ex_{i:032x}" for i in np.random.default_rng(3).choice(n, min(n, count), replace=False).tolist()]


def searches(
    catalogue: Catalogue, store: SqliteStore, queries: Matrix, texts: Matrix, kind: str, n: int
) -> dict[str, float]:
    """Recall and time of the index, and of reading what it found from the store."""
    best = np.full((len(queries), K), -2.0, np.float32)
    who = np.zeros((len(queries), K), np.int64)
    for start, block in enumerate(blocks(kind, texts, n, seed=1)):
        cosines, rows = faiss.knn(queries, block, K, metric=faiss.METRIC_INNER_PRODUCT)
        cosines, rows = np.concatenate([best, cosines], 1), np.concatenate([who, rows + start * 10_000], 1)
        order = np.argsort(-cosines, axis=1)[:, :K]
        best, who = np.take_along_axis(cosines, order, 1), np.take_along_axis(rows, order, 1)
    found: list[float] = []
    read: list[float] = []
    hits = 0
    for query, true in zip(queries, who.tolist(), strict=True):
        started = time.thread_time()
        ids = catalogue.search("default", query, 16)
        between = time.thread_time()
        examples = store.examples(ids)
        read.append(time.thread_time() - between)
        found.append(between - started)
        ranked = sorted(examples, key=lambda e: -float(e.embedding @ query))[:K]
        hits += len({f"ex_{row:032x}" for row in true} & {e.id for e in ranked})
    return {
        "recall": hits / len(queries) / K,
        "p50_ms": quantile(found, 0.5) * 1e3,
        "p99_ms": quantile(found, 0.99) * 1e3,
        "read16_p50_ms": quantile(read, 0.5) * 1e3,
    }


def in_background(snapshots: Snapshots, lag: list[float]) -> tuple[float, float]:
    """(wall, CPU) seconds of clustering in its thread, while an event loop notes how late its timer is."""

    def at_work() -> bool:
        return snapshots._thread is not None and snapshots._thread.is_alive()

    started, spent = time.monotonic(), all_cpu()
    snapshots.start()
    asyncio.run(watch(lag, at_work))
    took = time.monotonic() - started, all_cpu() - spent
    assert snapshots.finished() is not None
    return took


async def watch(lag: list[float], still: Callable[[], bool]) -> None:
    """How late a timer of 2 ms is, over and over."""
    while still():
        expected = time.perf_counter() + 0.002
        await asyncio.sleep(0.002)
        lag.append(time.perf_counter() - expected)


def all_cpu() -> float:
    """CPU seconds of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


# measuring


def clocked(function: Callable[..., Any], *arguments: Any) -> float:
    """CPU seconds of this thread."""
    started = time.thread_time()
    function(*arguments)
    return time.thread_time() - started


def cpu(function: Callable[[], Any]) -> float:
    """CPU seconds."""
    started = time.process_time()
    function()
    return time.process_time() - started


def quantile(values: list[float], q: float) -> float:
    return float(np.quantile(values, q))


def private_mb() -> float:
    """Memory that is this process's alone: files that are mapped are everybody's."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) / 1024


# the command


def measure(results: Path, folder: Path, kind: str, n: int, part: str) -> None:
    """One step, in a process of its own so that its memory is its own."""
    texts = embedded_texts(results)
    rows = compare(kind, texts, n) if part == "index" else iter([whole(kind, texts, n, folder)])
    for row in rows:
        row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def known(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.exists() else []


INDEX_TABLE = (
    *("vectors", "n", "dim", "index", "recall@10", "p50 / p99, ms", "bytes per vector", "build, CPU s"),
    "add / delete, us",
)
CACHE_TABLE = (
    *(
        "vectors",
        "n",
        "dim",
        "lists looked into",
        "recall@10",
        "search p50 / p99, ms",
        "reading 16, ms",
        "start, s CPU / wall",
    ),
    "clustering, CPU s",
    *("event loop late before, p99 / most, wall ms", "while clustering", "own memory, MB", "snapshot, MB", "store, MB"),
    "delete / catch up, us",
)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    rows = sorted(rows, key=lambda r: (r["vectors"] != "texts", r["n"]))
    for names, what, line in ((INDEX_TABLE, "index", index_line), (CACHE_TABLE, "cache", cache_line)):
        yield f"| {' | '.join(names)} |"
        yield "|---" * len(names) + "|"
        yield from (f"| {' | '.join(line(row))} |" for row in rows if row["what"] == what)
        yield ""


def index_line(r: dict[str, Any]) -> Iterator[str]:
    yield from (r["vectors"], f"{r['n']:,}", str(r["dim"]), r["name"], f"{r['recall']:.3f}")
    yield from (f"{r['p50_ms']:.2f} / {r['p99_ms']:.2f}", f"{r['bytes']:.0f}", f"{r['build_s']:.1f}")
    yield f"{r['add_us']:.0f} / {'-' if r['remove_us'] is None else format(r['remove_us'], '.0f')}"


def cache_line(r: dict[str, Any]) -> Iterator[str]:
    size = r["bytes"]
    yield from (r["vectors"], f"{r['n']:,}", str(r["dim"]), ", ".join(map(str, r["probes"])) or "all")
    yield from (f"{r['recall']:.3f}", f"{r['p50_ms']:.2f} / {r['p99_ms']:.2f}", f"{r['read16_p50_ms']:.2f}")
    yield from (f"{r['start_cpu_s']:.2f} / {r['start_s']:.2f}", f"{r.get('cluster_cpu_s', 0):.1f}")
    for name in ("idle_late", "loop_late"):
        yield f"{r[f'{name}_p99_ms']:.1f} / {r[f'{name}_max_ms']:.1f}" if f"{name}_max_ms" in r else "-"
    yield from (f"{r['private_mb']:.0f}", f"{size['index'] / 1e6:.1f}")
    yield from (f"{(sum(size.values()) - size['index']) / 1e6:.0f}", f"{r['delete_us']:.0f} / {r['catch_up_us']:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--vectors", nargs="*", default=["texts", "spread"], choices=["texts", "spread"])
    parser.add_argument("--parts", nargs="*", default=["index", "cache"], choices=["index", "cache"])
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "iccache-recall.jsonl")
    parser.add_argument("--folder", type=Path, help="for the stores; a temporary one by default")
    parser.add_argument("--table", action="store_true", help="print what is known, measure nothing")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.step:
        kind, n, part = asked.step
        measure(asked.results, asked.folder, kind, int(n), part)
        return
    with tempfile.TemporaryDirectory(prefix="iccache-recall-") as temporary:
        for n in [] if asked.table else asked.sizes:
            for kind in asked.vectors:
                for part in asked.parts:
                    if any((r["what"], r["vectors"], r["n"]) == (part, kind, n) for r in known(asked.results)):
                        continue
                    print(f"{part} of {n:,} {kind} ...", file=sys.stderr, flush=True)
                    subprocess.run(
                        [
                            *(sys.executable, "-m", "tests.bench.recall", "--results", asked.results),
                            *("--folder", asked.folder or temporary, "--step", kind, str(n), part),
                        ],
                        check=True,
                        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                    )
    print("\n".join(table(known(asked.results))))


if __name__ == "__main__":
    main()
