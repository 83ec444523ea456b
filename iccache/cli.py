"""The command line. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from iccache import __version__, config
from iccache.demo.command import demo
from iccache.errors import ConfigError, IccacheError, of_system

if TYPE_CHECKING:
    from iccache.examples.store import ExampleStore

STDOUT = "-"
DAY_S = 86400.0

config_option = click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Configuration file; default: iccache.toml where there is one, else the built-in defaults.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
tenant_option = click.option("--tenant", metavar="T", help="Of this tenant only.")
subject_option = click.option("--subject", metavar="S", help="Of this end user of the tenant only.")
file_argument = click.argument("file", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))


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
            forget_output()
            sys.exit(1)
        except OSError as exc:
            said = of_system(exc)
            if said is None:
                raise
            forget_output()
            _say(said)
            sys.exit(1)


def forget_output() -> None:
    """What is still to be written to standard output goes nowhere: Python would fail at it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    """Print the configuration in force: file, environment and defaults together. It shows no key and no password."""
    if example:
        click.echo(config.example_toml(), nl=False)
    elif table:
        click.echo(config.markdown_table(), nl=False)
    elif as_json:
        click.echo(config.without_passwords(config.to_json(config.load(path))))
    else:
        click.echo(config.without_passwords(config.to_toml(config.load(path))), nl=False)


@main.command()
@config_option
@json_option
@click.argument("request_id")
def explain(path: Path | None, as_json: bool, request_id: str) -> None:
    """Why a request went where it went, and with which examples."""
    from iccache import explain as explaining

    with _reading(config.load(path)) as store:
        exchange = store.exchange(request_id)
        if exchange is None:
            raise IccacheError(f"no exchange {request_id} is recorded")
        record = explaining.exchange_as_json(exchange, store.feedback(request_id))
    if as_json:
        _print_json(record)
    else:
        explaining.show(record)


@main.command(name="import")
@config_option
@json_option
@click.argument("file", metavar="FILE.jsonl", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--tenant", metavar="T", required=True, help="Whose examples they become.")
@click.option("--subject", metavar="S", help="Their end user; default: what the line says, as a request would.")
def import_(path: Path | None, as_json: bool, file: Path, tenant: str, subject: str | None) -> None:
    """Make examples of logs: OpenAI chat JSONL, the last message being the answer; .gz too.

    Run it again after an interruption: it goes on where it was. Bad lines are named and skipped; the exit code is 1
    only when no line was good, or the file could not be gone through.
    """
    settings = config.load(path)
    _require_tenant(settings, tenant)
    from iccache.data import importing
    from iccache.data.progress import progress

    started = time.monotonic()
    most = settings.server.max_body_bytes, settings.store.max_bytes
    options = importing.Options(tenant, subject, *most, screen=settings.cache.screen)
    with closing(_open(settings)) as store, progress() as told:
        importer = importing.Importer(store, *_reading_tools(settings), options)
        try:
            counts, begun = importer.run(file, told)
        except KeyboardInterrupt:
            raise IccacheError("interrupted: run it again to go on") from None
    done = importing.result(counts, begun, time.monotonic() - started)
    if as_json:
        _print_json(done)
    else:
        resumed = f" (going on after line {begun})" if begun else ""
        click.echo(
            f"{done['lines']} lines{resumed}: {done['added']} examples added, {done['updated']} updated, "
            f"{done['known']} known already, {done['bad']} bad lines, {done['seconds']:.1f} s"
        )
    if counts.bad and counts.bad == counts.lines:
        raise IccacheError(f"{file}: no line could be imported")


@main.command()
@config_option
@json_option
@click.argument("file", metavar="[FILE]", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True), default="-")
@tenant_option
@subject_option
def export(path: Path | None, as_json: bool, file: Path, tenant: str | None, subject: str | None) -> None:
    """Write examples as OpenAI chat JSONL, to standard output by default; the summary goes to standard error."""
    from iccache.data import exporting

    to, settings = None if str(file) == STDOUT else file, config.load(path)
    with _reading(settings) as store:
        count, size = exporting.export(store, to, tenant, _known_as(settings, subject))
    done = {"file": None if to is None else str(to), "examples": count, "bytes": size}
    if as_json:
        _print_json(done, err=True)
    else:
        click.echo(f"{count} examples, {size} bytes{'' if to is None else f' in {to}'}", err=True)


