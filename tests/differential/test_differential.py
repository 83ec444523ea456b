"""What a client sees through the proxy is what it would see without it, and so is what the upstream sees."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.differential.answers import scripts
from tests.differential.bodies import Body, bodies
from tests.differential.pair import (
    EXACT,
    ROUTED,
    STORE_NOTHING,
    WAYS,
    Pair,
    Way,
    check_answer,
    check_body,
    check_request,
    pair,
)
from tests.differential.wire import Headers, Script

PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
steady = settings(
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def p() -> Iterator[Pair]:
    with pair() as made:
        yield made


QUERY = st.sampled_from(["", "", "", "?api-version=2024-10-21", "?a=b%26c&d=%C3%A9+%20e&f", "?x=1&x=2", "?a=%2B;b=%25"])
HEADERS: st.SearchStrategy[Headers] = st.lists(
    st.sampled_from(
        [
            ("OpenAI-Organization", "org-1"), ("OpenAI-Project", "p"), ("OpenAI-Beta", "assistants=v2"),
            ("X-Stainless-Lang", "python"), ("X-Stainless-Retry-Count", "0"), ("anthropic-version", "2023-06-01"),
            ("anthropic-beta", "a"), ("anthropic-beta", "b"), ("User-Agent", "OpenAI/Python 3.54"), ("Accept", "*/*"),
            ("Authorization", "Bearer sk-secret"), ("x-api-key", "sk-2"), ("Cookie", "a=b"), ("Via", "1.1 x"),
            ("Accept-Encoding", "gzip, br"), ("X-Forwarded-For", "1.2.3.4"), ("X-Unicode", "grüße"),
            ("Idempotency-Key", "k"), ("Content-Encoding", "x-own"), ("traceparent", "00-0af7-b7ad-01"),
            ("Cache-Control", "max-age=0"), ("X-Empty", ""), ("Connection", "x-hop"), ("x-hop", "1"),
            ("TE", "trailers"),
        ]
    ),
    max_size=5,
    unique=True,
)  # fmt: skip
TYPES = st.sampled_from(
    [
        "application/json",
        "application/json",
        "application/json; charset=utf-8",
        "text/plain",
        "application/vnd.x+json",
        "",
    ]
)


def _dialect(path: str) -> st.SearchStrategy[tuple[str, Body, Headers, str, Script, Way]]:
    return st.tuples(
        st.just(path), bodies(path), HEADERS, QUERY, scripts(path), st.sampled_from([*WAYS, ROUTED, ROUTED])
    )


@pytest.mark.parametrize("path", PATHS)
def test_a_dialects_request_is_answered_as_without_the_proxy(p: Pair, path: str) -> None:
    @settings(steady, max_examples=120)
    @given(_dialect(path), TYPES)
    def compare(case: tuple[str, Body, Headers, str, Script, Way], kind: str) -> None:
        p.run(_compare(p, *case, kind))

    compare()


async def _compare(
    p: Pair, path: str, body: Body, headers: Headers, query: str, script: Script, way: Way, kind: str
) -> None:
    typed = [*headers, *([("Content-Type", kind)] if kind else [])]
    p.upstream.script = script
    direct, wanted = await p.direct("POST", path + query, [*typed, *_told_both(way)], body.text("large-model"))
    ours = [*typed, *way.headers, STORE_NOTHING]
    proxied, received = await p.through("POST", path + query, ours, body.text(way.model))

    check_answer(direct, proxied, script)
    for one in received:
        check_request(wanted, one)
        name = "small-model" if b"small-model" in one.body and way.backend != "large" else "large-model"
        check_body(one, body.text(name), exactly=True)
        assert way.backend in (None, name.removesuffix("-model"))
    assert way is not EXACT or received[0].body == body.text("large-model")
    assert proxied.one("x-iccache-examples") == "0"
    await p.settled()


def _told_both(way: Way) -> Headers:
    """Headers that are not ours alone go upstream too."""
    return [(name, value) for name, value in way.headers if not name.startswith("x-iccache-")]


@pytest.mark.parametrize("path", PATHS)
def test_only_our_own_member_is_taken_out(p: Pair, path: str) -> None:
    @settings(steady, max_examples=30)
    @given(bodies(path), st.sampled_from([b'{"examples":0}', b'{"backend":"large"}', b"null", b'{"store":false}']))
    def compare(body: Body, controls: bytes) -> None:
        p.run(_controls(p, path, body, controls))

    compare()


async def _controls(p: Pair, path: str, body: Body, controls: bytes) -> None:
    p.upstream.script = Script(200, [("Content-Type", "application/json")], [b"{}"])
    member = b' , "icc\\u0061che" : ' + controls
    _, received = await p.through("POST", path, [STORE_NOTHING], body.text("large", member))
    check_body(received[0], body.text("large-model"), exactly=False)


# ---- every other path

OTHER = st.one_of(
    st.tuples(
        st.just("POST"), st.sampled_from(["/v1/embeddings", "/v1/completions", "/v1/moderations", "/v1/audio/speech"])
    ),
    st.tuples(
        st.just("GET"), st.sampled_from(["/v1/files", "/v1/files/f%2F1/content", "/v1/batches/b?limit=2", "/v1/x;y=z"])
    ),
    st.tuples(
        st.sampled_from(["DELETE", "PATCH", "PUT", "HEAD", "OPTIONS"]), st.sampled_from(["/v1/files/f1", "/v1/a//b/"])
    ),
    st.tuples(st.just("POST"), st.sampled_from(["/v1/files", "/v1/messages/count_tokens", "/v1/responses/r/cancel"])),
)
MULTIPART = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\n'
    b'Content-Disposition: form-data; name="file"; filename="\xc3\xa4.bin"\r\n\r\n\x00\xff\r\n--b--\r\n'
)
PAYLOADS: st.SearchStrategy[tuple[str, bytes | None]] = st.one_of(
    st.just(("", None)),
    st.just(("multipart/form-data; boundary=b", MULTIPART)),
    st.tuples(
        st.sampled_from(["application/octet-stream", "application/json", "", "audio/wav"]), st.binary(max_size=300)
    ),
    st.tuples(st.just("application/json"), bodies("/v1/chat/completions").map(lambda b: b.text("large-model"))),
    st.tuples(st.just("application/json"), bodies("/v1/chat/completions").map(lambda b: b.text("unheard-of"))),
)


def test_any_other_path_passes_both_ways(p: Pair) -> None:
    @settings(steady, max_examples=200)
    @given(OTHER, QUERY, HEADERS, PAYLOADS, scripts("/v1/other"))
    def compare(
        what: tuple[str, str], query: str, headers: Headers, payload: tuple[str, bytes | None], script: Script
    ) -> None:
        p.run(_pass(p, *what, query, headers, payload, script))

    compare()


async def _pass(
    p: Pair, method: str, path: str, query: str, headers: Headers, payload: tuple[str, bytes | None], script: Script
) -> None:
    kind, body = payload
    target = path + (query if "?" not in path else "")
    sent = [*headers, *([("Content-Type", kind)] if kind else [])]
    p.upstream.script = script
    direct, wanted = await p.direct(method, target, sent, body)
    proxied, received = await p.through(method, target, sent, body)
    check_answer(direct, proxied, script)
    if proxied.status < 300 and not proxied.all("x-accel-buffering"):
        read_whole = [str(len(proxied.body))] if proxied.all("x-iccache-cost-usd") else []  # as its cost is told
        assert proxied.all("content-length") == (direct.all("content-length") or read_whole)
    for one in received:
        check_request(wanted, one)
        check_body(one, wanted.body, exactly=True)
    assert (proxied.one("x-iccache-decision"), proxied.one("x-iccache-reason")) in (
        ("bypass", "endpoint"), ("fallback", "status"), ("fallback", "circuit"),
    )  # fmt: skip
    await p.settled()


@pytest.mark.parametrize("kind", ["application/json", "application/octet-stream"])
@pytest.mark.parametrize("body", [b"", b"{}", b"[" + b"1," * 100_000 + b"1]"])
def test_a_head_tells_how_long_the_body_would_be(p: Pair, kind: str, body: bytes) -> None:
    script = Script(200, [("Content-Type", kind)], [body] if body else [])
    p.run(_pass(p, "HEAD", "/v1/files/f", "", [], ("", None), script))
