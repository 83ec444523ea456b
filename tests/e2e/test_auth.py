"""Who may ask, how much, and where keys go: SPEC, 4 and 8."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.served import served
from tests.e2e.world import Answered, World, world
from tests.fakes import Script

CHAT = "/v1/chat/completions"
KEYS = {"A_KEY": "key-of-a-111", "A_KEY_2": "key-of-a-222", "B_KEY": "key-of-b-333", "UP_KEY": "upstream-key-444"}
TENANTS = [{"name": "team-a", "key_env": ["A_KEY", "A_KEY_2"]}, {"name": "team-b", "key_env": "B_KEY"}]
ADMIN = {"ICCACHE_ADMIN_KEY": "admin-key-555"}
A = {"Authorization": "Bearer key-of-a-111"}
B = {"Authorization": "Bearer key-of-b-333"}
ROOT = {"Authorization": "Bearer admin-key-555"}


@pytest.fixture
async def w(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path, KEYS | ADMIN, tenants=TENANTS, large={"key_env": "UP_KEY"}) as made:
        yield made


STRANGERS: dict[str, dict[str, str]] = {
    "no key": {},
    "empty bearer": {"Authorization": "Bearer "},
    "bearer alone": {"Authorization": "Bearer"},
    "empty": {"Authorization": ""},
    "unknown": {"Authorization": "Bearer nobody"},
    "a part": {"Authorization": "Bearer key-of-a-11"},
    "longer": {"Authorization": "Bearer key-of-a-1111"},
    "another case": {"Authorization": "Bearer KEY-OF-A-111"},
    "basic": {"Authorization": "Basic key-of-a-111"},
    "no scheme": {"Authorization": "key-of-a-111"},
    "empty x-api-key": {"x-api-key": ""},
    "unknown x-api-key": {"x-api-key": "nobody"},
    "the admin's": ROOT,
    "the upstream's": {"Authorization": "Bearer upstream-key-444"},
    "a name": {"Authorization": "Bearer team-a", "x-tenant": "team-a", "OpenAI-Organization": "team-a"},
    "not ASCII": {"Authorization": "Bearer schlüssel"},
    "injection": {"Authorization": "Bearer ' OR '1'='1"},
}
ENDPOINTS = [
    ("POST", CHAT),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/chat/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/feedback"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/small"),
    ("GET", "/v1/files"),
    ("POST", "/v1/files"),
    ("DELETE", "/v1/whatever"),
]


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
async def test_a_stranger_gets_a_401_that_says_always_the_same(w: World, method: str, path: str) -> None:
    bodies = set()
    for name, headers in STRANGERS.items():
        body = {"model": "large", "messages": [{"role": "user", "content": "x"}]} if method == "POST" else None
        async with w.http.request(method, w.url + path, json=body, headers=headers) as r:
            answered = Answered(r.status, r.headers, await r.read())
        assert answered.status == 401, name
        assert answered.headers["x-request-id"]
        bodies.add(answered.body)
    (said,) = bodies
    error = json.loads(said)
    if path == "/v1/messages":
        assert (error["type"], error["error"]["type"]) == ("error", "authentication_error")
    else:
        assert error["error"]["code"] == "invalid_api_key"
    assert not w.small.requests and not w.large.requests


async def test_every_key_of_a_tenant_opens_in_either_header(w: World) -> None:
    for headers in (
        A,
        B,
        {"Authorization": "Bearer key-of-a-222"},
        {"Authorization": "bearer key-of-a-111"},
        {"x-api-key": "key-of-a-111"},
        {"x-api-key": "key-of-b-333", "Authorization": "Basic something"},
    ):
        assert (await w.ask("hello", headers=headers)).status == 200, headers


async def test_what_needs_no_key(w: World) -> None:
    for path in ("/healthz", "/readyz", "/metrics"):
        assert (await w.get(path)).status == 200


async def test_admin_is_for_the_admins_key_alone(w: World) -> None:
    paths = ("/admin/examples", "/admin/exchanges/x", "/admin/examples/x", "/admin/nothing", "/admin")
    for path in paths:
        for headers in ({}, A, B, {"Authorization": "Bearer "}, {"Authorization": "Basic admin-key-555"}):
            assert (await w.get(path, headers)).status == 401, (path, headers)
        assert (await w.get(path, ROOT)).status in (200, 404), path
    async with w.http.delete(w.url + "/admin/examples/x", headers=A) as r:
        assert r.status == 401


async def test_clients_keys_go_nowhere_and_the_backends_own_goes_upstream(w: World) -> None:
    await w.ask("hello", "small", A)
    await w.ask("hello", "large", A)
    await w.ask("hello", "large", {"x-api-key": "key-of-a-111", "api-key": "key-of-a-111", "Cookie": "k=key-of-a-111"})
    await w.post("/v1/embeddings", {"model": "large", "input": "x"}, A)
    message = {"model": "large", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    await w.post("/v1/messages", message, {"x-api-key": "key-of-a-111"})
    for received in (*w.small.requests, *w.large.requests):
        assert "key-of-a" not in str(dict(received.headers)) + received.path
    assert "Authorization" not in w.small.requests[0].headers
    assert all(r.headers["Authorization"] == "Bearer upstream-key-444" for r in w.large.requests)


async def test_above_the_rate_it_is_429_with_the_wait(tmp_path: Path) -> None:
    tenants = [TENANTS[0] | {"requests_per_minute": 3}, TENANTS[1]]
    async with world(tmp_path, KEYS, tenants=tenants) as w:
        w.proxy.gate.clock = lambda: 0.0
        answers = [await w.ask("hello", headers=A if i % 2 else {"x-api-key": "key-of-a-222"}) for i in range(5)]
        assert [a.status for a in answers] == [200, 200, 200, 429, 429]
        refused = answers[-1]
        assert refused.json["error"]["type"] == "rate_limit_error"
        assert refused.json["error"]["code"] == "rate_limit_exceeded"
        assert int(refused.headers["Retry-After"]) == 20  # a third of a minute
        assert (await w.post("/v1/embeddings", {"model": "large", "input": "x"}, A)).status == 429
        message = {"model": "large", "messages": [], "max_tokens": 1}
        assert (await w.post("/v1/messages", message, A)).json["error"]["type"] == "rate_limit_error"
        assert (await w.ask("hello", headers=B)).status == 200
        w.proxy.gate.clock = lambda: 20.0
        assert [(await w.ask("hello", headers=A)).status for _ in range(2)] == [200, 429]


async def test_what_a_day_may_cost_whether_recorded_or_not(tmp_path: Path) -> None:
    tenants = [TENANTS[0] | {"usd_per_day": 0.005}, TENANTS[1]]
    dear = {"usd_per_million_input_tokens": 1000.0, "usd_per_million_output_tokens": 1000.0}
    for kept in ("no", "yes"):  # in this order: the second finds nothing that the first has left
        async with world(tmp_path, KEYS, tenants=tenants, large=dear) as w:
            headers = A | {"x-iccache-store": kept}
            answers = []
            for _ in range(5):  # 0.002 USD each
                answers.append((await w.ask("hello", "large", headers)).status)
                await w.proxy.learner.background.drain(5)
                w.proxy.learner.upkeep.looked_after = 0.0  # what the store knows of the spending is read again
                w.proxy.learner.follower.kicked.set()
                await w.proxy.learner.catch_up()
                await w.proxy.learner.spending.reload()
            assert answers == [200, 200, 200, 429, 429]
            refused = await w.ask("hello", "small", A)
            assert refused.json["error"]["code"] == "insufficient_quota"
            assert 0 < int(refused.headers["Retry-After"]) <= 86400
            assert (await w.ask("hello", "large", B)).status == 200
    async with world(tmp_path, KEYS, tenants=tenants, large=dear) as w:
        assert (await w.ask("hello", "small", A)).status == 429  # after a restart too


def everything(tmp_path: Path) -> bytes:
    return b"".join(f.read_bytes() for f in sorted(tmp_path.rglob("*")) if f.is_file())


async def sent(url: str, request: bytes) -> None:
    """A request that no client of ours would send, until it is answered or hung up on."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    writer.write(request)
    async with asyncio.timeout(10):
        await reader.read(65536)
    writer.close()


