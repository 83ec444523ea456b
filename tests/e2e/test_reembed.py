"""Another embedding model: service goes on, and what the old one embedded becomes findable again."""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.world import world

EXAMPLES = 40


async def _shown(w: Any, i: int) -> str | None:
    answered = await w.ask(f"What is the price of article number {i} today?", "small")
    assert answered.status == 200
    shown: str | None = answered.header("examples")
    return shown


@pytest.mark.parametrize("models", [("hash", "static", "hash"), ("static", "onnx-int8")])
async def test_a_change_of_model_reembeds_under_live_requests(tmp_path: Path, models: tuple[str, ...]) -> None:
    async with world(tmp_path, embedder={"backend": models[0]}) as w:
        for i in range(EXAMPLES):
            await w.teach(f"What is the price of article number {i}?", f"{i} euros")
    for model in models[1:]:
        async with world(tmp_path, embedder={"backend": model}) as w:
            identity = w.proxy.select.retriever.embedder.identity

            async def stale(identity: str = identity, w: Any = w) -> int:
                rows = await w.proxy.read(lambda store: list(store.embeddings()))
                assert len(rows) == EXAMPLES
                return sum(row[2] != identity for row in rows)

            async def pending(w: Any = w) -> float:
                lines = (await w.get("/metrics")).body.decode().splitlines()
                return float(next(line.split()[1] for line in lines if line.startswith("iccache_reembed_pending ")))

            for i in range(3):
                await _shown(w, i)  # answered whatever is found by now
            await w.until(stale, lambda left: left == 0, seconds=60)
            await w.until(pending, lambda left: left == 0.0, seconds=10)
            await w.proxy.learner.catch_up()
            assert [await _shown(w, i) for i in (0, 7, EXAMPLES - 1)] == ["3"] * 3
