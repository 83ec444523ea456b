"""How soon the router follows: a student that breaks, one that is mended, a backend that is new.

    python -m tests.bench.recovery [--runs 20]

One kind of request or two, everyday texts, a 0/1 score for each, default configuration with its floor. Counted in
requests of all kinds: until at most 15 % of the last 20 go to the student that broke, 80 % of the last 30 to
the one that was mended or to the new one, and until the new one is asked for the first time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from iccache import config
from iccache.examples.embed import make_embedder
from iccache.quality.kinds import kind_of
from router.linear import LinearThompson
from router.types import Arm, Signals
from tests.bench import everyday
from tests.bench.routing import MIDDLE, STUDENT, TEACHER, Kind, Texts, default_floor, default_router

GOOD_N, BROKEN_N, MENDED_N, NEW_N = 200, 150, 500, 300
SETTINGS = {"perfect": (1.0, 0.0), "0/1 of .95 and .10": (0.95, 0.1), "0/1 of .90 and .20": (0.9, 0.2)}


@dataclass(frozen=True)
class Found:
    """Requests until each; None: not within the phase."""

    dropped: int | None
    found_again: int | None
    new_asked: int | None
    new_used: int | None


def run(kinds: list[Kind], texts: Texts, good: float, bad: float, seed: int) -> Found:
    rng = np.random.default_rng(seed)
    router, floor = default_router(LinearThompson(), np.random.default_rng(seed + 1)), default_floor("teacher")

    def phase(n: int, arms: list[Arm], quality: dict[str, float], begin: int) -> list[str]:
        served = []
        for i in range(n):
            kind = kinds[rng.integers(len(kinds))]
            text = kind.texts[rng.integers(len(kind.texts))]
            of = kind_of(kind.system)
            signals = Signals(texts.known[text], len(text) // 4, 1, {}, system=kind.system)
            decision = router.route(signals, arms, 0.0, floor.standing("tenant", of))
            score = float(rng.random() < quality[decision.arm])
            router.learn(decision.arm, decision.features, score)
            floor.learn("tenant", of, decision.arm, score, at=float(begin + i), weight=decision.meant)
            served.append(decision.arm)
        return served

    two, three = [STUDENT, TEACHER], [STUDENT, MIDDLE, TEACHER]
    able = {"student": good, "middle": good, "teacher": 1.0}
    phase(GOOD_N, two, able, 0)
    broken = phase(BROKEN_N, two, able | {"student": bad}, GOOD_N)
    mended = phase(MENDED_N, two, able, GOOD_N + BROKEN_N)
    start = GOOD_N + BROKEN_N + MENDED_N
    phase(100, two, able | {"student": bad}, start)
    new = phase(NEW_N, three, able | {"student": bad}, start + 100)
    return Found(
        first(broken, "student", 20, lambda share: share <= 0.15),
        first(mended, "student", 30, lambda share: share >= 0.8),
        new.index("middle") + 1 if "middle" in new else None,
        first(new, "middle", 30, lambda share: share >= 0.8),
    )


def first(served: list[str], arm: str, window: int, reached: Callable[[float], bool]) -> int | None:
    """After how many requests the arm's share of the last `window` is as wanted."""
    shares = (served[i - window : i].count(arm) / window for i in range(window, len(served) + 1))
    return next((i + window for i, share in enumerate(shares) if reached(share)), None)


def summary(counts: list[int | None]) -> str:
    """Median and 90 % quantile; what did not come counts as infinite."""
    ordered = sorted(float("inf") if n is None else n for n in counts)
    median, high = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return f"{median:.0f} / {high:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    texts = Texts(make_embedder(config.Embedder()))
    one, other = (Kind(everyday.texts(name)) for name in ("cooking", "code"))
    texts.embed([*one.texts, *other.texts])
    print("| requests until (median / 90 %) | dropped | found again | new one asked | new one used |")
    print("|---|---|---|---|---|")
    for kinds, name in (([one], "one kind"), ([one, other], "two kinds")):
        for scores, (good, bad) in SETTINGS.items():
            found = [run(kinds, texts, good, bad, seed) for seed in range(args.runs)]
            columns = [[getattr(f, field) for f in found] for field in Found.__dataclass_fields__]
            print(f"| {name}, {scores} | {' | '.join(map(summary, columns))} |", flush=True)


if __name__ == "__main__":
    main()
