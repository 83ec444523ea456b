"""What the proxy costs: contestants side by side in one run, on scripted upstreams, as ratios.

    make bench [QUICK=1]        python -m tests.bench.run [--quick] [--only 'NAME;NAME'] [--json FILE] [--picture FILE]
    make bench-quick            the same in two minutes, without other gateways

The contestants take turns, so that whatever else the machine does meets all of them. CPU time per request, of a whole
process tree, is the steadiest figure; added time is the difference to `direct` within the same round. The load and the
upstream are processes of their own and in no figure.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.bench.peers import PEERS, Missing

TICK = os.sysconf("SC_CLK_TCK")
READY_WITHIN_S = 180
EXAMPLES = 10_000
REPEATED = 50
ROOT = Path(__file__).resolve().parents[2]
TOPICS = [
    f"{verb} {thing} {end}"
    for verb in ("explain the meaning of", "write a short email about", "list three risks of", "translate to French:")
    for thing in ("a late delivery", "an unpaid invoice", "a new office", "the yearly budget", "a broken printer")
    for end in ("for a customer who is in a hurry and has asked twice", "in the voice of a friendly colleague")
]
NGINX = """
worker_processes 1; daemon off; error_log /dev/null; pid %(folder)s/nginx.pid;
events { worker_connections 2048; }
http { access_log off; client_body_temp_path %(folder)s; proxy_temp_path %(folder)s; fastcgi_temp_path %(folder)s;
  uwsgi_temp_path %(folder)s; scgi_temp_path %(folder)s; upstream u { server 127.0.0.1:%(upstream)d; keepalive 256; }
  server { listen 127.0.0.1:%(port)d backlog=1024; keepalive_requests 1000000;
    location / { proxy_pass http://u; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; } } }
"""
CONFIG = """
[server]
port = %(port)d
[store]
url = "sqlite:///%(store)s"
[cache]
admit = "%(admit)s"
[[backends]]
name = "small"
model = "small-model"
base_url = "http://127.0.0.1:%(upstream)d/v1"
usd_per_million_output_tokens = 0.4
max_in_flight = 64
[[backends]]
name = "large"
model = "large-model"
base_url = "http://127.0.0.1:%(upstream)d/v1"
usd_per_million_output_tokens = 4.0
max_in_flight = 64
"""


@dataclass
class Server:
    """A process under test; several contestants may be ways to use the same one."""

    name: str
    port: int
    command: list[str]
    ready: str = "/readyz"
    environ: Mapping[str, str] = field(default_factory=dict)
    says_port: bool = False  # on a line of its output: PORT=n
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    rss_mb: float = 0.0

    def start(self, log: Path) -> None:
        began = time.monotonic()
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True, env=os.environ | self.environ
            )
        while not (self._knows_port(log) and answers(self.port, self.ready)):
            if self.process.poll() is not None or time.monotonic() - began > READY_WITHIN_S:
                raise RuntimeError(f"{self.name} did not start: {log.read_text(errors='replace')[-500:]}")
            time.sleep(0.02)
        self.started_s = time.monotonic() - began

    def _knows_port(self, log: Path) -> bool:
        if self.says_port and (found := re.findall(r"PORT=(\d+)", log.read_text(errors="replace"))):
            self.port, self.says_port = int(found[-1]), False
        return not self.says_port

    def lag(self, kind: str) -> dict[float, int]:
        """Looks at the event loop of an iccache, by how late it was at most (s), or was held up; empty for others."""
        if not self.ready:
            return {}
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as said:
            rows = re.findall(rf'iccache_loop_{kind}_seconds_bucket{{le="([^"]+)"}} ([\d.e+]+)', said.read().decode())
            return {float(most): int(float(count)) for most, count in rows}
        return {}

    def cpu_s(self) -> float:
        return sum(map(cpu_s, tree(self.process.pid))) if self.process else 0.0

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()


@dataclass
class Contestant:
    name: str
    server: Server
    model: str = "large-model"
    headers: dict[str, str] = field(default_factory=dict)
    prompts: int = 0  # how many different ones; 0: every one is new
    path: str = "/v1/chat/completions"
    rounds: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Size:
    rounds: int
    low: int  # requests, at 20 a second
    seconds: float  # of each closed phase
    streams: int
    chunked: int  # streams whose chunks are counted


FEW, MANY = 5, 85  # chunks of a stream; what 80 more of them cost is what chunks cost
QUICK = Size(rounds=2, low=20, seconds=1.5, streams=8, chunked=32)
FULL = Size(rounds=4, low=200, seconds=3.0, streams=16, chunked=96)


# ---- one round


def measure(contestant: Contestant, load: subprocess.Popen[str], size: Size) -> dict[str, Any]:
    def run(**phase: Any) -> dict[str, Any]:
        return ask(contestant, load, **phase)

    run(phase="closed", connections=4, seconds=0.5)  # to get warm
    if contestant.prompts:
        run(phase="closed", connections=4, seconds=60, requests=contestant.prompts)  # from here on all are known
    low = run(phase="open", rate=20, requests=size.low)
    many = run(phase="closed", connections=32, seconds=size.seconds)
    more = run(phase="closed", connections=128, seconds=size.seconds)
    stream = run(phase="open", rate=5, requests=size.streams, events=20)
    short = run(phase="closed", connections=16, seconds=60, requests=size.chunked, events=FEW)
    long = run(phase="closed", connections=16, seconds=60, requests=size.chunked, events=MANY)
    chunks = long["events"] - short["events"]  # none are seen where a gateway writes events anew
    cpu_ms = 1000 * many["cpu_s"] / max(many["answered"], 1)
    return {
        "low_ms": [1000 * s for s in low["latency"]],
        "cpu_ms": cpu_ms,
        "per_s": many["answered"] / many["seconds"],
        "per_s_128": more["answered"] / more["seconds"],
        "first_ms": [1000 * s for s in stream["first"]],
        "delay_ms": [1000 * s for s in stream["delays"]],
        "chunk_us": 1e6 * (long["cpu_s"] - short["cpu_s"]) / chunks if chunks > 0 else math.nan,
        "bypassed": many["bypassed"] / max(many["answered"], 1),
        "failed": sum(phase["failed"] for phase in (low, many, more, stream, short, long)),
    }


def cpu_ms(contestant: Contestant, load: subprocess.Popen[str], seconds: float) -> float:
    """CPU time per request at 32 connections, of one short phase."""
    said = ask(contestant, load, phase="closed", connections=32, seconds=seconds)
    return float(1000 * said["cpu_s"] / max(said["answered"], 1))


def ask(contestant: Contestant, load: subprocess.Popen[str], **phase: Any) -> dict[str, Any]:
    """One phase: what the load says of it, and `cpu_s` of the contestant until it is idle again."""
    common = {
        "model": contestant.model, "headers": contestant.headers, "prompts": contestant.prompts, "topics": TOPICS,
        "path": contestant.path,
    }  # fmt: skip
    assert load.stdin is not None and load.stdout is not None
    before = contestant.server.cpu_s()
    load.stdin.write(json.dumps(common | phase) + "\n")
    load.stdin.flush()
    said: dict[str, Any] = json.loads(load.stdout.readline())
    settle(contestant.server)
    return said | {"cpu_s": contestant.server.cpu_s() - before}


def settle(server: Server, quiet_s: float = 0.2, most_s: float = 10) -> None:
    """Work behind the answers belongs to them: wait until the process is idle."""
    until = time.monotonic() + most_s
    before = server.cpu_s()
    while server.process and time.monotonic() < until:
        time.sleep(quiet_s)
        now = server.cpu_s()
        if now - before < 0.1 * quiet_s:
            return
        before = now


# ---- processes


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for one in found:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, children.read_text().split())
    return found


def cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICK


def rss_mb(pids: Sequence[int]) -> float:
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += sum(
                int(x.split()[1]) for x in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in x
            )
    return total / 1024


def answers(port: int, path: str) -> bool:
    if not path:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError):
        return False


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# ---- contestants


def contestants(folder: Path, upstream: int, more: str = "", admit: str = "none") -> list[Contestant]:
    """`more`: further lines of iccache's configuration; `admit`: whose answers become examples."""
    python = [sys.executable, "-W", "ignore"]
    direct = Contestant("direct", Server("direct", upstream, []))
    port = free_port()
    minimal = Server(
        "minimal", port, [*python, "-m", "tests.bench.minimal_proxy", str(port), f"http://127.0.0.1:{upstream}"], ""
    )
    found = [direct, Contestant("minimal aiohttp + uvloop", minimal)]
    if shutil.which("nginx"):
        port = free_port()
        (folder / "nginx.conf").write_text(NGINX % {"folder": folder, "port": port, "upstream": upstream})
        nginx = Server("nginx", port, ["nginx", "-c", str(folder / "nginx.conf"), "-p", str(folder)], "")
        found.append(Contestant("nginx", nginx))
    empty = iccache(folder, "empty", upstream, python, more, admit=admit)
    full = iccache(folder, "full", upstream, python, more, admit=admit)
    plain = {"x-iccache-store": "no", "x-iccache-examples": "0"}
    found += [
        Contestant("iccache pinned, unrecorded", empty, headers=plain),
        Contestant("iccache pinned", empty),
        Contestant("iccache routed, empty cache, new prompts", empty, "auto"),
        Contestant(f"iccache routed, {EXAMPLES:,} examples, repeated prompts", full, "auto", prompts=REPEATED),
        Contestant(f"iccache routed, {EXAMPLES:,} examples, new prompts", full, "auto"),
        Contestant(
            "iccache pinned, unrecorded, 2 workers", iccache(folder, "two", upstream, python, more, 2), headers=plain
        ),
    ]
    return found


def others(folder: Path, upstream: int) -> list[Contestant]:
    """Other gateways, as far as they can be installed."""
    found = []
    for make in PEERS:
        port = free_port()
        try:
            peer = make(folder, port, upstream)
        except Missing as exc:
            say(f"left out: {make.__name__} ({exc})")
            continue
        server = Server(peer.name, port, list(peer.command), peer.ready, environ=peer.environ, says_port=peer.says_port)
        found.append(Contestant(peer.name, server, peer.model, dict(peer.headers), path=peer.path))
    return found


def iccache(
    folder: Path, name: str, upstream: int, python: list[str], more: str, workers: int = 1, admit: str = "none"
) -> Server:
    port = free_port()
    file = folder / f"{name}.toml"
    file.write_text(
        more + CONFIG % {"port": port, "store": folder / f"{name}.db", "upstream": upstream, "admit": admit}
    )
    command = [*python, "-m", "iccache", "serve", "--config", str(file), "--workers", str(workers)]
    return Server(f"iccache ({name})", port, command)


def fill(store: Path, count: int, backend: str = "") -> None:
    """Examples around the topics: real embeddings of these, with noise, so that they are found and nothing waits."""
    import numpy as np  # noqa: PLC0415 - not in the process that measures

    from iccache.config import Embedder  # noqa: PLC0415
    from iccache.examples.embed import make_embedder  # noqa: PLC0415
    from iccache.examples.store import open_store  # noqa: PLC0415
    from tests.factories import make_example  # noqa: PLC0415

    embedder = make_embedder(Embedder(backend=backend) if backend else Embedder())  # type: ignore[arg-type]
    centres = embedder.embed([f"Case 1: {topic}" for topic in TOPICS])
    rng = np.random.default_rng(1)
    opened = open_store(f"sqlite:///{store}")
    with opened.transaction():
        for i in range(count):
            topic = i % len(TOPICS)
            vector = centres[topic] + rng.normal(scale=0.02, size=embedder.dim).astype(np.float32)
            opened.admit(
                make_example(
                    f"ex_{i}", tenant="default", at=time.time(), request=f"Case {i}: {TOPICS[topic]}",
                    answer=f"Answer {i}. " + "Here is what I would say to them, in a few plain words. " * 6,
                    embedder=embedder.identity, embedding=vector / np.linalg.norm(vector), tokens=110,
                )
            )  # fmt: skip
    opened.close()


# ---- the table


def table(found: Sequence[Contestant]) -> str:
    direct, minimal = found[0], found[1]
    yard = middle(minimal, "cpu_ms")
    yard_chunk = middle(minimal, "chunk_us")
    rows = [
        "| contestant | CPU ms per request | x minimal | added p50 / p95 / p99, ms | p99/p50 | requests/s at 32 / 128 "
        "| added time to first chunk, ms | added ms per chunk | CPU us per chunk | x minimal | start, s | RSS, MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        own = one.server.process is not None
        chunked = own and not math.isnan(middle(one, "chunk_us"))
        cells = [
            one.name,
            f"{middle(one, 'cpu_ms'):.2f}" if own else "-",
            f"{middle(one, 'cpu_ms') / yard:.1f}" if own and yard else "-",
            " / ".join(f"{added(one, direct, 'low_ms', q):.2f}" for q in (0.5, 0.95, 0.99)) if own else "-",
            f"{spread(one):.1f}" if own else "-",
            f"{middle(one, 'per_s'):.0f} / {middle(one, 'per_s_128'):.0f}",
            f"{added(one, direct, 'first_ms', 0.5):.2f}" if own else "-",
            f"{added(one, direct, 'delay_ms', 0.5):.2f}" if own else "-",
            f"{middle(one, 'chunk_us'):.0f}" if chunked else "-",
            f"{middle(one, 'chunk_us') / yard_chunk:.1f}" if chunked and yard_chunk else "-",
            f"{one.server.started_s:.1f}" if own else "-",
            f"{one.server.rss_mb:.0f}" if own else "-",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    failed = {one.name: sum(r["failed"] for r in one.rounds) for one in found}
    rows += [f"\n{name}: {count} requests failed" for name, count in failed.items() if count]
    for one in found:
        if share := middle(one, "bypassed"):
            rows.append(f"\n{one.name}: at 32 connections {share:.0%} went past the cache, undecided in time")
    return "\n".join(rows)


def draw(found: Sequence[Contestant], file: Path) -> None:
    """Bars of CPU time per request, on a logarithmic scale, as SVG by rich."""
    from rich.console import Console  # noqa: PLC0415 - only where a picture is wanted
    from rich.table import Table  # noqa: PLC0415

    costs = {one.name: middle(one, "cpu_ms") for one in found if one.server.process is not None}
    yard, least = costs[found[1].name], min(costs.values())
    bars = Table("", "CPU per request", "ms", "x minimal", box=None, title="CPU time per request, logarithmic")
    for name, cost in sorted(costs.items(), key=lambda pair: pair[1]):
        length = 1 + round(12 * math.log2(max(cost, 1e-3) / max(least, 1e-3)))
        colour = "green" if name.startswith("iccache") else "blue"
        bars.add_row(name, f"[{colour}]{chr(0x2588) * min(length, 90)}[/]", f"{cost:.2f}", f"{cost / yard:.1f}")
    console = Console(record=True, width=170, file=io.StringIO())
    console.print(bars)
    outside = re.compile(r"@font-face\s*\{.*?\}\s*|<!--.*?-->\s*", re.DOTALL)  # fonts
    file.write_text(outside.sub("", console.export_svg(title="make bench")))


def middle(one: Contestant, figure: str) -> float:
    return statistics.median(r[figure] for r in one.rounds)


def added(one: Contestant, direct: Contestant, figure: str, q: float) -> float:
    """The quantile over `direct`'s in the same round; the median of the rounds."""
    pairs = zip(one.rounds, direct.rounds, strict=True)
    return statistics.median(quantile(a[figure], q) - quantile(b[figure], q) for a, b in pairs)


def spread(one: Contestant) -> float:
    """p99/p50 of the latency itself, over all rounds."""
    low = [ms for r in one.rounds for ms in r["low_ms"]]
    return quantile(low, 0.99) / quantile(low, 0.5)


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else float("nan")


# ---- the run


@contextlib.contextmanager
def loads(found: Sequence[Contestant]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A load generator for each contestant."""
    made = {
        one.name: subprocess.Popen(
            [sys.executable, "-m", "tests.bench.load", str(one.server.port)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for one in found
    }  # fmt: skip
    try:
        yield made
    finally:
        for process in made.values():
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description="What the proxy costs, beside other proxies.")
    parser.add_argument("--quick", action="store_true", help="two short rounds, about two minutes")
    parser.add_argument("--only", default="", help="names of contestants to keep, as they begin, beside the first two")
    parser.add_argument("--rounds", type=int, default=0, help="how often everyone has a turn; 0: two or four")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="in the full cache")
    parser.add_argument("--embedder", default="", help="embedder.backend, where it is not to be the default")
    parser.add_argument("--admit", default="none", help="cache.admit: teacher, or none")
    parser.add_argument("--no-peers", action="store_true", help="without other gateways, which take long to install")
    parser.add_argument("--picture", type=Path, help="also draw the CPU time per request there, as SVG")
    parser.add_argument("--json", type=Path, help="also write every round there")
    parser.add_argument("--fill", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.fill:
        fill(given.fill, given.examples, given.embedder)
        return 0
    size = QUICK if given.quick else FULL
    size = replace(size, rounds=given.rounds or size.rounds)
    with tempfile.TemporaryDirectory() as folder:
        return bench(Path(folder), given, size)


def bench(folder: Path, given: argparse.Namespace, size: Size) -> int:
    upstream = Server(
        "upstream", port := free_port(), [sys.executable, "-m", "tests.bench.mock_upstream", str(port)], ""
    )
    more = "" if not given.embedder else f'[embedder]\nbackend = "{given.embedder}"\n'
    found = contestants(folder, port, more, given.admit) + (
        [] if given.quick or given.no_peers else others(folder, port)
    )
    kept = tuple(filter(None, given.only.split(";")))
    found = found[:2] + [c for c in found[2:] if not kept or c.name.startswith(kept)]
    servers = list({id(c.server): c.server for c in found[1:]}.values())
    try:
        upstream.start(folder / "upstream.log")
        if any(s.name == "iccache (full)" for s in servers):
            say(f"making {given.examples:,} examples")
            command = [sys.executable, "-W", "ignore", "-m", "tests.bench.run", "--fill", str(folder / "full.db")]
            command += ["--examples", str(given.examples), "--embedder", given.embedder]
            subprocess.run(command, cwd=ROOT, check=True)
        for server in list(servers):
            say(f"starting {server.name}")
            try:
                server.start(folder / f"{server.port}.log")
            except RuntimeError as exc:
                say(f"left out: {exc}")
                servers.remove(server)
                found = [one for one in found if one.server is not server]
        with loads(found) as made:
            for number in range(size.rounds):
                order = found[1:]
                random.Random(number).shuffle(order)
                for one in [found[0], *order]:
                    say(f"round {number + 1} of {size.rounds}: {one.name}")
                    one.rounds.append(measure(one, made[one.name], size))
        for server in servers:
            server.rss_mb = rss_mb(tree(server.process.pid)) if server.process else 0.0
        lags = {(server.name, kind): server.lag(kind) for server in servers for kind in ("lag", "held")}
    finally:
        for server in [*servers, upstream]:
            server.stop()
    print(table(found))
    for (name, kind), lag in lags.items():
        if lag:
            looked, late = max(lag.values()), max(lag.values()) - lag.get(0.02, 0)
            what = {"lag": "late", "held": "held up by something in the process"}[kind]
            print(f"\n{name}: the event loop was more than 20 ms {what} {late} of {looked} times")
    busy, cores = os.getloadavg()[1], os.cpu_count()
    print(f"\nload average over the last five minutes: {busy:.1f}, on {cores} cores, all of this included")
    if given.picture:
        draw(found, given.picture)
    if given.json:
        given.json.write_text(json.dumps({c.name: c.rounds for c in found}))
    return 0


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
