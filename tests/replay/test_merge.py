from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iccache.examples.embed.hashed import HashEmbedder
from iccache.types import Example, ExampleStats, Hold, Vector
from replay.merge import BLOCK, USUAL_LIMIT, alike, limit_of, merge
from replay.store import ReplayStore, open_replay_store
from tests.bench.eviction import items
from tests.factories import AT, DIM, make_example
from tests.replay.world import World, examples_of, fill, make_settings, replayed

HOUR = 3600.0


@pytest.fixture
def store(tmp_path: Path) -> ReplayStore:
    return open_replay_store(make_settings(tmp_path, "http://127.0.0.1:9"))


def at_angle(cosine: float) -> Vector:
    """(DIM,): a unit vector with that cosine to the first axis."""
    vector = np.zeros(DIM, np.float32)
    vector[0], vector[1] = cosine, np.sqrt(1 - cosine**2)
    return vector


def like(id: str, cosine: float = 1.0, **given: Any) -> Example:
    asked = "What is the capital of France" + "?" * (1 + len(id) + sum(map(ord, id)) % 50)  # never the same twice
    fields = {"request": asked, "answer": "Paris is the capital.", "embedding": at_angle(cosine)}
    return make_example(id, **{**fields, **given})


def test_the_better_stays_with_the_statistics_of_both(store: ReplayStore) -> None:
    fine = ExampleStats(
        uses=3, credit=2.0, credited_quality=1.5, offloads=1.0, offloads_at=AT, gain=0.1, own_quality=0.9
    )
    poor = ExampleStats(uses=5, credit=6.0, credited_quality=3.0, offloads=2.0, offloads_at=AT - HOUR, gain=0.5)
    store.admit(like("poor", stats=poor))
    store.admit(like("fine", 0.99, answer="Paris is the capital", stats=fine, subject="ann"))

    assert merge(store) == 1

    (left,) = store.list_examples()
    assert left.id == "fine"
    stats = left.stats
    assert (stats.uses, stats.credit, stats.credited_quality, stats.own_quality) == (8, 8.0, 4.5, 0.9)
    assert stats.offloads == pytest.approx(1.0 + 2.0 * 0.9), "decayed by the hour between them"
    assert stats.gain == pytest.approx((0.1 * 2 + 0.5 * 6) / 8)
    assert merge(store) == 0


@pytest.mark.parametrize(
    "other",
    [
        like("b", USUAL_LIMIT - 0.01),  # not near enough
        like("b", request="What is the capital of France in 1940?"),
        like("b", answer="London is the capital."),
        like("b", answer="Paris is not the capital."),
        like("b", tenant="u"),
        like("b", system="Be brief."),
        like("b", embedder="another"),
    ],
)
def test_what_differs_is_left_alone(store: ReplayStore, other: Example) -> None:
    store.admit(like("a"))
    store.admit(other)
    assert merge(store) == 0
    assert store.count_examples() == 2


def test_what_is_held_is_left_alone(store: ReplayStore) -> None:
    store.admit(like("a"))
    store.admit(like("b"))
    store.hold(["b"], Hold.QUARANTINE)
    assert merge(store) == 0


def test_what_was_made_of_the_one_that_goes_goes_with_it(store: ReplayStore) -> None:
    store.admit(like("a", stats=ExampleStats(own_quality=0.9)))
    store.admit(like("b"))
    store.admit(make_example("guidance", backend="distilled"))
    store.derive("guidance", ["b"])
    assert merge(store) == 1
    assert [e.id for e in store.list_examples()] == ["a"]


def test_many_alike_become_one_across_blocks(store: ReplayStore) -> None:
    count = BLOCK + 3
    with store.transaction():
        for n in range(count):
            near = n in (0, 1, count - 1)
            store.admit(like(f"e{n:04}") if near else make_example(f"e{n:04}", answer=f"answer {n}"))
    assert merge(store) == 2
    assert store.count_examples() == count - 2


def test_slips_of_the_pen_are_alike_and_other_requests_are_not() -> None:
    """Real requests. Their answers, which have to say the same too, are not even looked at here."""
    texts = list(dict.fromkeys(item.text for item in items()))
    embedder = HashEmbedder()
    vectors, limit = embedder.embed(texts), limit_of(embedder.identity)
    slips = [text.rstrip(".?!").upper() + "!" for text in texts]
    near = (vectors * embedder.embed(slips)).sum(axis=1) >= limit
    assert np.mean([n and alike(a, b) for n, a, b in zip(near, texts, slips, strict=True)]) > 0.95
    pairs = np.argwhere(np.triu(vectors @ vectors.T, 1) >= limit)
    wrong = {int(a) for a, b in pairs if alike(texts[a], texts[b])}
    assert len(pairs) > 50 and len(wrong) < 0.01 * len(texts)


async def test_a_run_merges_and_says_so(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url)
    fill(settings, [like("a"), like("b")])
    report = await replayed(settings)
    assert report.as_json()["merged"] == 1
    assert "merged" in report.as_text()
    assert len(examples_of(settings)) == 1


async def test_merging_can_be_switched_off(world: World, tmp_path: Path) -> None:
    settings = make_settings(tmp_path, world.upstream.base_url, replay={"merge": False})
    fill(settings, [like("a"), like("b")])
    assert "merged" not in (await replayed(settings)).as_json()
    assert len(examples_of(settings)) == 2
