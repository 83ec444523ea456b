"""From the record in a store to what the command prints."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from iccache.examples.store import open_store
from iccache.types import BackendScore, DecisionKind, Exchange, Feedback, Usage
from replay.cli import main

PRICES = {"small": 0.001, "large": 0.01}

CONFIG = """
[store]
url = "sqlite:///{store}"
[[backends]]
name = "small"
base_url = "http://127.0.0.1:9/v1"
model = "small"
usd_per_million_output_tokens = 1
[[backends]]
name = "large"
base_url = "http://127.0.0.1:9/v1"
model = "large"
usd_per_million_output_tokens = 10
"""


def exchange(i: int, rng: np.random.Generator, holdout: float = 0.1) -> Exchange:
    """The student is as good as it is believed to be, the teacher at 0.9; two thirds have feedback."""
    believed = float(rng.random())
    p = (1 - holdout) * (0.85 if believed > 0.6 else 0.15)
    out = bool(rng.random() < holdout)
    small = not out and bool(rng.random() < p / (1 - holdout))
    name = "small" if small else "large"
    return Exchange(
        request_id=f"req_{i}", tenant="default", subject=None, session=None, at=time.time() - 60 + i / 1000,
        dialect="chat", model="auto", stream=False, backend=name, decision=DecisionKind.ROUTED, reason=None, status=200,
        complete=True, offloaded=small, cost_usd=PRICES[name], usage=Usage(100, 10),
        propensity=p if small else 1 - p,
        backends=[BackendScore("small", believed, 0.0, p), BackendScore("large", 0.7, 0.2, 1 - p)],
        extra={"kind": ""} | ({"held_out": True} if out else {}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(8)
    file, store = folder / "iccache.toml", folder / "ic.db"
    file.write_text(CONFIG.format(store=store))
    with closing(open_store(f"sqlite:///{store}")) as opened, opened.transaction():
        for i in range(3000):
            e = exchange(i, rng)
            opened.record(e)
            if rng.random() < 0.66:
                mean = e.backends[0].score if e.backend == "small" else 0.9
                opened.add_feedback(Feedback(e.request_id, "user", float(rng.random() < mean), e.at), tenant=e.tenant)
    return file


def ran(config: Path, *arguments: str) -> str:
    done = CliRunner().invoke(main, ["evaluate", "--config", str(config), *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_policies_are_valued_as_they_are_worth(config: Path) -> None:
    found = json.loads(ran(config, "--json", "--policy", "teacher", "--policy", "threshold:0.6", "--policy", "student"))
    assert found["requests"] == 3000
    assert sum(f["answers"] for f in found["feedback"]) == 3000
    teacher, threshold, student = found["policies"]
    # believed is uniform on [0, 1]: above 0.6 the student at 0.8 on average, else the teacher at 0.9
    for policy, worth, offloaded in ((teacher, 0.9, 0.0), (threshold, 0.4 * 0.8 + 0.6 * 0.9, 0.4), (student, 0.5, 1.0)):
        for kind in ("ips", "snips", "dr"):
            assert policy["quality"][kind]["value"] == pytest.approx(worth, abs=0.06), (policy["policy"], kind)
        dr = policy["quality"]["dr"]
        assert dr["low"] - 0.02 <= worth <= dr["high"] + 0.02
        assert policy["offload_share"] == pytest.approx(offloaded, abs=0.03)
        cost = offloaded * PRICES["small"] + (1 - offloaded) * PRICES["large"]
        assert policy["cost_usd"]["dr"]["value"] == pytest.approx(cost, rel=0.05)
        assert policy["quality"]["overlap"]
    assert [p["policy"] for p in found["curve"]][:2] == ["threshold:0", "threshold:0.05"]


def test_the_hold_out_says_what_was_saved_and_lost(config: Path) -> None:
    found = json.loads(ran(config, "--json"))["hold_out"]
    assert 220 <= found["held_out"] <= 380 and found["held_out"] + found["others"] == 3000
    offloaded = 0.85 * 0.4 + 0.15 * 0.6
    lost = 0.85 * 0.4 * (0.9 - 0.8) + 0.15 * 0.6 * (0.9 - 0.3)
    assert found["saved_usd_per_request"]["value"] == pytest.approx(offloaded * 0.009, rel=0.1)
    assert found["quality_difference"]["low"] <= -lost <= found["quality_difference"]["high"]
    assert found["net_saved_usd"] == pytest.approx(found["saved_usd"])


def test_the_table_and_the_picture(config: Path, tmp_path: Path) -> None:
    picture = tmp_path / "curve.svg"
    said = ran(config, "--picture", str(picture))
    assert "threshold:0.6" in said and "hold-out" in said and "never as 0" in said
    root = ElementTree.parse(picture).getroot()
    drawn = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(drawn) >= 15


def test_what_cannot_be_said_is_not_said(tmp_path: Path) -> None:
    file, store = tmp_path / "iccache.toml", tmp_path / "ic.db"
    file.write_text(CONFIG.format(store=store))
    with closing(open_store(f"sqlite:///{store}")) as opened:
        assert "0 requests" in ran(file)
        rng = np.random.default_rng(1)
        for i in range(30):
            opened.record(exchange(i, rng))
    said = ran(file, "--policy", "student", "--picture", str(tmp_path / "x.svg"))
    assert "too little overlap" in said and "small: " in said
    assert json.loads(ran(file, "--json", "--policy", "student"))["policies"][0]["quality"] is None


@pytest.mark.parametrize("name", ["nobody", "threshold:", "threshold:2", "target:x", "threshold:nan"])
def test_a_policy_that_is_none_is_refused(config: Path, name: str) -> None:
    done = CliRunner().invoke(main, ["evaluate", "--config", str(config), "--policy", name])
    assert done.exit_code == 2
    assert "policy" in done.output


def test_shadow_mode_supports_nothing_but_the_teacher(tmp_path: Path) -> None:
    file, store = tmp_path / "iccache.toml", tmp_path / "ic.db"
    file.write_text(CONFIG.format(store=store))
    rng = np.random.default_rng(2)
    with closing(open_store(f"sqlite:///{store}")) as opened, opened.transaction():
        for i in range(200):
            e = exchange(i, rng)
            e.backend, e.propensity, e.offloaded = "large", 1.0, False
            opened.record(e)
            opened.add_feedback(Feedback(e.request_id, "user", 0.9, e.at), tenant=e.tenant)
    found = json.loads(ran(file, "--json", "--policy", "student", "--policy", "teacher"))["policies"]
    assert [p["quality"]["overlap"] for p in found] == [False, True]
