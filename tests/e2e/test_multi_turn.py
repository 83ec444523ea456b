"""Conversations: what is looked for, what is stored, where examples go, and what a warm prompt cache is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.world import World, world
from tests.fakes import Script

U, A, S = "user", "assistant", "system"
LISTS = {"/v1/chat/completions": "messages", "/v1/responses": "input", "/v1/messages": "messages"}
FRENCH = [(U, "How do I say 'thank you' in French?"), (A, "Merci.")]
ITALIAN = [*FRENCH, (U, "and in Italian?")]
WRITTEN = "Earlier I asked: How do I say 'thank you' in French?\nYou answered: Merci.\n\nNow: and in Italian?"


def said(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


async def talk(w: World, turns: list[tuple[str, str]], model: str = "small", path: str = "/v1/chat/completions") -> Any:
    more = {"max_tokens": 20} if path.endswith("messages") else {}
    return await w.post(path, {"model": model, LISTS[path]: said(turns), **more})


async def test_a_follow_up_is_stored_so_that_it_can_be_understood_and_shown_as_one_turn(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.teach("", "Grazie.", messages=said(ITALIAN))
        [row] = (await w.get("/admin/examples")).json["examples"]
        assert (row["request"], row["answer"]) == (WRITTEN, "Grazie.")
        again = [(U, "How do I say 'good night' in French?"), (A, "Bonne nuit."), (U, "and in Italian?")]
        answered = await talk(w, again)
        assert answered.header("examples") == "1"
        assert w.small.requests[0].json["messages"] == said([(U, WRITTEN), (A, "Grazie."), *again])


@pytest.mark.parametrize("path", LISTS)
async def test_what_is_looked_for_is_what_is_meant(tmp_path: Path, path: str) -> None:
    """The nearest example of "and in Italian?" depends on what was spoken of; a new topic leaves the old one."""
    taught = {
        "How do I say 'thank you' in Italian?": "Grazie.",
        "What is the tallest mountain of Austria and how tall is it in metres?": "Grossglockner, 3798.",
    }
    topic = "What is the tallest mountain of Switzerland and how tall is it in metres?"
    async with world(tmp_path, selection={"max_examples": 1}) as w:
        for question, answer in taught.items():
            await w.teach(question, answer)
        for turns, nearest in (
            (ITALIAN, "How do I say 'thank you' in Italian?"),
            (
                [*ITALIAN, (A, "Grazie."), (U, topic)],
                "What is the tallest mountain of Austria and how tall is it in metres?",
            ),
            (
                [*ITALIAN, (A, "Grazie."), (U, topic), (A, "4634."), (U, "and in feet?")],
                "What is the tallest mountain of Austria and how tall is it in metres?",
            ),
        ):
            answered = await talk(w, turns, path=path)
            assert answered.header("examples") == "1"
            assert w.small.requests[-1].json[LISTS[path]][0]["content"] == nearest


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize("placement", ["start", "end"])
async def test_where_examples_go(tmp_path: Path, path: str, placement: str) -> None:
    async with world(tmp_path, selection={"placement": placement}) as w:
        await w.teach("How do I say 'please' in Italian?", "Per favore.")
        await talk(w, ITALIAN, path=path)
        await talk(w, FRENCH[:1], path=path)
        first, second = ([m["content"] for m in r.json[LISTS[path]]] for r in w.small.requests)
        shown = ["How do I say 'please' in Italian?", "Per favore."]
        given = [text for _, text in ITALIAN]
        at = 0 if placement == "start" else 2
        assert first == [*given[:at], *shown, *given[at:]]
        assert second == [*shown, given[0]]


async def test_the_prompt_cache_that_a_conversation_has_warmed_is_priced(tmp_path: Path) -> None:
    """The same request costs less where the turn before was answered, and the router is told so."""
    prices = {"usd_per_million_cached_input_tokens": 0.01}
    async with world(tmp_path, small=prices, large=prices, routing={"policy": "student"}) as w:
        seen: list[dict[str, float]] = []
        route = w.proxy.router.route

        def spy(signals: Any, arms: Any, *others: Any) -> Any:
            seen.append({arm.name: arm.price for arm in arms})
            return route(signals, arms, *others)

        w.proxy.router.route = spy  # type: ignore[method-assign]
        opening = [(U, "Tell me about the history of France. " * 20)]
        w.small.script = Script(answer="It is long.")
        for answer in (None, "It is long.", "It is wide."):
            turns = [] if answer is None else [(A, answer), (U, "and what about Spain?")]
            await talk(w, [*opening, *turns], "auto")
        _, warm, cold = seen
        assert warm["small"] < 0.95 * cold["small"]
        assert warm["large"] == pytest.approx(cold["large"], rel=0.02)
        assert w.proxy.directory.with_fallbacks(w.proxy.directory.names["small"], w.proxy.directory.by_price) == (
            "small", "large",
        )  # fmt: skip


async def test_what_came_from_the_prompt_cache_costs_what_it_costs_there(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 10, "prompt_tokens_details": {"cached_tokens": 600}}
    choice = {"index": 0, "message": {"role": A, "content": "x"}, "finish_reason": "stop"}
    body = json.dumps({"id": "c", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()
    for prices, usd in (({}, 1000 + 40), ({"usd_per_million_cached_input_tokens": 0.1}, 400 + 60 + 40)):
        folder = tmp_path / str(usd)
        folder.mkdir()
        async with world(folder, large=prices) as w:
            w.large.script = Script(body=body)
            assert float((await w.ask("hello", "large")).header("cost-usd") or 0) == pytest.approx(usd / 1e6)
