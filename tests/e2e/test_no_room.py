"""What an operator is told where the disk is full or permissions are missing: one line with the cure, nothing lost."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from iccache.types import ExampleStats
from replay.store import open_replay_store
from tests.e2e.served import only_read
from tests.factories import make_example
from tests.replay.world import make_settings

SMALL_BYTES = 1000  # no file of a process may grow beyond it: as on a full disk


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A configuration, and a store with one example worth asking again in the folder `data`."""
    (tmp_path / "data").mkdir()
    settings = make_settings(tmp_path / "data", "http://127.0.0.1:9")
    store = open_replay_store(settings)
    store.admit(make_example(stats=ExampleStats(uses=3, gain=0.5)))
    store.close()
    (tmp_path / "iccache.toml").write_text(
        f'[store]\nurl = "{settings.store.url}"\n[[backends]]\nname = "large"\nbase_url = "http://127.0.0.1:9"\n'
        'model = "m"\nusd_per_million_output_tokens = 4.0\n'
    )
    return tmp_path


def ended(place: Path, module: str, *arguments: str, **given: object) -> subprocess.CompletedProcess[str]:
    """A command after its end; without the powers of root where it is root's."""
    command = [sys.executable, "-m", module, *arguments, "--config", str(place / "iccache.toml")]
    if given.pop("barred", False):
        command = only_read(command)
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        command, stderr=subprocess.PIPE, text=True, timeout=120, check=False, **{"stdout": subprocess.PIPE, **given}
    )


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_BYTES, SMALL_BYTES))


@pytest.mark.parametrize(("module", "command"), [("replay", "run"), ("iccache", "stats"), ("iccache", "serve")])
def test_no_room_for_the_stores_log_is_said_to_be_a_full_disk(place: Path, module: str, command: str) -> None:
    done = ended(place, module, command, preexec_fn=small_files)

    assert done.returncode == 1
    assert "cache.db: cannot be opened: the disk is full" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    again = ended(place, "iccache", "stats")
    assert (again.returncode, again.stdout.splitlines()[0]) == (0, "1 examples")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    ("module", "arguments"), [("replay", ("plan", "--json")), ("iccache", ("export",)), ("iccache", ("stats",))]
)
def test_where_standard_output_is_a_full_disk_one_line_says_so(
    place: Path, module: str, arguments: tuple[str, ...]
) -> None:
    with Path("/dev/full").open("w") as full:
        done = ended(place, module, *arguments, stdout=full)

    assert done.returncode == 1
    assert [line.partition(": ")[2] for line in done.stderr.splitlines()] == [
        "standard output: No space left on device"
    ]


@pytest.mark.parametrize(("module", "command"), [("replay", "plan"), ("iccache", "stats")])
@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_a_folder_that_is_barred_is_named_in_one_line(place: Path, module: str, command: str, mode: int) -> None:
    (place / "data").chmod(mode)
    try:
        done = ended(place, module, command, barred=True)
    finally:
        (place / "data").chmod(0o755)

    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "cache.db" in line
    assert "ermission" in line


def test_a_report_that_has_no_room_in_its_file_is_printed_all_the_same(place: Path) -> None:
    (place / "closed").mkdir(mode=0o555)

    done = ended(place, "replay", "plan", "--json", str(place / "closed" / "plan.json"), barred=True)

    assert done.returncode == 1
    assert "e1" in done.stdout
    assert "plan.json: cannot be written: Permission denied" in done.stderr


def test_what_was_begun_of_a_report_goes_when_there_is_no_room(tmp_path: Path) -> None:
    code = "from pathlib import Path; from replay.report import write_whole; write_whole(Path('r.json'), 'x' * 5000)"

    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        preexec_fn=small_files,
        check=False,
    )

    assert "r.json: cannot be written" in done.stderr
    assert list(tmp_path.iterdir()) == []
