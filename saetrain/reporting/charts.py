"""Small charts as SVG, for a page that is light, dark or printed: colours are classes, text is the page's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from saetrain.reporting.panels import Panel

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 20, 8, 34  # margins
MOST_POINTS = 400  # of a curve
COLOURS = 8  # classes c0 to c7
NARROW = 0.02  # of the value: the least that a linear scale spans


@dataclass(frozen=True)
class Axis:
    """A scale from numbers to places between `first` and `last`."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    @classmethod
    def of(cls, values: Iterable[float], first: float, last: float, *, log: bool = False, share: bool = False) -> Axis:
        """A scale for these values, with some room; a share begins at 0 and reaches at least 0.01."""
        held = sorted(v for v in values if math.isfinite(v) and (v > 0 or not log)) or [1.0]
        low, high = held[0], held[-1]
        if log:
            room = (high / low) ** 0.05 if high > low else 1.3
            return cls(low / room, high * room, first, last, True)
        if share:
            return cls(0.0, max(high * 1.05, 0.01), first, last)
        low = 0.0 if 0 < low < high / 2 else low
        if high - low < NARROW * abs(high):  # noise of a constant is no curve
            low, high = (low + high - NARROW * abs(high)) / 2, (low + high + NARROW * abs(high)) / 2
        room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
        return cls(low - room if low else low, high + room, first, last)

    def place(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.first + min(max(share, 0.0), 1.0) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Round numbers, about five."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1) if self.log else ()
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            found = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
            if len(found) > 2:
                return found[:: -(-len(found) // 6)]
        raw = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(s * unit for s in (1, 2, 5, 10) if s * unit >= raw)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def number(value: float) -> str:
    if abs(value) >= 1e6 or 0 < abs(value) < 1e-3:
        return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def chart(panel: Panel, colours: dict[str, int]) -> str:
    """A panel as a figure with its title; a run's curve has the class c and the run's number."""
    xs = [x for points in panel.curves.values() for x, _ in points]
    ys = [y for points in panel.curves.values() for _, y in points]
    across = Axis(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, WIDTH - RIGHT)
    up = Axis.of(ys, HEIGHT - BOTTOM, TOP, log=panel.log, share=panel.share)
    parts = []
    for run, points in panel.curves.items():
        colour = colours[run] % COLOURS
        if band := panel.bands.get(run):
            edge = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
            parts.append(f'<path class="band c{colour}" d="{_path(edge, across, up)}Z"/>')
        if points:
            shape = _path(points, across, up) if len(points) > 1 else _dot(points[0], across, up)
            parts.append(f'<path class="line c{colour}" d="{shape}"><title>{escape(run)}</title></path>')
    ends = [value if isinstance(value, str) else number(value) for value in panel.ends.values()]
    end = ends[0] if len(panel.curves) == len(ends) == 1 else ""
    return figure(panel.title, across, up, panel.x, "".join(parts), end=end)


def figure(title: str, across: Axis, up: Axis, x: str, inside: str, y: str = "", end: str = "") -> str:
    """Axes with ticks around what is `inside`; beside the title the value at the end."""
    parts = []
    for tick in up.ticks():
        at = up.place(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{at + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in across.ticks():
        at = across.place(tick)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 13}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{escape(x)}</text>')
    if y:
        parts.append(f'<text class="axis" x="{LEFT + 4}" y="{TOP + 10}">{escape(y)}</text>')
    shape = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"'
    drawing = f"<svg {shape}>{''.join(parts)}{inside}</svg>"
    last = f"<b>{end}</b>" if end else ""
    return f"<figure><figcaption><span>{escape(title)}</span>{last}</figcaption>{drawing}</figure>"


def _path(points: Sequence[tuple[float, float]], across: Axis, up: Axis) -> str:
    every = -(-len(points) // MOST_POINTS)
    kept = [*points[:-1:every], points[-1]]
    return "M" + "L".join(f"{across.place(x):.1f} {up.place(y):.1f}" for x, y in kept)


def _dot(point: tuple[float, float], across: Axis, up: Axis) -> str:
    return f"M{across.place(point[0]):.1f} {up.place(point[1]):.1f}h.01"
