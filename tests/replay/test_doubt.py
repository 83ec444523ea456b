from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from iccache.examples.utility import votes
from iccache.types import Example, ExampleStats, Hold
from replay.doubt import LEAST_PEERS, LOCAL, NEIGHBOURS, UNKNOWN, Peer, Said, doubts, evidence
from replay.store import SAID_KEPT, open_replay_store
from tests.factories import AT, make_example, make_exchange, make_feedback
from tests.replay.world import make_settings

DIM = 16
LABELS = ("book_table", "get_weather", "play_music")


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def labelled(rng: np.random.Generator, n: int = 120, bad: float = 0.3) -> tuple[list[Peer], np.ndarray, np.ndarray]:
    """Requests in three clusters, each with its label; of `bad` of them the answer is another's."""
    centres = rng.normal(size=(len(LABELS), DIM))
    true = rng.integers(len(LABELS), size=n)
    wrong = rng.random(n) < bad
    given = np.where(wrong, (true + rng.integers(1, len(LABELS), size=n)) % len(LABELS), true)
    vectors = unit(centres[true] + 0.8 * rng.normal(size=(n, DIM)))
    return [Peer(str(i), f"request {i}", LABELS[label]) for i, label in enumerate(given)], vectors, wrong


def plurals(rng: np.random.Generator, n: int = 60) -> tuple[list[Peer], np.ndarray, np.ndarray]:
    """Every request has an answer of its own; a fifth got another's."""
    words = ["".join(rng.choice(list("abcdefghijklmnop"), size=7)) for _ in range(n)]
    wrong = np.arange(n) % 5 == 0
    answers = [f"{words[i - 1] if bad else word}s" for i, (word, bad) in enumerate(zip(words, wrong, strict=True))]
    vectors = unit(rng.normal(size=(n, DIM)))
    return [Peer(str(i), f"Plural: {word}", answers[i]) for i, word in enumerate(words)], vectors, wrong


@pytest.mark.parametrize("make", [labelled, plurals])
@pytest.mark.parametrize("seed", range(3))
def test_wrong_answers_are_doubted_where_peers_show_what_is_right(make: object, seed: int) -> None:
    assert callable(make)
    peers, vectors, wrong = make(np.random.default_rng(seed))

    assert roc_auc_score(wrong, evidence(peers, vectors).doubt()) > 0.9


def test_where_nothing_can_be_seen_nobody_is_doubted_more() -> None:
    """The limit of what this can do: right and wrong look alike, and no two answers are the same."""
    rng = np.random.default_rng(0)
    numbers = rng.permutation(np.arange(1000, 3000))[:400]
    peers = [Peer(str(i), f"How many of {i + 1000}?", str(number)) for i, number in enumerate(numbers)]

    found = evidence(peers, unit(rng.normal(size=(400, DIM)))).doubt()

    assert 0.4 < roc_auc_score(np.arange(400) % 3 == 0, found) < 0.6


def test_the_evidence_is_that_of_the_formula_worked_out_one_by_one() -> None:
    peers, vectors, _ = labelled(np.random.default_rng(4), n=40)
    found = evidence(peers, vectors)
    lengths = np.array([math.log1p(len(p.answer)) for p in peers])
    margins, odd, near = [], [], []
    for i, peer in enumerate(peers):
        others = sorted((j for j in range(40) if j != i), key=lambda j: -float(vectors[i] @ vectors[j]))[:NEIGHBOURS]
        near.append(others)
        say = dict(
            zip(
                (peers[j].answer for j in others),
                votes([float(vectors[i] @ vectors[j]) for j in others], [peers[j].answer for j in others]),
                strict=True,
            )
        )
        margins.append(max((s for a, s in say.items() if a != peer.answer), default=0.0) - say.get(peer.answer, 0.0))
        middle = float(np.median(lengths[others]))
        local = 1.4826 * float(np.median(np.abs(lengths[others] - middle)))
        odd.append(abs(lengths[i] - middle) / (LOCAL * local + (1 - LOCAL) * lengths.std()))
    foretold = np.mean(np.array(margins) < 0)
    assert found.outvoted == pytest.approx(foretold * np.array(margins), abs=1e-5)
    same_length = [Peer(p.id, "r" * 5, "x" * len(p.answer)) for p in peers]  # nothing but lengths differs
    assert np.argsort(evidence(same_length, vectors).odd)[-1] in np.flatnonzero(np.array(odd) >= max(odd) - 1e-6)


