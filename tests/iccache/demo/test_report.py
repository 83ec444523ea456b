import json

import pytest
from rich.console import Console

from iccache.demo.outcome import Outcome
from iccache.demo.report import CONDITIONS, Report


def outcomes(right: int, n: int, backend: str = "student", cost_usd: float = 1.0) -> list[Outcome]:
    return [
        Outcome(
            answer="a",
            correct=i < right,
            backend=backend,
            examples=3,
            latency_s=0.5,
            overhead_ms=4.0,
            input_tokens=100,
            output_tokens=5,
            cost_usd=cost_usd,
            request_id=f"req_{i}",
        )
        for i in range(n)
    ]


def report(examples: int = 23, random: int = 8, after: int = 24) -> Report:
    """One task; half of the routed requests at the student for 1 dollar, half at the teacher for 10."""
    return Report(
        {
            "a task": {
                "student": outcomes(0, 30),
                "student_random": outcomes(random, 30),
                "student_examples": outcomes(examples, 30),
                "teacher": outcomes(27, 30, "teacher", cost_usd=10.0),
                "routed": outcomes(15, 20) + outcomes(18, 20, "teacher", cost_usd=10.0),
                "student_after_replay": outcomes(after, 30),
            }
        },
        teacher="teacher",
    )


def test_the_data_have_the_promised_shape() -> None:
    data = json.loads(json.dumps(report().as_data()))

    assert list(data) == ["tasks", "offloaded", "overhead_ms_p50", "cost_usd", "cost_usd_all_teacher"]
    assert list(data["tasks"]["a task"]) == [
        "student",
        "student_random",
        "student_examples",
        "teacher",
        "routed",
        "student_after_replay",
    ]
    for condition in data["tasks"]["a task"].values():
        assert list(condition) == ["accuracy", "low", "high", "n"]
        assert 0 <= condition["low"] <= condition["accuracy"] <= condition["high"] <= 1
    assert data["tasks"]["a task"]["routed"]["n"] == 40


def test_the_shares_and_costs_are_of_the_routed_requests() -> None:
    data = report().as_data()

    assert data["offloaded"] == 0.5
    assert data["overhead_ms_p50"] == 4.0
    assert data["cost_usd"] == 20 * 1 + 20 * 10
    assert data["cost_usd_all_teacher"] == pytest.approx(40 * 10)


def test_where_examples_help_it_is_said() -> None:
    said = list(report().sentences())

    assert "the student with chosen examples is better than the student alone" in said[0]
    assert "the student with chosen examples is better than with random ones" in said[1]


def test_where_they_do_not_it_is_said_as_plainly() -> None:
    said = list(report(examples=3, random=25, after=3).sentences())

    assert "no difference that these requests can show" in said[0]
    assert "is WORSE than with random ones" in said[1]
    assert "no difference that these requests can show" in said[2]


def test_the_table_has_a_row_for_each_condition() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(report().as_table())

    for title in CONDITIONS.values():
        assert title in captured.get()
    assert "0.77 [0.59, 0.88]" in captured.get()
    assert "50%" in captured.get()


def test_a_run_without_routed_requests_divides_by_nothing() -> None:
    empty = Report({"a task": {condition: [] for condition in CONDITIONS}}, teacher="teacher")

    assert empty.as_data()["offloaded"] == 0
    assert list(empty.sentences())
