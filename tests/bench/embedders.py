"""How well each embedder finds what belongs together, and what it costs: `python -m tests.bench.embedders`.

Thirteen sets of texts with labels, from two packages of PyPI that are downloaded by hash and read, not installed
(bigbench 358 MB, evals 46 MB; reading takes about a minute). EACH texts of each set.

- same task: of the 10 nearest among all texts of all sets, the share from the text's own set
- same label: within its set, whether the nearest has its label; and the share of the 10 nearest that have
- paraphrase: mean reciprocal rank of the plain meaning of a figure of speech (metaphor_boolean) among plain sentences
- near miss: how often the plain meaning is nearer than a sentence in nearly the same words that means another thing
- long, end / start: a question put otherwise, among EACH others, all with the same document of about 2,000 words
  before (after) them: mean reciprocal rank

Intervals are 95 %, by bootstrap over texts. The packaged table is made of no text, but the share of its embedder's
dimensions that is about spelling was chosen on these thirteen sets, so the first three columns flatter it; the others
were not looked at for that. Vectors are kept in FOLDER, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from iccache import config
from iccache.examples.embed import Embedder, make_embedder
from iccache.examples.embed.onnx import cache_folder

EACH = 100
PACKAGES = {
    "bigbench-1.0.0.tar.gz": ("bigbench==1.0.0", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"),
    "evals-3.0.1.post1-py3-none-any.whl": (
        "evals==3.0.1.post1",
        "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    ),
}
BIGBENCH = (
    "intent_recognition",
    "social_support",
    "linguistic_mappings",
    "qa_wikidata",
    "mult_data_wrangling",
    "language_identification",
    "metaphor_boolean",
)
EVALS = ("bias_detection", "guess_the_singer", "brazilian_laws", "soc_codes", "food", "event_categories", "ner_finance")
BACKENDS = ("static", "hash", "onnx-int8", "onnx", "sentence-transformers")
ASKED = ("Please tell me: {}", "I would like an answer to this. {}", "{} Thanks in advance!")
Pairs = list[tuple[str, str]]
Floats = NDArray[np.floating]


class Data(NamedTuple):
    sets: dict[str, Pairs]  # name -> (text, label)
    figures: list[tuple[str, str, str]]  # (figure of speech, its meaning, what it does not mean)
    document: str


def fetched(folder: Path, name: str) -> Path:
    """The package's file, by pip and with its hash checked, where it is not there yet."""
    requirement, sha256 = PACKAGES[name]
    if not (folder / name).is_file():
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
            listed.write(f"{requirement} --hash=sha256:{sha256}\n")
            listed.flush()
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--require-hashes"]
            subprocess.run([*command, "--dest", str(folder), "-r", listed.name], check=True)
    with (folder / name).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise SystemExit(f"{folder / name} is not the file that is meant")
    return folder / name


def read(folder: Path) -> Data:
    """Everything that is embedded; kept beside the vectors, since the archive takes a minute to read."""
    kept = folder / f"texts-{EACH}.json"
    if not kept.is_file():
        kept.write_text(json.dumps(_bigbench(folder) | _evals(folder)))
    loaded: dict[str, Pairs] = json.loads(kept.read_text())
    rows = {name: [(text, label) for text, label in pairs] for name, pairs in loaded.items()}
    figures = rows.pop("metaphor_boolean")
    words = " ".join(text for text, _ in rows["social_support"])
    return Data({name: _some(pairs) for name, pairs in rows.items()}, _figures(figures), words[:12_000])


def _bigbench(folder: Path) -> dict[str, Pairs]:
    found: dict[str, Pairs] = {name: [] for name in BIGBENCH}
    with tarfile.open(fetched(folder, "bigbench-1.0.0.tar.gz")) as archive:
        for member in archive:
            parts = member.name.split("/")
            if parts[-1] != "task.json" or parts[3] not in found:
                continue
            opened = archive.extractfile(member)
            assert opened is not None
            for example in json.load(opened).get("examples", []):
                if isinstance(example.get("input"), str) and example["input"].strip():
                    found[parts[3]].append((example["input"], _label(parts[3:-1], example)))
    return found


def _label(parts: Sequence[str], example: dict[str, object]) -> str:
    """What two texts of a set have in common: the answer, the relation asked for, or the subtask."""
    if parts[0] == "qa_wikidata":  # "The genre of X is": what is not a name
        return re.sub(r"[A-Z0-9\"(].*[A-Z0-9\")]\S*|[A-Z0-9]\S*", "X", str(example["input"])[4:])
    if len(parts) > 1:
        return "/".join(parts[1:])
    scores = example.get("target_scores")
    return str(max(scores, key=scores.__getitem__) if isinstance(scores, dict) else example["target"])


def _evals(folder: Path) -> dict[str, Pairs]:
    found: dict[str, Pairs] = {}
    with zipfile.ZipFile(fetched(folder, "evals-3.0.1.post1-py3-none-any.whl")) as wheel:
        for name in EVALS:
            file = next(f for f in wheel.namelist() if f.endswith(f"/registry/data/{name}/samples.jsonl"))
            rows = [json.loads(line) for line in wheel.read(file).decode().splitlines() if line.strip()]
            found[name] = [(row["input"][-1]["content"], json.dumps(row["ideal"])) for row in rows if "ideal" in row]
    return found


def _some(pairs: Pairs) -> Pairs:
    distinct = sorted(dict(pairs).items())
    random.Random(0).shuffle(distinct)
    return distinct[:EACH]