def test_an_answer_that_was_repeated_and_failed_is_doubted_and_one_that_was_not_repeated_is_not() -> None:
    peers, vectors, _ = labelled(np.random.default_rng(1), bad=0.0)
    before = evidence(peers, vectors).doubt()
    label = peers[7].answer
    other = next(name for name in LABELS if name != label)

    def after(said: str, quality: float) -> np.ndarray:
        others = [Said(p.id, p.answer, 1.0) for p in peers[20:40]]
        return evidence(peers, vectors, [*others, *[Said("7", said, quality)] * 3]).doubt()

    assert after(f" {label.upper()}.", 0.0)[7] > 1.5 * before[7]
    assert after(label, 1.0)[7] < before[7]
    assert after(other, 0.0)[7] == pytest.approx(before[7], rel=0.05)


def test_what_the_neighbours_agree_on_is_known_with_its_weight() -> None:
    peers, vectors, _ = labelled(np.random.default_rng(2))
    alone, far, _ = plurals(np.random.default_rng(2))

    found = evidence(peers, vectors).consensus

    truth = [p.answer for p in labelled(np.random.default_rng(2), bad=0.0)[0]]
    assert np.mean([c.answer == t for c, t in zip(found, truth, strict=True)]) > 0.75, "of single answers 0.7 are right"
    assert all(0.0 < c.weight <= 1.0 for c in found)
    assert max(c.weight for c in evidence(alone, far).consensus) == 0.0, "no answer is given twice"


def kept(id: str, request: str, answer: str, **given: object) -> Example:
    return make_example(id, system="Name it.", request=request, answer=answer, **given)


def test_peers_are_of_one_tenant_system_prompt_and_model_and_are_shown(tmp_path: Path) -> None:
    store = open_replay_store(make_settings(tmp_path, "http://127.0.0.1:9"))
    for n in range(LEAST_PEERS - 1):
        store.admit(kept(f"e{n:02}", f"request {n}", "yes"))
    store.admit(kept("other tenant", "request", "yes", tenant="u"))
    store.admit(make_example("other system", system="Say it.", answer="yes"))
    store.admit(kept("other model", "request 91", "yes", embedder="another"))
    store.admit(kept("held", "request 92", "yes", held=Hold.SUSPECT))
    assert doubts(store, ["e00", "other tenant", "other system", "other model"]) == {}, "too few each"

    store.admit(kept("e99", "request 99", "something quite different, with many words!"))
    found = doubts(store, ["e00", "e99", "other system", "gone"])

    assert sorted(found) == ["e00", "e99"]
    assert found["e00"].wrong < UNKNOWN < 0.9 < found["e99"].wrong
    assert doubts(store, ["held"])["held"].wrong < UNKNOWN, "it is compared with those that are shown"


def test_the_newest_scored_answers_are_read_for_each_example(tmp_path: Path) -> None:
    store = open_replay_store(make_settings(tmp_path, "http://127.0.0.1:9"))
    stats = ExampleStats()
    for id in ("a", "b"):
        store.admit(make_example(id, stats=stats))
    for n in range(SAID_KEPT + 5):
        shown = ["a", "b"] if n < 2 else ["a"]
        store.record(make_exchange(f"r{n:03}", answer=f"answer {n}", shown=shown, at=AT + n))
        store.add_feedback(make_feedback(f"r{n:03}", score=0.25, at=AT + n), tenant="t")
    store.record(make_exchange("not scored", shown=["b"]))

    found = store.said(["a", "b"])

    assert {s.answer for s in found if s.example_id == "b"} == {"answer 0", "answer 1"}
    assert sorted(s.answer for s in found if s.example_id == "a") == sorted(
        f"answer {n}" for n in range(5, SAID_KEPT + 5)
    )
    assert {s.quality for s in found} == {0.25}
