"""`iccache demo`: the main job, from an empty cache to a table.

1. Warm-up: the teacher answers, the cache fills. Meanwhile the student answers the held-out requests alone.
2. Held-out: the student with chosen examples, then with as many random ones; meanwhile the teacher.
3. Routed: `auto`, each answer followed by feedback.
4. Replay over the cache, then the student once more.

The answers to held-out requests are never stored (`x-iccache-store: no`), so none can be shown later as an example of
itself. Feedback needs a recorded exchange, and what the teacher answers to a routed request becomes an example like any
other: therefore the routed requests are a further slice of the data, in which no held-out request occurs. After
replay the student has the examples of that stage too, as it would have in use.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from rich.markup import escape

from iccache.demo import models
from iccache.demo.client import Client, DemoError, Price, first_model
from iccache.demo.outcome import Outcome, accuracy, offloaded
from iccache.demo.report import CONDITIONS, Outcomes, Report
from iccache.demo.screen import Bar, Screen
from iccache.demo.servers import free_port, model_server, proxy_server, run_to_end
from iccache.demo.tasks import FULL, QUICK, SEED, TASKS, Item, Sizes, Split, Task
from iccache.errors import IccacheError

STUDENT, TEACHER, AUTO = "student", "teacher", "auto"
PRICES = {STUDENT: Price(0.05, 0.20), TEACHER: Price(1.00, 4.00)}  # made up, of the usual proportions
QUALITY_TARGET = 0.7  # what this application asks of a cheaper model: so much of the teacher's quality
EXPLORATION = 0.1  # a short run has to try things sooner than a long one
NOT_STORED = {"x-iccache-store": "no"}
PLAIN = {**NOT_STORED, "x-iccache-examples": "0"}
WARM_UP_AT_MOST_S = 200.0  # on a slow machine a stage ends early rather than the demo late
WARM_UP_AT_LEAST = 80  # requests, of both tasks together
ROUTED_AT_MOST_S = 150.0
ROUTED_AT_LEAST = 50
ROUTED_TOLD_TIMES = 4
PREVIEWED = 2  # held-out requests of each task
PREVIEW_AFTER = 24  # answers in the cache, of both tasks together
REPLAYED_AT_MOST = 24  # examples
FOLLOW_S = 1.5  # within a second the proxy sees what another process changed


class Options(NamedTuple):
    """What was asked for on the command line."""

    full: bool = False
    json_file: Path | None = None
    student_url: str | None = None
    teacher_url: str | None = None
    seed: int = SEED
    models: Path | None = None


class Stopped(Exception):
    """The other lane failed; there is no point in going on."""


@dataclass(slots=True)
class TaskRun:
    """A task, its requests, and what came back."""

    task: Task
    split: Split
    transcripts: list[tuple[str, str]] = field(default_factory=list)  # request and answer, from the warm-up
    outcomes: Outcomes = field(default_factory=lambda: {condition: [] for condition in CONDITIONS})


def run(options: Options) -> None:
    """Everything; prints the findings. Raises IccacheError where something fails."""
    with _terminable(), contextlib.ExitStack() as stack:
        screen = stack.enter_context(Screen())
        folder = stack.enter_context(_scratch(screen))
        upstreams = _upstreams(options, screen, folder, stack)
        config, port = folder / "iccache.toml", free_port()
        config.write_text(configuration(port, folder / "cache.db", upstreams), encoding="utf-8")
        screen.say("starting iccache serve")
        base_url = stack.enter_context(proxy_server(config, port, folder))
        demo = Demo(FULL if options.full else QUICK, options, screen, lambda: Client(base_url, PRICES))
        demo.run(lambda: replay(config, folder, options.full))
    _finish(demo.report(), options, screen)


def _finish(report: Report, options: Options, screen: Screen) -> None:
    screen.console.print(report.as_table())
    for sentence in report.sentences():
        screen.console.print(f"- {escape(sentence)}", highlight=False, soft_wrap=not screen.console.is_terminal)
    if options.json_file is not None:
        try:
            options.json_file.write_text(json.dumps(report.as_data(), indent=2) + "\n", encoding="utf-8")
        except OSError as exc:
            raise DemoError(f"{options.json_file}: cannot be written: {exc.strerror}") from exc
    screen.say("done")


@contextlib.contextmanager
def _scratch(screen: Screen) -> Iterator[Path]:
    """A folder for the cache and the logs, which stays where something fails: the logs say what."""
    folder, failed = Path(tempfile.mkdtemp(prefix="iccache-demo-")), False
    try:
        yield folder
    except IccacheError:
        failed = True
        screen.say(f"it failed; the logs are in {folder}")
        raise
    finally:
        if not failed:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the demo the way Ctrl-C does: nothing stays behind."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Upstream(NamedTuple):
    """A model behind an OpenAI-compatible base URL."""

    base_url: str
    model: str


def _upstreams(options: Options, screen: Screen, folder: Path, stack: contextlib.ExitStack) -> dict[str, Upstream]:
    """The student's and the teacher's servers: one's own where a URL is given, else started here."""
    own = {STUDENT: options.student_url, TEACHER: options.teacher_url}
    local = {STUDENT: models.STUDENT, TEACHER: models.TEACHER}
    wanted = [local[name] for name, url in own.items() if url is None]
    paths = models.fetch(options.models or models.default_folder(), screen.say, wanted) if wanted else {}
    upstreams = {}
    for name, url in own.items():
        if url is None:
            screen.say(f"starting the {name}: {local[name].name}")
            url = stack.enter_context(model_server(local[name], paths[local[name].name], folder))
            upstreams[name] = Upstream(url, local[name].name)
        else:
            upstreams[name] = Upstream(url, first_model(url))
            screen.say(f"the {name} is {escape(upstreams[name].model)} at {escape(url)}")
    return upstreams


