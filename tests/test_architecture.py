"""Who may import whom, and where things are kept. Read from the sources, so that a test run need not reach a line."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("router", "iccache", "replay")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LOOSE_NAMES = {"utils", "util", "helpers", "helper", "base", "common", "misc", "manager", "managers"}

ONE_HOME = {
    "faiss": {"iccache/examples/index/flat.py", "iccache/examples/index/clustered.py"},
    "sentence_transformers": {"iccache/examples/embed/sentence_transformer.py"},
    "torch": {"iccache/examples/embed/sentence_transformer.py", "iccache/examples/embed/onnx.py"},
    "onnxruntime": {"iccache/examples/embed/onnx.py"},
    "sqlite_utils": {"iccache/examples/database.py"},
    "sqlite3": {"iccache/examples/sqlite/driver.py"},
    "sqlcipher3": {"iccache/examples/sqlite/driver.py"},
    "psycopg": {"iccache/examples/postgres/driver.py", "iccache/examples/postgres/connection.py"},
    "prometheus_client": {"iccache/metrics.py", "replay/report.py", "iccache/backends/engine.py"},  # the last reads
    "sklearn": {"iccache/examples/training.py"},
    "bpe_openai": {"iccache/examples/encoding.py"},
}
IMPURE = {
    "asyncio", "concurrent", "datetime", "http", "multiprocessing", "os", "random", "socket", "sqlite3", "subprocess",
    "threading", "time", "urllib",
}  # fmt: skip


class Import(NamedTuple):
    module: str  # imported
    line: int
    when: str  # "start": while the importing module is loaded; "call": in a function; "never": for types only


def imports(path: Path) -> Iterator[Import]:
    """Every import in a file. `from a import b` is an import of a.b where that is a module of ours, else of a."""
    yield from _imports(ast.parse(path.read_text(encoding="utf-8")), "start")


def _imports(node: ast.AST, when: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, when)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, "imports are absolute"
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                yield Import(whole if whole in MODULES else child.module, child.lineno, when)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _imports(child, "call" if when == "start" else when)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for part in child.body:
                yield from _imports(ast.Module([part], []), "never")
            for part in child.orelse:
                yield from _imports(ast.Module([part], []), when)
        else:
            yield from _imports(child, when)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


MODULES = {name_of(path): path for path in FILES}
IMPORTS = {path: list(imports(path)) for path in FILES}


def offences(wrong: dict[str, set[str]]) -> list[str]:
    """`file:line imports module` for every file below a package that imports what it must not."""
    return [
        f"{place(path)}:{found.line} imports {found.module}"
        for path in FILES
        for found in IMPORTS[path]
        if found.module.partition(".")[0] in wrong.get(path.relative_to(ROOT).parts[0], set())
    ]


def test_imports_point_down() -> None:
    assert (
        offences({"router": {"iccache", "replay", "tests"}, "iccache": {"replay", "tests"}, "replay": {"tests"}}) == []
    )


def test_the_router_is_pure() -> None:
    allowed = (sys.stdlib_module_names - IMPURE) | {"numpy", "router"}
    found = [
        f"{place(path)}:{i.line} imports {i.module}"
        for path in FILES
        if path.is_relative_to(ROOT / "router")
        for i in IMPORTS[path]
        if i.module.partition(".")[0] not in allowed
    ]
    assert found == []


def test_no_module_needs_itself_to_be_imported() -> None:
    graph = {
        name: {i.module for i in IMPORTS[path] if i.when == "start" and i.module in MODULES and i.module != name}
        for name, path in MODULES.items()
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as exc:
        pytest.fail(" <- ".join(exc.args[1]))


@pytest.mark.parametrize("package", ONE_HOME)
def test_prescribed_packages_stand_behind_one_file(package: str) -> None:
    users = {place(path) for path in FILES for i in IMPORTS[path] if i.module.partition(".")[0] == package}
    assert users <= ONE_HOME[package]


def test_files_are_named_after_what_they_hold() -> None:
    assert [place(p) for p in FILES if p.stem in LOOSE_NAMES or p.parent.name in LOOSE_NAMES] == []


def test_packages_are_listed_and_typed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {name_of(path) for path in FILES if path.name == "__init__.py"}
    assert listed == there
    assert {name_of(path).rpartition(".")[0] or name_of(path) for path in FILES if path.name != "__init__.py"} <= there
    assert [p for p in PACKAGES if not (ROOT / p / "py.typed").is_file()] == []


def test_tests_have_packages() -> None:
    """Without __init__.py, tests/router would stand in the way of router."""
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert [place(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("iccache", ["--help"]), ("iccache", ["serve", "--help"]), ("iccache", ["config"]), ("replay", ["--help"])],
)
def test_help_answers_at_once(module: str, arguments: list[str], tmp_path: Path) -> None:
    """That is, without loading what takes seconds."""
    heavy = ["torch", "faiss", "sentence_transformers", "sklearn", "openai", "xllamacpp", "transformers", "sqlcipher3"]
    code = (
        f"import runpy, sys; sys.argv = ['x', *{arguments!r}]\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as exc: assert not exc.code, exc.code\n"
        f"print('loaded:', sorted(set({heavy}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"