def _figures(pairs: Pairs) -> list[tuple[str, str, str]]:
    meant: dict[str, dict[str, str]] = {}
    for text, label in pairs:
        figure, _, plain = text.partition("<-->")
        meant.setdefault(figure.strip(), {}).setdefault(label, plain.strip())
    return [(figure, m["True"], m["False"]) for figure, m in meant.items() if len(m) == 2]


class Result(NamedTuple):
    """Each (n,) over texts, and the set each belongs to where sets are averaged."""

    task: Floats
    first: Floats
    ten: Floats
    paraphrase: Floats
    near_miss: Floats
    end: Floats
    start: Floats


def measure(embed: Callable[[Sequence[str]], Floats], data: Data) -> Result:
    rows = [(name, text, label) for name, pairs in data.sets.items() for text, label in pairs]
    names, labels = np.array([n for n, _, _ in rows]), np.array([label for _, _, label in rows])
    vectors = embed([text for _, text, _ in rows])
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2)
    task = (names[np.argsort(-cosines, axis=1)[:, :10]] == names[:, None]).mean(1)
    cosines[names[:, None] != names[None, :]] = -3
    hits = labels[np.argsort(-cosines, axis=1)[:, :10]] == labels[:, None]
    figures, plain, other = (embed([f[i] for f in data.figures]) for i in range(3))
    questions = [text for text, _ in data.sets["qa_wikidata"]]
    asked = [ASKED[i % len(ASKED)].format(q) for i, q in enumerate(questions)]
    return Result(
        task,
        hits[:, 0].astype(float),
        hits.mean(1),
        _reciprocal(figures, np.concatenate([plain, other])),
        ((figures * plain).sum(1) > (figures * other).sum(1)).astype(float),
        _reciprocal(*(embed([f"{data.document}\n\n{q}" for q in list_]) for list_ in (asked, questions))),
        _reciprocal(*(embed([f"{q}\n\n{data.document}" for q in list_]) for list_ in (asked, questions))),
    )


def _reciprocal(queries: Floats, candidates: Floats) -> Floats:
    """1 / rank of candidate i for query i; of equals, all are before it."""
    cosines = queries @ candidates.T
    own = np.diagonal(cosines)[:, None]
    return 1.0 / (cosines >= own - 1e-6).sum(1)


def interval(values: Floats) -> str:
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (1000, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]".replace("0.", ".")


def kept(embedder: Embedder, folder: Path) -> Callable[[Sequence[str]], Floats]:
    """`embedder`, with the vectors of each list of texts on disk."""

    def embed(texts: Sequence[str]) -> Floats:
        key = hashlib.sha256("\0".join([embedder.identity, *texts]).encode("utf-8", "replace")).hexdigest()[:24]
        file = folder / f"{key}.npy"
        if not file.is_file():
            np.save(file, embedder.embed(texts))
        return np.load(file)

    return embed


COST = """
import json, pathlib, re, sys, time
started = time.process_time()
from iccache import config
from iccache.examples.embed import make_embedder
embedder = make_embedder(config.Embedder(backend=sys.argv[1], cache_entries=0))
embedder.embed(["a first text"])
ready = time.process_time() - started
words = "The station near the old bridge opens early on most days and its small hall is warm".split()
took = []
for tokens in (16, 64, 256):
    texts = [" ".join(words[(i + j) % len(words)] for j in range(tokens)) for i in range(20)]
    each = []
    for text in texts:
        before = time.process_time(); embedder.embed([text]); each.append(time.process_time() - before)
    took.append(sorted(each)[len(each) // 2] * 1000)
peak = int(re.search('VmHWM:[^0-9]*([0-9]+)', pathlib.Path('/proc/self/status').read_text())[1])
print(json.dumps([*took, ready, peak / 1024]))
"""


def cost(backend: str) -> list[float]:
    """CPU ms of a text of 16, 64 and 256 tokens, CPU s to the first embedding, RSS in MB: in its own process."""
    done = subprocess.run([sys.executable, "-c", COST, backend], capture_output=True, text=True, check=True)
    return [float(x) for x in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.embedders", description=__doc__)
    parser.add_argument("--folder", type=Path, default=cache_folder() / "bench-embedders")
    parser.add_argument("--only", choices=BACKENDS, action="append")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    data = read(asked.folder)
    print(f"{sum(map(len, data.sets.values()))} texts of {len(data.sets)} sets, {len(data.figures)} figures\n")
    print("| embedder | same task | same label, nearest | of 10 | paraphrase | near miss | long, end | long, start |")
    print("|---|---|---|---|---|---|---|---|")
    for backend in asked.only or BACKENDS[:-1]:  # the last is the same model as the one before
        embedder = make_embedder(config.Embedder(backend=backend, cache_entries=0))
        found = measure(kept(embedder, asked.folder), data)
        print(f"| {backend} | " + " | ".join(map(interval, found)) + " |", flush=True)
    print("\n| embedder | dimensions | CPU ms, 16 / 64 / 256 tokens | CPU s to the first | RSS, MB |")
    print("|---|---|---|---|---|")
    for backend in asked.only or BACKENDS:
        dim = make_embedder(config.Embedder(backend=backend)).dim
        short, middling, long, ready, rss = cost(backend)
        took = f"{short:.2f} / {middling:.2f} / {long:.2f}"
        print(f"| {backend} | {dim} | {took} | {ready:.1f} | {rss:.0f} |", flush=True)


if __name__ == "__main__":
    main()
