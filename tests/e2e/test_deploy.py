"""deploy/, read and run: what the manifests say is what is started here, as processes.

Substituted, everywhere in a manifest's text before it is read:

    /etc/iccache, /var/lib/iccache    folders of this test
    8080                              a free port
    the base URLs of the backends     a scripted upstream on loopback
    ${NAME:?...}, ${NAME:-...}        what compose would put there

and of what the image brings, `python` and its entry points are those of the interpreter that runs this test. Secrets
have made-up values. Everything else (arguments, environment, probes, signals) is taken as it stands.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import kubernetes_validate
import pytest
import yaml

from iccache import config
from iccache.metrics import Metrics
from replay import report
from replay.store import open_replay_store
from tests.fakes import Script, ScriptedUpstream

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
IMAGE = f"iccache:{VERSION}"
KUBERNETES = "1.33"
START_S = 90.0

# ---- reading


def dockerfile(word: str) -> list[str]:
    """What follows `word` at the beginning of a line of the last stage, one string for each such line."""
    last = re.split(r"^FROM ", (DEPLOY / "Dockerfile").read_text().replace("\\\n", " "), flags=re.MULTILINE)[-1]
    return [line.removeprefix(word).strip() for line in last.splitlines() if line.startswith(f"{word} ")]


def manifests(name: str, text: str | None = None) -> dict[str, dict[str, Any]]:
    """The documents of a manifest by kind; of `text` where it is given, else of the file as it is."""
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text() if text is None else text)
    return {document["kind"]: document for document in documents}


def sidecar_pod(text: str | None = None) -> dict[str, Any]:
    pod: dict[str, Any] = manifests("sidecar.yaml", text)["Deployment"]["spec"]["template"]["spec"]
    return pod


def cronjob_pod(text: str | None = None) -> dict[str, Any]:
    job = manifests("cronjob.yaml", text)["CronJob"]["spec"]["jobTemplate"]
    pod: dict[str, Any] = job["spec"]["template"]["spec"]
    return pod


def command(container: dict[str, Any]) -> list[str]:
    """What the container runs: its own command or the image's entry point, then its arguments."""
    entry: list[str] = container.get("command") or json.loads(dockerfile("ENTRYPOINT")[0])
    arguments: list[str] = container.get("args") or json.loads(dockerfile("CMD")[0])
    return [*entry, *arguments]


