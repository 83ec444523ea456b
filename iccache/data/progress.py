"""What an import says while it works: a bar on a terminal, lines elsewhere; on standard error in both cases."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from iccache.data.importing import BAD_NAMED, Counts, Progress
from iccache.data.lines import REASONS

LINE_EVERY_S = 10.0
WHOLE = 1.0


@contextmanager
def progress() -> Generator[Progress]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Plain()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console) as bars:
        yield Shown(bars)


class Told:
    """Names bad lines, up to as many as a report does."""

    def __init__(self) -> None:
        self._bad = 0

    def bad(self, number: int, reason: str) -> None:
        self._bad += 1
        if self._bad <= BAD_NAMED:
            self.say(f"line {number}: {REASONS[reason]}")
        if self._bad == BAD_NAMED:
            self.say("further bad lines are counted only")

    def say(self, text: str) -> None:
        click.echo(text, err=True)


class Shown(Told):
    """On a terminal."""

    def __init__(self, bars: Bars) -> None:
        super().__init__()
        self._bars = bars
        self._task = bars.add_task("import", total=WHOLE)

    def say(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)

    def step(self, counts: Counts, share: float) -> None:
        self._bars.update(self._task, completed=share, description=f"import: {counts.lines:,} lines, {counts.bad} bad")


class Plain(Told):
    """In a log: a line now and then."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._next = clock() + LINE_EVERY_S

    def step(self, counts: Counts, share: float) -> None:
        if self._clock() >= self._next:
            self._next = self._clock() + LINE_EVERY_S
            self.say(f"import: {counts.lines:,} lines, {counts.bad} bad, {share:.0%} of the file")
