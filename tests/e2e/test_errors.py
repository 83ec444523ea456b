"""What goes wrong, seen from outside: each a clear error in the right shape, nothing lost, nothing hung."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from iccache.dialects.answer import StreamReader
from tests.e2e.world import Answered, World, world
from tests.fakes import Script

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def w(tmp_path: Path) -> AsyncIterator[World]:
    clocks = {"first_token_timeout_s": 0.4, "idle_timeout_s": 0.4, "connect_timeout_s": 1}
    async with world(tmp_path, small=clocks, large=clocks, server={"body_timeout_s": 0.2}) as made:
        yield made


def in_openai_shape(answered: Answered) -> dict[str, Any]:
    assert answered.headers["Content-Type"].startswith("application/json")
    assert set(answered.json) == {"error"}
    error: dict[str, Any] = answered.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str)
    assert answered.id.startswith("req_")
    return error


async def send(w: World, path: str, body: bytes, **headers: str) -> Answered:
    async with w.http.post(w.url + path, data=body, headers={"Content-Type": "application/json"} | headers) as r:
        return Answered(r.status, r.headers, await r.read())


NOT_REQUESTS = {
    "empty": b"",
    "not JSON": b"{messages: []}",
    "cut off": b'{"model": "auto", "messages": [',
    "not an object": b"[]",
    "a string": b'"auto"',
    "null": b"null",
    "byte order mark": b'\xef\xbb\xbf{"model":"auto","messages":[]}',
    "not UTF-8": b'{"model":"auto","messages":[{"role":"user","content":"\xff"}]}',
    "lone surrogate": b'{"model":"auto","messages":[{"role":"user","content":"\\ud800"}]}',
    "NaN": b'{"model":"auto","temperature":NaN,"messages":[]}',
    "no float": b'{"model":"auto","temperature":1e400,"messages":[]}',
    "no model": b'{"messages":[{"role":"user","content":"x"}]}',
    "model of another type": b'{"model":5,"messages":[]}',
    "model null": b'{"model":null,"messages":[]}',
    "no messages": b'{"model":"auto"}',
    "messages of another type": b'{"model":"auto","messages":7}',
    "a thousand levels": b'{"model":"auto","messages":' + b"[" * 1000 + b"]" * 1000 + b"}",
    "a million levels": b'{"model":"auto","messages":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
    "two hundred levels": b'{"model":"auto","messages":' + b'[{"a":' * 100 + b"1" + b"}]" * 100 + b"}",
    "a hundred thousand members": b'{"model":"auto",' + b",".join(b'"k%d":1' % i for i in range(100_000)) + b"}",
    "two hundred thousand messages": b'{"model":"auto","messages":[' + b",".join([b"{}"] * 200_000) + b"]}",
    "two hundred thousand parts": b'{"model":"auto","messages":[{"role":"user","content":['
    + b",".join([b"1"] * 200_000)
    + b"]}]}",
    "our own object of another type": b'{"model":"auto","messages":[],"iccache":7}',
    "our own object, unknown key": b'{"model":"auto","messages":[],"iccache":{"bakend":"large"}}',
    "our own object, wrong value": b'{"model":"auto","messages":[],"iccache":{"examples":-1}}',
}


@pytest.mark.parametrize("path", [CHAT, "/v1/responses", MESSAGES])
async def test_a_body_that_is_no_request_is_a_400_in_the_dialects_shape(w: World, path: str) -> None:
    for name, body in NOT_REQUESTS.items():
        answered = await send(w, path, body.replace(b"messages", b"input") if path == "/v1/responses" else body)
        assert answered.status == 400, name
        if path == MESSAGES:
            assert answered.json["type"] == "error"
            assert answered.json["error"]["type"] == "invalid_request_error"
            assert set(answered.json["error"]) == {"type", "message"}
        else:
            assert in_openai_shape(answered)["type"] == "invalid_request_error"
    assert not w.small.requests and not w.large.requests


async def test_messages_of_an_unknown_shape_pass_to_the_teacher_unchanged(w: World) -> None:
    """What they mean is the upstream's to say: it may know more than we do."""
    user = {"role": "user"}
    for messages in ([], [7], [None], [{}], [{"role": 5}], [user | {"content": 5}], [{"role": "martian"}]):
        answered = await w.post(CHAT, {"model": "auto", "messages": messages})
        assert answered.status == 200
        assert (answered.header("decision"), answered.header("backend")) == ("bypass", "large")
        assert answered.header("reason") in ("unreadable", "empty")
        assert w.large.requests[-1].json["messages"] == messages


