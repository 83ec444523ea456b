"""One upstream: bytes, headers, clocks and failures, against a scripted server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from iccache.backends.client import BackendClient, Session, make_session
from iccache.config import Backend
from iccache.errors import BackendError, BackendTimeout, RequestError
from iccache.types import Reason
from tests.fakes import Script, ScriptedUpstream
from tests.iccache.backends.sinks import Bucket, body_of

PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
PLAIN = {"Content-Type": "application/json"}


def backend(base_url: str, **more: Any) -> Backend:
    return Backend(name="small", base_url=base_url, model="m", **more)


def asking(path: str = PATHS[0], *, stream: bool = False, text: str = "one two three four", **more: Any) -> bytes:
    field = "input" if path.endswith("responses") else "messages"
    return json.dumps({"model": "m", "stream": stream, field: [{"role": "user", "content": text}], **more}).encode()


@pytest.fixture
async def session() -> AsyncIterator[Session]:
    async with make_session() as made:
        yield made


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as started:
        yield started


@pytest.fixture
def client(upstream: ScriptedUpstream, session: Session) -> BackendClient:
    return BackendClient(backend(upstream.base_url), None, session)


async def read(
    client: BackendClient, path: str = PATHS[0], body: bytes | None = None, *, poured: bool = False
) -> tuple[int, bytes]:
    body = asking(path) if body is None else body
    async with client.send("POST", path, headers=PLAIN, body=body) as answer:
        return answer.status, await body_of(answer, poured=poured)


# ---- bytes


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
async def test_bytes_are_those_that_came(client: BackendClient, session: Session, path: str, stream: bool) -> None:
    body = asking(path, stream=stream)
    async with session.http.post(client.url(path), data=body, headers=PLAIN) as direct:
        expected = await direct.read()
    assert await read(client, path, body) == (200, expected)


async def test_the_body_goes_up_byte_for_byte(client: BackendClient, upstream: ScriptedUpstream) -> None:
    body = b'{ "model":"m",\n "messages" : [], "x": 1e2 }'
    await read(client, body=body)
    assert upstream.requests[0].body == body
    assert upstream.requests[0].headers["Content-Length"] == str(len(body))


@pytest.mark.filterwarnings("error::ResourceWarning")
async def test_a_large_body_goes_whole(client: BackendClient, upstream: ScriptedUpstream) -> None:
    body = asking(text="x" * 5_000_000)
    status, _ = await read(client, body=body)
    assert status == 200
    assert upstream.requests[0].body == body


async def test_chunks_come_as_they_are_sent(client: BackendClient, upstream: ScriptedUpstream) -> None:
    upstream.script = Script(between_s=0.05)
    began = time.monotonic()
    async with client.send("POST", PATHS[0], headers=PLAIN, body=asking(stream=True)) as answer:
        entered = time.monotonic() - began
        chunks = [chunk async for chunk in answer.chunks()]
    assert entered < 0.2 < time.monotonic() - began
    assert len(chunks) >= 6


async def test_an_error_status_is_an_answer(client: BackendClient, upstream: ScriptedUpstream) -> None:
    upstream.script = Script(status=429, headers={"Retry-After": "7"})
    async with client.send("POST", PATHS[0], headers=PLAIN, body=asking()) as answer:
        assert (answer.status, answer.headers["retry-after"]) == (429, "7")
        assert b"scripted 429" in b"".join([chunk async for chunk in answer.chunks()])


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("http://name:secret@127.0.0.1:1/v2?key=secret#secret", " to http://127.0.0.1:1/v2 "),
        ("/elsewhere?key=secret", " to /elsewhere "),
        ("http://[", "small redirects (307)"),
    ],
)
async def test_redirects_are_neither_followed_nor_passed_on(
    client: BackendClient, upstream: ScriptedUpstream, location: str, told: str
) -> None:
    async def uploaded() -> AsyncIterator[bytes]:
        yield b"piece"

    upstream.script = Script(status=307, headers={"Location": location})
    for body in (asking(), uploaded()):
        with pytest.raises(BackendError) as caught:
            async with client.send("POST", PATHS[0], headers=PLAIN, body=body):
                pass
        assert caught.value.reason is Reason.REDIRECT
        assert caught.value.lasting
        assert told in str(caught.value)
        assert "secret" not in str(caught.value)
    assert len(upstream.requests) == 2


async def test_an_empty_body_is_an_end(client: BackendClient, upstream: ScriptedUpstream) -> None:
    upstream.script = Script(body=b"")
    assert await read(client) == (200, b"")


async def test_compressed_answers_stay_compressed(client: BackendClient, upstream: ScriptedUpstream) -> None:
    upstream.script = Script(body=b"\x1f\x8bnot really gzip", headers={"Content-Encoding": "gzip"})
    assert await read(client) == (200, b"\x1f\x8bnot really gzip")
    assert upstream.requests[0].headers["Accept-Encoding"] == "identity"


async def test_an_upload_is_streamed(client: BackendClient, upstream: ScriptedUpstream) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * 1000

    for headers, length in (({}, None), ({"Content-Length": "10000"}, "10000")):
        async with client.send("POST", "/v1/files", query="a=b&c=%20", headers=headers, body=pieces()) as answer:
            told = json.loads(b"".join([chunk async for chunk in answer.chunks()]))
        assert told == {"method": "POST", "path": "/v1/files?a=b&c=%20", "bytes": 10000}
        assert upstream.requests[-1].headers.get("Content-Length") == length


async def test_an_uploads_own_failure_is_raised(client: BackendClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"x"
        raise RequestError(408, "the client is too slow")

    with pytest.raises(RequestError, match="too slow"):
        async with client.send("POST", "/v1/files", headers={}, body=pieces()):
            pass


async def test_a_slow_upload_is_not_a_slow_answer(upstream: ScriptedUpstream, session: Session) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(5):
            await asyncio.sleep(0.1)
            yield b"x"

    slow = BackendClient(backend(upstream.base_url, first_token_timeout_s=0.3), None, session)
    async with slow.send("POST", "/v1/files", headers={}, body=pieces()) as answer:
        assert answer.status == 200


async def test_get(client: BackendClient) -> None:
    async with client.send("GET", "/v1/models", headers={}) as answer:
        assert b"fake" in b"".join([chunk async for chunk in answer.chunks()])


# ---- where and with what


@pytest.mark.parametrize(
    ("base", "path", "expected"),
    [
        ("http://h/v1", "/v1/models", "http://h/v1/models"),
        ("http://h/v1/", "/v1/models", "http://h/v1/models"),
        ("http://h:8000", "/v1/models", "http://h:8000/v1/models"),
        ("http://h/", "/v1/models", "http://h/v1/models"),
        ("http://h/gateway", "/v1/models", "http://h/gateway/v1/models"),
        ("http://h/openai/v1", "/v1/models", "http://h/openai/v1/models"),
        ("http://h/v1beta/openai", "/v1/models", "http://h/v1beta/openai/models"),
        ("http://h/api/paas/v4", "/v1/chat/completions", "http://h/api/paas/v4/chat/completions"),
        ("http://user:pw@h/v1", "/v1/models", "http://h/v1/models"),
        ("http://h/v1", "/v1/models/a%2Fb", "http://h/v1/models/a%2Fb"),
        ("http://h/v1", "/v1", "http://h/v1"),
        ("http://h/v1", "//evil/v1", "http://h/v1//evil/v1"),
    ],
)
async def test_join(session: Session, base: str, path: str, expected: str) -> None:
    assert str(BackendClient(backend(base), None, session).url(path)) == expected


async def test_join_keeps_both_queries(session: Session) -> None:
    client = BackendClient(backend("http://h/v1?api-version=1"), None, session)
    assert str(client.url("/v1/models", "b=%2F")) == "http://h/v1/models?api-version=1&b=%2F"


@pytest.mark.parametrize(
    "path", ["/v1/../admin", "/v1/%2e%2E/admin", "/v1/.%2e", "/v1/./x", "v1/models", "@evil/v1", "/v1/\u00e9"]
)
async def test_paths_that_lead_elsewhere_are_refused(session: Session, path: str) -> None:
    with pytest.raises(RequestError) as caught:
        BackendClient(backend("http://h/v1"), None, session).send("GET", path, headers={})
    assert caught.value.status == 400


async def test_the_clients_keys_stay_here(upstream: ScriptedUpstream, session: Session) -> None:
    given = {
        "Authorization": "Bearer tenant",
        "x-api-key": "tenant",
        "Cookie": "tenant",
        "X-Iccache-Session": "tenant",
        "OpenAI-Beta": "kept",
    }
    for key, path in ((None, PATHS[0]), ("backend-key", PATHS[0]), ("backend-key", PATHS[2])):
        client = BackendClient(backend(upstream.base_url), key, session)
        async with client.send("POST", path, headers=given, body=asking(path)):
            pass
        came = upstream.requests[-1].headers
        assert "tenant" not in str(came)
        assert came["openai-beta"] == "kept"
        assert came.get("Authorization") == (f"Bearer {key}" if key else None)
        assert came.get("x-api-key") == (key if path == PATHS[2] else None)


async def test_credentials_in_the_url(upstream: ScriptedUpstream, session: Session) -> None:
    base = upstream.base_url.replace("http://", "http://user:hunter2@")
    await read(BackendClient(backend(base), None, session))
    assert upstream.requests[-1].headers["Authorization"].startswith("Basic ")
    await read(BackendClient(backend(base), "key", session))
    assert upstream.requests[-1].headers["Authorization"] == "Bearer key"
    gone = BackendClient(backend("http://user:hunter2@127.0.0.1:1/v1"), None, session)
    with pytest.raises(BackendError) as caught:
        await read(gone)
    assert "hunter2" not in str(caught.value) + str(caught.value.__cause__)


async def test_nothing_is_added_to_the_headers(client: BackendClient, upstream: ScriptedUpstream) -> None:
    async with client.send("POST", PATHS[0], headers={}, body=asking()):
        pass
    assert {name.lower() for name in upstream.requests[0].headers} == {"host", "accept-encoding", "content-length"}


# ---- failures before the first byte


@pytest.mark.parametrize(
    ("fault", "reason", "kind"),
    [
        ("reset_before_head", Reason.RESET, BackendError),
        ("close_before_head", Reason.RESET, BackendError),
        ("reset_after_head", Reason.RESET, BackendError),
        ("hang", Reason.SLOW, BackendTimeout),
        ("hang_after_head", Reason.SLOW, BackendTimeout),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_byte(
    upstream: ScriptedUpstream, session: Session, fault: Any, reason: Reason, kind: type, stream: bool
) -> None:
    client = BackendClient(backend(upstream.base_url, first_token_timeout_s=0.3), None, session)
    upstream.script = Script(fault=fault)
    entered = False
    with pytest.raises(BackendError) as caught:
        async with client.send("POST", PATHS[0], headers=PLAIN, body=asking(stream=stream)):
            entered = True
    assert not entered
    assert (type(caught.value), caught.value.reason) == (kind, reason)
    assert "small" in str(caught.value)
    assert len(upstream.requests) == 1  # it was not a stale connection: not sent twice


async def test_nobody_listens(session: Session) -> None:
    with pytest.raises(BackendError, match="small cannot be reached") as caught:
        await read(BackendClient(backend("http://127.0.0.1:1/v1"), None, session))
    assert caught.value.reason is Reason.CONNECT


async def test_not_http(session: Session) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(BackendError) as caught:
        await read(BackendClient(backend(f"http://127.0.0.1:{port}/v1"), None, session))
    assert caught.value.reason is Reason.RESET
    server.close()


async def test_no_connection_in_time(session: Session) -> None:
    """TLS spoken to a server that accepts and says nothing."""

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = BackendClient(backend(f"https://127.0.0.1:{port}/v1", connect_timeout_s=0.3), None, session)
    began = time.monotonic()
    with pytest.raises(BackendTimeout) as caught:
        await read(client)
    assert caught.value.reason is Reason.CONNECT
    assert 0.27 < time.monotonic() - began < 0.6
    server.close()


# ---- clocks


async def elapsed(client: BackendClient, *, stream: bool = True, poured: bool = False) -> tuple[float, BackendTimeout]:
    began = time.monotonic()
    with pytest.raises(BackendTimeout) as caught:
        await read(client, body=asking(stream=stream), poured=poured)
    assert caught.value.reason is Reason.SLOW
    return time.monotonic() - began, caught.value


async def test_first_token_clock(upstream: ScriptedUpstream, session: Session) -> None:
    client = BackendClient(backend(upstream.base_url, first_token_timeout_s=0.4, idle_timeout_s=0.1), None, session)
    for script in (Script(before_head_s=2), Script(before_body_s=2)):
        upstream.script = script
        took, error = await elapsed(client)
        assert 0.36 <= took <= 0.7
        assert "sent no byte within 0.4 s" in str(error)


@pytest.mark.parametrize("poured", [False, True])
async def test_idle_clock(upstream: ScriptedUpstream, session: Session, poured: bool) -> None:
    client = BackendClient(backend(upstream.base_url, idle_timeout_s=0.4, first_token_timeout_s=5), None, session)
    upstream.script = Script(fault="hang_midway")
    took, error = await elapsed(client, poured=poured)
    assert 0.36 <= took <= 0.7
    assert "silent for 0.4 s" in str(error)
    upstream.script = Script(between_s=0.2)  # longer than the clock in all, never silent for so long
    assert (await read(client, body=asking(stream=True), poured=poured))[0] == 200


@pytest.mark.parametrize("poured", [False, True])
async def test_total_clock(upstream: ScriptedUpstream, session: Session, poured: bool) -> None:
    client = BackendClient(backend(upstream.base_url, timeout_s=0.5, idle_timeout_s=5), None, session)
    for script in (Script(between_s=0.1, repeat=10), Script(before_head_s=2), Script(fault="hang_midway")):
        upstream.script = script
        took, error = await elapsed(client, poured=poured)
        assert 0.45 <= took <= 0.8
        assert "within 0.5 s" in str(error)


async def test_total_clock_where_there_is_always_more(upstream: ScriptedUpstream, session: Session) -> None:
    client = BackendClient(backend(upstream.base_url, timeout_s=0.3), None, session)
    upstream.script = Script(answer="x" * 100_000, repeat=1000)
    began = time.monotonic()
    with pytest.raises(BackendTimeout):
        async with client.send("POST", PATHS[0], headers=PLAIN, body=asking(stream=True)) as answer:
            async for _ in answer.chunks():
                await asyncio.sleep(0.02)
    assert time.monotonic() - began < 0.6


async def test_the_readers_slowness_is_not_the_upstreams(upstream: ScriptedUpstream, session: Session) -> None:
    client = BackendClient(backend(upstream.base_url, idle_timeout_s=0.2), None, session)
    upstream.script = Script(between_s=0.01)
    async with client.send("POST", PATHS[0], headers=PLAIN, body=asking(stream=True)) as answer:
        async for _ in answer.chunks():
            await asyncio.sleep(0.3)
    async with client.send("POST", PATHS[0], headers=PLAIN, body=asking(stream=True)) as answer:
        await answer.pour(Bucket(room=1, slow_s=0.3))


# ---- failures after the first byte


@pytest.mark.parametrize("fault", ["reset_midway", "truncate"])
@pytest.mark.parametrize(("stream", "poured"), [(False, False), (True, False), (True, True)])
async def test_a_break_midway(
    client: BackendClient, upstream: ScriptedUpstream, fault: Any, stream: bool, poured: bool
) -> None:
    upstream.script = Script(fault=fault, between_s=0.01)
    bucket = Bucket()
    with pytest.raises(BackendError) as caught:
        async with client.send("POST", PATHS[0], headers=PLAIN, body=asking(stream=stream)) as answer:
            if poured:
                await answer.pour(bucket)
            async for chunk in answer.chunks():
                bucket.write(chunk)
    came = b"".join(bucket.pieces)
    assert caught.value.reason is Reason.RESET
    assert not isinstance(caught.value, BackendTimeout)
    assert not caught.value.stale
    assert came


# ---- connections


async def test_connections_are_kept(client: BackendClient, upstream: ScriptedUpstream) -> None:
    for _ in range(5):
        await read(client)
        await read(client, body=asking(stream=True))
    assert {r.connection for r in upstream.requests} == {0}


@pytest.mark.parametrize("fault", ["reset_before_head", "close_before_head"])
async def test_a_stale_connection_is_tried_once_more(
    client: BackendClient, upstream: ScriptedUpstream, fault: Any
) -> None:
    await read(client)
    upstream.queue.append(Script(fault=fault))
    assert (await read(client))[0] == 200
    assert [r.connection for r in upstream.requests] == [0, 0, 1]
    assert upstream.requests[1].body == upstream.requests[2].body


async def test_a_stale_connection_is_tried_only_once(client: BackendClient, upstream: ScriptedUpstream) -> None:
    await read(client)
    upstream.script = Script(fault="close_before_head")
    with pytest.raises(BackendError):
        await read(client)
    assert len(upstream.requests) == 3


async def test_several_stale_connections(client: BackendClient, upstream: ScriptedUpstream) -> None:
    """The second attempt never takes a pooled connection: they may all be stale."""
    upstream.script = Script(before_head_s=0.1)
    await asyncio.gather(*(read(client) for _ in range(3)))
    pooled = {r.connection for r in upstream.requests}
    upstream.queue.append(Script(fault="close_before_head"))
    await read(client)
    assert upstream.requests[-2].connection in pooled
    assert upstream.requests[-1].connection not in pooled


async def test_a_crash_at_work_is_not_a_stale_connection(
    client: BackendClient, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iccache.backends.client.STALE_WITHIN_S", 0.1)
    await read(client)
    upstream.script = Script(fault="close_before_head", before_head_s=0.3)
    with pytest.raises(BackendError):
        await read(client)
    assert len(upstream.requests) == 2


async def test_an_answer_that_began_is_not_asked_for_again(client: BackendClient, upstream: ScriptedUpstream) -> None:
    await read(client)
    upstream.script = Script(fault="reset_after_head")
    with pytest.raises(BackendError) as caught:
        await read(client)
    assert not caught.value.stale
    assert len(upstream.requests) == 2


async def test_an_upload_starts_on_a_fresh_connection(client: BackendClient, upstream: ScriptedUpstream) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"once"

    await read(client)
    async with client.send("POST", "/v1/files", headers={}, body=pieces()):
        pass
    assert upstream.requests[-1].connection != upstream.requests[0].connection


async def left(upstream: ScriptedUpstream) -> float:
    """When the upstream saw its last client leave."""
    async with asyncio.timeout(2):
        await upstream.requests[-1].left.wait()
    at = upstream.requests[-1].left_at
    assert at is not None
    return at


async def test_leaving_midway_stops_the_upstream(client: BackendClient, upstream: ScriptedUpstream) -> None:
    upstream.script = Script(between_s=0.02, repeat=1000)
    async with client.send("POST", PATHS[0], headers=PLAIN, body=asking(stream=True)) as answer:
        async for _ in answer.chunks():
            break
        began = time.monotonic()
    assert await left(upstream) - began < 1
    sent = upstream.requests[-1].sent
    await asyncio.sleep(0.2)
    assert upstream.requests[-1].sent == sent < 100


@pytest.mark.parametrize("script", [Script(fault="hang"), Script(fault="hang_after_head"), Script(fault="hang_midway")])
async def test_a_cancelled_task_stops_the_upstream(
    client: BackendClient, upstream: ScriptedUpstream, script: Script
) -> None:
    upstream.script = script
    task = asyncio.create_task(read(client, body=asking(stream=True)))
    await asyncio.sleep(0.2)
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await left(upstream) - began < 1


async def test_a_timeout_stops_the_upstream(upstream: ScriptedUpstream, session: Session) -> None:
    client = BackendClient(backend(upstream.base_url, first_token_timeout_s=0.1), None, session)
    upstream.script = Script(fault="hang")
    await elapsed(client)
    await left(upstream)


async def test_a_slow_reader_holds_the_upstream_back(upstream: ScriptedUpstream, session: Session) -> None:
    """What is not read stays with the sender: 64 MB are offered, a few are buffered on the way (kernel included)."""
    upstream.script = Script(answer="x" * 64_000, repeat=1000)
    client = BackendClient(backend(upstream.base_url), None, session)
    async with client.send("POST", PATHS[0], headers=PLAIN, body=asking(stream=True)) as answer:
        await anext(aiter(answer.chunks()))
        await asyncio.sleep(0.5)
        assert upstream.requests[-1].sent * 64_000 < 16_000_000
        assert answer._source._connection._held < 1_000_000


async def test_no_cookies_are_kept(client: BackendClient, upstream: ScriptedUpstream) -> None:
    upstream.script = Script(headers={"Set-Cookie": "a=b"})
    await read(client)
    await read(client)
    assert "Cookie" not in upstream.requests[1].headers
