"""The command line of the offline job: `iccache-replay run | plan | evaluate`."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click
import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from iccache import __version__, config
from iccache.cli import forget_output
from iccache.errors import ConfigError, IccacheError, of_system
from iccache.examples.store import is_there, shown
from replay import assemble, evaluate, report, spent
from replay.assemble import Options
from replay.job import Progress, Stop
from replay.ledger import Money, Result
from replay.picture import curve_svg
from replay.prices import NUSD
from replay.simulate.report import simulated
from replay.simulate.world import Assumptions
from replay.store import open_replay_store

STDOUT = "-"
LINE_EVERY_S = 10.0
DAY_S = 86400.0
FAILED = frozenset({Stop.ERROR, Stop.INTERRUPTED})


class Commands(click.Group):
    """Turns our errors into one line and an exit code: 1 failed, 2 wrong usage or configuration."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except IccacheError as exc:
            for line in str(exc).splitlines():
                click.echo(f"iccache-replay: {line}", err=True)
            sys.exit(2 if isinstance(exc, ConfigError) else 1)
        except OSError as exc:
            said = of_system(exc)
            if said is None:
                raise
            forget_output()
            click.echo(f"iccache-replay: {said}", err=True)
            sys.exit(1)


CONFIG = click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Configuration file; default: iccache.toml where there is one, else the built-in defaults.",
)
JSON = click.option(
    "--json",
    "json_to",
    is_flag=False,
    flag_value=STDOUT,
    metavar="[FILE]",
    help="Report as JSON, on standard output or into FILE.",
)


def shared(command: Callable[..., None]) -> Callable[..., None]:
    """The options that both commands have."""
    for option in reversed(
        (
            CONFIG,
            JSON,
            click.option("--tenant", help="Replay this tenant's examples only."),
            click.option("--limit", type=click.IntRange(0), metavar="N", help="Replay the N best at most."),
        )
    ):
        command = option(command)
    return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="iccache-replay")
def main() -> None:
    """Improve the examples while nobody waits: ask the teacher again, keep the better answer, evict to capacity.

    And say what other policies would have earned on the recorded requests.
    """


@main.command()
@shared
@click.option("--workers", type=click.IntRange(1), default=4, show_default=True, help="Examples replayed at once.")
@click.option(
    "--max-wait-s",
    type=click.FloatRange(0),
    default=600.0,
    show_default=True,
    help="Longest wait for the proxy's load to fall; then the run ends.",
)
@click.option(
    "--metrics-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write iccache_replay_* there, for a collector of text files.",
)
@click.option("--push-gateway", metavar="URL", help="Send iccache_replay_* to a Prometheus push gateway.")
def run(
    path: Path | None,
    json_to: str | None,
    tenant: str | None,
    limit: int | None,
    workers: int,
    max_wait_s: float,
    metrics_file: Path | None,
    push_gateway: str | None,
) -> None:
    """Go once over the cache, then exit. Safe beside a live proxy; a killed run is taken up where it was."""
    logging.basicConfig(level="WARNING", stream=sys.stderr, format="iccache-replay: %(message)s")
    settings = _settings(path)
    with _progress() as progress:
        done = asyncio.run(assemble.run(settings, Options(tenant, limit, workers, max_wait_s), progress))
    _print(done.as_text(), done.as_json(), json_to)
    if done.stopped in FAILED:
        raise IccacheError(done.error or done.stopped.value)
    with closing(open_replay_store(settings)) as store:
        if metrics_file is not None:
            report.write_whole(metrics_file, report.metrics(store, time.time()))
        if push_gateway is not None:
            report.push(push_gateway, store, time.time())


@main.command()
@shared
def plan(path: Path | None, json_to: str | None, tenant: str | None, limit: int | None) -> None:
    """Print what `run` would do and the most it would cost. Calls nobody."""
    told = assemble.planned(_settings(path), Options(tenant, limit))
    _print(told.as_text(), told.as_json(), json_to)


