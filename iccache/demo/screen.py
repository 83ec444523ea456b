"""What the demo shows while it runs: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 10.0
PLAIN_WIDTH = 100


class Screen:
    """Safe to use from several threads."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console or _console()
        self.clock = clock
        self.started = clock()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line that stays, with the time since the start."""
        minutes, seconds = divmod(int(self.clock() - self.started), 60)
        self.console.print(f"[dim]{minutes:2d}:{seconds:02d}[/dim]  {text}", highlight=False, soft_wrap=True)

    def bar(self, title: str, total: int) -> Bar:
        """Something that takes `total` steps."""
        return Bar(self, self._progress, self._progress.add_task(title, total=total, note=""), title, total)


class Bar:
    """How far one stage has come."""

    def __init__(self, screen: Screen, progress: Progress, task: TaskID, title: str, total: int) -> None:
        self.screen = screen
        self.title = title
        self.total = total
        self.done = 0
        self._progress = progress
        self._task = task
        self._said = screen.clock()
        self._lock = threading.Lock()

    def step(self, note: str = "") -> None:
        """One step further; `note`: what is known by now."""
        with self._lock:
            self.done += 1
            self._progress.update(self._task, completed=self.done, note=note)
            now = self.screen.clock()
            if not self.screen.console.is_terminal and (now - self._said >= LINE_EVERY_S or self.done == self.total):
                self._said = now
                self.screen.say(f"{self.title}: {self.done} of {self.total}  {note}")


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)
