"""Every client once directly at the upstream and once through iccache: what passes must be the same.

    make clients                        all of them, results.json and the README's table
    make clients ARGS="--only litellm"  some, by a part of their name; written nowhere
    make clients ARGS="--upstream URL"  at a real model; what needs a script fails, alike
    make clients ARGS=--lock            environments/*.in to *.txt anew

Scripts of ours run three times: at the scripted upstream itself, `through` a proxy that forwards to the backend their
model names, and through one that has the same name `routed` to a student that is shown examples.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.clients import environment, proxies
from tests.clients.upstream import MODEL

RESULTS = environment.HERE / "results.json"
README = environment.ROOT / "README.md"
LOGS = environment.HOME / "logs"
KEY = proxies.KEYS["CLIENT_KEY"]
TIMEOUT_S = 900
OPENAI_TESTS = [
    *(f"tests/api_resources/{folder}" for folder in ("chat", "responses", "audio")),
    *(
        f"tests/api_resources/test_{name}.py"
        for name in ("completions", "embeddings", "models", "files", "batches", "moderations", "images")
    ),
]
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "OPENAI_AGENTS_DISABLE_TRACING": "1"}


@dataclass(frozen=True)
class Outcome:
    passed: bool | None  # None: skipped
    seen: Any = None


Outcomes = dict[str, Outcome]


@dataclass(frozen=True)
class Suite:
    """A client, or somebody's suite, and how to run it at a base URL."""

    client: str
    environment: str
    package: str
    what: str
    cases: Callable[[Suite, str, str], Outcomes]  # of the suite, a base URL and the scripted upstream's
    given: tuple[str, ...] = ()
    upstream: str = "scripted"

    @property
    def version(self) -> str:
        return environment.version(self.environment, self.package)

    @property
    def modes(self) -> tuple[str, ...]:
        return ("direct", "through", "routed") if self.upstream == "scripted" else ("direct", "through")


