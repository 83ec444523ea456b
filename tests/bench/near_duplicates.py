"""When two examples with the same answer say the same: `python -m tests.bench.near_duplicates [BACKEND ...]`.

Of the requests of a data set in this repository: the same request written otherwise (case, punctuation, a typing error,
a polite word), and the nearest other request with the same answer. A measure is good where nearly all of the first are
above a threshold and few of the second; the cosine's threshold is another for every embedder, the words' is not.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from iccache import config
from iccache.examples.embed import make_embedder
from iccache.examples.selector import SAME_COSINE, SAME_WORDS
from iccache.examples.traits import overlap, words

ROOT = Path(__file__).parents[2]
FILE = "iccache/demo/data/intent_recognition.jsonl"
EACH = 150


def typo(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) - 1)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


EDITS: dict[str, Callable[[str, random.Random], str]] = {
    "case and punctuation": lambda text, rng: text.lower().rstrip(".!?"),
    "typing error": typo,
    "polite": lambda text, rng: f"Please {text[0].lower()}{text[1:]}",
}


def main() -> None:
    rng = random.Random(1)
    rows = [json.loads(line) for line in (ROOT / FILE).read_text("utf-8").splitlines()]
    rows = [row for row in rng.sample(rows, len(rows)) if len(row["input"]) > 15][: 4 * EACH]
    texts = [row["input"] for row in rows]
    some = texts[:EACH]
    edited = {name: [edit(text, rng) for text in some] for name, edit in EDITS.items()}
    cuts = {"words": SAME_WORDS}
    measures: dict[str, tuple[dict[str, list[float]], list[float]]] = {}
    said = [words(text) for text in texts]
    by_words = {
        name: [overlap(words(a), words(b)) for a, b in zip(some, new, strict=True)] for name, new in edited.items()
    }

    def nearest(score: Callable[[int, int], float]) -> list[float]:
        answers = [row["target"] for row in rows]
        same = {i: [j for j in range(len(rows)) if j != i and answers[j] == answers[i]] for i in range(EACH)}
        return [max(score(i, j) for j in same[i]) for i in range(EACH) if same[i]]

    measures["words"] = by_words, nearest(lambda i, j: overlap(said[i], said[j]))
    for backend in sys.argv[1:] or ["static", "hash"]:
        embedder = make_embedder(config.Embedder(backend=backend))  # type: ignore[arg-type]
        vectors = embedder.embed(texts)
        cosines = {name: (vectors[:EACH] * embedder.embed(new)).sum(axis=1).tolist() for name, new in edited.items()}
        measures[backend] = cosines, nearest(lambda i, j, v=vectors: float(v[i] @ v[j]))  # type: ignore[misc]
    edits = " | ".join(f"{name}, 5 / 50 %" for name in EDITS)
    print(f"| measure | {edits} | nearest other, 50 / 95 % | above the threshold |")
    print("|---" * (len(EDITS) + 3) + "|")
    for name, (dups, others) in measures.items():
        cells = [f"{np.quantile(d, 0.05):.2f} / {np.quantile(d, 0.5):.2f}" for d in dups.values()]
        cut = cuts.get(name, SAME_COSINE)
        kept = {edit: np.mean(np.array(d) > cut) for edit, d in dups.items()}
        print(
            f"| {name} | {' | '.join(cells)} | {np.quantile(others, 0.5):.2f} / {np.quantile(others, 0.95):.2f} "
            f"| above {cut}: {', '.join(f'{v:.0%}' for v in kept.values())} of the edits, "
            f"{np.mean(np.array(others) > cut):.0%} of the others |"
        )


if __name__ == "__main__":
    main()
