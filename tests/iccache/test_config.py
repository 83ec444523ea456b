"""The configuration: what is read, what is refused and how it says so."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from iccache import config
from iccache.errors import ConfigError

TWO = [
    {"name": "small", "base_url": "http://a/v1", "model": "s", "usd_per_million_output_tokens": 1},
    {"name": "large", "base_url": "http://b/v1", "model": "l", "usd_per_million_output_tokens": 9},
]


def test_the_example_is_the_defaults() -> None:
    read = config.parse(tomllib.loads(config.example_toml()))
    for section in msgspec.structs.fields(config.Config):
        if section.name not in config.REPEATED:
            assert getattr(read, section.name) == getattr(config.Config(), section.name)


def test_what_is_printed_reads_back_equal() -> None:
    before = config.parse(
        {"backends": TWO, "selection": {"threshold": 0.25}, "tenants": [{"name": "t", "key_env": ["A", "B"]}]}
    )
    assert config.parse(tomllib.loads(config.to_toml(before))) == before
    assert msgspec.json.decode(config.to_json(before), type=config.Config) == before


def test_a_key_may_be_in_a_file_that_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("first\n")
    environ = {"KEY_FILE": str(file)}
    assert config.secret(environ, "KEY", "x") == "first"
    file.write_text("second\n")
    assert config.secret(environ, "KEY", "x") == "second"
    assert config.secret(environ | {"KEY": "third"}, "KEY", "x") == "third"
    assert config.key_in({}, "KEY") is None
    for environ in ({"KEY_FILE": str(tmp_path / "none")}, {"KEY_FILE": str(tmp_path)}):
        with pytest.raises(ConfigError, match=r"KEY_FILE: .* cannot be read: "):
            config.key_in(environ, "KEY")


@pytest.mark.parametrize("url", ["http://host:99999", "http://:80/v1", "http://a b/v1", "https:///v1", "http://[::1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    for data in (
        {"backends": [{"name": "a", "base_url": url, "model": "m"}]},
        {"backends": [{"name": "a", "base_url": "http://h/v1", "model": "m", "metrics_url": url}]},
        {"embedder": {"backend": "remote", "base_url": url}},
    ):
        with pytest.raises(ConfigError, match="names no host and port"):
            config.parse(data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"sever": {}}, "unknown key sever; did you mean server?"),
        ({"server": {"hots": "x"}}, "unknown key server.hots; did you mean host?"),
        ({"backends": [TWO[0] | {"modle": "x"}]}, "unknown key backends[0].modle; did you mean model?"),
        ({"server": {"port": 70000}}, "server.port: expected `int` <= 65535 (here: 70000)"),
        ({"server": {"port": "eighty"}}, "server.port: expected `int`"),
        ({"backends": [{"name": "a"}]}, "backends[0]: object missing required field `base_url`"),
        ({"backends": [TWO[0], TWO[0]]}, "backends: small is listed twice"),
        ({"selection": {"threshold": "atuo"}}, "selection.threshold"),
        ({"routing": {"quality_target": 1.5}}, "routing.quality_target: expected `float` <= 1"),
        ({"judge": {"backend": "smal"}, "backends": TWO}, "judge.backend: no backend is named smal"),
        ({"routing": {"models": ["small"]}, "backends": TWO}, "routing.models: small is a backend's name"),
        ({"privacy": {"patterns": ["("]}}, "privacy.patterns: '(' is not a regular expression"),
        ({"store": {"url": "mysql://x"}}, "store.url"),
        ({"server": {"host": "0.0.0.0"}}, "server.host: 0.0.0.0 is reachable from other machines"),
        ({"server": 3}, "server: expected `object`"),
        (
            {"routing": {"policy": "bandit"}},
            "routing.policy: is none of linear-thompson, linear-ucb, neural-thompson, ",
        ),
        ({"selection": {"threshold": "Auto"}}, "selection.threshold: is none of a number, auto (here: 'Auto')"),
    ],
)
def test_a_mistake_is_named(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(data, source="x.toml")
    assert str(caught.value).startswith("x.toml: ")
    assert said in str(caught.value)


def test_every_unknown_key_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse({"server": {"hots": 1}, "cache": {"reus": 1}})
    assert len(str(caught.value).splitlines()) == 2


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "ic.toml"
    file.write_text('[server]\nport = 1\n[[backends]]\nname = "a"\nbase_url = "http://a"\nmodel = "m"\n')
    environ = {
        "ICCACHE_SERVER__PORT": "2",
        "ICCACHE_ROUTING__SHADOW": "true",
        "ICCACHE_ROUTING__MODELS": "auto, gpt-4",
        "ICCACHE_PRIVACY__PATTERNS": '["x{1,2}"]',
        "ICCACHE_SELECTION__THRESHOLD": "0.5",
        "ICCACHE_BACKENDS__A__MODEL": "n",
        "ICCACHE_BACKENDS__1__NAME": "b",
        "ICCACHE_BACKENDS__1__BASE_URL": "http://b",
        "ICCACHE_BACKENDS__1__MODEL": "o",
        "ICCACHE_ADMIN_KEY": "not a setting",
    }
    read = config.load(file, environ)
    assert (read.server.port, read.routing.shadow, read.routing.models) == (2, True, ["auto", "gpt-4"])
    assert (read.privacy.patterns, read.selection.threshold) == (["x{1,2}"], 0.5)
    assert [(b.name, b.model) for b in read.backends] == [("a", "n"), ("b", "o")]


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("ICCACHE_SEVER__PORT", "there is no section [sever]; did you mean server?"),
        ("ICCACHE_SERVER__PROT", "unknown key server.prot; did you mean port?"),
        ("ICCACHE_BACKENDS__X__MODEL", "no backend is named x"),
        ("ICCACHE_BACKENDS__MODEL", "name it ICCACHE_BACKENDS__<position or name>__<KEY>"),
    ],
)
def test_a_variable_that_means_nothing_is_named(variable: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(None, {variable: "1"})
    assert variable in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"), [(b"[server", "is not TOML"), (b"\xff", "is not UTF-8"), (None, "no such file")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "ic.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        config.load(file, {})


def test_roles_follow_prices_unless_they_are_said() -> None:
    third = {"name": "mid", "base_url": "http://c", "model": "m", "usd_per_million_output_tokens": 5}
    read = config.parse({"backends": [TWO[1], third, TWO[0]]})
    assert [b.name for b in read.by_price()] == ["small", "mid", "large"]
    assert [b.name for b in read.teachers()] == ["large"]
    assert [b.name for b in read.students()] == ["small", "mid"]
    read = config.parse({"backends": [TWO[1], third | {"teacher": True, "student": True}, TWO[0]]})
    assert [b.name for b in read.teachers()] == ["mid"]
    assert [b.name for b in read.students()] == ["small", "mid", "large"]


def test_equal_prices_make_the_last_listed_the_teacher() -> None:
    same = [{"name": n, "base_url": "http://a", "model": n} for n in ("a", "b")]
    assert [b.name for b in config.parse({"backends": same}).teachers()] == ["b"]


def test_every_setting_has_its_sentence() -> None:
    for row in config.settings():
        assert row.sentence.endswith("."), row
        assert row.type, row


def test_a_missing_key_is_said() -> None:
    with pytest.raises(ConfigError, match="backends: a: the environment variable A_KEY is not set"):
        config.secret({"A_KEY": " "}, "A_KEY", "backends: a")
    with pytest.raises(ConfigError, match="characters that no header can carry"):
        config.secret({"A_KEY": "a\nb"}, "A_KEY", "x")
    assert config.secret({"A_KEY": " k "}, "A_KEY", "x") == "k"


def test_a_mistake_names_the_variables_that_were_laid_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "iccache.toml"
    file.write_text("[server]\nport = 1\n")
    with pytest.raises(ConfigError, match=r"iccache\.toml with ICCACHE_SERVER__PORT: server\.port: .*here: 'abc'"):
        config.load(file, {"ICCACHE_SERVER__PORT": "abc", "ICCACHE_ADMIN_KEY": "x"})
    with pytest.raises(ConfigError, match=r"iccache\.toml: server\.prot: |iccache\.toml: unknown key server\.prot"):
        file.write_text("[server]\nprot = 1\n")
        config.load(file, {})


def test_a_printed_configuration_shows_no_password() -> None:
    given = config.parse(
        {"backends": [{"name": "a", "base_url": "https://ann:s3cret@host:1/v1?x=a@b:c", "model": "m"}]}
    )
    for text in (config.to_toml(given), config.to_json(given)):
        shown = config.without_passwords(text)
        assert "s3cret" not in shown and "https://ann:***@host:1/v1?x=a@b:c" in shown
    assert config.without_passwords(config.example_toml()) == config.example_toml()