@main.group()
def examples() -> None:
    """List, show and delete examples."""


@examples.command(name="list")
@config_option
@json_option
@tenant_option
@subject_option
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many, newest first.")
@click.option("--offset", type=click.IntRange(0), default=0, help="Leave out so many of the newest.")
def list_examples(
    path: Path | None, as_json: bool, tenant: str | None, subject: str | None, limit: int, offset: int
) -> None:
    """One line each, newest first."""
    from iccache import explain as explaining

    settings = config.load(path)
    with _reading(settings) as store:
        found = store.list_examples(tenant, _known_as(settings, subject), limit=limit, offset=offset)
        total = store.count_examples(tenant)
    if as_json:
        _print_json({"examples": [explaining.example_as_json(e) for e in found], "total_of_tenant": total})
    else:
        explaining.list_examples(found)


@examples.command()
@config_option
@json_option
@tenant_option
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
def show(path: Path | None, as_json: bool, tenant: str | None, ids: tuple[str, ...]) -> None:
    """Examples whole, with their statistics. Exit code 1 when one of them is not there."""
    from iccache import explain as explaining

    with _reading(config.load(path)) as store:
        found = [e for e in store.examples(ids) if tenant in (None, e.tenant)]
    if as_json:
        _print_json({"examples": [explaining.example_as_json(e) for e in found]})
    else:
        for example in found:
            explaining.show_example(example)
    _require_all(ids, {e.id for e in found})


@examples.command()
@config_option
@json_option
@tenant_option
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, and delete nothing.")
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
def delete(path: Path | None, as_json: bool, tenant: str | None, dry_run: bool, ids: tuple[str, ...]) -> None:
    """Delete text, embedding and statistics. Exit code 1 when one of them was not there; the others are gone."""
    with _writing(config.load(path)) as store:
        found = list(dict.fromkeys(e.id for e in store.examples(ids) if tenant in (None, e.tenant)))
        deleted = 0 if dry_run else store.delete_examples(found)
    if as_json:
        missing = sorted(set(ids) - set(found))
        _print_json({"found": found, "deleted": deleted, "missing": missing, "dry_run": dry_run})
    else:
        click.echo(f"{len(found)} examples would be deleted" if dry_run else f"{deleted} examples deleted")
    _require_all(ids, set(found))


@examples.command()
@config_option
@json_option
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
def hold(path: Path | None, as_json: bool, ids: tuple[str, ...]) -> None:
    """Keep examples, and what was derived from them, from being shown, until they are released."""
    from iccache.types import Hold

    _change(path, as_json, ids, "held", lambda store: store.hold(ids, Hold.SUSPECT))


@examples.command()
@config_option
@json_option
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
def release(path: Path | None, as_json: bool, ids: tuple[str, ...]) -> None:
    """Let held examples be shown. Exit code 1 when one of them is not there; the others are released."""
    _change(path, as_json, ids, "released", lambda store: store.release(ids))


