"""Where a request's time goes, by stage and by line: the event loop's thread of a proxy under load, sampled.

    python -m tests.bench.lines [--path new|repeated|pinned] [--seconds 10] [--top 25]

A timer of the process's CPU time interrupts the loop's thread every other millisecond; each sample weighs what that
thread itself has computed since the last. A line stands for all that it calls outside the project: libraries, sockets
and the kernel. What the loop itself does (waiting for sockets included) is `the loop`. The threads beside it are a sum.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

from tests.bench import run

EVERY_S = 0.002
WARM_S = 2.0
OWN = tuple(str(run.ROOT / name) + os.sep for name in ("iccache", "router"))
STAGES = {  # the innermost of these on the stack names the stage
    "Pipeline.parse": "understand",
    "Select.count_prompt": "count",
    "Directory.plan": "plan",
    "Retriever.embed": "embed",
    "Retriever.begin": "look for",
    "Retriever.end": "look for",
    "Select._ranked": "rank",
    "Pipeline.route": "route",
    "Pipeline.compose.<locals>.body": "compose",
    "Fleet.begin": "forward",
    "Pipeline.begin": "record",
    "Pipeline.account": "record",
    "Learner.finish": "record",
    "Pipeline.head": "answer",
    "Link._send": "answer",
    "Link._serve": "between these",
    "Link.data_received": "take the request",
    "Connection.data_received": "forward",
}
PATHS: dict[str, dict[str, Any]] = {
    "new": {"model": "auto", "prompts": 0},
    "repeated": {"model": "auto", "prompts": run.REPEATED},
    "pinned": {"model": "large-model", "headers": {"x-iccache-store": "no", "x-iccache-examples": "0"}},
}


class Sampler:
    """Of the main thread of this process."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.lines: dict[str, float] = defaultdict(float)
        self.stages: dict[str, float] = defaultdict(float)
        self.on = False
        self._thread = self._last = self._process = 0.0

    def start(self) -> None:
        signal.signal(signal.SIGPROF, self._look)
        signal.signal(signal.SIGUSR1, self._turn)
        signal.setitimer(signal.ITIMER_PROF, EVERY_S, EVERY_S)

    def _turn(self, number: int, frame: FrameType | None) -> None:
        """On, and at the second time off, with what was found written down."""
        if not self.on:
            self.on = True
            self._thread = self._last = time.thread_time()
            self._process = time.process_time()
            return
        signal.setitimer(signal.ITIMER_PROF, 0)
        beside = time.process_time() - self._process - (time.thread_time() - self._thread)
        found = {"beside_s": beside, "thread_s": sum(self.stages.values())}
        whole = self.out.with_suffix(".part")
        whole.write_text(json.dumps(found | {"lines": self.lines, "stages": self.stages}))
        whole.rename(self.out)

    def _look(self, number: int, frame: FrameType | None) -> None:
        if not self.on:
            return
        now = time.thread_time()
        took, self._last = now - self._last, now
        line = stage = ""
        while frame is not None and not (line and stage):
            code = frame.f_code
            if not line and code.co_filename.startswith(OWN):
                line = f"{Path(code.co_filename).relative_to(run.ROOT)}:{frame.f_lineno} {code.co_qualname}"
            stage = stage or STAGES.get(code.co_qualname, "")
            frame = frame.f_back
        if line.endswith("run_worker"):
            line = ""
        self.lines[line or "the loop"] += took
        self.stages[stage or "the loop"] += took


def serve(out: Path, file: str) -> None:
    """`iccache serve`, sampled."""
    from iccache.cli import main as iccache  # noqa: PLC0415 - in the process that serves alone

    Sampler(out).start()
    sys.argv = ["iccache", "serve", "--config", file]
    iccache()


def sampled(folder: Path, path: str, seconds: float) -> tuple[dict[str, Any], int]:
    """What the sampler found, and how many requests there were."""
    upstream = run.Server(
        "upstream", port := run.free_port(), [sys.executable, "-m", "tests.bench.mock_upstream", str(port)], ""
    )
    proxy = run.iccache(folder, "full", port, [sys.executable, "-W", "ignore"], "")
    out = folder / "samples.json"
    proxy.command = [
        *(sys.executable, "-W", "ignore", "-m", "tests.bench.lines"),
        *("--serve", str(folder / "full.toml"), "--out", str(out)),
    ]
    contestant = run.Contestant("iccache", proxy, **PATHS[path])
    try:
        upstream.start(folder / "upstream.log")
        run.fill(folder / "full.db", run.EXAMPLES)
        proxy.start(folder / "proxy.log")
        assert proxy.process is not None
        with run.loads([contestant]) as made:
            load = made["iccache"]
            wait_for(folder / "full.db.vectors")  # the index is clustered
            run.ask(contestant, load, phase="closed", connections=4, seconds=WARM_S)
            proxy.process.send_signal(signal.SIGUSR1)
            answered = run.ask(contestant, load, phase="closed", connections=32, seconds=seconds)["answered"]
            proxy.process.send_signal(signal.SIGUSR1)
        wait_for(out)
        return json.loads(out.read_text()), answered
    finally:
        proxy.stop()
        upstream.stop()


def wait_for(file: Path) -> None:
    until = time.monotonic() + run.READY_WITHIN_S
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Where a request's time goes.")
    parser.add_argument("--path", choices=PATHS, default="new")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--top", type=int, default=25)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.out, given.serve)
        return
    with tempfile.TemporaryDirectory() as folder:
        found, requests = sampled(Path(folder), given.path, given.seconds)
    us = 1e6 / max(requests, 1)
    print(f"{given.path}: {requests} requests, {found['thread_s'] * us:.0f} us of the loop's thread for each, and")
    print(f"{found['beside_s'] * us:.0f} us of the threads beside it\n")
    for kind, most in (("stages", len(STAGES) + 1), ("lines", given.top)):
        print(f"| {kind} | us | share |\n|---|---|---|")
        for name, took in sorted(found[kind].items(), key=lambda pair: -pair[1])[:most]:
            print(f"| `{name}` | {took * us:.0f} | {took / found['thread_s']:.1%} |")
        print()


if __name__ == "__main__":
    main()
