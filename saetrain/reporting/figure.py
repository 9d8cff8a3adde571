"""Panels as one picture, by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from saetrain.reporting.panels import Panel

COLOURS = ("#0b62a4", "#d1495b", "#2e8b57", "#8a5ea8", "#c77f1a", "#3aa6a6", "#6b6b6b", "#a3315d")


def draw(panels: Sequence[Panel], colours: dict[str, str]) -> Figure:
    """All panels, four in a row."""
    rows = max(-(-len(panels) // 4), 1)
    width, height = 16.0, 2.8 * rows  # inches, as all lengths here
    figure = Figure(figsize=(width, height))
    # Margins that hold all titles and ticks: matplotlib's tight layout takes longer than all the drawing.
    axes = (width - 0.75 - 3 * 0.7) / 4, (height - 0.75 - (rows - 1) * 0.8) / rows
    figure.subplots_adjust(
        left=0.6 / width,
        right=1 - 0.15 / width,
        bottom=0.45 / height,
        top=1 - 0.3 / height,
        wspace=0.7 / axes[0],
        hspace=0.8 / axes[1],
    )
    for number, panel in enumerate(panels, 1):
        axis = figure.add_subplot(rows, 4, number)
        for run, points in panel.curves.items():
            axis.plot(*zip(*points, strict=True), color=colours[run], lw=1.2, label=run)
            if band := panel.bands.get(run):
                x, low, high = zip(*band, strict=True)
                axis.fill_between(x, low, high, color=colours[run], alpha=0.2, lw=0)
        if number == 1:
            axis.legend(fontsize=7, loc="upper right")
        axis.set_title(panel.title, fontsize=9)
        axis.set_xlabel(panel.x, fontsize=7)
        axis.tick_params(which="both", labelsize=7)
        axis.grid(alpha=0.3)
        if panel.log:
            axis.set_yscale("log")
        bottom, top = axis.get_ylim()
        if panel.log:
            decades = math.log10(top / bottom)
            few = [2, 3, 4, 6] if decades < 1.2 else [2, 5] if decades < 2 else []
            axis.yaxis.set_minor_locator(LogLocator(subs=range(2, 10) if decades < 0.5 else few))
            axis.yaxis.set_minor_formatter(lambda y, _: _number(y))
        elif panel.share:
            axis.set_ylim(0, max(top, 0.01))
        elif 0 < bottom < top / 2:
            axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(lambda y, _: _number(y))
    return figure


def png(figure: Figure) -> bytes:
    """The picture as the content of a file."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
