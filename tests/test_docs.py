"""What is written is true of the code. `python -m tests.test_docs` writes the generated parts anew."""

from __future__ import annotations

import ast
import re
import tempfile
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import iccache.cli
import replay.cli
from iccache import __version__, config, plan
from iccache.api.feedback import FORMS
from iccache.dialects import body
from iccache.metrics import Metrics
from iccache.types import DecisionKind, Reason
from replay import report
from replay.store import open_replay_store

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
EXAMPLE = ROOT / "deploy" / "iccache.toml"
SOURCES = "\n".join(
    path.read_text()
    for package in ("iccache", "replay")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name != "config.py"
)
PROSE = [README, ROOT / "CHANGELOG.md"]
PROGRAMS: dict[str, click.Group] = {"iccache": iccache.cli.main, "iccache-replay": replay.cli.main}


def metrics_table() -> str:
    lines = ["| metric | type | labels | |", "|---|---|---|---|"]
    lines += [f"| `{r.name}` | {r.type} | {r.labels} | {r.sentence} |" for r in Metrics().rows()]
    return "\n".join(lines) + "\n"


def replay_metrics_table() -> str:
    """Read from what replay writes."""
    with tempfile.TemporaryDirectory() as folder:
        store = open_replay_store(config.parse({"store": {"url": f"sqlite:///{folder}/empty.db"}}))
        text = report.metrics(store, 0.0)
        store.close()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    labels = {name: ", ".join(re.findall(r"(\w+)=", rest)) for name, rest in re.findall(r"^(\w+)(.*)$", text, re.M)}
    lines = ["| metric | type | labels | |", "|---|---|---|---|"]
    for name, sentence in re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE):
        lines.append(f"| `{name}` | {kinds[name]} | {labels[name]} | {sentence} |")
    return "\n".join(lines) + "\n"


GENERATED = {"settings": config.markdown_table, "metrics": metrics_table, "replay metrics": replay_metrics_table}


def part(name: str) -> str:
    """What stands between the markers `<!-- name -->` and `<!-- /name -->` in the README."""
    [found] = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README.read_text(), re.DOTALL)
    return str(found)


def section(title: str) -> str:
    """What stands below a heading, up to the next one of any level."""
    [found] = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", README.read_text(), re.DOTALL | re.MULTILINE)
    return str(found)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def write() -> None:
    text = README.read_text()
    for name, table in GENERATED.items():
        text = text.replace(
            f"<!-- {name} -->\n{part(name)}<!-- /{name} -->", f"<!-- {name} -->\n{table()}<!-- /{name} -->"
        )
    README.write_text(text)
    EXAMPLE.write_text(config.example_toml())


# ---- generated


@pytest.mark.parametrize("name", GENERATED)
def test_tables_are_those_of_the_code(name: str) -> None:
    assert part(name) == GENERATED[name](), "run `make docs`"


def test_the_example_configuration_is_that_of_the_code() -> None:
    assert EXAMPLE.read_text() == config.example_toml(), "run `make docs`"
    config.parse(tomllib.loads(EXAMPLE.read_text()))


def test_the_demo_s_table_has_its_place() -> None:
    part("demo")


# ---- headers, reasons, feedback


def headers_in_code() -> set[str]:
    """Every string of the sources that is a header of ours."""
    found = set()
    for path in (ROOT / "iccache").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"\Ax-iccache-[a-z-]*[a-z]\Z", node.value))
    return found


def test_headers_are_documented() -> None:
    documented = set(re.findall(r"`(x-iccache-[a-z-]+)[:`]", README.read_text()))
    assert documented == headers_in_code()


def test_request_headers_are_those_that_are_read() -> None:
    read = {value for name, value in vars(plan).items() if name.startswith("HEADER_")}
    assert set(re.findall(r"^\| `(x-iccache-[a-z-]+):", section("Request headers"), re.MULTILINE)) == read


def test_the_body_takes_what_the_headers_take() -> None:
    for name in re.findall(r'"(\w+)": \.\.\.', section("Request headers")):
        body.controls({"iccache": {name: None}})


