"""What is written of the clients is what was found."""

from __future__ import annotations

import json

from tests.clients import environment, run


def test_the_readme_has_the_table_of_the_results() -> None:
    table = run.table(json.loads(run.RESULTS.read_text()))
    assert f"<!-- clients -->\n{table}<!-- /clients -->" in run.README.read_text(), "run `make clients`"


def test_every_suite_is_in_the_results_with_the_version_that_is_pinned() -> None:
    found = [(r["client"], r["version"], r["what"]) for r in json.loads(run.RESULTS.read_text())]
    assert found == [(s.client, s.version, s.what) for s in run.SUITES], "run `make clients`"


def test_pins_are_exact() -> None:
    for file in environment.PINS.glob("*.txt"):
        lines = [line for line in file.read_text().splitlines() if line and not line.lstrip().startswith("#")]
        assert [line for line in lines if "==" not in line] == [], file.name
