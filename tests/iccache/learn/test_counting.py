"""What is told of exchanges that could not be recorded."""

from __future__ import annotations

import pytest

from iccache.errors import StoreError
from iccache.learn.counting import Counting
from iccache.metrics import Metrics


def test_every_dropped_exchange_is_counted_and_one_a_second_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    now, metrics = 100.0, Metrics()
    counting = Counting(None, metrics, None, lambda: now)  # type: ignore[arg-type] - neither is looked at
    for i in range(50):
        counting.dropped(StoreError("the disk is full"), f"req_{i}")
    now += 1.0
    counting.dropped(StoreError("the disk is full"), "req_50")
    metrics.flush()
    (dropped,) = metrics.dropped.collect()
    assert [s.value for s in dropped.samples if s.name.endswith("_total")] == [51.0]
    assert [record.getMessage() for record in caplog.records] == [
        "req_0 is not recorded: the disk is full",
        "req_50 is not recorded: the disk is full (and 49 before it)",
    ]
