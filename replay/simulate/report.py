"""What five seeds say: a table, JSON, a picture, and whether the paper's order of policies came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from iccache.errors import IccacheError
from replay.simulate.run import EQUAL, KINDS, QUALITY_TARGET, Simulated, at_equal_quality, curve, simulate
from replay.simulate.world import Assumptions

COLUMNS = (
    "policy",
    "offload",
    "win rate",
    "throughput at equal quality",
    "requests/s",
    "p50 s",
    "p99 s",
    "correlation",
)
LEAST_CORRELATION = 0.7
COLOURS = ("#1b6ca8", "#e07b39", "#4c9f70", "#888888", "#b07aa1", "#c44e52")


class Claim(NamedTuple):
    """Something of the paper that is to come out, and whether it does, in how many of the seeds."""

    figure: str
    sentence: str
    held: int
    seeds: int
    why_not: str = ""  # what of the assumptions stands against it

    @property
    def line(self) -> str:
        if self.held == self.seeds:
            return f"yes: {self.sentence}"
        return f"in {self.held} of {self.seeds} seeds: {self.sentence}{self.why_not and f'. Why not: {self.why_not}'}"


class Report(NamedTuple):
    assumed: Assumptions
    seeds: tuple[int, ...]
    runs: Mapping[str, Sequence[Simulated]]  # by policy, in the order of the seeds
    equal: Mapping[str, Sequence[float]]  # throughput at equal quality, of the policies that have a curve

    def claims(self) -> list[Claim]:
        """Figures 12, 13 and 20 of the paper, and that the offloaded share follows the load."""

        def all_seeds(figure: str, sentence: str, holds: Sequence[bool], why_not: str = "") -> Claim:
            return Claim(figure, sentence, sum(holds), len(self.seeds), why_not)

        ic, plus, small, shown, large, blind = (
            self.runs[name]
            for name in ("IC-Cache", "RouteLLM+", "small only", "small with examples", "large only", "load-blind")
        )
        each = range(len(self.seeds))
        both = {"IC-Cache": ic, "RouteLLM+": plus}
        return [
            all_seeds(
                "12",
                "win rate: IC-Cache > RouteLLM+ > small only",
                [ic[i].win_rate > plus[i].win_rate > small[i].win_rate for i in each],
            ),
            all_seeds(
                "12",
                "median latency: small only < IC-Cache and RouteLLM+, and large only diverges",
                [
                    small[i].p50_s < min(ic[i].p50_s, plus[i].p50_s)
                    and large[i].p50_s > 10 * max(ic[i].p50_s, plus[i].p50_s)
                    for i in each
                ],
            ),
            all_seeds("12", "p99: IC-Cache < load-blind", [ic[i].p99_s < blind[i].p99_s for i in each]),
            all_seeds(
                "13",
                "throughput at equal quality: IC-Cache > RouteLLM+",
                [self.equal["IC-Cache"][i] > self.equal["RouteLLM+"][i] for i in each],
            ),
            all_seeds(
                "20",
                "median latency: small with examples < small only < large only",
                [shown[i].p50_s < small[i].p50_s < large[i].p50_s for i in each],
            ),
            all_seeds(
                "20",
                "p99: small with examples > small only",
                [shown[i].p99_s > small[i].p99_s for i in each],
                "with examples every answer is taken to be shorter by the same share, which saves the longest ones "
                "more than reading the examples costs",
            ),
            *(
                all_seeds(
                    "12",
                    f"{name}: offloading follows the arrivals (correlation over minutes > {LEAST_CORRELATION})",
                    [(run.correlation or 0.0) > LEAST_CORRELATION for run in runs],
                    "what examples make the small model good at goes there at any load, and only the rest follows it",
                )
                for name, runs in both.items()
            ),
        ]

    def rows(self) -> list[dict[str, Any]]:
        """One line of the table for each policy: means over the seeds."""
        return [
            {
                "policy": name,
                "offload": _mean([r.offload for r in runs]),
                "win_rate": _mean([r.win_rate for r in runs]),
                "throughput_at_equal_quality": _mean(self.equal[name]) if name in self.equal else None,
                "requests_per_s": _mean([r.throughput for r in runs]),
                "p50_s": _mean([r.p50_s for r in runs]),
                "p99_s": _mean([r.p99_s for r in runs]),
                "correlation": None if runs[0].correlation is None else _mean([r.correlation or 0.0 for r in runs]),
            }
            for name, runs in self.runs.items()
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "assumptions": self.assumed.lines() | {"quality_target": QUALITY_TARGET, "equal_win_rate": EQUAL},
            "seeds": list(self.seeds),
            "policies": self.rows(),
            "claims": [c._asdict() for c in self.claims()],
            "runs": {name: [r._asdict() for r in runs] for name, runs in self.runs.items()},
        }

    def as_text(self) -> str:
        lines = [" | ".join(["", *COLUMNS, ""]).strip(), "|" + "---|" * len(COLUMNS)]
        for row in self.rows():
            digits = ("", ".2f", ".3f", ".2f", ".2f", ".1f", ".1f", ".2f")
            cells = ["" if v is None else format(v, d) for v, d in zip(row.values(), digits, strict=True)]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", "What the paper's figures say, and whether it comes out here:", ""]
        lines += [f"- figure {c.figure}: {c.line}" for c in self.claims()]
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """Offloaded share and arrivals over time, and the latencies: one picture. Raises IccacheError."""
        try:
            import matplotlib.figure  # noqa: PLC0415 - an extra: only a picture needs it
        except ImportError as exc:
            raise IccacheError("a picture needs matplotlib: pip install 'iccache[pictures]'") from exc
        figure = matplotlib.figure.Figure(figsize=(10, 4.2), layout="constrained")
        over_time, latency = figure.subplots(1, 2, width_ratios=[3, 2])
        arrivals = np.mean([[m[0] for m in r.by_minute] for r in self.runs["IC-Cache"]], axis=0)
        over_time.fill_between(
            range(len(arrivals)), arrivals / arrivals.max(), color="#dddddd", label="arrivals / peak"
        )
        for (name, runs), colour in zip(self.runs.items(), COLOURS, strict=True):
            if runs[0].correlation is not None:
                share = np.mean([[m[1] for m in r.by_minute] for r in runs], axis=0)
                over_time.plot(share, label=name, color=colour)
            latency.plot([_mean([r.p50_s for r in runs])], [name], "o", color=colour)
            latency.plot([_mean([r.p99_s for r in runs])], [name], "x", color=colour)
        over_time.set(xlabel="minute", ylabel="offloaded share", ylim=(0, 1.02))
        over_time.legend(fontsize=8)
        latency.set(xscale="log", xlabel="seconds (o: median, x: 99 %)")
        figure.savefig(path)


def simulated(assumed: Assumptions, seeds: Sequence[int], say: Callable[[str], None]) -> Report:
    """Every policy with every seed; `say` hears of each as it begins."""
    runs: dict[str, list[Simulated]] = {}
    equal: dict[str, list[float]] = {}
    for kind in KINDS:
        say(f"{kind.name}, {len(seeds)} seeds")
        runs[kind.name] = [simulate(kind, assumed, seed) for seed in seeds]
        if kind.load_aware:
            equal[kind.name] = [at_equal_quality(curve(kind, assumed, seed)) for seed in seeds]
    return Report(assumed, tuple(seeds), runs, equal)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
