"""The table of real answers on which any policy can be run exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.bench.routed_real import (
    STUDENTS,
    TEACHER,
    Result,
    Table,
    always,
    auto,
    oracle,
    same_cost,
    threshold,
)


@pytest.fixture(scope="module")
def table() -> Table:
    return Table(gold=True)


def test_the_oracle_is_the_best_of_all_choices_by_brute_force(table: Table) -> None:
    """Of 3^5 ways to answer five requests: the most right answers, and of those the cheapest."""
    rows = table.test[::37][:5]
    best = max(
        (sum(r.shown[a].quality for r, a in zip(rows, arms, strict=True)),
         -sum(r.shown[a].usd for r, a in zip(rows, arms, strict=True)))
        for arms in itertools.product((*STUDENTS, TEACHER), repeat=len(rows))
    )  # fmt: skip
    quality, cost = oracle(rows).sum(axis=2)[:, 0]
    assert (quality, -cost) == pytest.approx(best)


def test_the_router_is_cheaper_than_the_teacher_and_better_than_any_student(table: Table) -> None:
    quality, cost = auto(table.train, table.test, orders=1).mean(axis=(1, 2))
    teacher_quality, teacher_cost = always(table.test, TEACHER).mean(axis=(1, 2))
    best_student = max(always(table.test, name).mean(axis=(1, 2))[0] for name in STUDENTS)
    assert best_student + 0.1 < quality <= teacher_quality and cost < 0.85 * teacher_cost


def test_thresholds_go_from_the_cheapest_student_to_the_teacher(table: Table) -> None:
    rows = table.test
    np.testing.assert_allclose(threshold(table.train, rows, 0.0, plain=False), always(rows, STUDENTS[0]))
    np.testing.assert_allclose(threshold(table.train, rows, 1.01, plain=False), always(rows, TEACHER))


def test_intervals_hold_the_mean_and_a_curve_is_read_between_its_points() -> None:
    found = np.stack([np.random.default_rng(1).random((2, 50)), np.full((2, 50), 0.001)])
    result = Result.of("any", found)
    mean, low, high = result.quality
    assert low < mean < high and mean == pytest.approx(found[0].mean())
    assert result.cost == pytest.approx((1.0, 1.0, 1.0))
    points = [Result("a", (0.2, 0, 0), (1.0, 0, 0)), Result("b", (0.6, 0, 0), (3.0, 0, 0))]
    assert same_cost(points, 2.0) == pytest.approx(0.4)
