"""Who answers when a backend fails: SPEC, 2.7."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from iccache.backends.circuit import Circuit
from tests.e2e.world import Answered, World, lines, world
from tests.fakes import Script, ScriptedUpstream

CLOCKS = {"first_token_timeout_s": 0.3, "idle_timeout_s": 0.3, "connect_timeout_s": 1}
CHEAPEST = {"policy": "student"}  # whatever is routed goes to the cheapest backend first
RETRY = {"Retry-After": "3", "x-ratelimit-remaining-tokens": "0"}

FAULTS = {  # name -> what the upstream does, the reason that is told, the status where nobody else may answer
    "refused": (None, "connect", 502),
    "reset": (Script(fault="reset_before_head"), "reset", 502),
    "closed": (Script(fault="close_before_head"), "reset", 502),
    "reset after the head": (Script(fault="reset_after_head"), "reset", 502),
    "hang": (Script(fault="hang"), "timeout", 504),
    "redirect": (Script(status=308, headers={"Location": "http://127.0.0.1:1/v1"}), "redirect", 502),
    "hang after the head": (Script(fault="hang_after_head"), "timeout", 504),
    **{str(s): (Script(status=s, headers=RETRY), "status", s) for s in (408, 429, 500, 502, 503, 529)},
}


@pytest.fixture
async def w(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path, small=CLOCKS, large=CLOCKS, routing=CHEAPEST) as made:
        yield made


def forget(w: World) -> None:
    """Start afresh: nobody has failed, nothing has been asked."""
    for member in w.proxy.fleet.members.values():
        member.circuit = Circuit()
    w.small.requests.clear()
    w.large.requests.clear()


def told(answered: Answered) -> tuple[int, str | None, str | None, str | None]:
    return answered.status, answered.header("backend"), answered.header("decision"), answered.header("reason")


async def said(answered: Answered, stream: bool) -> str:
    if not stream:
        return answered.text
    assert answered.body.endswith(b"data: [DONE]\n\n")
    return "".join(e["choices"][0]["delta"].get("content") or "" for e in lines(answered.body))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_fault_before_the_first_byte(w: World, fault: str, stream: bool) -> None:
    script, reason, status = FAULTS[fault]

    async def fail(upstream: ScriptedUpstream) -> None:
        if script is None:
            await upstream.stop()
        else:
            upstream.script = script

    await fail(w.small)

    routed = await w.ask("who is there?", stream=stream)
    assert told(routed) == (200, "large", "fallback", reason)
    assert await said(routed, stream) == "who is there?"
    assert routed.header("propensity") is None
    forget(w)

    for pinned in (
        await w.ask("hello", "small", stream=stream),
        await w.ask("hello", "small-model", stream=stream),
        await w.ask("hello", headers={"x-iccache-backend": "small"}, stream=stream),
    ):
        assert pinned.status == status
        if status not in (502, 504) or fault == str(status):
            assert told(pinned) == (status, "small", "pinned", None)
            assert pinned.json["error"]["message"] == f"scripted {status}"
            assert pinned.headers["Retry-After"] == "3"
        else:
            assert pinned.json["error"]["code"] == f"upstream_{reason}"
        assert not w.large.requests
        forget(w)

    await fail(w.large)
    if script is not None:
        w.small.script = Script()
        bypassed = await w.ask("hello", n=2, stream=stream)
        assert told(bypassed) == (200, "small", "fallback", reason)


async def test_a_bypass_that_falls_back_counts_as_a_bypass_too(w: World) -> None:
    w.large.script = Script(status=503)
    assert (await w.ask("hello", n=2)).header("decision") == "fallback"
    assert (await w.post("/v1/completions", {"prompt": "x"})).header("decision") == "fallback"
    counted = (await w.get("/metrics")).body.decode()
    for reason in ("n", "endpoint"):
        assert f'iccache_bypass_total{{reason="{reason}"}} 1.0' in counted
    assert 'iccache_bypass_total{reason="status"}' not in counted


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 409, 413, 422])
async def test_any_other_4xx_passes_unchanged(w: World, status: int) -> None:
    body = b'{"error": {"message":"caf\\u00e9",  "odd": 1}}\n'
    w.small.script = Script(status=status, body=body, headers=RETRY)
    answered = await w.ask("hello")
    assert told(answered) == (status, "small", "routed", None)
    assert answered.body == body
    assert not w.large.requests


async def test_where_all_fail_the_last_upstreams_error_passes_unchanged(w: World) -> None:
    body = b'{"error": {"message":"no room",  "odd": 1}}\n'
    w.small.script = Script(status=500)
    w.large.script = Script(status=429, body=body, headers=RETRY)
    for stream in (False, True):
        answered = await w.ask("hello", stream=stream)
        assert told(answered) == (429, "large", "fallback", "status")
        assert answered.body == body
        assert (answered.headers["Retry-After"], answered.headers["x-ratelimit-remaining-tokens"]) == ("3", "0")
        forget(w)


async def test_where_only_the_first_gave_an_answer_that_is_what_passes(w: World) -> None:
    w.small.script = Script(status=503, headers=RETRY)
    w.large.script = Script(fault="reset_before_head")
    answered = await w.ask("hello")
    assert (answered.status, answered.header("backend")) == (503, "small")
    assert answered.json["error"]["message"] == "scripted 503"
    assert answered.headers["Retry-After"] == "3"


async def test_where_nobody_answers_it_is_502_or_504_by_the_last(w: World) -> None:
    w.small.script, w.large.script = Script(fault="hang"), Script(fault="reset_before_head")
    assert (await w.ask("hello")).status == 502
    forget(w)
    w.small.script, w.large.script = Script(fault="reset_before_head"), Script(fault="hang")
    assert (await w.ask("hello")).status == 504


BREAKS = {"reset": "reset_midway", "end": "truncate", "hang": "hang_midway"}
DIALECTS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "one two three four five six"}]},
    "/v1/responses": {"input": "one two three four five six"},
    "/v1/messages": {"messages": [{"role": "user", "content": "one two three four five six"}], "max_tokens": 9},
}


@pytest.mark.parametrize("fault", BREAKS)
async def test_after_the_first_byte_a_failure_ends_the_stream_with_an_error_event(w: World, fault: str) -> None:
    w.small.script = Script(fault=BREAKS[fault])  # type: ignore[arg-type]
    for path, asked in DIALECTS.items():
        broken = await w.post(path, {"model": "auto", "stream": True, **asked})
        assert told(broken) == (200, "small", "routed", None)
        last = list(lines(broken.body))[-1]
        assert "error" in (last.get("type"), *last), path
        assert b"one" in broken.body
        assert not any(end in broken.body for end in (b"[DONE]", b"message_stop", b"response.completed"))
        assert len(w.small.requests) == 1 and not w.large.requests
        assert not (await w.recorded(broken.id)).complete
        forget(w)


@pytest.mark.parametrize("fault", BREAKS)
async def test_a_whole_answer_that_is_cut_has_sent_nothing_and_is_asked_of_another(w: World, fault: str) -> None:
    w.small.script = Script(fault=BREAKS[fault])  # type: ignore[arg-type]
    reason = "timeout" if fault == "hang" else "reset"
    for path, asked in DIALECTS.items():
        answered = await w.post(path, {"model": "auto", **asked})
        assert told(answered) == (200, "large", "fallback", reason), path
        assert b"one two three four five six" in answered.body
        assert (len(w.small.requests), len(w.large.requests)) == (1, 1)
        assert (await w.recorded(answered.id)).complete
        forget(w)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
async def test_a_pinned_backend_that_cuts_its_answer_is_asked_once_more(w: World, path: str) -> None:
    asked = {"messages": [{"role": "user", "content": "hello"}], "prompt": "hello", "input": "hello"}
    for says_length in (True, False):
        w.small.queue.append(Script(fault="truncate", says_length=says_length))
        answered = await w.post(path, {"model": "small", **asked})
        assert (answered.status, len(w.small.requests), len(w.large.requests)) == (200, 2, 0)
        forget(w)
    w.small.script = Script(fault="truncate")
    assert (await w.post(path, {"model": "small", **asked})).status == 502
    assert (len(w.small.requests), len(w.large.requests)) == (2, 0)


@pytest.mark.parametrize("fault", BREAKS.values())
async def test_nothing_is_left_of_an_answer_that_nobody_completed(w: World, fault: Any) -> None:
    w.small.script = Script(fault=fault)
    for asked in ({}, {"headers": {"x-iccache-session": "s"}}):
        assert (await w.ask("hello", "small", **asked)).status in (502, 504)
    assert w.proxy.fleet.members["small"].in_flight == 0
    assert b'iccache_in_flight{backend="small"} 0.0' in (await w.get("/metrics")).body
    if fault == "hang_midway":
        async with asyncio.timeout(5):
            await asyncio.gather(*(received.left.wait() for received in w.small.requests))


LONG = "word " * 4000


@pytest.fixture
async def brief(tmp_path: Path) -> AsyncIterator[World]:
    limited = {"max_answer_bytes": 10_000}
    async with world(tmp_path, small=limited, routing=CHEAPEST) as made:
        yield made


async def test_an_answer_that_is_too_large_is_a_failure_that_is_not_tried_again(brief: World) -> None:
    brief.small.script = Script(answer=LONG)
    for path, asked in DIALECTS.items():
        answered = await brief.post(path, {"model": "auto", **asked})
        assert told(answered) == (200, "large", "fallback", "too_large"), path
        pinned = await brief.post(path, {"model": "small", **asked})
        assert pinned.status == 502
        error = pinned.json["error"]
        assert "small" in error["message"] and "max_answer_bytes" in error["message"]
        assert error.get("code", "upstream_too_large") == "upstream_too_large"
        assert len(brief.small.requests) == 2, "the same again would be as large"
        forget(brief)
    for _ in range(5):
        await brief.ask("hello", "small")
    assert told(await brief.ask("hello"))[3] == "circuit_open"


async def test_a_stream_may_have_any_length(brief: World) -> None:
    brief.small.script = Script(answer=LONG)
    answered = await brief.ask("hello", "small", stream=True)
    assert answered.status == 200
    assert await said(answered, stream=True) == LONG


async def test_what_is_not_looked_into_goes_out_as_it_comes_when_it_is_large(brief: World) -> None:
    body = b'{"data": "' + b"x" * 50_000 + b'"}'
    for says_length in (True, False):
        brief.small.script = Script(body=body, says_length=says_length)
        answered = await brief.post("/v1/embeddings", {"model": "small", "input": "one two three"})
        assert (answered.status, answered.body) == (200, body)
    assert len(brief.small.requests) == 2
    counted = (await brief.get("/metrics")).body.decode()
    assert 'iccache_tokens_total{backend="small",kind="input"} 6.0' in counted


async def test_what_may_exist_twice_is_not_asked_for_again(w: World) -> None:
    w.large.script = Script(fault="truncate")
    assert (await w.post("/v1/batches", {"x": 1})).status == 502
    assert (len(w.small.requests), len(w.large.requests)) == (0, 1)


async def test_an_answer_that_was_cut_is_paid_for_all_the_same(w: World) -> None:
    w.small.script = Script(
        body=b'{"choices": [{"message": {"role": "assistant", "content": "a b c' + b" x" * 100, fault="truncate"
    )
    answered = await w.ask("one two three")
    assert told(answered)[:3] == (200, "large", "fallback")
    counted = (await w.get("/metrics")).body.decode()
    spent = {
        k: v
        for k, v in (row.rsplit(" ", 1) for row in counted.splitlines() if row.startswith("iccache_"))
        if "small" in k
    }
    assert float(spent['iccache_tokens_total{backend="small",kind="input"}']) >= 3
    assert float(spent['iccache_tokens_total{backend="small",kind="output"}']) >= 10
    assert float(spent['iccache_cost_usd_total{backend="small"}']) > 0
    paid = [float(row.rsplit(" ", 1)[1]) for row in counted.splitlines() if row.startswith("iccache_cost_usd_total{")]
    assert len(paid) == 2
    assert float(answered.header("cost-usd") or 0) == pytest.approx(sum(paid))
    assert (await w.recorded(answered.id)).cost_usd == pytest.approx(sum(paid))
    assert w.proxy.learner.spent_today("default") == pytest.approx(sum(paid))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_backend_that_always_breaks_off_is_left_alone(w: World, stream: bool) -> None:
    w.small.script = Script(fault="truncate")
    for _ in range(5):
        await w.ask("one two three four", stream=stream)
    asked = len(w.small.requests)
    answered = await w.ask("one two three four", stream=stream)
    assert told(answered) == (200, "large", "fallback", "circuit_open")
    assert len(w.small.requests) == asked


@pytest.mark.parametrize("fault", [*BREAKS.values(), "error_event", "no_done"])
async def test_a_teachers_broken_answer_is_no_example(w: World, fault: Any) -> None:
    w.large.script = Script(fault=fault)
    for path, asked in DIALECTS.items():
        answered = await w.post(path, {"model": "large", "stream": True, **asked})
        record = await w.recorded(answered.id)
        assert not record.complete, path
    await w.proxy.learner.background.drain(5)
    assert await w.examples() == 0


async def test_a_drawn_backend_that_is_asked_last_keeps_its_propensity(tmp_path: Path) -> None:
    """Its circuit is open, so the others come first; when they fail too it answers, as drawn."""
    async with world(tmp_path, routing={"policy": "uniform"}) as w:
        for _ in range(5):
            w.small.script = Script(status=500)
            await w.ask("hello", "small")
        w.small.script, w.large.script = Script(), Script(status=500)
        answers = [await w.ask("hello") for _ in range(20)]
        drawn = [a for a in answers if a.header("decision") == "routed" and a.header("backend") == "small"]
        assert all(a.status == 200 for a in answers)
        assert drawn
        assert {a.header("propensity") for a in drawn} == {"0.5"}


async def test_three_backends_the_dearer_ones_in_ascending_price_then_the_rest(tmp_path: Path) -> None:
    async with ScriptedUpstream(models=["mid-model"]) as mid:
        named = {"name": "mid", "base_url": mid.base_url, "model": "mid-model", "usd_per_million_output_tokens": 2}
        async with world(tmp_path, routing=CHEAPEST, more_backends=[named]) as w:
            down = Script(status=503)
            who = {"small": w.small, "mid": mid, "large": w.large}

            async def answers(*failing: str, **headers: str) -> tuple[str | None, str | None]:
                forget(w)
                for name, upstream in who.items():
                    upstream.script = down if name in failing else Script()
                answered = await w.ask("hello", headers={k.replace("_", "-"): v for k, v in headers.items()})
                return answered.header("backend"), answered.header("decision")

            assert await answers() == ("small", "routed")
            assert await answers("small") == ("mid", "fallback")
            assert await answers("small", "mid") == ("large", "fallback")
            assert await answers(x_iccache_backend="mid", x_iccache_session="of-mid") == ("mid", "pinned")
            assert await answers("mid", x_iccache_session="of-mid") == ("large", "fallback")
            assert await answers(x_iccache_backend="mid", x_iccache_session="of-mid") == ("mid", "pinned")
            assert await answers("mid", "large", x_iccache_session="of-mid") == ("small", "fallback")


async def test_a_circuit_opens_is_left_alone_and_closes_again(w: World) -> None:
    now = 0.0
    w.proxy.fleet.clock = lambda: now
    w.small.script = Script(status=500)
    for _ in range(5):
        assert told(await w.ask("hello")) == (200, "large", "fallback", "status")
    w.small.requests.clear()
    assert told(await w.ask("hello")) == (200, "large", "fallback", "circuit_open")
    assert not w.small.requests
    assert b'iccache_circuit_open{backend="small"} 1.0' in (await w.get("/metrics")).body
    assert told(await w.ask("hello", "small"))[:3] == (500, "small", "pinned")  # the last resort is always asked
    w.small.script = Script()
    now = 3600.0
    assert told(await w.ask("hello")) == (200, "small", "routed", None)
    assert b'iccache_circuit_open{backend="small"} 0.0' in (await w.get("/metrics")).body


async def test_a_clients_own_faults_open_no_circuit(w: World) -> None:
    w.small.script = Script(status=429)
    for _ in range(8):
        assert told(await w.ask("hello", "small"))[0] == 429
    w.small.script = Script()
    assert told(await w.ask("hello")) == (200, "small", "routed", None)


async def test_a_client_that_leaves_while_a_backend_is_tried_leaves_nothing_behind(w: World) -> None:
    w.small.script = Script(before_head_s=60)
    body = json.dumps({"model": "auto", "messages": [{"role": "user", "content": "hello"}]})
    _, writer = await asyncio.open_connection("127.0.0.1", int(w.url.rsplit(":", 1)[1]))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body.encode())

    async def asked() -> bool:
        return bool(w.small.requests)

    await w.until(asked, bool)
    writer.close()
    async with asyncio.timeout(2):
        await w.small.requests[0].left.wait()

    async def idle() -> bool:
        return not w.proxy.fleet.members["small"].in_flight and not w.proxy.open_requests

    await w.until(idle, bool, seconds=2)
    assert not w.large.requests


async def test_passed_through_requests_fall_back_where_they_can_be_sent_again(w: World) -> None:
    w.large.script = Script(status=503)
    sent_again = (
        await w.post("/v1/embeddings", {"model": "another", "input": "x"}),
        await w.get("/v1/batches"),
    )
    for answered in sent_again:
        assert told(answered) == (200, "small", "fallback", "status")
    pinned = await w.post("/v1/embeddings", {"model": "large-model", "input": "x"})
    assert pinned.status == 503
    async with w.http.post(w.url + "/v1/files", data=b"x" * 1000) as upload:
        assert upload.status == 503
