"""Real child processes, but small ones."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iccache.demo import servers
from iccache.demo.servers import ServerError, free_port, run_to_end, running
from iccache.errors import IccacheError

SLEEPS = ["-c", "import time; print('asleep', flush=True); time.sleep(600)"]
HOLDS_A_CHILD = """
import sys, time
from pathlib import Path
from iccache.demo.servers import running
with running("sleeper", ["-c", "import time; time.sleep(600)"], Path(sys.argv[1])) as child:
    print(child.process.pid, flush=True)
    time.sleep(600)
"""


def ends(pid: int, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_child_ends_with_its_block(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), running("sleeper", SLEEPS, tmp_path / "log") as child:
        raise KeyboardInterrupt

    assert child.process.returncode is not None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_CHILD, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.5)  # until it has become what it is to be

    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()

    assert ends(pid)


def test_a_server_that_ends_at_once_is_told_with_its_last_words(tmp_path: Path) -> None:
    fails = ["-c", "import sys; sys.exit('the port is taken')"]

    with running("the server", fails, tmp_path / "log") as child, pytest.raises(ServerError) as caught:
        child.wait_until_ready(f"http://127.0.0.1:{free_port()}/health", timeout_s=30)

    assert str(caught.value) == "the server ended with 1: the port is taken"


def test_what_fails_because_a_server_ended_is_told_as_that(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(ServerError, match="sleeper ended with -9: asleep"), running("sleeper", SLEEPS, log) as child:
        while "asleep" not in child.last_words():
            time.sleep(0.05)
        child.process.kill()
        child.process.wait()
        raise IccacheError("connection refused")


def test_a_server_that_never_answers_is_told(tmp_path: Path) -> None:
    with running("the server", SLEEPS, tmp_path / "log") as child, pytest.raises(ServerError, match="does not answer"):
        child.wait_until_ready(f"http://127.0.0.1:{free_port()}/health", timeout_s=0.5)


def test_what_a_command_prints_is_kept_apart_from_its_errors(tmp_path: Path) -> None:
    speaks = ["-c", "import sys; print('{}'); print('progress', file=sys.stderr)"]

    assert run_to_end("job", speaks, tmp_path) == "{}\n"


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="job ended with 1: no store"):
        run_to_end("job", ["-c", "import sys; sys.exit('no store')"], tmp_path)


def test_settings_in_the_environment_do_not_reach_the_children() -> None:
    environ = {"ICCACHE_SERVER__PORT": "1", "ICCACHE_DEMO_MODELS": "/m", "PATH": "/bin"}

    assert servers.clean_environment(environ) == {"ICCACHE_DEMO_MODELS": "/m", "PATH": "/bin"}
