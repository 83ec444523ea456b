"""How examples are shown is learned from feedback and from replay, seen from outside."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import closing
from pathlib import Path

import tokenizers

from iccache.assemble import Proxy
from iccache.examples.selector import THRESHOLD_STATE
from replay import lessons
from replay.threshold import Threshold
from tests.e2e.world import World, world

LABELS = ("red", "green", "blue")
SYSTEM = {"role": "system", "content": "Name the colour."}


async def ask(w: World, text: str, system: str = "Name the colour.", **body: object) -> object:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return await w.post("/v1/chat/completions", {"model": "small", "messages": messages} | body)


async def fill(w: World, system: str, count: int) -> None:
    """Examples as a log would bring them: the teacher's answers."""
    for i in range(count):
        w.large.script.answer = LABELS[i % 3]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": f"{system} thing number {i}"}]
        await w.post("/v1/chat/completions", {"model": "large", "messages": messages})
    w.large.script.answer = None
    await w.until(w.examples, lambda n: n >= count)
    await w.proxy.learner.catch_up()


async def test_examples_that_hurt_are_no_longer_shown_and_those_that_help_are(tmp_path: Path) -> None:
    """Two applications behind one proxy: in one, examples help the student, in the other they mislead it."""
    async with world(tmp_path) as w:
        await fill(w, "Name the colour.", 8)
        await fill(w, "Count the things.", 8)
        late: dict[str, Counter[bool]] = {"Name the colour.": Counter(), "Count the things.": Counter()}
        for i in range(120):
            for system in late:
                answered = await ask(w, f"{system} another thing {i}", system)
                shown = answered.header("examples") != "0"
                good = shown == (system == "Name the colour.")
                assert (await w.feedback(answered.id, score=1.0 if good else 0.0)).status == 204
                if i >= 80:
                    late[system][shown] += 1
        assert late["Name the colour."][True] >= 30
        assert late["Count the things."][False] >= 30


async def test_until_anything_is_scored_the_nearest_are_shown_and_the_record_says_how(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await fill(w, "Name the colour.", 6)
        answered = await ask(w, "Name the colour. thing number 77")
        assert answered.header("examples") == "3"
        way = (await w.recorded(answered.id)).extra["way"]
        assert (way["way"], way["probability"], way["left_out"]) == ("own", 1.0, None)


async def test_a_shared_set_is_built_by_replay_taken_over_and_shown_the_same_to_all(tmp_path: Path) -> None:
    async with world(tmp_path, selection={"leave_out_share": 0.0}) as w:
        await fill(w, "Name the colour.", 30)
        assert await asyncio.to_thread(_build_sets, w.proxy) == 1
        await w.proxy.learner.lessons.look()

        system = "Name the colour."
        for i in range(60):  # the students' own examples turn out bad; the router of ways looks at what else there is
            answered = await ask(w, f"{system} other thing {i}")
            own = answered.header("examples") == "3" and (await w.recorded(answered.id)).extra["way"]["way"] == "own"
            await w.feedback(answered.id, score=0.0 if own or answered.header("examples") == "0" else 1.0)
        prompts = []
        for i in range(12):
            last = await ask(w, f"{system} last thing {i}")
            if (await w.recorded(last.id)).extra["way"]["way"] == "shared":
                answered = last
                prompts.append([m["content"] for m in w.small.requests[-1].json["messages"]][:-1])
        assert len(prompts) >= 6
        assert all(prompt == prompts[0] for prompt in prompts)
        ids = (answered.header("example-ids") or "").split(",")
        assert len(ids) == len(set(ids)) == 3

        await w.proxy.learner.delete_examples(ids[:1])
        answered = await ask(w, f"{system} after the deletion")
        assert ids[0] not in (answered.header("example-ids") or "")
        capped = await ask(w, f"{system} capped", iccache={"examples": 1})
        assert capped.header("examples") in ("0", "1")


async def test_requests_without_a_system_prompt_are_shown_the_set_of_what_they_ask(tmp_path: Path) -> None:
    async with world(tmp_path, selection={"leave_out_share": 0.0}) as w:
        await fill(w, "", 30)
        assert await asyncio.to_thread(_build_sets, w.proxy) == 1
        await w.proxy.learner.lessons.look()
        for i in range(200):
            answered = await ask(w, f" thing number {i % 30}", "")
            if (await w.recorded(answered.id)).extra["way"]["way"] == "shared":
                break
            await w.feedback(answered.id, score=0.0)
        shown = [m["content"] for m in w.small.requests[-1].json["messages"]][1:-1]
        assert sorted(shown[1::2]) == sorted(LABELS)


async def test_the_threshold_that_replay_has_measured_is_taken_over_and_outlives_new_settings(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await fill(w, "Name the colour.", 8)
        assert (await ask(w, "Name the colour. one")).header("examples") == "3"
        await asyncio.to_thread(_keep_threshold, w.proxy, Threshold(5.0))
        await w.proxy.learner.lessons.look()
        assert (await ask(w, "Name the colour. two")).header("examples") == "0"
        w.proxy._wire()
        assert (await ask(w, "Name the colour. three")).header("examples") == "0"


def _keep_threshold(proxy: Proxy, threshold: Threshold) -> None:
    with closing(proxy._open_store()) as store:
        store.save_state(THRESHOLD_STATE, store.last_change(), threshold.state())


def _build_sets(proxy: Proxy) -> int:
    with closing(proxy._open_store()) as store:
        return lessons.build_sets(store)


async def test_what_was_learned_of_the_ways_survives_a_restart(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await fill(w, "Count the things.", 8)
        for i in range(40):
            answered = await ask(w, f"Count the things. another thing {i}", "Count the things.")
            await w.feedback(answered.id, score=0.0 if answered.header("examples") != "0" else 1.0)
    async with world(tmp_path, selection={"exploration": 0.0}) as w:
        ways = w.proxy.ways
        await w.until(_ready(lambda: len(ways.evidence)), lambda n: n == 1)
        answered = await ask(w, "Count the things. once more", "Count the things.")
        assert answered.header("examples") == "0"


def _ready(look: object) -> object:
    async def looked() -> object:
        return look()  # type: ignore[operator]

    return looked


async def test_the_budget_is_counted_as_the_student_counts(tmp_path: Path) -> None:
    by_letter = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    by_letter.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    by_letter.save(str(tmp_path / "tokenizer.json"))
    counts = {}
    for tokenizer in ("o200k_base", str(tmp_path / "tokenizer.json")):
        folder = tmp_path / f"by {len(counts)}"
        folder.mkdir()
        async with world(folder, small={"tokenizer": tokenizer}, selection={"max_tokens": 120}) as w:
            await fill(w, "Name the colour.", 6)  # pairs of 37 or 39 letters and some 9 tokens
            counts[tokenizer] = (await ask(w, "Name the colour. thing number 77")).header("examples")
    assert list(counts.values()) == ["3", "2"]