@examples.command()
@config_option
@json_option
@click.option("--tenant", metavar="T", required=True, help="Whose.")
@subject_option
@click.option("--dry-run", is_flag=True, help="Say what would be erased, and erase nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge(path: Path | None, as_json: bool, tenant: str, subject: str | None, dry_run: bool, yes: bool) -> None:
    """Erase a tenant, or one end user of it: examples, and all text of their requests."""
    settings = config.load(path)
    names = dict.fromkeys([subject, _known_as(settings, subject)])  # as given too: it is how older versions wrote it
    with _writing(settings) as store:
        would = _sum([store.purge(tenant, name, dry_run=True) for name in names])
        if not dry_run and any(would.values()):
            whose = tenant if subject is None else f"{subject} of {tenant}"
            _confirm(
                f"Erase {would['examples']} examples and the text of {would['exchanges']} requests of {whose}?", yes
            )
        done = would if dry_run else _sum([store.purge(tenant, name) for name in names])
    if as_json:
        _print_json({**done, "dry_run": dry_run})
    else:
        said = "would be erased" if dry_run else "erased"
        click.echo(f"{done['examples']} examples and the text of {done['exchanges']} requests {said}")


@main.command()
@config_option
@json_option
@tenant_option
@click.option("--days", type=click.FloatRange(0, min_open=True), default=30, show_default=True, help="How far back.")
def stats(path: Path | None, as_json: bool, tenant: str | None, days: float) -> None:
    """Examples, bytes, decisions, offloading, cost and saving, quality by backend and by day."""
    from iccache.data import stats as counting

    settings = config.load(path)
    with _reading(settings) as store:
        found = counting.stats(store, settings, time.time() - days * DAY_S, tenant)
    if as_json:
        _print_json(found)
    else:
        counting.show(found)


@main.command()
@config_option
@json_option
@file_argument
def backup(path: Path | None, as_json: bool, file: Path) -> None:
    """Write a consistent copy of the store to FILE, also while it serves. A FILE there is replaced."""
    with _reading(config.load(path)) as store:
        store.backup(file)
    size = file.stat().st_size
    if as_json:
        _print_json({"file": str(file), "bytes": size})
    else:
        click.echo(f"{file}: {size} bytes")


@main.command()
@config_option
@json_option
@file_argument
@click.option("--keep/--no-keep", default=True, show_default=True, help="Keep the old content in STORE.before-restore.")
def restore(path: Path | None, as_json: bool, file: Path, keep: bool) -> None:
    """Put a backup in the place of the store's content, also while it serves. What came after the backup is lost."""
    settings = config.load(path)
    from iccache.examples.sqlite.key import key_of
    from iccache.examples.store import restore_store

    kept = restore_store(settings.store.url, file, keep=keep, key=key_of(settings.store, os.environ))
    with _reading(settings) as store:
        count = store.count_examples()
    if as_json:
        _print_json({"restored": str(file), "examples": count, "kept": None if kept is None else str(kept)})
    else:
        click.echo(f"restored {file}: {count} examples" + ("" if kept is None else f"; what there was is in {kept}"))


@main.command()
@config_option
@json_option
@click.argument("file", metavar="[FILE]", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--old-key-env", metavar="NAME", help="Environment variable with the key until now, to change the key.")
@click.option("--in-clear", is_flag=True, help="Take the encryption off.")
def encrypt(path: Path | None, as_json: bool, file: Path | None, old_key_env: str | None, in_clear: bool) -> None:
    """Encrypt the store, or the backup FILE, with the key of store.key_env. Nobody may have it open meanwhile."""
    settings = config.load(path)
    from iccache.examples.sqlite.encrypt import bring_to_key, in_clear_beside
    from iccache.examples.sqlite.key import key_in, key_of
    from iccache.examples.store import file_of

    named = key_of(settings.store, os.environ)
    old = named if old_key_env is None else key_in(os.environ, old_key_env, "--old-key-env")
    if named is None and not in_clear:
        raise ConfigError("store.key_env: is not set: name there the environment variable with the key")
    target = file_of(settings.store.url) if file is None else file.absolute()
    if target is None:
        raise ConfigError("store.url: names no file")
    done = bring_to_key(target, None if in_clear else named, old)
    left = [] if in_clear else in_clear_beside(target)
    if as_json:
        _print_json({"file": str(target), "done": done.name.lower(), "in_clear": [str(each) for each in left]})
    else:
        click.echo(f"{target}: {done.value}")
    for each in left:
        click.echo(f"iccache: {each} is in clear: delete it, or encrypt it with `iccache encrypt {each}`", err=True)


def _change(
    path: Path | None, as_json: bool, ids: tuple[str, ...], name: str, change: Callable[[ExampleStore], list[str]]
) -> None:
    """Do something to examples, and say to which; its past participle is `name`."""
    with _writing(config.load(path)) as store:
        found = {e.id for e in store.examples(ids)}
        changed = change(store)
    if as_json:
        _print_json({name: changed, "missing": sorted(set(ids) - found)})
    else:
        click.echo(f"{len(changed)} examples {name}")
    _require_all(ids, found)


def _known_as(settings: config.Config, subject: str | None) -> str | None:
    """The end user's name as it was written down."""
    from iccache.examples.redact import Redactor

    return None if subject is None else Redactor.of(settings.privacy).name(subject)


def _sum(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {key: sum(count[key] for count in counts) for key in counts[0]}


def _require_tenant(settings: config.Config, tenant: str) -> None:
    """Where tenants are configured, it has to be one of them: nobody else's requests could be shown its examples."""
    if not tenant.isprintable():
        raise ConfigError("--tenant: holds characters that no name has")
    names = [t.name for t in settings.tenants]
    if names and tenant not in names:
        raise ConfigError(f"--tenant: there is no tenant {tenant!r}; configured: {', '.join(names)}")
    if not names and tenant != "default":
        click.echo("iccache: no tenants are configured: only examples of the tenant 'default' are shown", err=True)


def _require_all(ids: tuple[str, ...], found: set[str]) -> None:
    missing = [id for id in dict.fromkeys(ids) if id not in found]
    if missing:
        raise IccacheError(f"no such example: {', '.join(missing)}")


def _confirm(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("there is nobody to ask: say --yes, or look with --dry-run")
    click.confirm(question, abort=True, err=True)


def _reading_tools(settings: config.Config) -> tuple[Any, Any, Any]:
    """Embedder, redactor and tokenizer, as the proxy would have them."""
    from iccache.examples.embed import make_embedder
    from iccache.examples.redact import Redactor
    from iccache.examples.tokens import make_tokenizer

    by_default = config.Backend(name="none", base_url="http://none", model="none")
    tokenizer = make_tokenizer([by_default, *settings.by_price()][-1].tokenizer)
    redactor = Redactor.of(settings.privacy)
    return make_embedder(settings.embedder), redactor, tokenizer


def _open(settings: config.Config) -> ExampleStore:
    from iccache.examples.sqlite.key import key_of
    from iccache.examples.store import open_store

    store, cache, key = settings.store, settings.cache, key_of(settings.store, os.environ)
    return open_store(store.url, key=key, decay_per_hour=cache.decay_per_hour, quality_floor=cache.quality_floor)


@contextmanager
def _writing(settings: config.Config) -> Iterator[ExampleStore]:
    """The store; it has to exist."""
    from iccache.examples.store import is_there, shown

    if not is_there(settings.store.url):
        raise IccacheError(f"there is no store at {shown(settings.store.url)}")
    with closing(_open(settings)) as store:
        yield store


@contextmanager
def _reading(settings: config.Config) -> Iterator[ExampleStore]:
    """The store, for reading only; it has to exist."""
    with _writing(settings) as store, closing(store.reader()) as reader:
        yield reader


def _print_json(value: Any, *, err: bool = False) -> None:
    import orjson

    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY).decode(), err=err)


def _log_to_stderr(level: str) -> None:
    """JSON lines where a program reads them, plain lines on a terminal."""
    from iccache.logs import FromClients

    handler = logging.StreamHandler()
    make: Callable[[], logging.Formatter] = _plain if sys.stderr.isatty() else _json
    handler.setFormatter(make())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("faiss", "sentence_transformers", "transformers"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("aiohttp.server").addFilter(FromClients())


def _plain() -> logging.Formatter:
    return logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


def _json() -> logging.Formatter:
    from iccache.logs import JsonFormatter

    return JsonFormatter()


main.add_command(demo)