@main.command(name="evaluate")
@CONFIG
@JSON
@click.option("--policy", "policies", multiple=True, metavar="NAME", help=f"Any of: {evaluate.FORMS}.")
@click.option("--tenant", help="This tenant's requests only.")
@click.option("--days", type=click.FloatRange(0, min_open=True), default=30, show_default=True, help="How far back.")
@click.option(
    "--picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw quality against cost into this SVG file."
)
def evaluate_(
    path: Path | None,
    json_to: str | None,
    policies: tuple[str, ...],
    tenant: str | None,
    days: float,
    picture: Path | None,
) -> None:
    """Say what other policies would have earned on the recorded requests, with 95 % intervals. Calls nobody."""
    settings = _settings(path)
    since = time.time() - days * DAY_S
    with closing(open_replay_store(settings)) as store:
        seen = evaluate.traffic(store.exchanges(since, tenant), evaluate.backend_names(settings))
        judging, replayed = store.judged_usd(since), spent.replay_usd(store, since)
    told = evaluate.evaluated(seen, policies or evaluate.BASELINES, judging, replayed)
    if picture is not None:
        report.write_whole(picture, curve_svg(told.curve, told.policies))
    _print(told.as_text(), told.as_json(), json_to)


@main.command()
@click.option("--seeds", type=click.IntRange(1), default=5, show_default=True, help="How often, each time otherwise.")
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="The first seed.")
@click.option("--scale", type=click.FloatRange(0.01, 1.0), default=0.05, show_default=True, help="Of load and slots.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw offloading over time into this file (.svg, .png, .pdf).",
)
@click.option(
    "--json", "json_to", is_flag=False, flag_value=STDOUT, metavar="[FILE]", help="Report as JSON, there or into FILE."
)
@click.option("--config", "path", type=click.Path(path_type=Path, dir_okay=False), help="Is checked; not needed.")
def simulate(
    seeds: int, first: int, scale: float, picture: Path | None, json_to: str | None, path: Path | None
) -> None:
    """Drive the real router with a half hour of arrivals and modelled backends: six policies under one load."""
    if path is not None:
        config.load(path)
    say = lambda line: click.echo(f"simulate: {line}", err=True)  # noqa: E731
    told = simulated(Assumptions(scale=scale), range(first, first + seeds), say)
    _print(told.as_text(), told.as_json(), json_to)
    if picture is not None:
        told.draw(picture)


def _settings(path: Path | None) -> config.Config:
    """The configuration, with at least one backend and a store that is there."""
    settings = config.load(path)
    if not settings.backends:
        raise ConfigError("backends: none is configured; at least one [[backends]] table is required")
    if not is_there(settings.store.url):
        raise IccacheError(f"there is no store at {shown(settings.store.url)}: `iccache serve` makes it")
    return settings


def _print(text: str, data: dict[str, Any], json_to: str | None) -> None:
    """JSON alone on standard output where it is wanted there, else the text."""
    encoded = orjson.dumps(data, option=orjson.OPT_INDENT_2).decode()
    if json_to == STDOUT:
        click.echo(encoded)
        return
    click.echo(text)  # first: what cannot be written to a file is not lost
    if json_to is not None:
        report.write_whole(Path(json_to), encoded + "\n")


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal, lines elsewhere; on standard error in both cases."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console) as bar:
        yield Shown(bar)


class Told:
    """Counts what happened."""

    def __init__(self) -> None:
        self.total = self.seen = self.improved = 0

    def begin(self, total: int) -> None:
        self.total = total

    def step(self, result: Result | None, money: Money) -> None:
        self.seen += 1
        self.improved += result is Result.IMPROVED


class Shown(Told):
    """On a terminal."""

    def __init__(self, bar: Bar) -> None:
        super().__init__()
        self.bar = bar
        self.task = bar.add_task("replay")

    def begin(self, total: int) -> None:
        super().begin(total)
        self.bar.update(self.task, total=total)

    def step(self, result: Result | None, money: Money) -> None:
        super().step(result, money)
        said = f"replay: {self.improved} improved, {money.bound / NUSD:.4f} USD"
        self.bar.update(self.task, completed=self.seen, description=said)


class Lines(Told):
    """In a log: one line at the beginning, then at most one every LINE_EVERY_S."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._next = clock() + LINE_EVERY_S

    def begin(self, total: int) -> None:
        super().begin(total)
        click.echo(f"replay: {total} examples are worth asking again", err=True)

    def step(self, result: Result | None, money: Money) -> None:
        super().step(result, money)
        if self._clock() >= self._next or self.seen == self.total:
            self._next = self._clock() + LINE_EVERY_S
            spent = f"{money.bound / NUSD:.6f} USD"
            click.echo(f"replay: {self.seen} of {self.total}, {self.improved} improved, {spent}", err=True)
