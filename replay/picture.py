"""The quality-cost curve as a picture: SVG, without a library or a font of its own."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from replay.evaluate import Evaluated

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 440, 70, 50, 20, 20
TICKS = 5
COLOURS = ("#1f5fa8", "#b8442c", "#2e7d4f", "#7a4fa3", "#8a6d1d", "#555555")


def curve_svg(curve: Sequence[Evaluated], points: Sequence[Evaluated]) -> str:
    """Cost against quality, by the doubly robust estimates; bars are 95 % intervals of quality. What the log has too
    little to say of is left out."""
    shown, named = [e for e in curve if e.trusted], [e for e in points if e.trusted]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    if not shown and not named:
        text = "The log has too little overlap with these policies to draw anything."
        return "\n".join([*parts, f'<text x="{LEFT}" y="{HEIGHT / 2}">{text}</text>', "</svg>"]) + "\n"
    axes = _Axes([*shown, *named])
    parts += axes.drawn()
    line = " ".join(f"{axes.x(e):.1f},{axes.y(_quality(e)):.1f}" for e in sorted(shown, key=_cost))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1f5fa8" stroke-width="1.5"/>')
    for e in shown:
        parts += _point(axes, e, "#1f5fa8", e.policy.removeprefix("threshold:"), 3)
    for e, colour in zip(named, COLOURS[1:] * len(named), strict=False):
        parts += _point(axes, e, colour, e.policy, 5)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cost(e: Evaluated) -> float:
    return e.cost.dr.value * 1000


def _quality(e: Evaluated) -> float:
    assert e.quality is not None
    return e.quality.dr.value


class _Axes:
    """From USD per 1000 requests and quality to places."""

    def __init__(self, shown: Sequence[Evaluated]) -> None:
        costs = [_cost(e) for e in shown]
        bars = [x for e in shown if e.quality is not None for x in e.quality.dr[1:]]
        self.low, self.high = min(0.0, *costs), max(1e-9, max(costs) * 1.1)
        self.bottom, self.top = max(-0.2, min(bars) - 0.02), min(1.2, max(bars) + 0.02)

    def x(self, e: Evaluated) -> float:
        return self.at_x(_cost(e))

    def at_x(self, cost: float) -> float:
        return LEFT + (cost - self.low) / (self.high - self.low) * (WIDTH - LEFT - RIGHT)

    def y(self, quality: float) -> float:
        share = (min(self.top, max(self.bottom, quality)) - self.bottom) / (self.top - self.bottom)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    def drawn(self) -> list[str]:
        parts = []
        for i in range(TICKS + 1):
            cost = self.low + (self.high - self.low) * i / TICKS
            quality = self.bottom + (self.top - self.bottom) * i / TICKS
            x, y = self.at_x(cost), self.y(quality)
            parts += [
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>',
                f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{quality:.2f}</text>',
                f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{cost:.3g}</text>',
            ]
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">USD per 1000 requests</text>')
        parts.append(
            f'<text x="16" y="{HEIGHT / 2}" transform="rotate(-90 16 {HEIGHT / 2})" text-anchor="middle">quality</text>'
        )
        return parts


def _point(axes: _Axes, e: Evaluated, colour: str, label: str, size: int) -> list[str]:
    assert e.quality is not None
    x = axes.x(e)
    y, low, high = (axes.y(q) for q in e.quality.dr)
    return [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}" stroke-opacity="0.4"/>',
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{colour}"/>',
        f'<text x="{x + 6:.1f}" y="{y - 6:.1f}" fill="{colour}">{escape(label)}</text>',
    ]
