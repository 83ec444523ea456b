"""The command line. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from iccache import __version__, config
from iccache.demo.command import demo
from iccache.errors import ConfigError, IccacheError

config_option = click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Configuration file; default: iccache.toml where there is one, else the built-in defaults.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Commands(click.Group):
    """Turns our errors into one line and an exit code: 1 failed, 2 wrong usage or configuration."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as exc:
            _say(exc)
            sys.exit(2)
        except IccacheError as exc:
            _say(exc)
            sys.exit(1)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)


def _say(exc: IccacheError) -> None:
    for line in str(exc).splitlines():
        click.echo(f"iccache: {line}", err=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="iccache")
def main() -> None:
    """A caching proxy in front of language models: past answers as examples, and a router that learns."""


@main.command()
@config_option
@click.option("--host", default=None, help="Overrides server.host.")
@click.option("--port", type=click.IntRange(0, 65535), default=None, help="Overrides server.port.")
@click.option("--workers", type=click.IntRange(1), default=None, help="Overrides server.workers.")
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]))
def serve(path: Path | None, host: str | None, port: int | None, workers: int | None, log_level: str) -> None:
    """Run the proxy."""
    for key, value in (("HOST", host), ("PORT", port), ("WORKERS", workers)):
        if value is not None:
            os.environ[f"ICCACHE_SERVER__{key}"] = str(value)  # so that it also holds after a reload
    settings = config.load(path)
    _log_to_stderr(log_level)
    with tempfile.TemporaryDirectory(prefix="iccache-metrics-") as folder:
        if settings.server.workers > 1:
            os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", folder)  # has to be set before the metrics are made
        from iccache.api import serve as server

        sys.exit(server.serve(settings, path))


@main.command()
@config_option
@json_option
def check(path: Path | None, as_json: bool) -> None:
    """Validate the configuration, load the embedder, open the store, call every backend."""
    settings = config.load(path)
    from iccache import check as checks

    sys.exit(checks.run(settings, as_json))


@main.command(name="config")
@config_option
@json_option
@click.option("--example", is_flag=True, help="Print a file with every setting, its default and its sentence.")
@click.option("--table", is_flag=True, help="Print every setting as a Markdown table.")
def show_config(path: Path | None, as_json: bool, example: bool, table: bool) -> None:
    """Print the configuration in force: file, environment and defaults together. It holds no key."""
    if example:
        click.echo(config.example_toml(), nl=False)
    elif table:
        click.echo(config.markdown_table(), nl=False)
    elif as_json:
        click.echo(config.to_json(config.load(path)))
    else:
        click.echo(config.to_toml(config.load(path)), nl=False)


@main.command()
@config_option
@json_option
@click.argument("request_id")
def explain(path: Path | None, as_json: bool, request_id: str) -> None:
    """Why a request went where it went, and with which examples."""
    from iccache import explain as explaining

    store = _store(config.load(path))
    exchange = store.exchange(request_id)
    if exchange is None:
        raise IccacheError(f"no exchange {request_id} is recorded")
    record = explaining.exchange_as_json(exchange, store.feedback(request_id))
    if as_json:
        _print_json(record)
    else:
        explaining.show(record)


def _store(settings: config.Config) -> Any:
    """The store, for reading; it has to exist."""
    from iccache.examples.store import open_store

    name = settings.store.url.removeprefix("sqlite:///")
    if not Path(name).exists():
        raise IccacheError(f"there is no store at {name}")
    return open_store(settings.store.url).reader()


def _print_json(value: Any) -> None:
    import orjson

    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY).decode())


def _log_to_stderr(level: str) -> None:
    """JSON lines where a program reads them, plain lines on a terminal."""
    handler = logging.StreamHandler()
    make: Callable[[], logging.Formatter] = _plain if sys.stderr.isatty() else _json
    handler.setFormatter(make())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("faiss", "sentence_transformers", "transformers"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _plain() -> logging.Formatter:
    return logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


def _json() -> logging.Formatter:
    from iccache.logs import JsonFormatter

    return JsonFormatter()


main.add_command(demo)