async def test_no_key_is_in_any_file_log_metric_or_answer(tmp_path: Path) -> None:
    """A canary in every place and on every path of error, through the real process."""
    environ = KEYS | ADMIN
    secrets = [value.encode() for value in environ.values()]
    seen: list[bytes] = []
    async with served(
        tmp_path, environ, tenants=TENANTS, large={"key_env": "UP_KEY", "first_token_timeout_s": 0.3}
    ) as s:

        async def ask(path: str, headers: dict[str, str], body: Any = None, **query: str) -> None:
            method = "GET" if body is None else "POST"
            async with s.http.request(method, s.url + path, json=body, headers=headers, params=query) as r:
                seen.extend([await r.read(), str(r.headers).encode()])

        chat = {"model": "large", "messages": [{"role": "user", "content": "hello"}]}
        for headers in (A, B, ROOT, {"x-api-key": "key-of-a-222"}, {"api-key": "key-of-a-111"}):
            await ask(CHAT, headers, chat)
            await ask(CHAT, headers, {"model": "gpt-9", "messages": []})
            await ask(CHAT, headers, [])
            await ask("/v1/feedback", headers, {"request_id": "x", "score": 1})
            await ask("/v1/models/none", headers)
            await ask("/admin/examples", headers)
            await ask("/nothing", headers)
            await ask("/v1/files", headers)
        for script in (
            Script(status=401),
            Script(status=500),
            Script(fault="reset_before_head"),
            Script(fault="hang"),
            Script(body=b"{", status=200),
        ):
            s.large.script = script
            await ask(CHAT, A, chat)
            await ask(CHAT, A, chat | {"stream": True})
        await s.large.stop()
        await ask(CHAT, A, chat)
        await ask("/metrics", {})
        for line in (b"Authorization: Bearer key-of-a-111\x01", b"x-api-key\x00: key-of-a-222", b" key-of-b-333: x"):
            await sent(s.url, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + line + b"\r\n\r\n")
        await s.stop()
        seen.append(s.log)
        assert b"Traceback" not in s.log
        for received in s.small.requests:
            seen.extend([str(received.headers).encode(), received.body, received.path.encode()])
        for received in s.large.requests:
            own = {k: v for k, v in received.headers.items() if k != "Authorization"}
            seen.extend([str(own).encode(), received.body, received.path.encode()])
    assert s.log.count(b"\n") >= 1
    stored = everything(tmp_path)
    assert b"SQLite format" in stored
    for secret in secrets:
        assert secret not in b"\n".join(seen), secret
        assert secret not in stored, secret