def here(argv: list[str]) -> list[str]:
    """`argv` with the image's programs replaced by those of this interpreter."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert argv[0] == "python" or argv[0] in scripts
    program = [] if argv[0] == "python" else ["-m", scripts[argv[0]].partition(".")[0]]
    return [sys.executable, *program, *argv[1:]]


def environment(container: dict[str, Any]) -> dict[str, str]:
    """The image's and the container's, and what an interpreter outside an image needs."""
    image = dict(pair.split("=", 1) for line in dockerfile("ENV") for pair in line.split())
    own = {e["name"]: e.get("value", f"made-up-{e['name']}") for e in container.get("env", [])}
    return image | own | {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}


# ---- what the manifests say


@pytest.mark.parametrize("name", ["sidecar.yaml", "cronjob.yaml"])
def test_manifests_are_valid(name: str) -> None:
    for document in manifests(name).values():
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_the_sidecar_is_a_native_one() -> None:
    pod = sidecar_pod()
    [sidecar] = pod["initContainers"]
    assert sidecar["restartPolicy"] == "Always"
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= sidecar.keys()
    assert "/readyz" in str(sidecar["startupProbe"]) and "/readyz" in str(sidecar["readinessProbe"])
    assert "/healthz" in str(sidecar["livenessProbe"])


def test_the_sidecar_may_finish_what_it_began() -> None:
    settings = config.parse(tomllib.loads(manifests("sidecar.yaml")["ConfigMap"]["data"]["iccache.toml"]))
    grace = sidecar_pod()["terminationGracePeriodSeconds"]
    assert grace > 3 * settings.server.drain_s  # answers, then records, then the queue of writes
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    shipped = config.load(DEPLOY / "iccache.toml", {})
    assert int(compose["services"]["iccache"]["stop_grace_period"].removesuffix("s")) > 3 * shipped.server.drain_s


def test_probes_reach_the_address_that_is_listened_on() -> None:
    """kubelet asks the pod's address; what listens on loopback has to be asked from inside."""
    settings = config.parse(tomllib.loads(manifests("sidecar.yaml")["ConfigMap"]["data"]["iccache.toml"]))
    [sidecar] = sidecar_pod()["initContainers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert ("exec" in sidecar[probe]) == config.is_loopback(settings.server.host)
        assert f"127.0.0.1:{settings.server.port}/" in str(sidecar[probe])
        [waits] = map(float, re.findall(r"timeout=(\d+)", str(sidecar[probe])))
        assert waits < sidecar[probe]["timeoutSeconds"]
    [application] = sidecar_pod()["containers"]
    assert {"name": "OPENAI_BASE_URL", "value": f"http://127.0.0.1:{settings.server.port}/v1"} in application["env"]


@pytest.mark.parametrize("pod", [sidecar_pod(), cronjob_pod()], ids=["sidecar", "cronjob"])
def test_nothing_is_allowed_that_is_not_needed(pod: dict[str, Any]) -> None:
    uid, gid = map(int, dockerfile("USER")[0].split(":"))
    assert uid and gid
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]) == (uid, gid)
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        allowed = container["securityContext"]
        assert allowed["readOnlyRootFilesystem"] is True
        assert allowed["allowPrivilegeEscalation"] is False
        assert allowed["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("pod", [sidecar_pod(), cronjob_pod()], ids=["sidecar", "cronjob"])
def test_what_is_written_has_a_volume(pod: dict[str, Any]) -> None:
    settings = config.parse(tomllib.loads(manifests("sidecar.yaml")["ConfigMap"]["data"]["iccache.toml"]))
    [ours] = [c for c in [*pod.get("initContainers", []), *pod["containers"]] if c["image"] == IMAGE]
    mounts = {m["mountPath"]: m for m in ours["volumeMounts"]}
    assert mounts["/etc/iccache"]["readOnly"] is True
    assert Path(ours["args"][-1]).parent == Path("/etc/iccache")
    store = Path(settings.store.url.removeprefix("sqlite:///"))
    assert not mounts[str(store.parent)].get("readOnly")
    assert "/tmp" in mounts
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert {m["name"] for m in mounts.values()} <= volumes.keys()
    claim = manifests("sidecar.yaml")["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes[mounts[str(store.parent)]["name"]]["persistentVolumeClaim"]["claimName"] == claim


def test_the_job_runs_alone_and_on_the_store_s_node() -> None:
    job = manifests("cronjob.yaml")["CronJob"]["spec"]
    assert job["concurrencyPolicy"] == "Forbid"
    assert job["startingDeadlineSeconds"] > 0
    assert job["jobTemplate"]["spec"]["activeDeadlineSeconds"] > 0
    [near] = cronjob_pod()["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    deployment = manifests("sidecar.yaml")["Deployment"]["spec"]
    assert near["labelSelector"]["matchLabels"] == deployment["template"]["metadata"]["labels"]
    assert deployment["replicas"] == 1 and deployment["strategy"]["type"] == "Recreate"


def test_the_image_stops_on_sigterm_and_starts_as_the_manifests_do() -> None:
    assert dockerfile("STOPSIGNAL") == ["SIGTERM"]
    [sidecar] = sidecar_pod()["initContainers"]
    assert command(sidecar) == command({})
    [health] = dockerfile("HEALTHCHECK")
    assert "/healthz" in health and dockerfile("EXPOSE")[0] in health
    assert f"torch=={constraint('torch')}" in (ROOT / "pyproject.toml").read_text()


def constraint(package: str) -> str:
    [line] = re.findall(rf"^{package}==(.+)$", (DEPLOY / "constraints.txt").read_text(), re.MULTILINE)
    return str(line)


def test_constraints_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(p for extra in project["optional-dependencies"].values() for p in extra)]
    locked = (DEPLOY / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    assert [p for p in asked if p.partition(";")[0].strip().lower() not in locked] == []


# ---- compose


def compose(environ: dict[str, str]) -> dict[str, Any]:
    """deploy/compose.yaml with the variables that it takes from the shell."""

    def value(found: re.Match[str]) -> str:
        name, kind, default = found.groups()
        assert kind == ":-" or name in environ, f"{name} has to be set"
        return environ.get(name, default)

    text = re.sub(r"\$\{(\w+)(:-|:\?)([^}]*)\}", value, (DEPLOY / "compose.yaml").read_text())
    services: dict[str, Any] = yaml.safe_load(text)["services"]
    return services


def test_compose_asks_for_a_key_since_it_listens_beyond_loopback() -> None:
    services = compose({"ICCACHE_API_KEY": "a-key"})
    for service in (services["iccache"], services["replay"]):
        assert service["image"] == IMAGE
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
        settings = config.load(DEPLOY / "iccache.toml", service["environment"])
        assert not config.is_loopback(settings.server.host)
        assert [service["environment"][name] for t in settings.tenants for name in t.key_envs] == ["a-key"]
        mounts = {mount.split(":")[1] for mount in service["volumes"]}
        assert str(Path(settings.store.url.removeprefix("sqlite:///")).parent) in mounts
        assert Path(service["command"][2]).as_posix() in mounts
    assert services["replay"]["network_mode"] == "service:iccache"  # where it finds the proxy's load
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_prometheus_scrapes_what_is_there() -> None:
    services = compose({"ICCACHE_API_KEY": "a-key"})
    jobs = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    targets = [target for job in jobs for static in job["static_configs"] for target in static["targets"]]
    assert {target.split(":")[0] for target in targets} <= services.keys()
    assert "iccache:8080" in targets
    written = services["replay"]["command"][-1]
    folder = {m.split(":")[0]: m.split(":")[1] for m in services["textfile"]["volumes"]}
    mounted = {m.split(":")[1]: m.split(":")[0] for m in services["replay"]["volumes"]}
    assert written.endswith(".prom")
    assert (
        f"--collector.textfile.directory={folder[mounted[str(Path(written).parent)]]}"
        in services["textfile"]["command"]
    )


def test_grafana_finds_its_data_and_its_dashboard() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    services = compose({"ICCACHE_API_KEY": "a-key"})
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    assert {target["datasource"]["uid"] for target in targets(dashboard)} == {source["uid"]}
    [provider] = yaml.safe_load((provisioning / "dashboards" / "iccache.yaml").read_text())["providers"]
    mounted = {m.split(":")[1] for m in services["grafana"]["volumes"]}
    assert any(path.startswith(provider["options"]["path"]) for path in mounted)


# ---- the dashboard

PROMQL = {
    "sum", "avg", "max", "min", "by", "or", "rate", "increase", "time", "vector", "histogram_quantile",
}  # fmt: skip


def targets(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [target for panel in dashboard["panels"] for target in panel.get("targets", [])]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every name under which a sample is exported, with its labels."""
    names: dict[str, set[str]] = {}
    for row in Metrics().rows():
        labels = set(filter(None, row.labels.split(", "))) | {"job", "instance"}
        if row.type == "histogram":
            names |= {row.name + "_bucket": labels | {"le"}, row.name + "_sum": labels, row.name + "_count": labels}
        else:
            names[row.name] = labels
    url = f"sqlite:///{tmp_path_factory.mktemp('replay') / 'empty.db'}"
    store = open_replay_store(config.parse({"store": {"url": url}}))
    for line in report.metrics(store, 0.0).splitlines():
        if not line.startswith("#"):
            names.setdefault(re.split(r"[{ ]", line)[0], {"job", "instance"}).update(re.findall(r"(\w+)=\"", line))
    store.close()
    return names


def test_every_panel_shows_metrics_that_exist(exported: dict[str, set[str]]) -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    shown = set()
    for target in targets(dashboard):
        used, labels = read_promql(target["expr"])
        assert used and used <= exported.keys(), target["expr"]
        shown |= used
        labels |= set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        for metric in used:
            assert labels <= exported[metric], target["expr"]
    hidden = {re.sub(r"_(bucket|sum|count)$", "", m) for m in exported} - {
        re.sub(r"_(bucket|sum|count)$", "", m) for m in shown
    }
    assert hidden <= {"iccache_replay_runs_total", "iccache_replay_seconds_total"}
    for variable in dashboard["templating"]["list"]:
        [metric] = re.findall(r"label_values\((\w+), \w+\)", variable["query"]["query"])
        assert metric in exported


def read_promql(expr: str) -> tuple[set[str], set[str]]:
    """The metrics that an expression reads, and the labels that it speaks of."""
    labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expr))
    for group in re.findall(r"\bby \(([^)]*)\)", expr):
        labels |= {name.strip() for name in group.split(",")}
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\bby \([^)]*\)|\"[^\"]*\"", " ", expr)
    return set(re.findall(r"[A-Za-z_]\w*", bare)) - PROMQL, labels


# ---- as processes


class Place(NamedTuple):
    """Where the manifests' paths, port and models are for the length of a test."""

    folder: Path
    port: int
    upstream: str

    def laid(self, name: str) -> str:
        """A manifest's text, with everything substituted that the top of this file names."""
        text = (DEPLOY / "kubernetes" / name).read_text()
        for path in ("/etc/iccache", "/var/lib/iccache"):
            text = text.replace(path, f"{self.folder}{path}")
        text = re.sub(r"\b8080\b", str(self.port), text)
        return re.sub(r'(base_url = )"[^"]*"', rf'\1"{self.upstream}"', text)


@pytest.fixture
async def place(tmp_path: Path, unused_tcp_port: int) -> Any:
    for path in ("etc/iccache", "var/lib/iccache"):
        (tmp_path / path).mkdir(parents=True)
    async with ScriptedUpstream(Script(answer="Paris.")) as upstream:
        yield Place(tmp_path, unused_tcp_port, upstream.base_url)


@contextmanager
def started(container: dict[str, Any], place: Place) -> Iterator[subprocess.Popen[str]]:
    log = (place.folder / f"{container['name']}.log").open("w+")
    process = subprocess.Popen(
        here(command(container)),
        env=environment(container),
        cwd=place.folder / dockerfile("WORKDIR")[0].lstrip("/"),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        log.seek(0)
        print(log.read())
        log.close()


def probe(container: dict[str, Any], name: str) -> bool:
    """One look, as kubelet takes it."""
    wanted = container[name]
    done = subprocess.run(
        here(wanted["exec"]["command"]),
        env=environment(container),
        capture_output=True,
        timeout=wanted["timeoutSeconds"] + 5,
    )
    return done.returncode == 0


def wait_for(container: dict[str, Any], process: subprocess.Popen[str]) -> None:
    """Probe as the startup probe says, as often as it says."""
    wanted = container["startupProbe"]
    for _ in range(wanted["failureThreshold"]):
        if probe(container, "startupProbe"):
            return
        assert process.poll() is None, "the sidecar ended before it was ready"
        time.sleep(wanted["periodSeconds"] / 4)
    pytest.fail("the sidecar did not become ready in the time that its startup probe gives it")


def ask(base_url: str, question: str) -> tuple[dict[str, str], dict[str, Any]]:
    body = {"model": "large", "messages": [{"role": "user", "content": question}]}
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": "Bearer none"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return {k.lower(): v for k, v in response.headers.items()}, json.load(response)


async def test_the_sidecar_and_the_job_run_as_their_manifests_say(place: Place) -> None:
    await asyncio.to_thread(run_both, place)


def run_both(place: Place) -> None:
    for name, text in manifests("sidecar.yaml", place.laid("sidecar.yaml"))["ConfigMap"]["data"].items():
        (place.folder / "etc/iccache" / name).write_text(text)
    pod = sidecar_pod(place.laid("sidecar.yaml"))
    [sidecar], [application] = pod["initContainers"], pod["containers"]
    [job] = cronjob_pod(place.laid("cronjob.yaml"))["containers"]
    base_url = next(e["value"] for e in application["env"] if e["name"] == "OPENAI_BASE_URL")

    with started(sidecar, place) as process:
        wait_for(sidecar, process)
        assert probe(sidecar, "readinessProbe") and probe(sidecar, "livenessProbe")
        headers, answer = ask(base_url, "What is the capital of France?")
        assert answer["choices"][0]["message"]["content"] == "Paris."
        assert (headers["x-iccache-backend"], headers["x-iccache-decision"]) == ("large", "pinned")
        wait_until_an_example_is_there(base_url.removesuffix("/v1"))

        with started(job, place) as replay:
            assert replay.wait(60) == 0
        assert probe(sidecar, "readinessProbe")

        process.send_signal(signal.SIGTERM)
        assert process.wait(pod["terminationGracePeriodSeconds"]) == 0
    assert not probe(sidecar, "livenessProbe")
    assert (place.folder / "var/lib/iccache/iccache.db").is_file()
    assert os.listdir(place.folder / "etc/iccache") == ["iccache.toml"]


def wait_until_an_example_is_there(url: str) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as response:
            if re.search(rb'^iccache_examples\{tenant_class="default"\} 1\.0$', response.read(), re.MULTILINE):
                return
        time.sleep(0.1)
    pytest.fail("the answer did not become an example")
