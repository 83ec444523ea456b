"""The pace at which examples are embedded anew: as much of the time as requests leave, whatever a text takes."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from iccache.learn.access import Access
from iccache.learn.reembed import BATCH_S, BUSY_FOR_S, MOST_AT_ONCE, SHARE_BUSY, SHARE_IDLE, Reembedding
from iccache.metrics import Metrics


class Bench:
    """An embedder that takes `per_text` seconds, and nothing else that takes any time."""

    def __init__(self, per_text: float, asks_per_s: float = 0.0) -> None:
        self.now = 0.0
        self.per_text = per_text
        self.asks_per_s = asks_per_s
        self.select = SimpleNamespace(asked=0)
        access = cast(Access, SimpleNamespace(select=self.select))
        self.pace = Reembedding(access, Metrics(), lambda: None, lambda: self.now)

    def run(self, seconds: float) -> tuple[int, float, float]:
        """(texts embedded, seconds spent on them, the longest batch)."""
        texts, spent, longest = 0, 0.0, 0.0
        until = self.now + seconds
        while self.now < until:
            self.now = max(self.now, self.pace._not_before)
            self.select.asked = int(self.now * self.asks_per_s)
            batch = self.pace.at_once
            took = batch * self.per_text
            self.now += took
            self.pace._pace(batch, took)
            texts, spent, longest = texts + batch, spent + took, max(longest, took)
        return texts, spent, longest


@pytest.mark.parametrize("per_text", [0.0002, 0.003, 0.05])
@pytest.mark.parametrize(("asks_per_s", "share"), [(0.0, SHARE_IDLE), (20.0, SHARE_BUSY)])
def test_it_takes_its_share_of_the_time_in_short_batches(per_text: float, asks_per_s: float, share: float) -> None:
    bench = Bench(per_text, asks_per_s)
    bench.run(5 * BUSY_FOR_S)
    texts, spent, longest = bench.run(60.0)
    assert spent / 60.0 == pytest.approx(share, rel=0.2)
    assert texts == pytest.approx(share * 60.0 / per_text, rel=0.2)
    assert longest <= max(BATCH_S, per_text) * 1.001


def test_a_batch_grows_step_by_step_and_has_an_end() -> None:
    bench = Bench(1e-9)
    sizes: list[Any] = []
    for _ in range(12):
        sizes.append(bench.pace.at_once)
        bench.pace._pace(bench.pace.at_once, 1e-9)
    assert sizes[:4] == [1, 2, 4, 8] and sizes[-1] == MOST_AT_ONCE


def test_it_is_fast_again_when_requests_have_stopped() -> None:
    bench = Bench(0.001, asks_per_s=50.0)
    bench.run(10.0)
    bench.asks_per_s, bench.select.asked = 0.0, 0
    bench.run(2 * BUSY_FOR_S)
    _, spent, _ = bench.run(20.0)
    assert spent / 20.0 == pytest.approx(SHARE_IDLE, rel=0.2)
