"""Statistics for people: a table for the terminal, a fragment for notebooks, a picture."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from actshuffle._version import __version__
from actshuffle.checking.moments import bin_edges
from actshuffle.checking.statstypes import HEAVY, FloatStats, IntStats
from actshuffle.errors import RequestError
from actshuffle.html import image, page
from actshuffle.units import counted, format_bytes, format_seconds

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Stats:
    """Statistics of a store, by field; fields that are no numbers are in ``skipped``, with their type."""

    path: str
    rows: int
    identity: str
    fields: dict[str, FloatStats | IntStats]
    skipped: dict[str, str]
    nbytes: int
    seconds: float
    written: bool

    def __getitem__(self, name: str) -> FloatStats | IntStats:
        return self.fields[name]

    def as_dict(self) -> dict[str, Any]:
        """All but the arrays, as plain values."""
        return {
            "format": FORMAT,
            "version": __version__,
            "rows": self.rows,
            "identity": self.identity,
            "fields": {name: found.as_dict() for name, found in self.fields.items()},
            "skipped": self.skipped,
            "bytes": self.nbytes,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        floats, ints, notes = tables(self)
        rate = f"{format_bytes(self.nbytes / self.seconds)}/s" if self.seconds else "-"
        lines = [
            f"{self.path}: {counted(self.rows, 'row')}, {format_bytes(self.nbytes)} in "
            f"{format_seconds(self.seconds)} ({rate})" + (", kept in the store" if self.written else "")
        ]
        for header, rows in ((FLOAT_HEADER, floats), (INT_HEADER, ints)):
            if rows:
                lines += ["", *_columns([header, *rows])]
        return "\n".join([*lines, "", *notes] if notes else lines)

    def __repr__(self) -> str:
        return f"<Stats of {self.path}: {counted(self.rows, 'row')}, {', '.join(self.fields)}>"

    def _repr_html_(self) -> str:
        """The tables, and the picture where matplotlib is there."""
        floats, ints, notes = tables(self)
        facts: dict[str, object] = {"store": self.path, "rows": f"{self.rows:,}"}
        facts |= {f"note {i}": note for i, note in enumerate(notes, 1)}
        shown = floats and find_spec("matplotlib") is not None
        picture = image(png(self), f"statistics of {self.path}") if shown else ""
        whole = page("Statistics", facts, FLOAT_HEADER, floats, extra=picture)
        return whole + (page("", {}, INT_HEADER, ints) if ints else "")

    def png(self, path: str | Path | None = None) -> bytes:
        """A picture of the floating fields, also written to ``path``.  Needs matplotlib."""
        data = png(self)
        if path is not None:
            Path(path).write_bytes(data)
        return data


SHOWN = 8  # outlier places that are named
HEAVY_SHARE = 0.05  # of the squared norm: from here on heavy rows are named
FLOAT_HEADER = ("field", "type", "mean |x|²", "total var", "|mean|", "norm min", "5 %", "median", "95 %", "max")
INT_HEADER = ("field", "type", "min", "max", "distinct")


def tables(found: Stats) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]], list[str]]:
    """Rows for the floating and for the integer fields, and what is to be pointed out."""
    floats: list[tuple[str, ...]] = []
    ints: list[tuple[str, ...]] = []
    notes: list[str] = []
    for name, of in found.fields.items():
        if isinstance(of, FloatStats):
            norms = (of.norm_min, *(of.norm_quantile(q) for q in (0.05, 0.5, 0.95)), of.norm_max)
            with np.errstate(over="ignore", invalid="ignore"):
                size = float(np.sqrt(np.square(of.mean).sum()))
            values = (of.mean_squared_norm, float(of.variance.sum()), size, *norms)
            floats.append((name, of.dtype, *(f"{v:.4g}" for v in values)))
            notes += [f"{name}: {note}" for note in _notes(of)]
        else:
            about = f"{of.distinct:,}" if of.exact else f"about {of.distinct:,}"
            ends = ("-" if v is None else f"{v:,}" for v in (of.min, of.max))
            ints.append((name, of.dtype, *ends, about))
    notes += [f"{name}: no numbers ({dtype}), left out" for name, dtype in found.skipped.items()]
    return floats, ints, notes


def _notes(of: FloatStats) -> list[str]:
    notes = []
    for kind, count, first in (("NaN", of.nans, of.first_nan), ("Inf", of.infs, of.first_inf)):
        if first is not None:
            notes.append(f"{count:,} {kind}, the first in row {first[0]:,} at place {first[1]:,}")
    if of.left_out:
        notes.append(f"{counted(of.left_out, 'row')} with these are left out of the rest")
    rows, share = of.heavy
    if share >= HEAVY_SHARE:
        notes.append(
            f"{rows:,} of {counted(of.count, 'row')} ({rows / of.count:.2%}) have over {HEAVY:g} times the median norm "
            f"and hold {share:.1%} of the squared norm: means, scales and explained variance describe them "
            "and little else"
        )
    outliers = of.outliers
    if outliers:
        named = ", ".join(f"{i} ({times:.3g}x)" for i, times in list(outliers.items())[:SHOWN])
        more = ", ..." if len(outliers) > SHOWN else ""
        notes.append(
            f"{len(outliers):,} outlier dimension{'s' * (len(outliers) > 1)} "
            f"(root mean square over 6x the median's): {named}{more}"
        )
    if of.constant:
        notes.append(f"{of.constant:,} dimension{'s' * (of.constant > 1)} never change{'s' * (of.constant == 1)}")
    return notes


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


# --- The picture --------------------------------------------------------------------------------

INK, SOFT, ACCENT, WARN = "#1f2933", "#9aa5b1", "#2563a8", "#c2410c"
NOTE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}  # words at a point


def png(found: Stats) -> bytes:
    """One row of three panels per floating field: norms, dimensions, the spectrum of variances."""
    if find_spec("matplotlib") is None:
        raise RequestError("a picture needs matplotlib: pip install matplotlib")
    fields = [(n, f) for n, f in found.fields.items() if isinstance(f, FloatStats) and f.count]
    if not fields:
        raise RequestError(f"{found.path} has no floating fields with finite rows to show")
    figure = import_module("matplotlib.figure").Figure(
        figsize=(11, 0.55 + 2.9 * len(fields)), dpi=130, layout="constrained"
    )
    import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    name = found.path.rstrip("/").rsplit("/", 1)[-1]
    figure.suptitle(
        f"{name}   {counted(found.rows, 'row')}", x=0.01, ha="left", color=INK, fontsize=11, fontweight="bold"
    )
    axes = figure.subplots(len(fields), 3, squeeze=False)
    for row, (field, of) in zip(axes, fields, strict=True):
        _norm_panel(row[0], field, of)
        if of.mean.size > 1:
            _dimension_panel(row[1], of)
            _spectrum_panel(row[2], of)
        else:
            _scalar_panel(row[1], of)
            row[2].set_axis_off()
        for axis in row:
            axis.tick_params(labelsize=8, colors=INK)
            axis.spines[["top", "right"]].set_visible(False)
            axis.spines[["left", "bottom"]].set_color(SOFT)
    out = BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _norm_panel(axis: Any, field: str, of: FloatStats) -> None:
    """Share of rows by norm, in even bins between the extreme permilles."""
    low, high = bin_edges(of.norms[:, 0])
    middle = np.clip(np.sqrt((low + high) / 2), of.norm_min, of.norm_max)
    a, b = of.norm_quantile(0.001), of.norm_quantile(0.999)
    a, b = (a, b) if b > a else (a * 0.98 - 1e-9, a * 1.02 + 1e-9)
    inside = np.count_nonzero((middle >= a) & (middle <= b))  # bins of the histogram of the norms
    edges = np.linspace(a, b, int(np.clip(inside // 2, 8, 60)) + 1)
    # Rows are spread evenly over the bin they were counted in, or the bins here would beat with those.
    ends = np.clip(np.sqrt(np.stack([low, high], axis=1)), of.norm_min, of.norm_max).reshape(-1)
    counted = np.concatenate([[0], np.cumsum(of.norms[:, 1])]) / of.count
    below = np.interp(edges, ends, np.stack([counted[:-1], counted[1:]], axis=1).reshape(-1))
    below[0], below[-1] = 0.0, 1.0
    shares = np.diff(below)
    axis.stairs(shares, edges, fill=True, color=ACCENT, alpha=0.85)
    median = of.norm_quantile(0.5)
    axis.axvline(median, color=INK, linewidth=1)
    right = median < (a + b) / 2
    beside: dict[str, Any] = {"xytext": (4 if right else -4, -2), "va": "top", "ha": "left" if right else "right"}
    axis.annotate(
        f"median {median:.4g}", (median, 1.0), xycoords=("data", "axes fraction"), color=INK, **beside, **NOTE
    )
    axis.set_title(f"{field} ({of.dtype}): norms of rows", loc="left", fontsize=9, color=INK)
    axis.set_xlabel("norm (0.1 to 99.9 %, the rest in the outer bins)", fontsize=8, color=INK)
    axis.set_ylabel("share of rows", fontsize=8, color=INK)


def _dimension_panel(axis: Any, of: FloatStats) -> None:
    """Mean and one sd either side, by dimension; outliers named."""
    mean, sd = of.mean.reshape(-1), np.sqrt(of.variance.reshape(-1))
    place = np.arange(len(mean))
    axis.fill_between(place, mean - sd, mean + sd, color=ACCENT, alpha=0.3, linewidth=0, step="mid")
    axis.plot(place, mean, color=ACCENT, linewidth=0.8)
    span = float(np.ptp(np.concatenate([mean - sd, mean + sd]))) or 1.0
    for at in list(of.outliers)[:4]:
        up = mean[at] >= 0
        axis.plot(at, mean[at], ".", color=WARN, markersize=5)
        end = mean[at] + (sd[at] if up else -sd[at])
        beside: dict[str, Any] = {"xytext": (0, 3 if up else -3), "va": "bottom" if up else "top", "ha": "center"}
        axis.annotate(str(at), (at, end), color=WARN, **beside, **NOTE)
    if of.outliers:  # linear where most dimensions are, logarithmic beyond
        axis.set_yscale("symlog", linthresh=4 * float(np.median(of.rms)), linscale=2)
        axis.margins(y=0.15)
    else:
        axis.set_ylim(float((mean - sd).min()) - 0.08 * span, float((mean + sd).max()) + 0.12 * span)
    axis.set_title("mean and one sd, by dimension", loc="left", fontsize=9, color=INK)
    axis.set_xlabel("dimension", fontsize=8, color=INK)


def _scalar_panel(axis: Any, of: FloatStats) -> None:
    """A field of single numbers has no more to show than these."""
    axis.set_axis_off()
    words = f"mean {float(of.mean):.4g}\nsd {float(np.sqrt(of.variance)):.4g}"
    axis.text(0, 0.6, words, transform=axis.transAxes, fontsize=11, color=INK)


def _spectrum_panel(axis: Any, of: FloatStats) -> None:
    """Variances in falling order."""
    falling = np.sort(of.variance.reshape(-1))[::-1]
    rank = np.arange(1, len(falling) + 1)
    shown = falling > 0
    if shown.any():
        dots = "." if len(rank) < 30 else ""
        axis.loglog(rank[shown], falling[shown], color=ACCENT, linewidth=1.4, marker=dots)
        middle = float(np.median(falling)) or float(falling[shown][-1])
        axis.axhline(middle, color=SOFT, linewidth=0.8, linestyle="--")
    half = int(np.searchsorted(np.cumsum(falling), falling.sum() / 2)) + 1
    axis.set_title("variance of dimensions, largest first", loc="left", fontsize=9, color=INK)
    axis.set_xlabel(f"rank ({half:,} of {len(falling):,} hold half of it; dashed: median)", fontsize=8, color=INK)
