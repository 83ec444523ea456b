"""What came out of the demo: a table, as data, and in plain words, judged on the intervals."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from iccache.demo.outcome import Interval, Outcome, accuracy, cost_usd, latency_p50_s, offloaded, tokens_each

CONDITIONS = {
    "student": "student alone",
    "student_random": "+ random examples",
    "student_examples": "+ chosen examples",
    "teacher": "teacher alone",
    "routed": "auto",
    "student_after_replay": "student after replay",
}
Outcomes = dict[str, list[Outcome]]  # by condition


@dataclass(frozen=True, slots=True)
class Report:
    """Every scored request of a run."""

    tasks: dict[str, Outcomes]
    teacher: str  # the name of its backend

    @property
    def routed(self) -> list[Outcome]:
        return [o for outcomes in self.tasks.values() for o in outcomes["routed"]]

    @property
    def offloaded(self) -> float:
        """Share of the routed requests that the teacher did not answer."""
        return offloaded(self.routed, self.teacher)

    @property
    def overhead_ms_p50(self) -> float:
        """Of the requests for which everything was done: examples chosen, or routed."""
        took = [o.overhead_ms for each in self.tasks.values() for c in ("student_examples", "routed") for o in each[c]]
        return statistics.median(took) if took else 0.0

    @property
    def cost_usd_all_teacher(self) -> float:
        """What the routed requests would have cost at the teacher.

        What it did answer is counted as it was; what it did not, as the mean of its answers to the same task.
        """
        return sum(self._at_the_teacher(outcomes) for outcomes in self.tasks.values())

    def _at_the_teacher(self, outcomes: Outcomes) -> float:
        kept = [o for o in outcomes["routed"] if o.backend == self.teacher]
        known = outcomes["teacher"] + kept
        each = cost_usd(known) / max(1, len(known))
        return cost_usd(kept) + each * (len(outcomes["routed"]) - len(kept))

    def as_data(self) -> dict[str, Any]:
        """For programs: what `--json` writes."""
        return {
            "tasks": {
                task: {condition: _interval(outcomes[condition]) for condition in CONDITIONS}
                for task, outcomes in self.tasks.items()
            },
            "offloaded": self.offloaded,
            "overhead_ms_p50": self.overhead_ms_p50,
            "cost_usd": cost_usd(self.routed),
            "cost_usd_all_teacher": self.cost_usd_all_teacher,
        }

    def as_table(self) -> Table:
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            caption="Accuracy by the data sets' own answers, with 95 % intervals.",
        )
        table.add_column("", no_wrap=True)
        for column in ("n", "accuracy", "p50 s", "tokens", "$/1000", "offload"):
            table.add_column(column, justify="right", no_wrap=True)
        for task, outcomes in self.tasks.items():
            table.add_row(f"[bold]{escape(task)}[/bold]")
            for condition, title in CONDITIONS.items():
                table.add_row(title, *self._cells(condition, outcomes[condition]))
            table.add_section()
        return table

    def _cells(self, condition: str, outcomes: list[Outcome]) -> list[str]:
        tokens_in, tokens_out = tokens_each(outcomes)
        return [
            str(len(outcomes)),
            _shown(accuracy(outcomes)),
            f"{latency_p50_s(outcomes):.2f}",
            f"{tokens_in:.0f}+{tokens_out:.0f}",
            f"{1000 * cost_usd(outcomes) / max(1, len(outcomes)):.3f}",
            f"{offloaded(outcomes, self.teacher):.0%}" if condition == "routed" else "",
        ]

    def sentences(self) -> Iterator[str]:
        """The findings in words, the unwelcome ones included."""
        for task, outcomes in self.tasks.items():
            got = {condition: accuracy(outcomes[condition]) for condition in CONDITIONS}
            chosen = "the student with chosen examples"
            yield f"{task}: {_verdict(chosen, got['student_examples'], 'the student alone', got['student'])}"
            yield f"{task}: {_verdict(chosen, got['student_examples'], 'with random ones', got['student_random'])}"
            after = "the same after replay"
            yield f"{task}: {_verdict(after, got['student_after_replay'], 'before it', got['student_examples'])}"
            yield f"{task}: {_price_of_examples(outcomes)}"
        yield self._savings()

    def _savings(self) -> str:
        spent, teacher = cost_usd(self.routed), self.cost_usd_all_teacher
        share = f"{spent / teacher:.0%} of what" if teacher else "against"
        return (
            f"auto sent {self.offloaded:.0%} of its requests to the student and was right in "
            f"{_shown(accuracy(self.routed))} of them; it cost ${spent:.4f}, {share} the teacher would have cost "
            f"for all of them, ${teacher:.4f}"
        )


def _interval(outcomes: list[Outcome]) -> dict[str, float | int]:
    share, low, high = accuracy(outcomes)
    return {"accuracy": share, "low": low, "high": high, "n": len(outcomes)}


def _shown(interval: Interval) -> str:
    return f"{interval.share:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _verdict(subject: str, one: Interval, against: str, other: Interval) -> str:
    """Whether `one` is better, worse, or whether these requests cannot tell."""
    figures = f"{_shown(one)} against {_shown(other)}"
    if one.above(other):
        return f"{subject} is better than {against}: {figures}"
    if other.above(one):
        return f"{subject} is WORSE than {against}: {figures}"
    return f"no difference that these requests can show between {subject} and {against}: {figures}"


def _price_of_examples(outcomes: Outcomes) -> str:
    alone, shown, teacher = (latency_p50_s(outcomes[c]) for c in ("student", "student_examples", "teacher"))
    return f"examples take the student's p50 from {alone:.2f} s to {shown:.2f} s; the teacher takes {teacher:.2f} s"
