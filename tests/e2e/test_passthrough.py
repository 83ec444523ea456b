"""Every other path under /v1, and the list of models: SPEC, 3."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import openai
import pytest
from aiohttp import web

from tests.e2e.served import Served, served
from tests.e2e.world import World, world
from tests.fakes import Script

MB = 1 << 20


@pytest.fixture
async def w(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


async def test_models_are_auto_and_every_backend(w: World) -> None:
    for path in ("/v1/models", "/models"):
        listed = (await w.get(path)).json
        assert listed["object"] == "list"
        assert [m["id"] for m in listed["data"]] == ["auto", "small", "large"]
        assert all(set(m) == {"id", "object", "created", "owned_by"} for m in listed["data"])
    for name in ("auto", "small", "large", "small-model"):
        assert (await w.get(f"/v1/models/{name}")).json["id"] == name
    missing = await w.get("/v1/models/org/model-9")
    assert (missing.status, missing.json["error"]["code"]) == (404, "model_not_found")
    assert not w.small.requests and not w.large.requests
    async with openai.AsyncOpenAI(base_url=w.url + "/v1", api_key="none") as client:
        assert [m.id async for m in client.models.list()] == ["auto", "small", "large"]


@pytest.mark.parametrize(
    ("model", "backend", "sent"),
    [
        ("auto", "large", "large-model"),
        ("small", "small", "small-model"),
        ("small-model", "small", "small-model"),
        ("large", "large", "large-model"),
        ("text-embedding-3-small", "large", "text-embedding-3-small"),
    ],
)
async def test_completions_and_embeddings_go_where_model_says(w: World, model: str, backend: str, sent: str) -> None:
    for path, asked in (("/v1/embeddings", {"input": ["a", "b"]}), ("/v1/completions", {"prompt": "a b"})):
        answered = await w.post(path, {"model": model, **asked})
        assert answered.status == 200
        assert (answered.header("backend"), answered.header("decision")) == (backend, "bypass")
        assert (answered.header("reason"), answered.header("examples")) == ("endpoint", "0")
        upstream = w.small if backend == "small" else w.large
        assert upstream.requests[-1].json == {"model": sent, **asked}
        assert upstream.requests[-1].path == path


async def test_the_official_client_embeds_and_completes(w: World) -> None:
    async with openai.AsyncOpenAI(base_url=w.url + "/v1", api_key="none") as client:
        embedded = await client.embeddings.create(model="small", input="hello")
        assert embedded.data[0].embedding == pytest.approx([0.6, 0.8])
        completed = await client.completions.create(model="small", prompt="hello")
        assert completed.choices[0].text == "hello"


async def test_any_path_keeps_method_query_headers_and_body(w: World) -> None:
    path = "/v1/some%2Fthing/new?a=1&b=%20c&a=2"
    headers = {"Content-Type": "application/x-strange", "OpenAI-Beta": "x=1", "x-custom": "y"}
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        body = b"\x00\xff raw" if method != "GET" else None
        url = aiohttp.client.URL(w.url + path, encoded=True)
        async with w.http.request(method, url, data=body, headers=headers) as response:
            assert response.status == 200
            assert (await response.json())["method"] == method
        received = w.large.requests[-1]
        assert (received.method, received.path, received.body) == (method, path, body or b"")
        for name in ("OpenAI-Beta", "x-custom"):
            assert received.headers[name] == headers[name]


async def test_a_query_cannot_break_the_request_line(w: World) -> None:
    query = "?a=%0d%0aX-Injected:%201%0d%0a%0d%0aGET%20/v1/other%20HTTP/1.1%0d%0aHost:%20x%0d%0a%0d%0a&b=%20%23"
    for path in ("/v1/files", "/v1/embeddings", "/v1/chat/completions"):
        url = aiohttp.client.URL(w.url + path + query, encoded=True)
        asked = {"model": "large", "messages": [{"role": "user", "content": "x"}]}
        async with w.http.post(url, json=asked) as response:
            assert response.status == 200
        (received,) = w.large.requests
        assert received.path == path + query
        assert "X-Injected" not in received.headers
        w.large.requests.clear()


async def test_without_v1_it_is_the_same(w: World) -> None:
    for path in ("/embeddings", "/completions", "/files", "/moderations", "/vector_stores/x/files"):
        assert (await w.post(path, {"model": "large", "input": "x"})).status == 200
        assert w.large.requests[-1].path == "/v1" + path
    assert (await w.post("/chat/completions", {"model": "large", "messages": [{"role": "user", "content": "x"}]})).text
    assert (await w.get("/fine_tuning/jobs")).status == 200
    assert (await w.get("/something-else")).status == 404


async def test_stored_chats_and_their_kin_pass_too(w: World) -> None:
    for path in ("/v1/chat/completions", "/v1/chat/completions/x/messages", "/v1/responses/resp_1", "/v1/feedback/x"):
        assert (await w.get(path)).status == 200
        assert w.large.requests[-1].path == path


async def test_what_is_no_json_is_the_upstreams_to_judge(w: World) -> None:
    async with w.http.post(
        w.url + "/v1/embeddings", data=b"{not json", headers={"Content-Type": "application/json"}
    ) as response:
        assert response.status == 200
    assert w.large.requests[-1].body == b"{not json"


async def test_a_pin_holds_for_any_path(w: World) -> None:
    async with w.http.get(w.url + "/v1/files", headers={"x-iccache-backend": "small"}) as response:
        assert response.headers["x-iccache-backend"] == "small"
    assert (await w.get("/v1/files", {"x-iccache-backend": "huge"})).status == 400


async def test_a_stream_passes_as_it_comes(w: World) -> None:
    w.large.script = Script(body=b'data: {"a":1}\n\ndata: [DONE]\n\n')
    answered = await w.post("/v1/completions", {"model": "large", "prompt": "x", "stream": True})
    assert answered.headers["Content-Type"].startswith("text/event-stream")
    assert answered.body == b'data: {"a":1}\n\ndata: [DONE]\n\n'


async def test_a_download_that_breaks_off_is_seen_to(w: World) -> None:
    w.large.script = Script(body=b"x" * 100_000, fault="truncate", headers={"Content-Type": "application/octet-stream"})
    with pytest.raises(aiohttp.ClientPayloadError):
        await w.get("/v1/files/f/content")
    w.large.script = Script(body=b'data: {"a":1}\n\n', fault="truncate")
    broken = await w.post("/v1/completions", {"model": "large", "prompt": "x", "stream": True})
    assert b'"error"' in broken.body and b"[DONE]" not in broken.body


async def tokens(w: World, backend: str = "large") -> tuple[float, float]:
    """Input and output so far."""
    rows = (await w.get("/metrics")).body.decode().splitlines()
    found = dict(row.rsplit(" ", 1) for row in rows if row.startswith("iccache_tokens_total"))
    names = [f'iccache_tokens_total{{backend="{backend}",kind="{kind}"}}' for kind in ("input", "output")]
    return float(found.get(names[0], 0)), float(found.get(names[1], 0))


STREAM = b'data: {"choices": [{"index": 0, "text": "one two"}]}\n\ndata: {"choices": [{"text": " three"}]}\n\n'
DONE = b"data: [DONE]\n\n"
WHOLE = b'{"object": "text_completion", "choices": [{"index": 0, "text": "one two three", "finish_reason": "stop"}]}'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 0}}\n\n'


@pytest.mark.parametrize(
    ("path", "asked", "body", "took"),
    [
        ("/v1/completions", {"prompt": "a b c d", "stream": True}, STREAM + DONE, (4, 3)),
        ("/v1/completions", {"prompt": ["a b", "c d"], "stream": True}, STREAM + DONE, (5, 3)),
        ("/v1/completions", {"prompt": [[1, 2, 3], [4]], "stream": True}, STREAM + DONE, (4, 3)),
        ("/v1/completions", {"prompt": "a b c d", "stream": True}, STREAM + USAGE + DONE, (7, 0)),
        ("/v1/completions", {"prompt": "a b c d"}, WHOLE, (4, 3)),
        ("/v1/embeddings", {"input": "a b c d"}, b'{"object": "list", "data": []}', (4, 0)),
        ("/v1/embeddings", {"input": 5}, b'{"object": "list", "data": []}', (0, 0)),
        ("/v1/moderations", {"input": "a b c d"}, b'{"results": []}', (0, 0)),
    ],
)
async def test_what_is_not_reported_is_estimated(
    w: World, path: str, asked: dict[str, object], body: bytes, took: tuple[int, int]
) -> None:
    w.large.script = Script(body=body)
    answered = await w.post(path, {"model": "large", **asked})
    assert answered.body == body
    assert await tokens(w) == took


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_what_comes_packed_is_understood_and_passes_as_it_came(tmp_path: Path, coding: str, stream: bool) -> None:
    """Only identity is asked for; some send what they like."""
    said = STREAM + b'data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\n' + DONE if stream else WHOLE
    chat = said.replace(b'"text": ', b'"delta": {"content": ' if stream else b'"message": {"content": ')
    chat = chat.replace(b'two"', b'two"}').replace(b' three"', b' three"}').replace(b'"",', b'""},')
    pack = gzip.compress if coding == "gzip" else zlib.compress
    async with world(tmp_path, cache={"reuse": "exact"}) as w:
        for path, text in (("/v1/completions", said), ("/v1/chat/completions", chat)):
            kind = "text/event-stream" if stream else "application/json"
            w.large.script = Script(body=pack(text), headers={"Content-Encoding": coding, "Content-Type": kind})
            asked = {
                "model": "large",
                "prompt": "a b",
                "stream": stream,
                "messages": [{"role": "user", "content": "a b"}],
            }
            before = await tokens(w)
            for _ in range(2):  # what is packed is not kept for exact reuse: the record does not say how
                answered = await w.post(path, asked)
                assert (answered.body, answered.headers["Content-Encoding"]) == (text, coding)
                assert answered.header("decision") != "cached"
            assert (await tokens(w))[1] - before[1] == 6
        assert (await w.recorded(answered.id)).answer == "one two three"


async def test_what_is_packed_badly_passes_too(w: World) -> None:
    for body in (b"not packed", gzip.compress(WHOLE)[:-20], gzip.compress(b"0" * (40 * MB))):
        w.large.script = Script(body=body, headers={"Content-Encoding": "gzip"})
        asked = {"model": "large", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
        for path in ("/v1/completions", "/v1/chat/completions"):
            async with w.http.post(w.url + path, json=asked, auto_decompress=False) as answered:
                assert (answered.status, await answered.read()) == (200, body)


async def test_an_error_takes_nothing(w: World) -> None:
    w.large.script = Script(status=400, body=b'{"error": {"message": "no"}}')
    assert (await w.post("/v1/completions", {"model": "large", "prompt": "a b"})).status == 400
    assert await tokens(w) == (0, 0)


async def test_an_answer_in_chunks_says_what_it_took(w: World) -> None:
    reported = json.loads(WHOLE) | {"usage": {"prompt_tokens": 10, "completion_tokens": 1_000_000}}
    w.large.script = Script(body=json.dumps(reported).encode(), says_length=False)
    answered = await w.post("/v1/completions", {"model": "large", "prompt": "a b"})
    assert answered.header("cost-usd") == "4.00001"


async def test_passed_requests_are_counted(w: World) -> None:
    await w.post("/v1/embeddings", {"model": "small", "input": "x"})
    text = (await w.get("/metrics")).body
    assert b'iccache_requests_total{backend="small",decision="bypass",status="200"} 1.0' in text
    assert b'iccache_bypass_total{reason="endpoint"} 1.0' in text


# ---- constant memory, in the real process


def resident(s: Served) -> int:
    """Most memory the process has had, in bytes."""
    status = Path(f"/proc/{s.process.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


async def test_large_uploads_and_downloads_take_constant_memory(tmp_path: Path) -> None:
    size, piece = 50 * MB, os.urandom(MB)
    digest = hashlib.sha256(piece * 50).hexdigest()

    async def sink(request: web.Request) -> web.StreamResponse:
        seen = hashlib.sha256()
        async for chunk in request.content.iter_any():
            seen.update(chunk)
        return web.json_response({"sha256": seen.hexdigest()})

    async def source(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        await response.prepare(request)
        for _ in range(50):
            await response.write(piece)
        return response

    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/v1/files", sink)
    app.router.add_get("/v1/files/x/content", source)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    base = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    try:
        async with served(tmp_path, large={"base_url": base}) as s:

            async def upload() -> str:
                async def body() -> AsyncIterator[bytes]:
                    for _ in range(50):
                        yield piece

                headers = {"Content-Type": "multipart/form-data; boundary=x"}
                async with s.http.post(s.url + "/v1/files", data=body(), headers=headers) as response:
                    assert response.status == 200
                    return str(json.loads(await response.read())["sha256"])

            async def download() -> str:
                seen = hashlib.sha256()
                async with s.http.get(s.url + "/v1/files/x/content") as response:
                    async for chunk in response.content.iter_any():
                        seen.update(chunk)
                return seen.hexdigest()

            await s.ask("warm up", "small")
            before = resident(s)
            assert await asyncio.gather(upload(), upload(), download(), download()) == [digest] * 4
            assert resident(s) - before < size // 2
    finally:
        await runner.cleanup()


async def test_what_another_endpoint_took_is_counted_and_priced(w: World) -> None:
    answered = await w.post("/v1/completions", {"model": "large", "prompt": "one two three"})
    usage = answered.json["usage"]
    usd = usage["prompt_tokens"] * 1e-6 + usage["completion_tokens"] * 4e-6
    assert usd > 0
    assert float(answered.header("cost-usd") or 0) == pytest.approx(usd)
    assert w.proxy.learner.spent_today("default") == pytest.approx(usd)


async def test_what_a_stream_of_another_endpoint_took_is_counted_too(w: World) -> None:
    """So that a tenant's budget holds there as well."""
    body = b'data: {"choices": [{"text": "4"}], "usage": null}\n\n'
    body += b'data: {"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 10}}\n\ndata: [DONE]\n\n'
    w.large.script = Script(body=body, headers={"Content-Type": "text/event-stream"})
    answered = await w.post("/v1/completions", {"model": "large", "prompt": "2+2", "stream": True})
    assert answered.body == body
    assert w.proxy.learner.spent_today("default") == pytest.approx(30e-6 + 40e-6)
