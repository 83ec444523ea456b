"""Nothing of one tenant's ever reaches another: SPEC, 8."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e.world import World, world

KEYS = {"KEY_A": "a", "KEY_B": "b", "KEY_C": "c", "KEY_C_2": "c2", "ICCACHE_ADMIN_KEY": "root"}
TENANTS = [
    {"name": "a", "key_env": "KEY_A"},
    {"name": "b", "key_env": "KEY_B"},
    {"name": "c", "key_env": ["KEY_C", "KEY_C_2"]},
]
TEXTS = [f"{verb} the {noun}" for verb in ("sort", "count", "name", "draw") for noun in ("lists", "animals", "cities")]
ROOT = {"Authorization": "Bearer root"}


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


@pytest.fixture
async def w(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path, KEYS, tenants=TENANTS, routing={"policy": "uniform"}) as made:
        made.large.script.answer = lambda messages: f"answer to {messages[-1]['content']}"
        yield made


async def test_the_same_texts_from_several_tenants_never_meet(w: World) -> None:
    """Whatever is shown, judged or explained is the asker's own; the texts alone cannot tell them apart."""
    rng = random.Random(4)
    of: dict[str, str] = {}  # request id -> tenant
    shown = 0
    for _ in range(150):
        tenant = rng.choice("abc")
        text = rng.choice(TEXTS) + (f" of {tenant}" if rng.random() < 0.3 else "")
        claim = {"x-tenant": rng.choice("abc"), "x-iccache-session": rng.choice(["s", "t"])}
        body = {"user": rng.choice("abc"), "metadata": {"tenant": rng.choice("abc")}}
        answered = await w.ask(text, rng.choice(["auto", "small", "large"]), key(tenant) | claim, **body)
        of[answered.id] = tenant
        ids = [i for i in (answered.header("example-ids") or "").split(",") if i]
        shown += len(ids)
        for example in await w.proxy.read(lambda store, ids=ids: store.examples(ids)):  # type: ignore[misc]
            assert example.tenant == tenant
            assert of[example.request_id] == tenant
        if rng.random() < 0.4:
            judged = rng.choice(list(of))
            verdict = {"request_id": judged, "score": rng.random()}
            status = (await w.post("/v1/feedback", verdict, key(tenant))).status
            assert status == (204 if of[judged] == tenant else 404)
        await w.proxy.learner.background.drain(5)
        await w.proxy.learner.catch_up()
    assert shown > 60  # there was something to mix up
    for request_id, tenant in of.items():
        record = (await w.get(f"/admin/exchanges/{request_id}", ROOT)).json
        assert record["tenant"] == tenant
        considered = [c["id"] for c in record["considered"]]
        examples = await w.proxy.read(lambda store, ids=considered: store.examples(ids))  # type: ignore[misc]
        assert {e.tenant for e in examples} <= {tenant}
        assert all(f["source"] == "user" for f in record["feedback"])


async def test_identical_texts_are_one_example_in_each_tenant(w: World) -> None:
    for tenant in "ab":
        await w.teach("What is it?", f"It is {tenant}'s", key(tenant))
    for tenant in "ab":
        await w.ask("What is it?", "small", key(tenant))
        assert w.small.requests[-1].json["messages"][1]["content"] == f"It is {tenant}'s"
    await w.ask("What is it?", "small", key("c"))
    assert len(w.small.requests[-1].json["messages"]) == 1


async def test_the_keys_of_one_tenant_share(w: World) -> None:
    await w.teach("What is it?", "It is c's", key("c"))
    answered = await w.ask("What is it now?", "small", key("c2"))
    assert answered.header("examples") == "1"
    assert (await w.post("/v1/feedback", {"request_id": answered.id, "score": 1}, key("c"))).status == 204


async def test_no_verdict_on_anothers_answer(w: World) -> None:
    mine = await w.ask("What is it?", "large", key("a"))
    theirs = await w.ask("What is it?", "large", key("b"))
    for verdict in (
        {"request_id": theirs.id, "score": 1},
        {"request_id": theirs.id, "rating": "down"},
        {"request_id": theirs.id, "demonstration": "no"},
        {"request_id": mine.id, "preferred_over": theirs.id},
        {"request_id": theirs.id, "preferred_over": mine.id},
    ):
        answered = await w.post("/v1/feedback", verdict, key("a"))
        named = {name: "req_none" if value == theirs.id else value for name, value in verdict.items()}
        unknown = await w.post("/v1/feedback", named, key("a"))
        assert answered.status == 404
        assert answered.body == unknown.body  # it does not even tell that there is such a request
    for request_id in (mine.id, theirs.id):
        await w.recorded(request_id)
        assert (await w.get(f"/admin/exchanges/{request_id}", ROOT)).json["feedback"] == []
    assert all(e["answer"] == "answer to What is it?" for e in (await w.get("/admin/examples", ROOT)).json["examples"])


async def test_sessions_of_two_tenants_are_two(w: World) -> None:
    session = {"x-iccache-session": "s"}
    await w.ask("hello", "small", key("a") | session)
    await w.ask("hello", "large", key("b") | session)
    for _ in range(8):
        assert (await w.ask("hello", headers=key("a") | session)).header("backend") == "small"
        assert (await w.ask("hello", headers=key("b") | session)).header("backend") == "large"
    assert len({(await w.ask("hello", headers=key("c") | {"x-iccache-session": str(i)})).header("backend")
                for i in range(20)}) == 2  # fmt: skip


async def test_no_label_names_a_tenant_or_a_text(w: World) -> None:
    await w.teach("an-unlikely-word", "another-unlikely-word", key("a"))
    text = (await w.get("/metrics")).body
    assert b"unlikely" not in text and b"req_" not in text
    assert b'iccache_examples{tenant_class="keyed"} 1.0' in text
