"""The path of a request, seen from outside."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.world import World, lines, world


@pytest.fixture
async def w(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


async def test_a_teachers_answer_becomes_an_example_for_the_student(w: World) -> None:
    await w.teach("What is the capital of France?", "Paris")
    answered = await w.ask("What is the capital of Spain?", "small")
    messages = w.small.requests[0].json["messages"]
    assert messages == [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "What is the capital of Spain?"},
    ]
    assert (answered.header("decision"), answered.header("backend"), answered.header("examples")) == (
        "pinned", "small", "1",
    )  # fmt: skip
    assert w.small.requests[0].json["model"] == "small-model"


async def test_the_teacher_gets_the_clients_bytes(w: World) -> None:
    await w.teach("What is the capital of France?", "Paris")
    body = (
        b'{ "messages":[{"role":"user","content":"caf\\u00e9"}],'
        b'"seed":36893488147419103232,\n "model":"large-model","x":1.50}'
    )
    async with w.http.post(w.url + "/v1/chat/completions", data=body) as response:
        assert response.status == 200
    assert w.large.requests[-1].body == body


async def test_a_stream_passes_byte_for_byte_and_is_recorded(w: World) -> None:
    direct = await _raw(w, w.large.url + "/v1/chat/completions", "large-model")
    through = await _raw(w, w.url + "/v1/chat/completions", "large")
    assert [e["choices"] for e in lines(through)] == [e["choices"] for e in lines(direct)]
    assert through.endswith(b"data: [DONE]\n\n")
    await w.until(w.examples, lambda count: count == 1)


async def _raw(w: World, url: str, model: str) -> bytes:
    body = {"model": model, "messages": [{"role": "user", "content": "one two three"}], "stream": True}
    async with w.http.post(url, json=body) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        return await response.read()


async def test_the_record_explains_a_routed_request(w: World) -> None:
    await w.teach("How many legs has a spider?", "8")
    answered = await w.ask("How many legs has an ant?")
    await w.recorded(answered.id)
    assert (await w.feedback(answered.id, score=0.75)).status == 204
    record = (await w.get(f"/admin/exchanges/{answered.id}")).json
    assert record["decision"] == "routed"
    assert record["backend"] == answered.header("backend")
    assert record["propensity"] == pytest.approx(float(answered.header("propensity") or 0), rel=1e-5)
    assert sum(b["probability"] for b in record["backends"]) == pytest.approx(1)
    drawn = next(b for b in record["backends"] if b["name"] == record["backend"])
    assert drawn["probability"] == pytest.approx(record["propensity"])
    assert [f["score"] for f in record["feedback"]] == [0.75]


async def test_routed_requests_follow_feedback(w: World) -> None:
    """The student is good at sums and bad at poems; within 300 answers the router knows."""
    served: dict[str, list[str]] = {"sum": [], "poem": []}
    for i in range(300):
        kind = ("sum", "poem")[i % 2]
        text = f"add the numbers {i} and {i + 1}" if kind == "sum" else f"write a poem on autumn leaves, verse {i}"
        answered = await w.ask(text)
        backend = answered.header("backend") or ""
        served[kind].append(backend)
        good = backend == "large" or kind == "sum"
        assert (await w.feedback(answered.id, score=1.0 if good else 0.0)).status == 204
    assert served["sum"][-40:].count("small") >= 32
    assert served["poem"][-40:].count("small") <= 6


async def test_opposite_feedback_ranks_equally_similar_examples_differently(w: World) -> None:
    asked = {}
    for word, answer in (("alpha", "good"), ("gamma", "bad")):
        await w.teach(f"sort the list {word}", answer)
        asked[answer] = await w.ask(f"sort the list {word}", "small", {"x-iccache-examples": "1"})
        assert w.small.requests[-1].json["messages"][1]["content"] == answer
    assert (await w.feedback(asked["good"].id, score=1.0)).status == 204
    assert (await w.feedback(asked["bad"].id, score=0.0)).status == 204
    answered = await w.ask("sort the list", "small")
    await w.recorded(answered.id)
    record = (await w.get(f"/admin/exchanges/{answered.id}")).json
    utility = {c["id"]: c["utility"] for c in record["considered"]}
    similarity = {c["id"]: c["similarity"] for c in record["considered"]}
    assert len(utility) == 2
    assert max(similarity.values()) - min(similarity.values()) < 0.05
    shown = await w.proxy.read(lambda store: store.examples(list(utility)))
    by_answer = {e.answer: utility[e.id] for e in shown}
    assert by_answer["good"] > by_answer["bad"] + 0.1


async def test_feedback_while_the_answer_still_streams(w: World) -> None:
    w.large.script.between_s = 0.05
    body = {"model": "large", "messages": [{"role": "user", "content": " ".join("abcdefghij")}], "stream": True}
    async with w.http.post(w.url + "/v1/chat/completions", json=body) as response:
        request_id = response.headers["x-request-id"]
        assert (await w.feedback(request_id, rating="up")).status == 204
        await response.read()
    exchange = await w.until(lambda: w.recorded(request_id), lambda e: e.complete)
    assert exchange.answer.startswith("a b c")
    feedback = await w.proxy.read(lambda store: store.feedback(request_id))
    assert [f.score for f in feedback] == [1.0]


async def test_a_client_that_leaves_stops_the_upstream(w: World) -> None:
    w.large.script.between_s = 0.2
    body = {"model": "large", "messages": [{"role": "user", "content": " ".join("abcdefghij" * 5)}], "stream": True}
    async with w.http.post(w.url + "/v1/chat/completions", json=body) as response:
        await response.content.readany()
        response.close()
    await w.until(_now(lambda: w.large.requests[0].left), bool, seconds=1)
    await asyncio.sleep(0.1)
    assert await w.examples() == 0


async def test_a_client_that_does_not_read_holds_up_its_own_upstream_alone(w: World) -> None:
    """What it does not take stays with the sender; once it reads, all of it comes, in order and whole."""
    w.large.script.answer, w.large.script.repeat = "x" * 30_000, 1_500  # 45 MB, far more than sockets hold
    body = json.dumps({"model": "large", "stream": True, "messages": [{"role": "user", "content": "At length"}]})
    url = urlsplit(w.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port, limit=1 << 14)
    writer.write(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    received = await w.until(_now(lambda: w.large.requests[0].sent), lambda n: n > 100)
    await asyncio.sleep(0.5)
    held = w.large.requests[0].sent
    assert received <= held < 1_000
    assert (await w.get("/healthz")).status == 200
    text = bytearray()
    while size := int(await reader.readline(), 16):
        text += (await reader.readexactly(size + 2))[:-2]
    writer.close()
    assert w.large.requests[0].sent > 1_500
    assert text.count(b"x" * 30_000) == 1_500 and b"[DONE]" in text[-100:]


def _now(look):  # type: ignore[no-untyped-def]
    async def found():  # type: ignore[no-untyped-def]
        return look()

    return found
