"""The `iccache demo` command: its options. What it does is in run.py, which loads the OpenAI client and rich."""

from __future__ import annotations

from pathlib import Path

import click

from iccache.demo.tasks import SEED
from iccache.errors import ConfigError


@click.command()
@click.option("--full", is_flag=True, help="100 held-out requests per task, however long it takes.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    default=None,
    metavar="FILE",
    help="Also write the results as JSON.",
)
@click.option("--student-url", default=None, metavar="URL", help="A student of one's own: OpenAI-compatible base URL.")
@click.option("--teacher-url", default=None, metavar="URL", help="The same for the teacher.")
@click.option("--seed", type=int, default=SEED, show_default=True, help="Draws the requests from the data.")
@click.option(
    "--models",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    metavar="FOLDER",
    help="Where the model files are kept; default: $ICCACHE_DEMO_MODELS, else ~/.cache/iccache/models.",
)
def demo(
    full: bool,
    json_file: Path | None,
    student_url: str | None,
    teacher_url: str | None,
    seed: int,
    models: Path | None,
) -> None:
    """The main job on real parts: two local language models, a real data set, the proxy, the OpenAI client.

    Ends within fifteen minutes on two cores, the first download of the models (1.2 GB) apart.
    """
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise ConfigError(f"{json_file}: there is no such folder to write to")
    for url in (student_url, teacher_url):
        if url is not None and not url.startswith(("http://", "https://")):
            raise ConfigError(
                f"{url}: is not a URL; an OpenAI-compatible base URL ends in /v1, as in http://HOST:PORT/v1"
            )
    try:
        from iccache.demo.run import Options, run  # noqa: PLC0415 - openai and rich are extras of the demo
    except ImportError as exc:
        raise ConfigError(f"the demo needs its extras, pip install 'iccache[demo]': {exc}") from exc
    run(Options(full, json_file, student_url, teacher_url, seed, models))
