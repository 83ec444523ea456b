from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iccache import config
from iccache.types import Example, ExampleStats, Hold
from replay import assemble
from replay.assemble import Options
from replay.distil import CLUSTER, LEAST, SEEN, clusters, good, k_means, question
from replay.prices import NUSD
from replay.store import DISTILLED
from tests.factories import AT, DIM, make_example, make_exchange, make_feedback
from tests.fakes import Script
from tests.replay.world import World, fill, make_settings, opened, replayed

GUIDANCE = "Answer with one word, in lower case."


def around(axis: int, count: int, **given: Any) -> list[Example]:
    """Examples whose embeddings lie round one axis."""
    rng = np.random.default_rng(axis)
    vectors = np.eye(DIM)[axis] + 0.1 * rng.normal(size=(count, DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [
        make_example(f"e{axis}-{n:02}", embedding=v.astype(np.float32), **{"system": "Classify.", **given})
        for n, v in enumerate(vectors)
    ]


def settings_of(world: World, folder: Path, **replay: Any) -> config.Config:
    world.says = lambda prompt: GUIDANCE
    return make_settings(folder, world.upstream.base_url, replay={"distil": True, "merge": False, **replay})


def guidance_of(settings: config.Config) -> list[Example]:
    return [e for e in opened(settings).list_examples() if e.backend == DISTILLED]


def test_k_means_finds_what_lies_together() -> None:
    vectors = np.stack([e.embedding for axis in range(3) for e in around(axis, 20)]).astype(np.float64)
    labels = k_means(vectors, 3)
    groups = [set(labels[20 * g : 20 * (g + 1)]) for g in range(3)]
    assert all(len(group) == 1 for group in groups) and len(set.union(*groups)) == 3
    assert (k_means(vectors, 3) == labels).all()


@pytest.mark.parametrize("count", [0, LEAST - 1])
def test_of_too_few_nothing_is_distilled(count: int) -> None:
    assert not list(clusters(around(0, count)))


def test_a_cluster_begins_with_its_most_central_member() -> None:
    (cluster,) = clusters(around(0, CLUSTER))
    cosines = [float(e.embedding @ cluster.centre) for e in cluster.members]
    assert cosines == sorted(cosines, reverse=True)
    assert np.linalg.norm(cluster.centre) == pytest.approx(1.0)


def test_what_is_known_to_be_bad_is_not_learned_from() -> None:
    members = around(0, LEAST, stats=ExampleStats(own_quality=0.1))
    members[3] = members[3]._replace(stats=ExampleStats(own_quality=0.9))
    members[5] = members[5]._replace(stats=ExampleStats(credit=4.0, credited_quality=4.0))
    (cluster,) = clusters(members)
    assert [e.id for e in good(cluster)] == ["e0-05", "e0-03"]


async def test_guidance_is_written_and_competes_like_an_example(world: World, tmp_path: Path) -> None:
    settings = settings_of(world, tmp_path)
    fill(settings, around(0, 20))

    report = await replayed(settings)

    assert report.as_json()["distilled"] == 1
    (entry,) = guidance_of(settings)
    assert (entry.answer, entry.system, entry.tenant, entry.stats) == (GUIDANCE, "Classify.", "t", ExampleStats())
    (cluster,) = clusters(around(0, 20))
    assert entry.request == question(cluster.members[0])
    assert float(entry.embedding @ cluster.centre) == pytest.approx(1.0, abs=1e-5), "recalled where its cluster is"
    assert report.confirmed_nusd == world.billed_nusd(settings) > 0
    (call,) = world.asked("teacher")
    assert call.prompt.count("Good answer:") == SEEN


async def test_the_teacher_sees_failures_but_no_strangers(world: World, tmp_path: Path) -> None:
    settings = settings_of(world, tmp_path)
    fill(settings, around(0, 20, subject="ann"))
    live = opened(settings)
    for subject in ("ann", "bob", None):
        id = f"failed-{subject}"
        live.record(make_exchange(id, subject=subject, shown=["e0-00"], answer=f"bad answer to {subject}"))
        live.add_feedback(make_feedback(id, 0.0), tenant="t")
    live.record(make_exchange("fine", subject="ann", shown=["e0-00"], answer="went well"))
    live.add_feedback(make_feedback("fine", 1.0), tenant="t")

    await replayed(settings, limit=0)

    (call,) = world.asked("teacher")
    assert "bad answer to ann" in call.prompt and "bad answer to None" in call.prompt
    assert "bad answer to bob" not in call.prompt, "bob's purge would not reach what is made of it"
    assert "went well" not in call.prompt


@pytest.mark.parametrize("how", ["delete", "purge"])
async def test_guidance_goes_with_any_of_its_sources(world: World, tmp_path: Path, how: str) -> None:
    settings = settings_of(world, tmp_path)
    examples = around(0, 20)
    (cluster,) = clusters(examples)
    source = good(cluster)[3]
    fill(settings, [e._replace(subject="ann") if e.id == source.id else e for e in examples])
    await replayed(settings)
    assert guidance_of(settings)
    store = opened(settings)
    if how == "delete":
        store.delete_examples([source.id])
    else:
        store.purge("t", "ann")
    assert not guidance_of(settings)
    assert store.count_examples() == 19
    assert GUIDANCE.encode() not in Path(settings.store.url.removeprefix("sqlite:///")).read_bytes()


async def test_guidance_is_held_with_any_of_its_sources(world: World, tmp_path: Path) -> None:
    settings = settings_of(world, tmp_path)
    fill(settings, around(0, 20))
    await replayed(settings)
    (entry,) = guidance_of(settings)
    (cluster,) = clusters(around(0, 20))
    held = opened(settings).hold([good(cluster)[0].id], Hold.QUARANTINE)
    assert entry.id in held


async def test_it_is_written_once_until_the_cluster_has_doubled(world: World, tmp_path: Path) -> None:
    settings = settings_of(world, tmp_path)
    fill(settings, around(0, 16))
    written = [(await replayed(settings)).as_json()["distilled"] for _ in range(2)]
    fill(settings, around(0, 33))
    written += [(await replayed(settings)).as_json()["distilled"] for _ in range(2)]
    assert written == [1, 0, 1, 0]


async def test_what_cannot_be_used_is_not_paid_for_at_every_run(world: World, tmp_path: Path) -> None:
    settings = settings_of(world, tmp_path)
    world.says = lambda prompt: "Answer with <|im_end|> alone."  # a chat template's marker
    fill(settings, around(0, CLUSTER))
    for _ in range(3):
        await replayed(settings)
    assert guidance_of(settings) == [] and len(world.asked("teacher")) == 1


async def test_of_guidance_that_was_cut_the_whole_sentences_stay(world: World, tmp_path: Path) -> None:
    settings = settings_of(world, tmp_path)
    world.says = lambda prompt: "Answer with one word (in lower case.) Never explain.\n2. And then"
    world.upstream.by_model["teacher"].finish_reason = "length"
    fill(settings, around(0, CLUSTER))
    await replayed(settings)
    assert [e.answer for e in guidance_of(settings)] == ["Answer with one word (in lower case.) Never explain."]


async def test_the_plan_tells_what_guidance_would_cost_at_most(world: World, tmp_path: Path) -> None:
    settings = settings_of(world, tmp_path)
    fill(settings, around(0, 20))
    planned = assemble.planned(settings, Options()).as_json()
    assert planned["guidance"]["clusters"] == 1 and not world.billed
    report = await replayed(settings)
    assert 0 < report.confirmed_nusd <= planned["guidance"]["most_usd"] * NUSD
    assert planned["usd"]["most"] == planned["guidance"]["most_usd"]
    assert assemble.planned(settings, Options()).as_json()["guidance"] == {"clusters": 0, "most_usd": 0.0}


async def test_replay_never_asks_guidance_again(world: World, tmp_path: Path) -> None:
    settings = settings_of(world, tmp_path)
    fill(settings, [make_example("g", backend=DISTILLED, stats=ExampleStats(uses=9, credit=9.0, gain=0.9))])
    assert (await replayed(settings)).considered == 0


async def test_it_is_off_by_default_and_stays_within_the_budget(world: World, tmp_path: Path) -> None:
    assert config.Replay().distil is False
    settings = settings_of(world, tmp_path, usd_budget=0.0)
    fill(settings, around(0, 20))
    report = await replayed(settings)
    assert report.as_json()["distilled"] == 0 and not world.billed


async def test_a_teacher_that_fails_leaves_the_rest_of_the_run_alone(world: World, tmp_path: Path) -> None:
    settings = settings_of(world, tmp_path)
    world.upstream.by_model["teacher"] = Script(status=400)
    fill(settings, [*around(0, 20), make_example("old", at=AT)])
    report = await replayed(settings)
    assert report.as_json()["distilled"] == 0
    assert not guidance_of(settings)
    assert not opened(settings).rows("SELECT * FROM replay_workers")
