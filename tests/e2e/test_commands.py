"""`iccache serve`, `check`, `config` and `explain`: what they say, and with which exit code: SPEC, 4 and 5."""

from __future__ import annotations

import json
import os
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from iccache import config
from iccache.cli import main
from tests.e2e.served import served
from tests.e2e.world import settings, write
from tests.fakes import Script

KEY = "sk-canary-0815"
COMMANDS = ("serve", "check", "config", "explain")


def run(*command: str, environ: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, command, env=environ)


def valid(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    url = "http://127.0.0.1:9/v1"
    return settings(url, url, tmp_path / "ic.db", **sections)


def toml(tmp_path: Path, **sections: Any) -> str:
    return config.to_toml(config.parse(valid(tmp_path, **sections)))


MISTAKES: dict[str, tuple[str, list[str]]] = {
    "not TOML": ("[server\nport = 1", ["not TOML", "line 1"]),
    "unknown section": ("[servr]\nport = 1", ["servr", "server"]),
    "unknown key": ("[server]\nprot = 1", ["server.prot", "port"]),
    "unknown key of a backend": ('[[backends]]\nname = "a"\nbase_ulr = "x"', ["base_ulr", "base_url"]),
    "wrong type": ('[server]\nport = "many"', ["server.port", "many"]),
    "out of range": ("[server]\nport = 70000", ["server.port", "70000"]),
    "no URL": ('[[backends]]\nname = "a"\nmodel = "m"\nbase_url = "localhost:1"', ["base_url", "localhost:1"]),
    "a key missing": ('[[backends]]\nname = "a"\nmodel = "m"', ["base_url"]),
    "policy": ('[routing]\npolicy = "best"', ["routing.policy", "best"]),
    "store": ('[store]\nurl = "mysql://x"', ["store.url", "mysql://x"]),
    "a table for a value": ("[server.port]\nx = 1", ["server.port"]),
    "a value for a table": ("server = 1", ["server"]),
    "pattern": ('[privacy]\npatterns = ["("]', ["privacy.patterns"]),
    "not a number": ("[routing]\ntheta = nan", ["theta"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_file_is_exit_2_and_one_line_that_names_the_place(tmp_path: Path, mistake: str) -> None:
    text, named = MISTAKES[mistake]
    file = tmp_path / "iccache.toml"
    file.write_text(text)
    for command in COMMANDS:
        result = run(command, "--config", str(file), *(["id"] if command == "explain" else []))
        assert result.exit_code == 2, (command, result.output)
        assert result.stdout == ""
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert all(word in result.stderr for word in named), result.stderr


def test_names_that_are_listed_twice(tmp_path: Path) -> None:
    for section, table in (
        ("backends", '[[backends]]\nname = "large"\nmodel = "m"\nbase_url = "http://x"\n'),
        ("tenants", '[[tenants]]\nname = "t"\nkey_env = "A"\n' * 2),
    ):
        file = tmp_path / "iccache.toml"
        file.write_text(toml(tmp_path) + table)
        result = run("serve", "--config", str(file))
        assert (result.exit_code, len(result.stderr.strip().splitlines())) == (2, 1)
        assert section in result.stderr and "twice" in result.stderr


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'[server]\nhost = "\xe9"')
    (tmp_path / "folder").mkdir()
    for name in ("missing.toml", "latin.toml", "folder"):
        for command in COMMANDS:
            result = run(command, "--config", str(tmp_path / name), *(["id"] if command == "explain" else []))
            assert result.exit_code == 2, (command, name)
            assert name in result.stderr


def test_a_variable_that_overrides_nothing(tmp_path: Path) -> None:
    file = tmp_path / "iccache.toml"
    file.write_text(toml(tmp_path))
    for variable, value, named in (
        ("ICCACHE_SERVER__PROT", "1", "port"),
        ("ICCACHE_SERVRE__PORT", "1", "server"),
        ("ICCACHE_SERVER__PORT", "many", "many"),
        ("ICCACHE_BACKENDS__HUGE__MODEL", "m", "large"),
        ("ICCACHE_BACKENDS__LARGE__MODLE", "m", "model"),
    ):
        result = run("config", "--config", str(file), environ={variable: value})
        assert result.exit_code == 2, variable
        assert named in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_keys_that_are_missing_empty_or_shared(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", valid(tmp_path, large={"key_env": "UP"}))
    for environ in ({}, {"UP": ""}, {"UP": "  "}, {"UP": "a\nb"}, {"UP": "schlüssel"}):
        result = run("serve", "--config", str(file), environ=environ)
        assert (result.exit_code, len(result.stderr.strip().splitlines())) == (2, 1)
        assert "UP" in result.stderr
    tenants = [{"name": "a", "key_env": "A"}, {"name": "b", "key_env": ["B", "C"]}]
    file = write(tmp_path / "b.toml", valid(tmp_path, tenants=tenants))
    result = run("serve", "--config", str(file), environ={"A": KEY, "B": "b", "C": KEY})
    assert result.exit_code == 2
    assert "same key" in result.stderr and KEY not in result.stderr


@pytest.mark.parametrize("key_env", ["", [], [""], ["A", ""]])
def test_a_tenant_that_nobody_can_be(tmp_path: Path, key_env: Any) -> None:
    file = tmp_path / "iccache.toml"
    file.write_text(toml(tmp_path) + f'[[tenants]]\nname = "t"\nkey_env = {json.dumps(key_env)}\n')
    result = run("serve", "--config", str(file), environ={"A": KEY})
    assert (result.exit_code, len(result.stderr.strip().splitlines())) == (2, 1)
    assert "key_env" in result.stderr


def test_no_backends(tmp_path: Path) -> None:
    file = tmp_path / "empty.toml"
    file.write_text('[embedder]\nbackend = "hash"\n' + f'[store]\nurl = "sqlite:///{tmp_path}/ic.db"\n')
    for command in ("serve", "check"):
        result = run(command, "--config", str(file))
        assert result.exit_code == 2
        assert "backend" in result.output


def test_config_prints_what_is_in_force_and_no_key(tmp_path: Path) -> None:
    data = valid(tmp_path, large={"key_env": "UP"}, tenants=[{"name": "a", "key_env": "A"}])
    file = write(tmp_path / "iccache.toml", data)
    environ = {"UP": KEY, "A": KEY, "ICCACHE_ADMIN_KEY": KEY, "ICCACHE_ROUTING__THETA": "0.25"}
    as_toml = run("config", "--config", str(file), environ=environ)
    as_json = run("config", "--config", str(file), "--json", environ=environ)
    assert as_toml.exit_code == as_json.exit_code == 0
    assert KEY not in as_toml.output + as_json.output
    assert json.loads(as_json.stdout)["routing"]["theta"] == 0.25
    assert config.parse(tomllib.loads(as_toml.stdout)) == config.parse(json.loads(as_json.stdout))
    assert json.loads(as_json.stdout)["tenants"][0]["key_env"] == "A"


async def test_check_says_what_is_wrong_in_one_line_each(tmp_path: Path) -> None:
    environ = {"UP": KEY}
    async with served(tmp_path, environ, start=False, large={"key_env": "UP", "first_token_timeout_s": 1}) as s:
        code, out, err = await s.run("check")
        assert (code, err) == (0, "")
        assert out.count("\n") == 6 and out.count("ok ") == 6, out

        echo = json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}).encode()
        for script, said in (
            (Script(status=401, body=echo), "401"),
            (Script(fault="hang"), "no byte within"),
        ):
            s.large.script = script
            code, out, err = await s.run("check", "--json")
            report = json.loads(out)
            assert (code, report["ok"]) == (1, False)
            (wrong,) = [c for c in report["checks"] if not c["ok"]]
            assert wrong["what"] == "backend large"
            assert said in wrong["detail"]
            assert KEY not in out + err
        await s.large.stop()
        code, out, _ = await s.run("check")
        assert code == 1
        wrong_lines = [line for line in out.splitlines() if not line.startswith("ok")]
        assert [line.split(":")[0] for line in wrong_lines] == ["FAILED backend large"]
        code, out, _ = await s.run("check", environ={"UP": ""})
        assert code == 2 and "UP" in out


async def test_explain_prints_the_record(tmp_path: Path) -> None:
    async with served(tmp_path) as s:
        await s.teach("What is the capital of France?", "Paris")
        asked = await s.ask("What is the capital of Spain?")
        assert (await s.feedback(asked.id, score=0.75)).status == 204
        await s.recorded(asked.id)
        code, out, _ = await s.run("explain", asked.id, "--json")
        record = json.loads(out)
        assert code == 0
        served_says = (await s.get(f"/admin/exchanges/{asked.id}")).json
        assert record == served_says
        keys = ["request_id", "tenant", "at", "decision", "reason", "backend", "propensity", "considered", "backends"]
        keys += ["tokens", "cost_usd", "latency_s", "feedback"]
        assert set(keys) <= set(record)
        assert {"input", "output", "example", "estimated"} <= set(record["tokens"])
        assert set(record["considered"][0]) == {"id", "similarity", "utility", "shown"}
        assert {b["name"] for b in record["backends"]} == {"small", "large"}
        assert set(record["backends"][0]) == {"name", "score", "load_bias", "probability"}
        assert [(f["source"], f["score"]) for f in record["feedback"]] == [("user", 0.75)]
        code, out, _ = await s.run("explain", asked.id)
        assert code == 0 and asked.id in out and "small" in out
        assert time.strftime("%Y-%m-", time.gmtime(record["at"])) in out  # no count of seconds
        code, out, err = await s.run("explain", "req_none")
        assert (code, out) == (1, "")
        assert len(err.strip().splitlines()) == 1 and "req_none" in err


def test_explain_without_a_store(tmp_path: Path) -> None:
    file = write(tmp_path / "iccache.toml", valid(tmp_path))
    result = run("explain", "--config", str(file), "id")
    assert result.exit_code == 1
    assert not (tmp_path / "ic.db").exists()


def test_wrong_usage_is_exit_2() -> None:
    for command in (["nonsense"], ["serve", "--port", "x"], ["serve", "--workers", "0"], ["explain"], ["serve", "x"]):
        assert run(*command).exit_code == 2, command


def test_help_needs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ([], ["serve"], ["check"], ["config"], ["explain"], ["demo"]):
        assert run(*command, "--help").exit_code == 0
    assert os.listdir(tmp_path) == []
