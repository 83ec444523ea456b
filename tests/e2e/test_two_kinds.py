"""The router's promise through the whole proxy, under the default configuration: 700 requests, a score for each.

`python -m tests.bench.two_kinds` has hundreds of runs of the same without HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from iccache import config
from tests.bench import everyday
from tests.bench.routing import LAST, PATIENCE, REQUESTS
from tests.bench.two_kinds import SCORES
from tests.e2e.world import World, world

MASTERED, OTHER = "cooking", "code"


@dataclass
class Users:
    """They ask, and say what they think of the answers, `delay` requests later."""

    w: World
    score: str
    block: int
    delay: int
    systems: bool
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(5))
    waiting: list[tuple[str, float]] = field(default_factory=list)
    kind: str = MASTERED

    async def ask(self, n: int, broken: bool = False) -> list[tuple[str, str]]:
        """The kinds of `n` requests with who answered each. `broken`: the student masters nothing."""
        scores, served = SCORES[self.score], []
        for i in range(n):
            if i % self.block == 0:
                self.kind = MASTERED if self.rng.random() < 0.5 else OTHER
            texts = everyday.texts(self.kind)
            messages = [{"role": "user", "content": texts[self.rng.integers(len(texts))]}]
            if self.systems:
                messages.insert(0, {"role": "system", "content": f"You help with {self.kind}."})
            answered = await self.w.ask("", messages=messages)
            name = answered.header("backend") or ""
            able = self.kind == MASTERED and not broken
            quality = 1.0 if name == "large" else scores["good"] if able else scores["bad"]
            self.waiting.append((answered.id, scores["score"](self.rng, quality)))
            if len(self.waiting) > self.delay:
                request_id, score = self.waiting.pop(0)
                assert (await self.w.feedback(request_id, score=score)).status == 204
            served.append((self.kind, name))
        return served


def share(served: list[tuple[str, str]], kind: str | None = None) -> float:
    """Of the last `LAST` requests of the kind, or of all: what went to the student."""
    names = [name for of, name in served if kind in (None, of)][-LAST:]
    return names.count("small") / len(names)


@pytest.mark.parametrize(
    ("score", "block", "delay", "systems"),
    [("perfect", 1, 0, True), ("0/1 of .90 and .20", 10, 20, False)],
    ids=["perfect-scores", "noisy-late-in-blocks-and-without-system-prompts"],
)
async def test_of_two_kinds_the_one_that_the_student_masters_goes_to_it(
    tmp_path: Path, score: str, block: int, delay: int, systems: bool
) -> None:
    async with world(tmp_path, embedder={"backend": "static"}) as w:
        in_force = w.proxy.settings
        assert (in_force.routing, in_force.selection) == (config.Routing(), config.Selection()), "the defaults"
        users = Users(w, score, block, delay, systems)
        served = await users.ask(REQUESTS)
        assert share(served, MASTERED) >= 0.8
        assert share(served, OTHER) <= 0.15
        assert any(len(r.json["messages"]) > 2 for r in w.small.requests), "the student was shown examples"
        if not delay:
            assert share(await users.ask(PATIENCE + LAST, broken=True)) <= 0.15, "80 requests after it broke"