def configuration(port: int, database: Path, upstreams: Mapping[str, Upstream]) -> str:
    """The proxy's configuration file. Generous limits, since two cores do everything at once."""
    lines = ["[server]", f"port = {port}", "[store]", f"url = {json.dumps(f'sqlite:///{database}')}"]
    lines += ["[routing]", "decision_timeout_ms = 10000"]
    lines += [f"quality_target = {QUALITY_TARGET}", f"exploration = {EXPLORATION}"]
    lines += ["[replay]", "samples = 1"]  # a model's own samples, one after the other on one core, would take long
    for name, upstream in upstreams.items():
        lines += [
            "[[backends]]",
            f"name = {json.dumps(name)}",
            f"base_url = {json.dumps(upstream.base_url)}",
            f"model = {json.dumps(upstream.model)}",
            f"usd_per_million_input_tokens = {PRICES[name].input}",
            f"usd_per_million_output_tokens = {PRICES[name].output}",
            "context_window_tokens = 2048",
            "max_in_flight = 4",
            "timeout_s = 300",
        ]
    return "\n".join(lines) + "\n"


def replay(config: Path, logs: Path, full: bool) -> dict[str, Any]:
    """One `iccache-replay run`; what it says it did. Over the most promising examples only, unless `full`."""
    command = ["-m", "replay", "run", "--config", str(config), "--workers", "1"]
    command += [] if full else ["--limit", str(REPLAYED_AT_MOST)]
    printed = run_to_end("iccache-replay", [*command, "--json"], logs)
    try:
        said = json.loads(printed)
    except ValueError as exc:
        raise DemoError(f"iccache-replay run --json printed something else: {printed[:200]!r}") from exc
    assert isinstance(said, dict)
    time.sleep(FOLLOW_S)
    return said


