"""What replay cost, from its ledger in the store."""

from __future__ import annotations

from replay.prices import NUSD
from replay.store import ReplayStore


def replay_usd(store: ReplayStore, since: float) -> float:
    """USD of replay's calls since then; of those whose end is not known, the most they can have cost."""
    row = store.row(
        "SELECT coalesce(sum(CASE state WHEN 'confirmed' THEN nusd WHEN 'reserved' THEN reserved_nusd ELSE 0 END), 0)"
        " FROM replay_calls WHERE at >= ?",
        [since],
    )
    assert row is not None
    return int(row[0]) / NUSD
