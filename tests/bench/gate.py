"""Whether a request costs more than it may: CPU time as a ratio to the minimal proxy's in the same run. No timed test.

    make bench-gate             python -m tests.bench.gate [--rounds N]

Each contestant and the yardstick take turns; the ratio of a round is of two measurements a second apart, so that what
else the machine does is in both. Of the ratios the median is compared with its limit. `noise` is half the distance
between the quartiles: where it is above NOISY of the median, nothing is concluded (exit code 3). It is a program and
no part of `make test`: run it on a machine that is not busy, before and after what may have cost something.

Exit code 0: within the limits, 1: above one of them, 3: too noisy to tell.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.bench import run

LIMITS: Mapping[str, float] = {  # x minimal: what was measured, and a third more
    "iccache pinned, unrecorded": 2.2,
    "iccache pinned": 3.2,
    "iccache routed, empty cache, new prompts": 9.5,
}
NOISY = 0.15
ROUNDS = 7
SECONDS = 0.6


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether a request costs more than it may.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ratios = measured(Path(folder), given.rounds)
    return judged(ratios)


def measured(folder: Path, rounds: int) -> dict[str, list[float]]:
    """CPU time per request over the minimal proxy's of the same round, of each contestant that has a limit."""
    upstream = run.Server(
        "upstream", port := run.free_port(), [sys.executable, "-m", "tests.bench.mock_upstream", str(port)], ""
    )
    found = run.contestants(folder, port, '[embedder]\nbackend = "hash"\n')
    yard, rest = found[1], [one for one in found if one.name in LIMITS]
    servers = list({id(one.server): one.server for one in (yard, *rest)}.values())
    ratios: dict[str, list[float]] = {one.name: [] for one in rest}
    try:
        for server in (upstream, *servers):
            server.start(folder / f"{server.port}.log")
        with run.loads([yard, *rest]) as made:
            for number in range(rounds + 1):
                for one in rest:
                    pair = [run.cpu_ms(each, made[each.name], SECONDS) for each in (yard, one)]
                    if number:  # the first is to get warm
                        ratios[one.name].append(pair[1] / pair[0])
    finally:
        for server in (*servers, upstream):
            server.stop()
    return ratios


def judged(ratios: Mapping[str, list[float]]) -> int:
    """Prints each ratio beside its limit; the exit code."""
    code = 0
    for name, values in ratios.items():
        quartiles = statistics.quantiles(values, n=4)
        middle, noise = statistics.median(values), (quartiles[2] - quartiles[0]) / 2
        word = "ok" if middle <= LIMITS[name] else "ABOVE"
        if noise > NOISY * middle:
            word, code = "too noisy to tell", code or 3
        elif word == "ABOVE":
            code = 1
        print(f"{name}: {middle:.2f} x minimal (noise {noise:.2f}), at most {LIMITS[name]:.1f}: {word}")
    return code


if __name__ == "__main__":
    sys.exit(main())
