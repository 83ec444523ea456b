"""Exact reuse: identical requests only."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.world import Answered, World, world
from tests.fakes import Script

EXACT = {"reuse": "exact"}
QUESTION = "What is the capital of France?"


@pytest.fixture
async def w(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path, cache=EXACT) as made:
        yield made


async def again(w: World, first: Answered) -> None:
    """Wait until the first answer's record is durable."""
    await w.recorded(first.id)


async def test_an_identical_request_is_answered_from_the_record(w: World) -> None:
    first = await w.ask(QUESTION, "large", temperature=0.5)
    await again(w, first)
    second = await w.ask(QUESTION, "large", temperature=0.5)
    assert second.body == first.body
    assert (second.header("decision"), second.header("backend")) == ("cached", "large")
    assert (second.header("cost-usd"), second.header("examples")) == ("0", "0")
    assert second.id != first.id
    assert len(w.large.requests) == 1
    record = await w.recorded(second.id)
    assert (record.cost_usd, record.usage.input, record.extra) == (0, 0, {"answered_by": first.id})
    assert (await w.feedback(second.id, score=1)).status == 204


async def test_a_stream_is_replayed_as_the_same_stream(w: World) -> None:
    body = {"model": "large", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
    first = await w.post("/v1/chat/completions", body)
    await again(w, first)
    second = await w.post("/v1/chat/completions", body)
    assert second.header("decision") == "cached"
    assert second.headers["Content-Type"] == first.headers["Content-Type"]
    assert second.body == first.body
    whole = await w.ask(QUESTION, "large")
    assert whole.header("decision") == "pinned", "a stream does not answer a request for a whole body"


@pytest.mark.parametrize(
    "other",
    [
        {"temperature": 0.4},
        {"model": "small"},
        {"messages": [{"role": "user", "content": QUESTION + " "}]},
        {"messages": [{"role": "user", "content": "What is not the capital of France?"}]},
        {"seed": 1},
        {"user": "someone"},
    ],
)
async def test_whatever_differs_is_asked(w: World, other: dict[str, Any]) -> None:
    body = {"model": "large", "messages": [{"role": "user", "content": QUESTION}]}
    await again(w, await w.post("/v1/chat/completions", body))
    assert (await w.post("/v1/chat/completions", body | other)).header("decision") == "pinned"


async def test_a_thousand_at_once_cost_one_call(w: World) -> None:
    w.large.script.before_head_s = 2.0  # all of them are there before the answer is
    answers = await asyncio.gather(*(w.ask(QUESTION, "large") for _ in range(1000)))
    assert len(w.large.requests) == 1
    assert {a.status for a in answers} == {200}
    assert len({a.body for a in answers}) == 1
    assert [a.header("decision") for a in answers].count("cached") == 999
    assert len({a.id for a in answers}) == 1000


async def test_when_the_one_fails_the_others_ask_for_themselves(w: World) -> None:
    w.large.queue.append(Script(status=400, before_head_s=0.3))
    answers = await asyncio.gather(*(w.ask(QUESTION, "large") for _ in range(5)))
    assert sorted(a.status for a in answers) == [200, 200, 200, 200, 400]


@pytest.mark.parametrize("headers", [{"Cache-Control": "no-cache"}, {"x-iccache-examples": "0"}])
async def test_a_client_may_insist_on_a_fresh_answer(w: World, headers: dict[str, str]) -> None:
    await again(w, await w.ask(QUESTION, "large"))
    assert (await w.ask(QUESTION, "large", headers)).header("decision") == "pinned"


async def test_never_with_tools(w: World) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    await again(w, await w.ask(QUESTION, "large", tools=tools))
    assert (await w.ask(QUESTION, "large", tools=tools)).header("decision") == "pinned"


async def test_what_is_not_stored_is_not_reused(w: World) -> None:
    await w.ask(QUESTION, "large", {"x-iccache-store": "no"})
    await asyncio.sleep(0.2)
    assert (await w.ask(QUESTION, "large")).header("decision") == "pinned"


async def test_never_where_redaction_changed_the_answer(w: World) -> None:
    w.large.script.answer = "write to jane.doe@example.com"
    await again(w, await w.ask(QUESTION, "large"))
    second = await w.ask(QUESTION, "large")
    assert second.header("decision") == "pinned"
    assert second.text == "write to jane.doe@example.com"


async def test_an_answer_that_was_said_to_be_bad_is_not_repeated(w: World) -> None:
    first = await w.ask(QUESTION, "large")
    assert (await w.feedback(first.id, rating="down")).status == 204
    assert (await w.ask(QUESTION, "large")).header("decision") == "pinned"


async def test_nor_when_that_was_said_of_its_repetition(w: World) -> None:
    first = await w.ask(QUESTION, "large")
    await again(w, first)
    other = await w.ask(QUESTION, "small")
    await again(w, other)
    second = await w.ask(QUESTION, "large")
    assert second.header("decision") == "cached"
    assert (await w.feedback(second.id, score=1)).status == 204
    assert (await w.ask(QUESTION, "large")).header("decision") == "cached"
    assert (await w.feedback(second.id, score=0)).status == 204
    assert (await w.ask(QUESTION, "large")).header("decision") == "pinned"
    assert (await w.ask(QUESTION, "small")).header("decision") == "cached"


async def test_a_cut_answer_is_not_repeated(w: World) -> None:
    w.large.script.finish_reason = "length"
    await again(w, await w.ask(QUESTION, "large"))
    assert (await w.ask(QUESTION, "large")).header("decision") == "pinned"


async def test_it_ends_with_its_time(tmp_path: Path) -> None:
    async with world(tmp_path, cache=EXACT | {"reuse_ttl_s": 0.5}) as w:
        await again(w, await w.ask(QUESTION, "large"))
        await asyncio.sleep(0.6)
        assert (await w.ask(QUESTION, "large")).header("decision") == "pinned"


async def test_it_stays_within_the_tenant(tmp_path: Path) -> None:
    tenants = [{"name": name, "key_env": f"KEY_{name.upper()}"} for name in ("a", "b")]
    async with world(tmp_path, {"KEY_A": "ka", "KEY_B": "kb"}, cache=EXACT, tenants=tenants) as w:
        await again(w, await w.ask(QUESTION, "large", {"Authorization": "Bearer ka"}))
        assert (await w.ask(QUESTION, "large", {"Authorization": "Bearer kb"})).header("decision") == "pinned"
        assert (await w.ask(QUESTION, "large", {"Authorization": "Bearer ka"})).header("decision") == "cached"


async def test_it_is_off_by_default(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await again(w, await w.ask(QUESTION, "large"))
        assert (await w.ask(QUESTION, "large")).header("decision") == "pinned"


async def test_a_deleted_example_takes_its_kept_answer_along(w: World) -> None:
    first = await w.teach(QUESTION, "Paris")
    await again(w, first)
    (example,) = await w.proxy.read(lambda store: store.list_examples())
    async with w.http.delete(f"{w.url}/admin/examples/{example.id}") as response:
        assert response.status == 204
    w.large.script.answer = "Paris"
    assert (await w.ask(QUESTION, "large")).header("decision") == "pinned"


# ---- the whole life of an answer: asked, given, recorded


@contextlib.contextmanager
def unwritten(w: World) -> Iterator[None]:
    """Meanwhile the store takes nothing, as a disk that is slow."""
    free = threading.Event()
    w.proxy.learner.access.writer.submit(lambda store: free.wait(20))
    try:
        yield
    finally:
        free.set()


async def asked_by(w: World, count: int) -> None:
    """Wait until so many requests are under way."""

    async def open_requests() -> int:
        return w.proxy.open_requests

    await w.until(open_requests, lambda n: n >= count)


def decisions(answers: list[Answered]) -> list[str | None]:
    return sorted(str(a.header("decision")) for a in answers)


async def test_between_its_end_and_its_record_an_answer_is_waited_for(w: World) -> None:
    with unwritten(w):
        first = await w.ask(QUESTION, "large")
        others = [asyncio.create_task(w.ask(QUESTION, "large")) for _ in range(20)]
        await asked_by(w, 20)
    answers = await asyncio.gather(*others)
    assert len(w.large.requests) == 1
    assert {a.body for a in answers} == {first.body}
    assert decisions(answers) == ["cached"] * 20


@pytest.mark.parametrize("stream", [False, True])
async def test_those_who_come_all_along_cost_one_call(w: World, stream: bool) -> None:
    w.large.script = Script(answer="one two three four", before_head_s=0.2, between_s=0.05)
    answers: list[asyncio.Task[Answered]] = []
    while len(answers) < 200:
        answers.append(asyncio.create_task(w.ask(QUESTION, "large", stream=stream)))
        await asyncio.sleep(0.004)
    assert len({a.body for a in await asyncio.gather(*answers)}) == 1
    assert len(w.large.requests) == 1


STREAM = {"model": "large", "messages": [{"role": "user", "content": QUESTION}], "stream": True}


async def test_an_answer_that_was_called_bad_as_it_came_is_not_handed_on(w: World) -> None:
    w.large.script.between_s = 0.2
    async with w.http.post(f"{w.url}/v1/chat/completions", json=STREAM) as first:
        assert (await w.feedback(first.headers["x-request-id"], rating="down")).status == 204
        await first.read()
    assert (await w.post("/v1/chat/completions", STREAM)).header("decision") == "pinned"
    assert len(w.large.requests) == 2


# ---- streams that several read while they come


async def test_a_stream_is_read_along_from_its_first_byte_on(w: World) -> None:
    w.large.script = Script(answer="one two three four five six", between_s=0.2)
    url = f"{w.url}/v1/chat/completions"
    async with w.http.post(url, json=STREAM) as first, w.http.post(url, json=STREAM) as second:
        assert second.headers["x-iccache-decision"] == "cached"
        ahead = await second.content.readuntil(b"one")
        assert b"six" not in ahead, "it comes as it comes"
        assert len(w.large.requests) == 1 and w.large.requests[0].sent < 6
        bodies = await first.read(), ahead + await second.read()
    assert bodies[0] == bodies[1]
    assert bodies[0].endswith(b"data: [DONE]\n\n")
    record = await w.recorded(second.headers["x-request-id"])
    assert (record.complete, record.cost_usd) == (True, 0)
    assert record.extra == {"answered_by": first.headers["x-request-id"]}
    assert (await w.feedback(second.headers["x-request-id"], score=1)).status == 204
    assert (await w.post("/v1/chat/completions", STREAM)).body == bodies[0], "from the record"
    assert len(w.large.requests) == 1


async def test_it_goes_on_for_the_others_when_the_first_client_leaves(w: World) -> None:
    w.large.script = Script(answer="one two three four five six", between_s=0.1)
    url = f"{w.url}/v1/chat/completions"
    first = await w.http.post(url, json=STREAM)
    second, third = await w.http.post(url, json=STREAM), await w.http.post(url, json=STREAM)
    first.close()
    third.close()
    assert (await second.read()).endswith(b"data: [DONE]\n\n")
    assert len(w.large.requests) == 1
    record = await w.recorded(first.headers["x-request-id"])
    assert record.complete and record.answer == "one two three four five six"
    assert record.usage.output > 0 and record.cost_usd > 0
    assert not (await w.recorded(third.headers["x-request-id"])).complete
    assert (await w.post("/v1/chat/completions", STREAM)).header("decision") == "cached"


async def test_when_all_have_left_the_upstream_is_stopped(w: World) -> None:
    w.large.script = Script(answer="one two three four five six", between_s=60)
    url = f"{w.url}/v1/chat/completions"
    first, second = await w.http.post(url, json=STREAM), await w.http.post(url, json=STREAM)
    first.close()
    await asyncio.sleep(0.3)
    assert not w.large.requests[0].left.is_set()
    second.close()
    async with asyncio.timeout(2):
        await w.large.requests[0].left.wait()
    assert not (await w.recorded(first.headers["x-request-id"])).complete
    assert not w.proxy.pipeline.reuse.under_way
    w.large.script = Script()
    assert (await w.post("/v1/chat/completions", STREAM)).header("decision") == "pinned"


async def test_a_stream_that_breaks_breaks_for_all_and_is_not_kept(w: World) -> None:
    w.large.script = Script(answer="one two three four five six", between_s=0.1, fault="reset_midway")
    url = f"{w.url}/v1/chat/completions"
    async with w.http.post(url, json=STREAM) as first, w.http.post(url, json=STREAM) as second:
        bodies = await first.read(), await second.read()
    assert bodies[0] == bodies[1]
    assert b"one" in bodies[0] and b'"error"' in bodies[0] and b"[DONE]" not in bodies[0]
    assert not (await w.recorded(second.headers["x-request-id"])).complete
    w.large.script = Script()
    assert (await w.post("/v1/chat/completions", STREAM)).header("decision") == "pinned"


async def test_an_error_instead_of_a_stream_is_each_ones_own(w: World) -> None:
    w.large.queue.append(Script(status=400, before_head_s=0.3))
    answers = await asyncio.gather(*(w.post("/v1/chat/completions", STREAM) for _ in range(4)))
    assert sorted(a.status for a in answers) == [200, 200, 200, 400]


async def test_when_the_one_leaves_another_takes_its_place(w: World) -> None:
    w.large.script.before_head_s = 0.5
    one = asyncio.create_task(w.ask(QUESTION, "large"))
    await asked_by(w, 1)
    others = [asyncio.create_task(w.ask(QUESTION, "large")) for _ in range(5)]
    await asked_by(w, 6)
    one.cancel()
    answers = await asyncio.gather(*others)
    assert decisions(answers) == ["cached"] * 4 + ["pinned"]
    assert len(w.large.requests) == 2


async def test_nobody_is_given_what_is_not_to_be_recorded(w: World) -> None:
    w.large.script.before_head_s = 0.3
    silent = asyncio.create_task(w.ask(QUESTION, "large", {"x-iccache-store": "no"}))
    await asked_by(w, 1)
    assert (await w.ask(QUESTION, "large")).header("decision") == "pinned"
    assert (await silent).header("decision") == "pinned"
    assert (await w.ask(QUESTION, "large", {"x-iccache-store": "no"})).header("decision") == "cached"


async def test_nor_at_the_same_time_what_is_to_be_redacted(w: World) -> None:
    w.large.script = Script(answer="write to jane.doe@example.com", before_head_s=0.3)
    answers = await asyncio.gather(*(w.ask(QUESTION, "large") for _ in range(3)))
    assert decisions(answers) == ["pinned"] * 3


async def test_a_store_that_takes_nothing_keeps_nobody_from_waiting_together(w: World) -> None:
    w.proxy.learner.access.writer.close()
    w.large.script.before_head_s = 0.3
    answers = await asyncio.gather(*(w.ask(QUESTION, "large") for _ in range(10)))
    assert decisions(answers) == ["cached"] * 9 + ["pinned"]
    assert (await w.ask(QUESTION, "large")).header("decision") == "pinned"


async def test_what_comes_from_the_future_is_asked_anew(w: World) -> None:
    await again(w, await w.ask(QUESTION, "large"))
    w.proxy.learner.wall = lambda: time.time() - 3600
    assert (await w.ask(QUESTION, "large")).header("decision") == "pinned", "the clock was set back by an hour"
    w.proxy.learner.wall = lambda: time.time() - 1
    assert (await w.ask(QUESTION, "large")).header("decision") == "cached", "proxies' clocks are never quite alike"


async def test_who_does_not_read_holds_nobody_up(w: World) -> None:
    w.large.script = Script(answer="long " * 100_000)
    body = {"model": "large", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
    async with w.http.post(f"{w.url}/v1/chat/completions", json=body):  # and it is not read
        await asyncio.sleep(0.5)
        w.large.script = Script()
        async with asyncio.timeout(20):
            second = await w.post("/v1/chat/completions", body)
    assert second.status == 200
    assert second.body.endswith(b"data: [DONE]\n\n")
