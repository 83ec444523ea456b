from __future__ import annotations

import itertools

import numpy as np
import pytest

from iccache import config
from replay import cutoff
from replay.cutoff import WINDOW, CutOff, Round, recovered
from replay.store import Recovery
from tests.replay.test_plan import TEACHER, record

DAY_S = 86_400.0
STUDENT = config.Backend(name="small", base_url="http://x", model="s", usd_per_million_input_tokens=0.01)
COST = 1_000


def potentials(ranks: int = 400) -> np.ndarray:
    """What an improvement at each rank saves: it falls with the rank, as the order wants it."""
    return 10_000 * np.exp(-np.arange(ranks) / 40)


def walked(chance: float, seed: int, saving: np.ndarray, cost: int = COST) -> tuple[int, float]:
    """In a world where a round improves with `chance`: the rank at which the rule stops, and what was earned."""
    rng, rule, earned = np.random.default_rng(seed), CutOff(True), 0.0
    for rank, potential in enumerate(saving):
        improved = bool(rng.random() < chance)
        earned += improved * potential - cost
        rule.add(Round(improved, float(potential), cost))
        if rule.reached:
            return rank + 1, earned
    return len(saving), earned


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.9])
def test_the_rank_where_replay_stops_paying_is_found(chance: float) -> None:
    """The optimum is known: go on as long as chance * potential >= cost."""
    saving = potentials()
    best = int(np.sum(chance * saving >= COST))
    optimum = float(np.sum(chance * saving[:best] - COST))
    stopped, earned = zip(*(walked(chance, seed, saving) for seed in range(200)), strict=True)
    assert best <= np.mean(stopped) <= best + WINDOW, "it has to see that it does not pay"
    assert np.mean(earned) >= 0.9 * optimum
    assert np.mean(earned) > 3 * abs(float(np.sum(chance * saving - COST))) or np.sum(chance * saving - COST) < 0


def test_the_rank_moves_with_what_an_answer_costs() -> None:
    stops = [np.mean([walked(0.6, seed, potentials(), cost)[0] for seed in range(50)]) for cost in (250, 1000, 4000)]
    assert stops == sorted(stops, reverse=True)
    expected = [np.sum(0.6 * potentials() >= cost) for cost in (250, 1000, 4000)]
    for stop, best in zip(stops, expected, strict=True):
        assert best <= stop <= best + WINDOW


def test_nothing_is_decided_before_a_window_is_full() -> None:
    rule = CutOff(True)
    for _ in range(WINDOW - 1):
        rule.add(Round(False, 0.0, COST))
        assert not rule.reached
    rule.add(Round(False, 0.0, COST))
    assert rule.reached


def test_where_nothing_is_to_be_saved_only_rounds_that_improve_nothing_end_it() -> None:
    rule = CutOff(pays_in_money=False)
    for n in range(3 * WINDOW):
        rule.add(Round(n % WINDOW == 0, 0.0, COST))
        assert not rule.reached
    for _ in range(WINDOW):
        rule.add(Round(False, 0.0, COST))
    assert rule.reached


def test_where_answers_are_free_it_goes_on_while_something_improves() -> None:
    rule = CutOff(True)
    for n in range(3 * WINDOW):
        rule.add(Round(n % 10 == 0, 1.0, 0))
        assert not rule.reached


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([], 0.5),
        ([Recovery(1e6, 1.0, 0.0)], 1.0),  # all of it, on much evidence
        ([Recovery(1e6, 0.2, 0.2)], 0.0),
        ([Recovery(1e6, 0.1, 0.5)], 0.0),  # worse than before
        ([Recovery(10.0, 1.0, 0.0)], 0.75),  # as much evidence as the prior has
    ],
)
def test_recovered(seen: list[Recovery], expected: float) -> None:
    assert recovered(seen) == pytest.approx(expected, abs=1e-4)


def test_what_is_lost_is_told_by_the_day() -> None:
    row = record(credit=10.0, credited_quality=4.0)
    assert cutoff.lost(row, 30.0, row.at + 3 * DAY_S) == pytest.approx(6 / 3 * 30)
    assert cutoff.lost(row, 30.0, row.at + 60.0) == pytest.approx(6 * 30), "an hour is not taken for every hour"


def test_the_gap_is_what_the_dearest_costs_more_and_not_below_nothing() -> None:
    row = record(request_bytes=400, answer_bytes=396, tokens=200)
    assert cutoff.gap_nusd(row, STUDENT, TEACHER, 3) == (100 * 1 + 100 * 4) * 1000 - (100 + 600) * 10
    assert cutoff.gap_nusd(row, STUDENT, TEACHER, 3000) == 0.0
    assert cutoff.gap_nusd(row, None, TEACHER, 3) == 0.0
    for shown in itertools.pairwise(range(4)):
        assert cutoff.gap_nusd(row, STUDENT, TEACHER, shown[0]) > cutoff.gap_nusd(row, STUDENT, TEACHER, shown[1])