@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/v1/responses"])
async def test_an_unknown_model_is_a_404_that_names_what_there_is(w: World, path: str) -> None:
    answered = await w.post(path, {"model": "gpt-9", "messages": HELLO, "input": "hello", "max_tokens": 5})
    assert answered.status == 404
    message = answered.json["error"]["message"]
    assert all(name in message for name in ("gpt-9", "auto", "small", "large"))
    if path == MESSAGES:
        assert answered.json["error"]["type"] == "not_found_error"
    else:
        error = in_openai_shape(answered)
        assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "invalid_request_error")
    assert not w.small.requests and not w.large.requests


async def test_an_unknown_pin_is_an_error_that_names_what_there_is(w: World) -> None:
    answered = await w.ask("hello", headers={"x-iccache-backend": "huge"})
    assert answered.status in (400, 404)
    assert "small" in in_openai_shape(answered)["message"]


async def test_a_cap_that_is_no_number_is_a_400(w: World) -> None:
    for value in ("-1", "three", "1.5", "", "0x2", "²", "1e1"):
        answered = await w.ask("hello", headers={"x-iccache-examples": value})
        assert answered.status == 400
        assert in_openai_shape(answered)["param"] == "x-iccache-examples"


async def test_a_header_that_is_no_text_is_no_500(w: World) -> None:
    """Bytes that are no UTF-8 reach a handler as lone surrogates, which neither a store nor a header can hold."""
    body = json.dumps({"model": "large", "messages": HELLO}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n".encode()
    for name in (b"x-iccache-session", b"x-iccache-backend", b"x-iccache-store", b"Cache-Control"):
        answer = await raw(w, head + name + b": a\xff\xfeb\r\n\r\n" + body)
        assert answer.split()[1] in (b"200", b"400"), name
    assert not w.proxy.metrics.dropped.collect()[0].samples


async def raw(w: World, sent: bytes) -> bytes:
    """What the proxy says to these bytes first: one answer, whole."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(w.url.rsplit(":", 1)[1]))
    try:
        writer.write(sent)
        async with asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r", 1)[0])
            return head + await reader.readexactly(length)
    finally:
        writer.close()


async def test_a_body_larger_than_allowed_is_413(w: World) -> None:
    body = b'{"model":"auto","messages":[{"role":"user","content":"' + b"x" * 33 * 1024 * 1024 + b'"}]}'
    answered = await send(w, CHAT, body)
    assert answered.status == 413
    in_openai_shape(answered)
    assert not w.large.requests


async def test_a_body_that_unpacks_to_more_than_allowed_is_413(w: World) -> None:
    packed = gzip.compress(b'{"model":"auto","x":"' + b"x" * 200_000_000 + b'"}')
    answered = await send(w, CHAT, packed, **{"Content-Encoding": "gzip"})
    assert answered.status == 413
    in_openai_shape(answered)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_packed_body_is_understood(w: World, encoding: str) -> None:
    plain = json.dumps({"model": "large", "messages": HELLO}).encode()
    packed = gzip.compress(plain) if encoding == "gzip" else zlib.compress(plain)
    answered = await send(w, CHAT, packed, **{"Content-Encoding": encoding})
    assert (answered.status, answered.text) == (200, "hello")
    assert w.large.requests[0].json["messages"] == HELLO
    assert "Content-Encoding" not in w.large.requests[0].headers


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/v1/feedback", MESSAGES])
async def test_a_body_that_is_not_packed_as_it_says_is_a_400(w: World, path: str) -> None:
    answered = await send(w, path, b'{"model": "large", "messages": []}', **{"Content-Encoding": "gzip"})
    assert answered.status == 400
    assert answered.json["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, "/v1/feedback", "/v1/embeddings", MESSAGES])
async def test_a_body_that_stops_coming_is_408(w: World, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
    answer = await raw(w, head.encode() + b'{"model": "auto", ')
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"error"' in answer


async def test_an_upload_that_stops_coming_is_408_and_nobodys_fault_but_the_clients(w: World) -> None:
    head = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data\r\nContent-Length: 500\r\n\r\n"
    for _ in range(6):
        answer = await raw(w, head + b"--cut")
        assert answer.startswith(b"HTTP/1.1 408")
    assert not w.proxy.fleet.members["large"].circuit.is_open(w.proxy.clock())
    assert (await w.ask("hello", "large")).status == 200


async def test_chunks_that_are_none_are_a_400(w: World) -> None:
    for path in (CHAT, "/v1/files"):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        answer = await raw(w, head.encode() + b"5\r\nhello\r\nnonsense\r\n")
        assert answer.split()[1] == b"400"


@pytest.mark.parametrize("path", [CHAT, "/v1/files"])
async def test_what_is_no_http_is_refused_in_openais_shape(w: World, path: str) -> None:
    length = b"Content-Length: 2\r\n"
    for heads, status in {
        (b"Host: x\r\nX-Long: " + b"secret " * 2000 + b"\r\n", 400),
        (b"Host: x\r\n" + b"".join(b"X-%d: a\r\n" % i for i in range(200)), 400),
        (b"Host: x\r\n" + length + length, 400),
        (b"Host: x\r\nContent-Encoding: nonsense\r\nbad header\r\n", 400),
        (b"", 400),
    }:
        answer = await raw(w, b"POST " + path.encode() + b" HTTP/1.1\r\n" + heads + length + b"\r\n{}")
        head, body = answer.split(b"\r\n\r\n")
        assert head.split()[1] == str(status).encode() and b"application/json" in head
        assert b"x-request-id: req_" in head
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"} and "cannot be read" in error["message"]
        assert "secret" not in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("PUT", "/healthz", 405)])
async def test_a_path_that_is_not_there(w: World, method: str, path: str, status: int) -> None:
    async with w.http.request(method, w.url + path) as r:
        answered = Answered(r.status, r.headers, await r.read())
    assert answered.status == status
    in_openai_shape(answered)


async def test_paths_that_climb_reach_no_upstream(w: World) -> None:
    for path in ("/v1/files/../../admin", "/v1/%2e%2e/secret", "/v1/a/%2E%2E/%2e%2e/b"):
        answer = await raw(w, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert answer.split()[1] in (b"400", b"404"), path
    assert not w.large.requests


# ---- a backend that is down, slow or hangs


@pytest.fixture
def refused() -> int:
    """A port where nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", MESSAGES])
async def test_all_backends_down_is_502(tmp_path: Path, refused: int, path: str) -> None:
    down = {"base_url": f"http://127.0.0.1:{refused}/v1"}
    async with world(tmp_path, small=down, large=down) as w:
        answered = await w.post(path, {"model": "auto", "messages": HELLO, "max_tokens": 5})
        assert answered.status == 502
        assert answered.id.startswith("req_")
        assert (await w.get("/readyz")).status == 503
        assert (await w.get("/healthz")).status == 200
        if path == MESSAGES:
            assert answered.json["error"]["type"] == "api_error"
        else:
            assert in_openai_shape(answered)["code"] == "upstream_connect"


@pytest.mark.parametrize("fault", ["hang", "hang_after_head"])
@pytest.mark.parametrize("stream", [False, True])
async def test_backends_that_hang_are_504_within_their_time_outs(w: World, fault: Any, stream: bool) -> None:
    w.small.script = w.large.script = Script(fault=fault)
    async with asyncio.timeout(5):
        answered = await w.ask("hello", stream=stream)
    assert answered.status == 504
    assert in_openai_shape(answered)["code"] == "upstream_timeout"
    assert all(m.in_flight == 0 for m in w.proxy.fleet.members.values())


async def test_an_answer_that_is_cut_off_is_a_502_and_no_example(w: World) -> None:
    w.large.script = Script(fault="truncate")
    answered = await w.ask("hello", "large")
    assert answered.status == 502
    assert in_openai_shape(answered)["code"] == "upstream_reset"
    await w.proxy.learner.background.drain(5)
    assert await w.examples() == 0


async def test_an_answer_that_is_no_json_passes_and_is_no_example(w: World) -> None:
    w.large.script = Script(body=b"<html>", headers={"Content-Type": "text/html"})
    answered = await w.ask("hello", "large")
    assert (answered.status, answered.body, answered.headers["Content-Type"]) == (200, b"<html>", "text/html")
    await w.proxy.learner.background.drain(5)
    assert await w.examples() == 0


async def test_a_header_that_no_server_may_write_costs_the_client_nothing_but_that_header(tmp_path: Path) -> None:
    async def bell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nX-Bell: a\x07b\r\nX-Kept: c\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(bell, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, world(tmp_path, large={"base_url": f"http://127.0.0.1:{port}/v1"}) as w:
        for answered in (await w.ask("hello", "large"), await w.post("/v1/embeddings", {"model": "large"})):
            assert (answered.status, answered.body) == (200, b"{}")
            assert answered.headers["X-Kept"] == "c" and "X-Bell" not in answered.headers


# ---- the official client


@pytest.fixture
async def client(w: World) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=w.url + "/v1", api_key="none", max_retries=0, timeout=10) as made:
        yield made


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_upstreams_error_raises_the_official_clients_own_class(
    w: World, client: openai.AsyncOpenAI, status: int, kind: type[openai.APIStatusError], stream: bool
) -> None:
    w.large.script = Script(status=status, headers={"Retry-After": "7"})
    with pytest.raises(kind) as caught:
        await client.chat.completions.create(model="large", messages=HELLO, stream=stream)  # type: ignore[call-overload]
    assert caught.value.body == {
        "message": f"scripted {status}",
        "type": "scripted",
        "param": None,
        "code": str(status),
    }
    assert caught.value.response.headers["retry-after"] == "7"
    assert str(caught.value.request_id).startswith("req_")
    assert caught.value.response.headers["x-iccache-upstream-request-id"].startswith("upstream-")


async def test_our_errors_raise_the_official_clients_own_classes(w: World, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-9", messages=HELLO)  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model="auto", messages="hello")  # type: ignore[arg-type]
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-9")
    w.small.script = w.large.script = Script(fault="hang")
    with pytest.raises(openai.InternalServerError) as late:
        await client.chat.completions.create(model="auto", messages=HELLO)  # type: ignore[arg-type]
    assert late.value.status_code == 504


async def test_a_client_that_gives_up_raises_its_time_out(w: World, client: openai.AsyncOpenAI) -> None:
    w.large.script = Script(before_head_s=5)
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.2).chat.completions.create(model="large", messages=HELLO)  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        await w.large.requests[0].left.wait()


async def test_a_stream_that_breaks_raises_in_the_official_client(w: World, client: openai.AsyncOpenAI) -> None:
    w.large.script = Script(answer="one two three four", fault="reset_midway")
    stream = await client.chat.completions.create(model="large", messages=HELLO, stream=True)  # type: ignore[call-overload]
    with pytest.raises(openai.APIError) as caught:
        async for _ in stream:
            pass
    assert caught.value.code == "upstream_reset"


async def test_a_proxy_that_is_gone_raises_a_connection_error(refused: int) -> None:
    url = f"http://127.0.0.1:{refused}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        with pytest.raises(openai.APIConnectionError):
            await client.chat.completions.create(model="auto", messages=HELLO)  # type: ignore[arg-type]


async def test_an_upstreams_error_on_messages_passes_in_its_own_shape(w: World) -> None:
    for status in (400, 429, 529):
        w.small.script = w.large.script = Script(status=status)
        answered = await w.post(MESSAGES, {"model": "auto", "messages": HELLO, "max_tokens": 5})
        assert answered.status == status
        assert answered.json == {"type": "error", "error": {"type": "api_error", "message": f"scripted {status}"}}


async def test_errors_below_messages_have_anthropics_shape_too(tmp_path: Path, refused: int) -> None:
    down = {"base_url": f"http://127.0.0.1:{refused}/v1"}
    async with world(tmp_path, small=down, large=down) as w:
        answered = await w.post(MESSAGES + "/count_tokens", {"model": "large", "messages": HELLO})
        assert (answered.status, answered.json["type"]) == (502, "error")


async def test_whatever_is_raised_inside_is_a_500_that_tells_nothing(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the secret is 42")

    monkeypatch.setattr(w.proxy.directory, "plan", broken)
    answered = await w.ask("hello")
    assert answered.status == 500
    assert in_openai_shape(answered)["type"] == "server_error"
    assert b"42" not in answered.body and b"Traceback" not in answered.body


async def test_a_fault_of_ours_within_a_stream_ends_it_without_its_end(
    w: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a second head in the middle of a body."""

    def broken(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(StreamReader, "feed", broken)
    body = json.dumps({"model": "large", "messages": HELLO, "stream": True})
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", int(w.url.rsplit(":", 1)[1]))
    writer.write(head.encode() + body.encode())
    async with asyncio.timeout(10):
        got = await reader.read()
    writer.close()
    assert got.count(b"HTTP/1.1") == 1 and b"internal_error" not in got
    assert b"[DONE]" not in got and not got.endswith(b"0\r\n\r\n")


async def test_what_no_backend_answered_is_counted_too(w: World) -> None:
    assert (await w.ask("hello", "nobody")).status == 404
    await w.large.stop()
    assert (await w.ask("hello", "large")).status == 502
    metrics = (await w.get("/metrics")).body.decode()
    for status in (404, 502):
        assert f'iccache_requests_total{{backend="none",decision="none",status="{status}"}} 1.0' in metrics


@pytest.mark.parametrize(("path", "shape"), [("/v1/chat/completions", "openai"), ("/v1/messages", "anthropic")])
async def test_an_expectation_that_nobody_can_meet_is_told_in_shape(w: World, path: str, shape: str) -> None:
    asked = {"model": "large", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
    refused = await w.post(path, asked, {"Expect": "200-ok"})
    assert (refused.status, "x-request-id" in refused.headers) == (417, True)
    assert refused.json["error"]["message"] and ("type" in refused.json) is (shape == "anthropic")
    assert (await w.post(path, asked, {"Expect": "100-continue"})).status == 200


@pytest.mark.parametrize("coding", ["br", "zstd"])
async def test_a_coding_that_is_not_understood_is_named_so(
    w: World, coding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for installed in ("HAS_BROTLI", "HAS_ZSTD"):
        monkeypatch.setattr(f"aiohttp.http_parser.{installed}", False)
    headers = {"Content-Encoding": coding, "Content-Type": "application/json"}
    async with w.http.post(f"{w.url}/v1/chat/completions", data=b"packed", headers=headers, compress=None) as response:
        told = await response.json()
    assert response.status == 415
    assert response.headers["Accept-Encoding"] == "gzip, deflate"
    assert "install" not in told["error"]["message"] and "gzip, deflate" in told["error"]["message"]
    assert response.headers["x-request-id"]
