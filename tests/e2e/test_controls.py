"""What a client may ask of iccache, and what the headers of every answer tell: SPEC, 3."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from multidict import CIMultiDict

from tests.e2e.world import Answered, World, world
from tests.fakes import Script

CHAT = "/v1/chat/completions"
TOLD = ("backend", "decision", "examples", "overhead-ms")


@pytest.fixture
async def w(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


async def fill(w: World, count: int = 4) -> None:
    for i in range(count):
        await w.teach(f"What is the capital of country number {i}?", f"City {i}")


async def ask(w: World, control: dict[str, Any], headers: dict[str, str], model: str = "small") -> Answered:
    """A request that says what it wants of us in its headers, or in its body."""
    return await w.ask("What is the capital of country number 9?", model, headers, **control)


# ---- response headers


async def test_every_answer_carries_our_headers(w: World) -> None:
    await fill(w, 2)
    for stream in (False, True):
        answered = await w.ask("What is the capital of country number 9?", "small", stream=stream)
        assert all(answered.header(name) for name in TOLD)
        assert answered.header("examples") == "2"
        ids = (answered.header("example-ids") or "").split(",")
        assert len(ids) == len(set(ids)) == 2
        known = [e["id"] for e in (await w.get("/admin/examples")).json["examples"]]
        assert set(ids) <= set(known)
        assert float(answered.header("overhead-ms") or -1) >= 0
        assert (answered.header("cost-usd") is None) == stream
        assert answered.header("reason") is None and answered.header("propensity") is None
    routed = await w.ask("hello there")
    assert 0 < float(routed.header("propensity") or 0) <= 1


async def test_an_upstreams_error_carries_them_too(w: World) -> None:
    for stream in (False, True):
        w.large.script = Script(status=400)
        answered = await w.ask("hello", "large", stream=stream)
        assert answered.status == 400
        assert all(answered.header(name) for name in TOLD)
        assert answered.id.startswith("req_")
        assert answered.header("upstream-request-id")


async def test_what_it_cost_is_told(w: World) -> None:
    answered = await w.ask("one two three", "large")  # three words in, three out, at 1 and 4 USD per million
    assert float(answered.header("cost-usd") or 0) == pytest.approx((3 * 1 + 3 * 4) / 1e6)
    w.large.script = Script(status=500)
    assert (await w.ask("one two three", "large")).header("cost-usd") == "0"


async def test_request_ids_are_ours_and_unique(w: World) -> None:
    w.large.script = w.small.script = Script(headers={"x-request-id": "theirs", "x-iccache-backend": "forged"})
    answers = [await w.ask("hello", "large", {"x-request-id": "mine"}, stream=i % 2 == 1) for i in range(4)]
    answers += [await w.post("/v1/embeddings", {"model": "large", "input": "x"}), await w.get("/v1/models")]
    answers += [
        await w.ask("hello", "gpt-9"),
        await w.get("/healthz"),
        await w.get("/nothing"),
        await w.get("/metrics"),
    ]
    ids = [a.id for a in answers]
    assert len(set(ids)) == len(ids)
    assert not {"theirs", "mine"} & set(ids)
    assert [a.header("upstream-request-id") for a in answers[:5]] == ["theirs"] * 5
    assert [a.header("backend") for a in answers[:5]] == ["large"] * 5
    assert all(len(a.headers.getall("x-request-id")) == 1 for a in answers)


# ---- request controls


BODIES_AND_HEADERS = [
    ({"iccache": {"backend": "small", "examples": 1}}, {}),
    ({}, {"x-iccache-backend": "small", "x-iccache-examples": "1"}),
    ({"iccache": {"backend": "large", "examples": 3}}, {"x-iccache-backend": "small", "x-iccache-examples": "1"}),
]


@pytest.mark.parametrize(("body", "headers"), BODIES_AND_HEADERS, ids=["body", "headers", "headers win"])
async def test_pin_and_cap(w: World, body: dict[str, Any], headers: dict[str, str]) -> None:
    await fill(w)
    answered = await ask(w, body, headers, model="auto")
    assert (answered.header("backend"), answered.header("decision")) == ("small", "pinned")
    assert answered.header("examples") == "1"
    sent = w.small.requests[-1]
    assert len(sent.json["messages"]) == 3
    assert "iccache" not in sent.json
    assert not [name for name in sent.headers if name.lower().startswith("x-iccache-")]


async def test_the_cap_runs_from_none_to_all_there_may_be(w: World) -> None:
    await fill(w)
    shown = [(await ask(w, {}, {"x-iccache-examples": str(k)})).header("examples") for k in (0, 1, 2, 3, 50)]
    assert shown == ["0", "1", "2", "3", "3"]
    shown = [(await ask(w, {"iccache": {"examples": k}}, {})).header("examples") for k in (0, 1, 2, 3, 50)]
    assert shown == ["0", "1", "2", "3", "3"]


async def test_our_own_member_leaves_the_body_and_nothing_else_does(w: World) -> None:
    body = (
        b'{"model":"large-model", "iccache" : {"session":"s"} , "messages":[{"role":"user","content":"x"}],"t":1.50 }'
    )
    for path in (CHAT, "/v1/embeddings", "/v1/completions"):
        async with w.http.post(w.url + path, data=body, headers={"Content-Type": "application/json"}) as response:
            assert response.status == 200
        sent = w.large.requests[-1]
        assert sent.json == {k: v for k, v in json.loads(body).items() if k != "iccache"}
        assert b'"t":1.50 }' in sent.body and b'"messages":[{"role":"user","content":"x"}]' in sent.body
    pinned = await w.post("/v1/embeddings", {"model": "another", "input": "x", "iccache": {"backend": "small"}})
    assert pinned.header("backend") == "small"
    assert w.small.requests[-1].json == {"model": "another", "input": "x"}


NO_EXAMPLES = [
    {"Cache-Control": "no-cache"},
    {"Cache-Control": "max-age=0, No-Cache"},
    {"Cache-Control": "no-cache", "x-iccache-examples": "3"},
    {"x-iccache-examples": "0"},
]


@pytest.mark.parametrize("headers", NO_EXAMPLES)
async def test_no_examples_leaves_the_body_as_it_came(w: World, headers: dict[str, str]) -> None:
    await fill(w, 1)
    answered = await ask(w, {}, headers, model="small-model")
    assert answered.header("examples") == "0"
    assert answered.header("example-ids") is None
    assert w.small.requests[-1].json["messages"] == [
        {"role": "user", "content": "What is the capital of country number 9?"}
    ]
    await w.recorded(answered.id)


NO_RECORD: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({}, [("x-iccache-store", "no")]),
    ({}, [("Cache-Control", "no-store")]),
    ({}, [("Cache-Control", "no-cache,no-store, max-age=0")]),
    ({}, [("Cache-Control", "max-age=0"), ("Cache-Control", "no-store")]),
    ({}, [("Cache-Control", "no-store"), ("x-iccache-store", "yes")]),
    ({"iccache": {"store": "no"}}, []),
    ({"iccache": {"store": False}}, [("x-iccache-store", "yes")]),
]


@pytest.mark.parametrize(("body", "headers"), NO_RECORD)
async def test_what_is_not_to_be_recorded_leaves_no_byte(
    w: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, body: dict[str, Any], headers: list[tuple[str, str]]
) -> None:
    caplog.set_level("DEBUG")
    w.large.script.answer = "answer-canary-5150"
    for stream in (False, True):
        asked = {"model": "large", "messages": [{"role": "user", "content": "request-canary-4711"}], "stream": stream}
        many = [("x-iccache-session", "session-canary-42"), *headers]
        async with w.http.post(w.url + CHAT, json=asked | body | {"user": "user-canary-77"}, headers=many) as r:
            answered = Answered(r.status, r.headers, await r.read())
        assert answered.status == 200 and b"answer-canary-5150" in answered.body
        assert (await w.feedback(answered.id, rating="up")).status == 404
        assert (await w.feedback(answered.id, demonstration="better")).status == 404
        assert (await w.get(f"/admin/exchanges/{answered.id}")).status == 404
    kept = await w.ask("something else", "large")
    await w.recorded(kept.id)
    files = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}
    assert sum(map(len, files.values())) > 10_000
    for name, content in [*files.items(), ("metrics", (await w.get("/metrics")).body), ("log", caplog.text.encode())]:
        assert not [c for c in (b"canary-4711", b"canary-42", b"canary-77") if c in content], name
    assert b"something else" in b"".join(files.values())  # the search would have found it


async def test_a_word_that_is_neither_yes_nor_no_is_refused(w: World) -> None:
    assert (await w.ask("hello", "large", {"x-iccache-store": "perhaps"})).status == 400
    assert (await w.ask("hello", "large", iccache={"store": "perhaps"})).status == 400


async def test_a_session_stays_on_one_backend_also_after_a_restart(tmp_path: Path) -> None:
    begun = {name: ("small", "large")[n % 2] for n, name in enumerate("abcdef")}  # whatever would be drawn for it
    async with world(tmp_path, routing={"policy": "uniform"}) as w:
        for name, backend in begun.items():
            await w.recorded((await w.ask("message", backend, {"x-iccache-session": name})).id)
    for _ in range(2):
        async with world(tmp_path, routing={"policy": "uniform"}) as w:
            for name, backend in begun.items():
                for by_header in (False, True):
                    answered = await w.ask(
                        "another message",
                        headers={"x-iccache-session": name} if by_header else {},
                        **({} if by_header else {"iccache": {"session": name}}),
                    )
                    assert (answered.header("decision"), answered.header("backend")) == ("routed", backend)


async def test_what_a_session_asks_at_once_meets_at_one_backend(tmp_path: Path) -> None:
    """None of them knows of the others yet: as where several workers share a session."""
    async with world(tmp_path, routing={"policy": "uniform"}) as w:
        met: list[str | None] = []
        for name in "abcdefgh":
            asking = [w.ask(f"message {i}", headers={"x-iccache-session": name}) for i in range(4)]
            backends = {answered.header("backend") for answered in await asyncio.gather(*asking)}
            assert len(backends) == 1
            met += backends
        assert set(met) == {"small", "large"}  # sessions are spread as requests are


async def test_requests_without_a_session_share_none(tmp_path: Path) -> None:
    async with world(tmp_path, routing={"policy": "uniform"}) as w:
        seen = {(await w.ask("hello", headers={"x-iccache-session": ""})).header("backend") for _ in range(20)}
        assert seen == {"small", "large"}


async def test_a_pin_moves_the_session(tmp_path: Path) -> None:
    async with world(tmp_path, routing={"policy": "uniform"}) as w:
        session = {"x-iccache-session": "s"}
        for pinned in ("small", "large", "small"):
            assert (await w.ask("hello", pinned, session)).header("backend") == pinned
            assert (await w.ask("hello", headers=session)).header("backend") == pinned


@pytest.mark.parametrize("said", [("yes", "no"), ("no", "yes"), ("yes, no",)])
async def test_of_two_wishes_the_more_careful_counts(w: World, said: tuple[str, ...]) -> None:
    await fill(w, 3)
    body = {"model": "small", "messages": [{"role": "user", "content": "What is the capital of country number 9?"}]}
    stores = [("x-iccache-store", word) for word in said]
    caps = [("X-ICCache-Examples", "2"), ("x-iccache-examples", "1")]
    async with w.http.post(w.url + CHAT, json=body, headers=CIMultiDict([*stores, *caps])) as response:
        assert response.status == 200 and response.headers["x-iccache-examples"] == "1"
        unrecorded = response.headers["x-request-id"]
    assert (await w.feedback(unrecorded, score=1)).status == 404
    for wrong in (("x-iccache-store", "maybe"), ("x-iccache-examples", "many")):
        async with w.http.post(w.url + CHAT, json=body, headers=CIMultiDict([*stores, *caps, wrong])) as response:
            assert response.status == 400


async def test_examples_are_no_more_tokens_than_an_upstream_says_it_was_sent(w: World) -> None:
    """Some report the prompt without what they had in their cache."""
    await fill(w, 3)
    w.small.script = Script(answer=lambda _: "short")
    answered = await ask(w, {}, {})
    kept = await w.recorded(answered.id)
    assert not kept.usage.estimated and 0 < kept.usage.example <= kept.usage.input