def called(command: Sequence[str | Path], cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    with (LOGS / "clients.log").open("a") as log:
        print("+", *command, environ.get("BASE_URL", ""), file=log, flush=True)
        return subprocess.run(
            command,
            cwd=cwd,
            env=kept | QUIET | environ,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            timeout=TIMEOUT_S,
        )


# ---- the kinds of suites


def script(suite: Suite, url: str, upstream: str) -> Outcomes:
    """A script of ours: one JSON line per case."""
    [file] = suite.given
    if suite.environment == "node":
        command: list[str | Path] = ["node", environment.NODE / file]
    else:
        command = [environment.python(suite.environment), environment.HERE / file]
    done = called(command, environment.HERE, BASE_URL=url, UPSTREAM_URL=upstream, MODEL=MODEL)
    lines = [json.loads(line) for line in done.stdout.split("\n") if line.startswith('{"case"')]
    if done.returncode or not lines:
        raise RuntimeError(f"{suite.client}: {command} ended with {done.returncode}; see {LOGS}/clients.log")
    return {line["case"]: Outcome(line["passed"], line["seen"]) for line in lines}


def pytest(suite: Suite, url: str, cwd: Path, tests: Sequence[str], *options: str) -> Outcomes:
    report = LOGS / "junit.xml"
    report.unlink(missing_ok=True)
    command = [environment.python(suite.environment), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    called([*command, *options, f"--junitxml={report}", *tests], cwd, BASE_URL=url, TEST_API_BASE_URL=url)
    found = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        passed = None if "skipped" in kinds else not kinds & {"failure", "error"}
        found[f"{case.get('classname')}::{case.get('name')}"] = Outcome(passed)
    return found


def langchain_standard(suite: Suite, url: str, _upstream: str) -> Outcomes:
    loops = ["-o", "asyncio_mode=auto", "-o", "asyncio_default_test_loop_scope=session"]
    return pytest(suite, url, environment.HERE, suite.given, "-c", os.devnull, "--rootdir=.", "--noconftest", *loops)


def openai_own(suite: Suite, url: str, _upstream: str) -> Outcomes:
    return pytest(suite, url, environment.openai_tests(suite.version), OPENAI_TESTS, "-o", "addopts=", "-n", "2")


def llm_comply(suite: Suite, url: str, _upstream: str) -> Outcomes:
    program = environment.python(suite.environment).parent / "llm-comply"
    found = {}
    for form in suite.given:
        done = called([program, "--json", "--format", form, "-u", url, "-k", KEY, "-m", MODEL], environment.HERE)
        for result in json.loads(done.stdout)["results"]:
            passed = None if result["status"] == "skipped" else result["status"] == "passed"
            found[f"{form}: {result['id']}"] = Outcome(passed, result.get("errors"))
    return found


def compatcanary(suite: Suite, url: str, _upstream: str) -> Outcomes:
    program = environment.NODE / "node_modules" / ".bin" / "compatcanary"
    given = ["--base-url", url, "--model", MODEL, "--profile", "modern", "--format", "json", "--fail-on", "never"]
    done = called([program, "scan", *given], environment.NODE, OPENAI_API_KEY=KEY)
    return {r["id"]: Outcome(r["status"] == "pass", r["status"]) for r in json.loads(done.stdout)["results"]}


OURS, THEIRS = "a script of ours", "its own tests, against a mock of the OpenAI API"
SUITES = [
    Suite("openai (Python)", "openai-3", "openai", OURS, script, ("openai_python.py",)),
    Suite("openai (Python)", "openai-2", "openai", OURS, script, ("openai_python.py",)),
    Suite("openai (Node)", "node", "openai", OURS, script, ("openai_node.mjs",)),
    Suite("anthropic (Python)", "anthropic", "anthropic", OURS, script, ("anthropic_python.py",)),
    Suite("@anthropic-ai/sdk (Node)", "node", "@anthropic-ai/sdk", OURS, script, ("anthropic_node.mjs",)),
    Suite("langchain-openai", "langchain", "langchain-openai", OURS, script, ("langchain_python.py",)),
    Suite(
        "langchain-openai", "langchain", "langchain-openai", "langchain-tests", langchain_standard,
        ("langchain_standard.py",),
    ),
    Suite("LlamaIndex OpenAILike, OpenAI", "llamaindex", "llama-index-llms-openai-like", OURS, script,
          ("llamaindex_python.py",)),
    Suite("LiteLLM as a client", "litellm", "litellm", OURS, script, ("litellm_python.py",)),
    Suite("OpenAI Agents SDK", "agents", "openai-agents", OURS, script, ("agents_python.py",)),
    Suite("AI SDK", "node", "ai", OURS, script, ("ai_sdk.mjs",)),
    Suite("llm-comply", "llm-comply", "llm-comply", "its checks of chat, responses and messages", llm_comply,
          ("openai-chat", "open-responses", "anthropic")),
    Suite("compatcanary", "node", "compatcanary", "its checks", compatcanary),
    Suite("openai (Python)", "openai-3", "openai", THEIRS, openai_own, upstream="steady"),
    Suite("openai (Python)", "openai-2", "openai", THEIRS, openai_own, upstream="steady"),
]  # fmt: skip


# ---- a run


class Servers:
    """Started when first asked for: the base URL of each mode."""

    def __init__(self, stack: contextlib.ExitStack, upstream: str | None) -> None:
        self._stack = stack
        self._urls: dict[tuple[str, str], str] = {("scripted", "direct"): upstream} if upstream else {}

    def url(self, upstream: str, mode: str) -> str:
        if (upstream, mode) not in self._urls:
            self._urls[upstream, mode] = self._stack.enter_context(self._start(upstream, mode))
        return self._urls[upstream, mode]

    def _start(self, upstream: str, mode: str) -> contextlib.AbstractContextManager[str]:
        match upstream, mode:
            case "scripted", "direct":
                return proxies.scripted(LOGS / "scripted.log")
            case "scripted", "through":
                return proxies.through(self.url("scripted", "direct"), LOGS)
            case "scripted", "routed":
                return proxies.routed(self.url("scripted", "direct"), LOGS)
            case "steady", "direct":
                program = environment.node() / "node_modules" / ".bin" / "steady"
                return proxies.steady(program, environment.openapi(), LOGS / "steady.log")
            case "steady", "through":
                return proxies.any_model(self.url("steady", "direct"), LOGS)
        raise ValueError(mode)

    def shown(self) -> int:
        """How many examples students were shown."""
        url = self._urls.get(("scripted", "routed"))
        return int(proxies.metric(url, "iccache_examples_shown_sum")) if url else 0


@dataclass
class Result:
    """What a suite came to: how many cases passed by mode, which do not pass alike, which pass nowhere, and which pass
    but saw something else.
    """

    client: str
    version: str
    what: str
    cases: int
    skipped: int
    passed: dict[str, int]
    differs: dict[str, dict[str, Any]] = field(default_factory=dict)
    fails: dict[str, Any] = field(default_factory=dict)
    seen_differently: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0


def compared(suite: Suite, modes: Mapping[str, Outcomes], seconds: float) -> Result:
    names = list(dict.fromkeys(name for outcomes in modes.values() for name in outcomes))
    missing = Outcome(False, "did not run")
    rows = {name: {mode: outcomes.get(name, missing) for mode, outcomes in modes.items()} for name in names}
    result = Result(
        client=suite.client,
        version=suite.version,
        what=suite.what,
        cases=len(names),
        skipped=sum(row["direct"].passed is None for row in rows.values()),
        passed={mode: sum(o.passed is True for o in outcomes.values()) for mode, outcomes in modes.items()},
        seconds=round(seconds, 1),
    )
    for name, row in rows.items():
        seen = {mode: outcome.seen for mode, outcome in row.items()}
        if len({outcome.passed for outcome in row.values()}) > 1:
            result.differs[name] = seen
        elif row["direct"].passed is False:
            result.fails[name] = row["direct"].seen
        elif any(s != seen["direct"] for s in seen.values()):
            result.seen_differently[name] = seen
    return result


def runs(suites: Sequence[Suite], upstream: str | None = None) -> Iterator[Result]:
    with contextlib.ExitStack() as stack:
        servers = Servers(stack, upstream)
        for suite in suites:
            began = time.monotonic()
            found = {mode: attempted(suite, servers, mode) for mode in suite.modes}
            result = compared(suite, found, time.monotonic() - began)
            print(told(result), flush=True)
            yield result
        print(f"students were shown {servers.shown()} examples")


def attempted(suite: Suite, servers: Servers, mode: str) -> Outcomes:
    return suite.cases(suite, servers.url(suite.upstream, mode), servers.url("scripted", "direct"))


def told(result: Result) -> str:
    counts = ", ".join(f"{mode} {n}" for mode, n in result.passed.items())
    lines = [f"{result.client} {result.version}, {result.what}: of {result.cases} cases pass {counts}"]
    lines += [f"    DIFFERS {name}: {seen}" for name, seen in result.differs.items()]
    if len(result.fails) < 10:
        lines += [f"    fails directly too: {name}: {seen}" for name, seen in result.fails.items()]
    lines += [f"    seen differently: {name}: {seen}" for name, seen in result.seen_differently.items()]
    return "\n".join(lines)


# ---- what is written


def table(results: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| client | version | what ran | cases | pass directly | through iccache | routed, with examples |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in results:
        passed = [str(r["passed"].get(mode, "")) for mode in ("direct", "through", "routed")]
        cases = f"{r['cases']}, {r['skipped']} skipped" if r["skipped"] else str(r["cases"])
        lines.append(f"| {' | '.join([r['client'], r['version'], r['what'], cases, *passed])} |")
    return "\n".join(lines) + "\n"


def write(results: Sequence[Result]) -> None:
    rows = [vars(result) for result in results]
    RESULTS.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    head, begin, rest = README.read_text().partition("<!-- clients -->\n")
    _, end, tail = rest.partition("<!-- /clients -->")
    README.write_text(head + begin + table(rows) + end + tail)


def ready(suites: Sequence[Suite]) -> Sequence[Suite]:
    """The suites that can run here, their environments made."""
    LOGS.mkdir(parents=True, exist_ok=True)
    if not shutil.which("node") or not shutil.which("npm"):
        print("Node is not here: its clients, and the mock of the OpenAI API, are left out", file=sys.stderr)
        suites = [s for s in suites if s.environment != "node" and s.upstream != "steady"]
    for suite in suites:
        environment.node() if suite.environment == "node" else environment.python(suite.environment)
        if suite.upstream == "steady":
            environment.openai_tests(suite.version)
            environment.openapi()
    return suites


def main() -> int:
    parser = argparse.ArgumentParser(description="Every client, directly and through iccache.")
    parser.add_argument("--only", help="clients, environments or suites whose name contains this")
    parser.add_argument("--lock", action="store_true", help="resolve environments/*.in anew")
    parser.add_argument("--upstream", help="base URL of a real model, instead of the scripted upstream")
    given = parser.parse_args()
    if given.lock:
        environment.lock()
        return 0
    wanted = given.only or ""
    chosen = [s for s in SUITES if wanted.lower() in f"{s.client} {s.environment} {s.what}".lower()]
    suites = ready(chosen)
    results = list(runs(suites, given.upstream))
    if len(results) == len(SUITES) and not given.upstream:
        write(results)
    return 1 if any(r.differs for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
