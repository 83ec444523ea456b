"""The cache fails softly: whatever goes wrong in deciding, the request goes plain to the teacher: SPEC, 2."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from iccache import pipeline
from iccache.errors import SelectionError, StoreError
from tests.e2e.world import Answered, World, world

QUESTION = "What is the capital of Spain?"


@pytest.fixture
async def w(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path, routing={"policy": "student", "decision_timeout_ms": 500}) as made:
        await made.teach("What is the capital of France?", "Paris")
        made.large.requests.clear()
        yield made


def raising(exc: BaseException) -> Callable[..., Any]:
    def broken(*_: object, **__: object) -> None:
        raise exc

    return broken


async def bypassed(w: World, answered: Answered, reason: str, count: int = 1) -> None:
    assert (answered.status, answered.text) == (200, QUESTION)
    assert (answered.header("decision"), answered.header("reason")) == ("bypass", reason)
    assert (answered.header("backend"), answered.header("examples")) == ("large", "0")
    assert w.large.requests[-1].json["messages"] == [{"role": "user", "content": QUESTION}]
    assert f'iccache_bypass_total{{reason="{reason}"}} {count}.0'.encode() in (await w.get("/metrics")).body
    assert (await w.recorded(answered.id)).reason == reason


FAULTS: dict[str, tuple[str, BaseException]] = {
    "embedder": ("select.retriever.embedder.embed", RuntimeError("no memory")),
    "embedder, ours": ("select.retriever.embedder.embed", SelectionError("no model")),
    "retriever": ("select.retriever._search", IndexError("faiss")),
    "store": ("select.retriever.store.examples", StoreError("disk I/O error")),
    "ranking": ("select.selector.select", ValueError("NaN")),
    "utility": ("utility.predict", FloatingPointError("overflow")),
    "router": ("router.route", ValueError("not a distribution")),
    "thread": ("select.retriever.read", SystemExit(3)),
    "no memory": ("select.retriever.read", MemoryError()),
}


@pytest.mark.parametrize("what", FAULTS)
async def test_whatever_fails_the_teacher_answers(w: World, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    place, exc = FAULTS[what]
    owner: Any = w.proxy
    *way, name = place.split(".")
    for step in way:
        owner = getattr(owner, step)
    w.proxy.select.changed()  # what is known already needs nothing that could fail
    w.proxy.select.retriever.at_hand.clear()
    with monkeypatch.context() as m:
        m.setattr(owner, name, raising(exc))
        await bypassed(w, await w.ask(QUESTION), "decision_failed")
    answered = await w.ask(QUESTION)  # and when it has passed, all is as before
    assert answered.header("decision") == "routed"
    assert int(answered.header("examples") or 0) >= 1


async def test_features_that_cannot_be_computed(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "features", raising(ValueError("another dimension")))
    monkeypatch.setattr(w.proxy.router, "route", raising(ValueError("another dimension")))
    await bypassed(w, await w.ask(QUESTION), "decision_failed")


async def test_a_pinned_student_stays_pinned_without_examples(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w.proxy.select.retriever, "_search", raising(IndexError("faiss")))
    answered = await w.ask(QUESTION, "small")
    assert (answered.status, answered.header("backend"), answered.header("examples")) == (200, "small", "0")
    assert answered.header("reason") == "decision_failed"


@contextmanager
def stuck(w: World) -> Iterator[None]:
    """The thread that embeds, recalls and ranks does nothing until this ends."""
    end = threading.Event()
    asyncio.get_running_loop().create_task(w.proxy.select.thread.run(end.wait))
    try:
        yield
    finally:
        end.set()


async def test_what_takes_too_long_is_not_waited_for(w: World) -> None:
    with stuck(w):
        async with asyncio.timeout(5):
            answers = [await w.ask(QUESTION), *await asyncio.gather(*(w.ask(QUESTION) for _ in range(5)))]
            for answered in answers:
                assert (answered.status, answered.header("backend")) == (200, "large")
                assert answered.header("reason") == "decision_timeout"
            for path in ("/v1/embeddings", "/v1/completions"):
                asked = {"model": "another", "input": "x", "prompt": "x"}
                passed = await w.post(path, asked, {"x-iccache-session": "new"})
                assert passed.status == 200
            session = await w.ask(QUESTION, headers={"x-iccache-session": "another new one"})
            assert (session.status, session.header("reason")) == (200, "decision_timeout")
            assert (await w.get("/healthz")).status == 200
    await bypassed(w, answers[0], "decision_timeout", count=7)
    await w.until(lambda: w.ask(QUESTION), lambda a: a.header("decision") == "routed")


async def test_a_slow_selector_and_a_stream(tmp_path: Path) -> None:
    async with world(tmp_path, routing={"policy": "student", "decision_timeout_ms": 50}) as w:
        selected = w.proxy.select.run

        def slow(jobs: Any) -> Any:
            threading.Event().wait(1.5)
            return selected(jobs)

        w.proxy.select.thread.fn = slow
        w.proxy.select.retriever.embedder.quick = False
        answered = await w.ask(QUESTION, stream=True)
        assert (answered.status, answered.header("backend")) == (200, "large")
        assert (answered.header("decision"), answered.header("reason")) == ("bypass", "decision_timeout")
        assert answered.body.endswith(b"data: [DONE]\n\n")
        assert float(answered.header("overhead-ms") or 0) < 1500


async def test_while_it_is_stuck_metrics_and_readiness_still_answer(w: World) -> None:
    with stuck(w):
        async with asyncio.timeout(5):
            assert (await w.get("/metrics")).status == 200
            assert (await w.get("/readyz")).status in (200, 503)


BYPASSES: list[tuple[str, dict[str, Any]]] = [
    ("n", {"n": 2}),
    ("empty", {"messages": [{"role": "user", "content": " "}]}),
    ("prefill", {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}),
    ("tool_loop", {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]}),
    (
        "multimodal",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}]},
    ),
    ("too_long", {"messages": [{"role": "user", "content": "word " * 10_000}]}),
]


@pytest.mark.parametrize(("reason", "body"), BYPASSES, ids=[name for name, _ in BYPASSES])
async def test_what_cannot_be_augmented_goes_to_the_pinned_the_sessions_or_the_teacher(
    w: World, reason: str, body: dict[str, Any]
) -> None:
    answered = await w.ask(QUESTION, **body)
    assert (answered.header("backend"), answered.header("decision"), answered.header("reason")) == (
        "large", "bypass", reason,
    )  # fmt: skip
    pinned = await w.ask(QUESTION, "small", **body)
    assert (pinned.header("backend"), pinned.header("reason")) == ("small", reason)
    session = {"x-iccache-session": "s"}
    await w.ask(QUESTION, "small", session)
    assert (await w.ask(QUESTION, headers=session, **body)).header("backend") == "small"
    sent = [r.json for r in (*w.small.requests, *w.large.requests)]
    assert all(len(each["messages"]) == len(body.get("messages", [0])) for each in sent if each != sent[1])


async def test_what_many_requests_want_of_the_store_is_read_together(w: World) -> None:
    select = w.proxy.select
    questions = [f"Where is the {thing}?" for thing in ("key", "lamp", "map", "pen", "saw", "tin", "urn", "vase")]
    for question in questions:
        await w.teach(question, "there")
    read, readings = select.retriever.read, []

    def noted(ids: Any) -> Any:
        readings.append(len(ids))
        return read(ids)

    select.retriever.read = noted
    ids = [row[0] for row in await w.proxy.read(lambda store: list(store.embeddings()))]
    found = await asyncio.gather(*(select._read([id]) for id in ids))
    assert all(id in each for id, each in zip(ids, found, strict=True))
    assert sum(readings) == len(ids) == len(questions) + 1
    assert len(readings) <= 2  # one under way, and all the others together
    assert list(await select._read(ids[:1])) == ids[:1]  # and again, later


async def test_what_is_deleted_while_a_request_waits_for_the_store_is_not_shown(w: World) -> None:
    select, question = w.proxy.select, "How do I delete what is read meanwhile?"
    await w.teach(question, "like this")
    await w.ask(question)
    select.changed()  # nothing is known any more
    select.retriever.at_hand.clear()
    read = select.retriever.read

    def meanwhile(ids: Any) -> Any:
        found = read(ids)
        select.changed()  # as the follower says once a deletion has been applied
        select.retriever.read = read
        gone.update(found)
        return {}

    gone: dict[str, Any] = {}
    select.retriever.read = meanwhile
    answered = await w.ask(question)
    assert gone and answered.header("decision") == "routed"  # by the long way, which looks again


async def test_short_requests_wait_for_a_thread_that_is_at_work_and_do_not_join_it(w: World) -> None:
    """Many of them ranked in a row in another thread would hold the interpreter, and keep it at work for the next."""
    select = w.proxy.select
    await w.teach("How do I wait for a thread?", "like this")
    batches: list[int] = []
    run = select.thread.fn
    select.thread.fn = lambda jobs: (batches.append(len(jobs)), run(jobs))[1]
    done = threading.Event()
    at_work = asyncio.create_task(select.thread.run(lambda: done.wait(10)))
    await w.until(lambda: asyncio.sleep(0, select.thread.busy.locked()), bool)
    asked = asyncio.gather(*(w.ask(f"How do I wait for thread {i}?") for i in range(10)))
    await asyncio.sleep(0.02)
    done.set()
    assert {answer.status for answer in await asked} == {200}
    await at_work
    assert not batches