class Demo:
    """The stages, against a proxy that is there. Knows nothing of processes."""

    def __init__(self, sizes: Sizes, options: Options, screen: Screen, connect: Callable[[], Client]) -> None:
        """`connect`: a new client of the proxy, one for each thread."""
        self.full = options.full
        self.screen = screen
        self.connect = connect
        self.rng = random.Random(options.seed)
        self.runs = [TaskRun(task, task.split(sizes, options.seed)) for task in TASKS]
        self.warm = False
        self.stopped = threading.Event()

    def report(self) -> Report:
        return Report({run.task.name: run.outcomes for run in self.runs}, TEACHER)

    def run(self, replay: Callable[[], Mapping[str, Any]]) -> None:
        """All stages. Raises DemoError for the first request that fails."""
        self.screen.say("warm-up: the teacher answers and the cache fills; meanwhile the student answers alone")
        self.side_by_side(self.warm_up, self.student_alone)
        self.screen.say("held-out requests: the student with chosen and with random examples; meanwhile the teacher")
        self.side_by_side(self.teacher, self.student_shown)
        self.screen.say(
            f"auto: the router decides, for {QUALITY_TARGET:.0%} of the teacher's quality; feedback follows each answer"
        )
        self.side_by_side(self.routed)
        self.screen.say("replay works over the cache")
        self.screen.say(_in_short(replay()))
        self.side_by_side(lambda client: self.held_out(client, "student_after_replay", STUDENT, NOT_STORED))

    def side_by_side(self, *lanes: Callable[[Client], None]) -> None:
        """Run the lanes at once, each in its thread with its client, until all are done or one fails."""
        executor = ThreadPoolExecutor(len(lanes))
        try:
            futures = [executor.submit(self._lane, lane) for lane in lanes]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:  # Ctrl-C too: the other lane is to begin nothing more
            self.stopped.set()
            raise
        finally:
            executor.shutdown(wait=False)

    def _lane(self, lane: Callable[[Client], None]) -> None:
        client = self.connect()
        try:
            lane(client)
        finally:
            client.close()

    def warm_up(self, client: Client) -> None:
        """Fill the cache with the teacher's answers."""
        requests = in_turn([(run, run.split.warm_up) for run in self.runs])
        bar = self.screen.bar("warm-up by the teacher", len(requests))
        outcomes: list[Outcome] = []
        for number, (run, item) in enumerate(self.in_time(bar, requests, WARM_UP_AT_MOST_S, WARM_UP_AT_LEAST)):
            outcome = self.ask(client, run, item, number, TEACHER, {})
            outcomes.append(outcome)
            run.transcripts.append((item.prompt, outcome.answer))
            bar.step(_so_far(outcomes))
            self.warm = number + 1 >= PREVIEW_AFTER
        self.warm = True

    def student_alone(self, client: Client) -> None:
        self.held_out(client, "student", STUDENT, PLAIN)
        while not self.warm:
            if self.stopped.wait(0.2):
                raise Stopped
        for run in self.runs:
            self.preview(client, run)

    def preview(self, client: Client, run: TaskRun) -> None:
        """The first held-out requests, before and after: to see what this is about while the rest is under way."""
        pairs = zip(run.split.held_out, run.outcomes["student"], strict=True)
        for number, (item, before) in enumerate(islice(pairs, PREVIEWED)):
            after = self.ask(client, run, item, number, STUDENT, NOT_STORED)
            self.screen.say(f"[bold]{run.task.name}[/bold]: {escape(item.prompt)}")
            self.screen.say(f"  the student alone:                {_quoted(before)}")
            self.screen.say(f"  shown {after.examples} of the teacher's answers:  {_quoted(after)}")

    def teacher(self, client: Client) -> None:
        self.held_out(client, "teacher", TEACHER, NOT_STORED)

    def student_shown(self, client: Client) -> None:
        self.held_out(client, "student_examples", STUDENT, NOT_STORED)
        self.held_out(client, "student_random", STUDENT, PLAIN, self.as_many_at_random)

    def as_many_at_random(self, run: TaskRun, number: int) -> list[tuple[str, str]]:
        """As many of the same task's answers in the cache as were chosen for its request of that number."""
        count = run.outcomes["student_examples"][number].examples
        return self.rng.sample(run.transcripts, min(count, len(run.transcripts)))

    def held_out(
        self,
        client: Client,
        condition: str,
        model: str,
        headers: Mapping[str, str],
        turns: Callable[[TaskRun, int], Sequence[tuple[str, str]]] = lambda run, i: (),
    ) -> None:
        """Every held-out request once. `turns(run, i)`: what precedes the i-th one of a task."""
        requests = in_turn([(run, run.split.held_out) for run in self.runs])
        bar = self.screen.bar(CONDITIONS[condition], len(requests))
        for number, (run, item) in enumerate(requests):
            earlier = turns(run, len(run.outcomes[condition]))
            run.outcomes[condition].append(self.ask(client, run, item, number, model, headers, earlier))
            bar.step(self._accuracies(condition))

    def routed(self, client: Client) -> None:
        """The router's choice for each request, and feedback from the data set's own check."""
        requests = in_turn([(run, run.split.routed) for run in self.runs])
        bar = self.screen.bar("auto", len(requests))
        for number, (run, item) in enumerate(self.in_time(bar, requests, ROUTED_AT_MOST_S, ROUTED_AT_LEAST)):
            outcome = self.ask(client, run, item, number, AUTO, {})
            client.feedback(outcome)
            run.outcomes["routed"].append(outcome)
            bar.step(self._accuracies("routed"))
            self._say_offloaded(number + 1, max(1, len(requests) // ROUTED_TOLD_TIMES))

    def in_time(
        self, bar: Bar, requests: Sequence[tuple[TaskRun, Item]], at_most_s: float, at_least: int
    ) -> Iterator[tuple[TaskRun, Item]]:
        """The requests, until `at_most_s` are over and `at_least` of them are done; with --full, all."""
        ends = time.monotonic() + at_most_s
        for number, request in enumerate(requests):
            if time.monotonic() > ends and number >= at_least and not self.full:
                self.screen.say(f"{bar.title}: this machine is slow, so it ends after {number} of {len(requests)}")
                return
            yield request

    def _say_offloaded(self, done: int, each: int) -> None:
        """After `each` further requests: how much of them went to the student, task by task."""
        if done % each:
            return
        lately = {run.task.name: run.outcomes["routed"][-(each // len(self.runs)) :] for run in self.runs}
        shares = ", ".join(f"{name} {offloaded(outcomes, TEACHER):.0%}" for name, outcomes in lately.items())
        self.screen.say(f"auto: of requests {done - each + 1} to {done} the student answered: {shares}")

    def ask(
        self,
        client: Client,
        run: TaskRun,
        item: Item,
        number: int,
        model: str,
        headers: Mapping[str, str],
        turns: Sequence[tuple[str, str]] = (),
    ) -> Outcome:
        """One request; every other pair of them is streamed, so that each task has both kinds."""
        if self.stopped.is_set():
            raise Stopped
        streams = number // len(self.runs) % 2 == 1
        return client.ask(run.task, item, model=model, stream=streams, headers=headers, turns=turns)

    def _accuracies(self, condition: str) -> str:
        return "  ".join(f"{run.task.name} {_so_far(run.outcomes[condition])}" for run in self.runs)


def in_turn(requests: Sequence[tuple[TaskRun, list[Item]]]) -> list[tuple[TaskRun, Item]]:
    """The requests of all tasks as one sequence, the tasks taking turns."""
    columns = [[(run, item) for item in items] for run, items in requests]
    return [pair for pair in chain.from_iterable(zip_longest(*columns)) if pair is not None]


def _so_far(outcomes: Sequence[Outcome]) -> str:
    return f"{accuracy(outcomes).share:.2f}" if outcomes else "-"


def _quoted(outcome: Outcome) -> str:
    text = " ".join(outcome.answer.split())
    return f'"{escape(text)}" {"[green]right[/green]" if outcome.correct else "[red]wrong[/red]"}'


def _in_short(said: Mapping[str, Any]) -> str:
    """The figures of a replay that matter here."""
    examples, usd = said["examples"], said["usd"]["confirmed"]
    return (
        f"replay asked the teacher again for {examples['replayed']} examples: {examples['improved']} got a better "
        f"answer, {examples['kept']} kept theirs, {said['evicted']['evicted']} were evicted, for ${usd:.4f}"
    )
