"""How often the floor holds an arm back that it should not, and how soon one that it should: thousands of seeded runs.

    python -m tests.bench.floor [--runs 2000] [--feedbacks 300] [--confidence 0.95]

The policy adapts: which arm answers depends on the luck so far. `at the target` is the worst case that is no shortfall.
"""

from __future__ import annotations

import argparse

import numpy as np

from router.floor import REST, Floor, Standing

TARGET, TEACHER = 0.7, 0.9
WORLDS = {"as good": 0.9, "at the target": TARGET * TEACHER, "half": 0.45, "bad": 0.2}


def held_after(seed: int, student: float, feedbacks: int, confidence: float) -> int | None:
    """After how many feedbacks on it the student is first held back; None: never."""
    rng = np.random.default_rng(seed)
    floor = Floor("teacher", quality_target=TARGET, confidence=confidence)
    luck, on_student = 0.0, 0
    for i in range(feedbacks):
        arm = "student" if rng.random() < 0.5 + 0.3 * np.tanh(luck) else "teacher"
        on_student += arm == "student"
        quality = float(rng.random() < (student if arm == "student" else TEACHER))
        luck += (quality - 0.5) * (1 if arm == "student" else -1) / 8
        floor.learn("t", REST, arm, quality, at=float(i))
        if floor.standing("t", REST).get("student") is Standing.HELD:
            return on_student
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--feedbacks", type=int, default=300)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--only", choices=WORLDS)
    asked = parser.parse_args()
    for name, student in WORLDS.items():
        if asked.only in (None, name):
            found = [held_after(s, student, asked.feedbacks, asked.confidence) for s in range(asked.runs)]
            held = [n for n in found if n is not None]
            soon = f"after {np.median(held):.0f} of its feedbacks (median)" if held else ""
            print(f"{name}: held back in {len(held)} of {asked.runs} runs {soon}")


if __name__ == "__main__":
    main()