async def test_without_tenants_only_loopback_is_served(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        async with served(tmp_path, start=False) as s:
            code, _, err = await s.run("serve", environ={"ICCACHE_SERVER__HOST": host})
        assert code == 2
        assert "tenants" in err and len(err.strip().splitlines()) == 1


async def test_with_tenants_any_host_may_be_listened_on(tmp_path: Path) -> None:
    async with served(tmp_path, KEYS | {"ICCACHE_SERVER__HOST": "0.0.0.0"}, tenants=TENANTS) as s:
        s.url = s.url.replace("0.0.0.0", "127.0.0.1")
        assert (await s.ask("hello", headers=A)).status == 200
        assert (await s.ask("hello")).status == 401


async def test_admin_without_a_key_is_open_to_loopback_alone(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    w.proxy.admin_key = None
    assert (await w.get("/admin/examples")).status == 200
    forged = {"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1", "X-Real-IP": "127.0.0.1"}
    monkeypatch.setattr(aiohttp.web.BaseRequest, "remote", "192.0.2.1")
    for path in ("/admin/examples", "/admin/nothing"):
        assert (await w.get(path, forged)).status == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "rebound.example"},
        {"Host": "rebound.example:8080"},
        {"Host": "192.0.2.1"},
        {"Host": "127.0.0.1.example"},
        {"X-Forwarded-For": "192.0.2.1"},
        {"Forwarded": "for=192.0.2.1"},
        {"X-Real-IP": "192.0.2.1"},
        {"Via": "1.1 gateway"},
    ],
)
async def test_admin_without_a_key_is_closed_to_what_only_seems_to_be_here(
    tmp_path: Path, headers: dict[str, str]
) -> None:
    """A page whose name was made to point here, and another machine through a proxy that runs here."""
    async with world(tmp_path) as w:
        assert (await w.get("/admin/examples", headers)).status == 403
        for here in ("localhost", "LOCALHOST:8080", "127.0.0.1:9", "[::1]:8080", "[::1]"):
            assert (await w.get("/admin/examples", {"Host": here})).status == 200, here


async def test_admin_with_a_key_does_not_mind_a_proxy(w: World) -> None:
    assert (await w.get("/admin/examples", ROOT | {"Host": "gateway.example", "Via": "1.1 x"})).status == 200


@pytest.mark.parametrize("path", [CHAT, "/v1/feedback", "/v1/embeddings", "/v1/messages"])
async def test_pages_from_elsewhere_are_not_served_where_nobody_needs_a_key(tmp_path: Path, path: str) -> None:
    chat = {"model": "large", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    async with world(tmp_path) as w:
        for origin in ("https://elsewhere.example", "http://127.0.0.1.example:8080", "null"):
            for site in ({}, {"Sec-Fetch-Site": "cross-site"}):
                answered = await w.post(path, chat, {"Origin": origin} | site)
                assert answered.status == 403, origin
        assert not w.large.requests
        for origin in ("http://localhost:3000", "http://127.0.0.1", "http://[::1]:5173", "app://desktop"):
            assert (await w.post(path, chat, {"Origin": origin})).status != 403, origin
        own = {"Origin": "https://chat.example", "Sec-Fetch-Site": "same-origin"}
        assert (await w.post(path, chat, own)).status != 403


async def test_with_a_key_it_is_the_key_that_counts(w: World) -> None:
    assert (await w.ask("hello", "large", A | {"Origin": "https://elsewhere.example"})).status == 200


async def test_numbers_beyond_all_bounds_are_no_fault(w: World) -> None:
    for query in (f"limit={10**30}", f"offset={10**30}"):
        assert (await w.get(f"/admin/examples?{query}", ROOT)).status == 200
