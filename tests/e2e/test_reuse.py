"""Exact reuse: identical requests only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
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
