"""A cache with bad answers, a teacher who can do better and a judge who can tell: everything a run needs, and a bill.

An answer's quality is the number in it: "q7 ..." is better than "q3 ...". The upstream keeps its own ledger.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from iccache import config
from iccache.types import Example, ExampleStats
from replay import assemble
from replay.assemble import Options
from replay.calls import Pace
from replay.ledger import Money, Result
from replay.prices import nusd
from replay.report import Report
from replay.store import ReplayStore, open_replay_store
from tests.factories import make_example
from tests.fakes import Message, Script, ScriptedUpstream

QUICK = Pace(tries=2, first_pause_s=0.001)
BUDGET_USD = 1.0


class Billed(NamedTuple):
    """One call as the upstream counts it."""

    model: str
    prompt: str
    answer: str
    input: int
    output: int


@dataclass
class World:
    """What the upstream says, and what it was asked."""

    says: Callable[[str], str] = lambda question: f"q9 to {question}"
    judges: Callable[[str, str], str] = lambda first, second: better(first, second)
    billed: list[Billed] = field(default_factory=list)
    on_call: Callable[[int], None] = lambda number: None  # before the answer goes out, with its number from 1
    upstream: ScriptedUpstream = field(default_factory=ScriptedUpstream)

    def __post_init__(self) -> None:
        self.upstream.by_model["teacher"] = Script(answer=lambda messages: self._answer("teacher", messages))
        self.upstream.by_model["judge"] = Script(answer=lambda messages: self._answer("judge", messages))

    def _answer(self, model: str, messages: list[Message]) -> str:
        prompt = messages[-1]["content"]
        said = self.says(prompt) if model == "teacher" else self.judges(*shown(prompt))
        words = sum(len(m["content"].split()) for m in messages)
        self.billed.append(Billed(model, prompt, said, words, len(said.split())))
        self.on_call(len(self.billed))
        return said

    def asked(self, model: str) -> list[Billed]:
        return [call for call in self.billed if call.model == model]

    def billed_nusd(self, settings: config.Config) -> int:
        backends = {b.model: b for b in settings.backends}
        return sum(nusd(backends[call.model], call.input, call.output) for call in self.billed)


def shown(prompt: str) -> tuple[str, str]:
    """The two answers in a judge's prompt."""
    found = re.search(r"--- answer A (\w+)\n(.*)\n--- answer B \1\n(.*)\n--- end \1", prompt, re.DOTALL)
    assert found is not None
    return found[2], found[3]


def better(first: str, second: str) -> str:
    """An honest verdict."""
    a, b = (int(re.findall(r"q(\d+)", answer)[0]) for answer in (first, second))
    return "A" if a > b else "B" if b > a else "tie"


def make_settings(folder: Path, base_url: str, **sections: dict[str, Any]) -> config.Config:
    """A student, a teacher and a judge; a store in `folder`; no proxy."""
    prices = {"usd_per_million_input_tokens": 1.0, "usd_per_million_output_tokens": 4.0}
    quick = {"connect_timeout_s": 2, "first_token_timeout_s": 5, "tokenizer": "cl100k_base"}  # the quickest to load
    backends = [
        {"name": "small", "base_url": base_url, "model": "small"},
        {"name": "judge", "base_url": base_url, "model": "judge", "usd_per_million_output_tokens": 0.5, **quick},
        {"name": "large", "base_url": base_url, "model": "teacher", **prices, **quick},
    ]
    replay = {"usd_budget": BUDGET_USD, "samples": 1, **sections.pop("replay", {})}
    return config.parse(
        {
            "backends": sections.pop("backends", backends),
            "store": {"url": f"sqlite:///{folder / 'cache.db'}", **sections.pop("store", {})},
            "server": {"port": 0, **sections.pop("server", {})},
            "judge": {"backend": "judge"},
            "replay": replay,
            **sections,
        }
    )


def fill(settings: config.Config, examples: Sequence[Example]) -> None:
    store = open_replay_store(settings)
    for example in examples:
        store.admit(example)
    store.close()


def bad(number: int, **given: Any) -> Example:
    """An example that did harm: the lower its number, the more."""
    fields: dict[str, Any] = {"answer": f"q3 of {number}", "stats": ExampleStats(uses=5, gain=1.0 / (2 + number))}
    return make_example(f"e{number:03}", **{**fields, **given})


class Silent:
    """Progress that nobody watches."""

    def __init__(self) -> None:
        self.results: list[Result | None] = []

    def begin(self, total: int) -> None:
        pass

    def step(self, result: Result | None, money: Money) -> None:
        self.results.append(result)


async def replayed(settings: config.Config, **options: Any) -> Report:
    """One run in this process."""
    return await assemble.run(settings, Options(**{"pace": QUICK, **options}), Silent(), environ={})


def run_once(world: World, settings_of: Callable[[str], config.Config], **options: Any) -> Report:
    """Start the upstream, run once, stop it; for tests that are not coroutines."""

    async def go() -> Report:
        async with world.upstream:
            return await replayed(settings_of(world.upstream.base_url), **options)

    return asyncio.run(go())


def examples_of(settings: config.Config) -> dict[str, Example]:
    store = open_replay_store(settings)
    found = {e.id: e for e in store.list_examples(limit=10_000)}
    store.close()
    return found


def opened(settings: config.Config) -> ReplayStore:
    return open_replay_store(settings)