def test_decisions_and_reasons_are_documented() -> None:
    told = section("Response headers")
    assert set(re.findall(r"^\| `([a-z_]+)` \|", told, re.MULTILINE)) == {str(reason) for reason in Reason}
    [decisions] = re.findall(r"^\| `x-iccache-decision` \| (.*?)\.", told, re.MULTILINE)
    seen = [kind for kind in DecisionKind if kind is not DecisionKind.COMPARED]  # that one no client sees
    assert re.findall(r"`(\w+)`", decisions) == [str(kind) for kind in seen]


def test_forms_of_feedback_are_documented() -> None:
    assert set(re.findall(r'^\| `"(\w+)":', section("Feedback"), re.MULTILINE)) == set(FORMS)


# ---- the command line


def test_commands_are_documented() -> None:
    there = {f"{program} {name}" for program, group in PROGRAMS.items() for name in group.commands}
    assert set(re.findall(r"^\| `(iccache[a-z -]*)` \|", section("Command line"), re.MULTILINE)) == there


def test_every_command_that_is_shown_exists() -> None:
    shown = re.findall(
        r"(?:^    (?:17 \* \* \* \*  )?|`)(iccache|iccache-replay) ([a-z]+)([^\n`]*)", README.read_text(), re.MULTILINE
    )
    assert len(shown) > 10
    for program, name, rest in shown:
        assert name in PROGRAMS[program].commands, f"{program} {name}"
        command = PROGRAMS[program].commands[name]
        if isinstance(command, click.Group) and rest.strip():
            command = command.commands[rest.split()[0]]
        options = {o for p in command.params for o in p.opts} | {"--help"}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= options, f"{program} {name}{rest}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program: str) -> None:
    done = CliRunner().invoke(PROGRAMS[program], ["--help"])
    assert done.exit_code == 0
    for name, command in PROGRAMS[program].commands.items():
        assert name in done.output and command.help
        assert CliRunner().invoke(PROGRAMS[program], [name, "--help"]).exit_code == 0


def test_targets_of_make_that_are_shown_exist() -> None:
    there = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in [*PROSE, ROOT / ".ci" / "run"]:
        assert set(re.findall(r"(?:^\s*|`)make ([a-z]+)", path.read_text(), re.MULTILINE)) <= there


# ---- examples, paths, versions


@pytest.mark.parametrize("text", blocks("toml"))
def test_toml_examples_are_configurations(text: str) -> None:
    config.parse(tomllib.loads(text))


@pytest.mark.parametrize("text", blocks("python"))
def test_python_examples_are_python(text: str) -> None:
    ast.parse(text)


def test_settings_that_are_named_exist() -> None:
    there = {f"{s.section}.{s.key}" for s in config.settings()}
    sections = {name.partition(".")[0] for name in there}
    for path in PROSE:
        named = set(re.findall(r"`(\w+\.\w+)(?: = [^`]*)?`", path.read_text()))
        assert {name for name in named if name.partition(".")[0] in sections} <= there


def test_settings_that_nothing_reads_are_named() -> None:
    told = "".join(re.findall(r"^- \*\*Without effect so far:\*\* (.*?)\. ", README.read_text(), re.M | re.DOTALL))
    named = {f"{s.section}.{s.key}" for s in config.settings() if not re.search(rf"\.{s.key}\b", SOURCES)}
    read_in_config = {"backends.student"}
    assert set(re.findall(r"`([\w.]+)`", told)) == named - read_in_config


def test_files_that_are_named_exist() -> None:
    for path in PROSE:
        text = path.read_text()
        named = set(re.findall(r"(?<![\w/.~-])((?:iccache|router|replay|deploy|tests)/[\w./-]*\w)", text))
        named |= set(re.findall(r"\]\(([^)#:]+)\)", text))
        assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_links_within_the_page_lead_somewhere() -> None:
    text = README.read_text()
    headings = {re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in re.findall(r"^#+ (.+)$", text, re.M)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= headings


def test_no_machine_s_paths() -> None:
    written = [
        *PROSE,
        ROOT / "Makefile",
        ROOT / ".ci" / "run",
        *(p for p in (ROOT / "deploy").rglob("*") if p.is_file()),
    ]
    for path in written:
        assert not re.search(r"(?<![\w.])/(?:work|home|root|Users|tmp/venv)/|file:///", path.read_text()), path


def test_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert __version__ == version
    assert re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == version


if __name__ == "__main__":
    write()
