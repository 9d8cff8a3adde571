"""Which runs are on the frontier of FVU and L0: no other run has less of one and no more of the other."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from saetrain.reporting.charts import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, figure
from saetrain.reporting.panels import is_number

TITLE = "FVU over L0, held-out rows, with 95 % intervals"


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of (L0, FVU) that are not dominated, by L0; of equal points all."""
    return sorted(
        (
            name
            for name, (l0, fvu) in points.items()
            if not any(a <= l0 and b <= fvu and (a, b) != (l0, fvu) for a, b in points.values())
        ),
        key=lambda name: (points[name], name),
    )


def points_of(last: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """L0 and FVU on held-out rows of the runs that ended sound."""
    return {
        run: (float(line["eval_l0"]), float(line["eval_fvu"]))
        for run, line in last.items()
        if is_number(line.get("eval_l0")) and is_number(line.get("eval_fvu")) and not line.get("diverged")
    }


def drawing(last: Mapping[str, Mapping[str, Any]], colours: Mapping[str, int]) -> str:
    """The chart of the frontier; a dot has the number of its run, as in the table."""
    points = points_of(last)
    sides = {run: _sides(last[run]) for run in points}
    wide = Axis.of([v for ends in sides.values() for v in ends[:2]], LEFT, WIDTH - RIGHT)
    up = Axis.of([v for ends in sides.values() for v in ends[2:]], HEIGHT - BOTTOM, TOP, log=True)
    best = frontier(points)
    places = [(wide.place(points[run][0]), up.place(points[run][1])) for run in best]
    steps = "".join(f"H{x:.1f}V{y:.1f}" for x, y in places[1:])
    parts = [f'<path class="front" d="M{places[0][0]:.1f} {places[0][1]:.1f}{steps}"/>'] if places else []
    for run, (l0, fvu) in points.items():
        x, y, (left, right, low, high) = wide.place(l0), up.place(fvu), sides[run]
        colour, on = f"c{colours[run] % COLOURS}", " on" if run in best else ""
        bars = (
            f"M{wide.place(left):.1f} {y:.1f}H{wide.place(right):.1f}M{x:.1f} {up.place(low):.1f}V{up.place(high):.1f}"
        )
        parts.append(f'<path class="line {colour}" d="{bars}"/>')
        told = f"{run}: L0 {l0:.4g}, FVU {fvu:.4g}" + (", on the frontier" if on else "")
        parts.append(
            f'<circle class="dot {colour}{on}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(told)}</title></circle>'
        )
        dx, dy = (-12, 12) if on else (6, -5)  # so that close ones do not cover each other
        parts.append(f'<text class="name" x="{x + dx:.1f}" y="{y + dy:.1f}">{colours[run] + 1}</text>')
    return figure(TITLE, wide, up, "active latents a token (L0)", "".join(parts), "FVU")


def _sides(line: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """The ends of both intervals, or the values where there are none."""
    found = [line.get(f"{key}_{side}", line[key]) for key in ("eval_l0", "eval_fvu") for side in ("low", "high")]
    a, b, c, d = (float(value) if is_number(value) else 0.0 for value in found)
    return a, b, c, d
