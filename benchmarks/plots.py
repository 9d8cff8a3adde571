"""The plots.  Without matplotlib a result has none, and is otherwise complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from actshuffle.units import format_bytes
from benchmarks.phases import OUTSIDE, PHASES
from benchmarks.results import Bench

INK, GREY, LIGHT = "#222222", "#8a8a8a", "#e6e6e6"
BLUE, ORANGE, GREEN, RED = "#2f6fb0", "#d9822b", "#3f8f5b", "#b5423b"
PHASE_COLOURS = {
    "read": "#2f6fb0",
    "key": "#8fb8de",
    "partition": "#3f8f5b",
    "hash": "#9ac7a6",
    "gather": "#d9a72b",
    "write": "#b5423b",
    "receipt": "#d79a96",
    "other": "#6b5b95",
    "scheduler": "#bdbdbd",
    "idle": "#dedede",
    "driver": "#8a8a8a",
    "clearing": "#5f5f5f",
}


def draw(bench: Bench, make: Callable[[Path], Sequence[str]]) -> list[str]:
    """Draw into the results folder; returns the names of the images."""
    try:
        import matplotlib
    except ImportError:
        bench.say("matplotlib is not installed: no plots")
        return []
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": INK,
            "axes.edgecolor": GREY,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.axisbelow": True,
            "grid.color": LIGHT,
            "legend.frameon": False,
            "figure.dpi": 130,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "savefig.bbox": "tight",
        }
    )
    return [name for name in make(bench.results) if name]


def _save(folder: Path, figure: Any, name: str) -> str:
    import matplotlib.pyplot as plt

    figure.savefig(folder / name)
    plt.close(figure)
    return name


def _bars(
    axis: Any,
    at: Sequence[float],
    found: Sequence[dict[str, float]],
    height: float,
    colour: str,
    label: str | None = None,
) -> None:
    """Horizontal bars at the medians, with a line from the lowest to the highest round."""
    middle = [f["median"] for f in found]
    reach = [[f["median"] - f["low"] for f in found], [f["high"] - f["median"] for f in found]]
    axis.barh(at, middle, height, color=colour, label=label)
    axis.errorbar(middle, at, xerr=reach, fmt="none", ecolor=INK, elinewidth=0.8, capsize=2)
    for y, f in zip(at, found, strict=True):
        axis.annotate(f"{f['median']:.2f}", (f["high"], y), (4, 0), textcoords="offset points", va="center", fontsize=8)


def _legend_below(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncol=len(labels),
        columnspacing=1.0,
        handlelength=1.2,
        fontsize=8,
    )


def floor(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Rates by mode and operation; a colour for each number of processes."""
    import matplotlib.pyplot as plt

    modes = list(dict.fromkeys(r["mode"] for r in rows))
    counts = list(dict.fromkeys(r["processes"] for r in rows))
    names = list(dict.fromkeys(r["what"] for r in rows))
    figure, axes = plt.subplots(1, len(modes), figsize=(4.6 * len(modes), 3.2), sharex=True, sharey=True, squeeze=False)
    height = 0.8 / len(counts)
    for axis, mode in zip(axes[0], modes, strict=True):
        for i, count in enumerate(counts):
            ours = [r for r in rows if (r["mode"], r["processes"]) == (mode, count)]
            at = [names.index(r["what"]) + (i - (len(counts) - 1) / 2) * height for r in ours]
            label = f"{count} process{'es' * (count > 1)}"
            _bars(axis, at, [r["rate"] for r in ours], 0.9 * height, (BLUE, ORANGE, GREEN)[i % 3], label)
        axis.set(title=mode, xlabel="GB/s", yticks=range(len(names)), yticklabels=names)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(x=0.2)
        axis.grid(axis="x")
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    _legend_below(figure, axes[0][0])
    return _save(folder, figure, "floor.png")


def verify(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Rates of verify as shares of a plain read's, a bar for each case."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 0.35 * len(rows) + 1.2))
    for number, r in enumerate(rows):
        colour = BLUE if r["threads"] == 1 else ORANGE
        _bars(axis, [number], [r["of_read"]], 0.8, colour, "")
    names = [f"{format_bytes(r['row_bytes'])}, {r['mode']}, {r['threads']} threads, {r['what']}" for r in rows]
    axis.axvline(1, color=INK, linewidth=0.8)
    axis.set(xlabel="of a plain read of both stores", yticks=range(len(rows)), yticklabels=names)
    axis.invert_yaxis()
    figure.tight_layout()
    return _save(folder, figure, "verify.png")


def s3(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Rates as shares of a plain copy's and a plain read's by the same client, two bars for each case."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 0.7 * len(rows) + 1.2))
    for number, r in enumerate(rows):
        _bars(axis, [number - 0.2], [r["of_copy"]], 0.4, BLUE, "shuffle, of a copy" if not number else "")
        _bars(axis, [number + 0.2], [r["verify_of_read"]], 0.4, ORANGE, "verify, of a read" if not number else "")
    names = [f"{format_bytes(r['row_bytes'])}, {r['levels'] or 'default'} levels" for r in rows]
    axis.axvline(1, color=INK, linewidth=0.8)
    axis.set(xlabel="of the plain operation by obstore", yticks=range(len(rows)), yticklabels=names)
    axis.invert_yaxis()
    axis.legend()
    figure.tight_layout()
    return _save(folder, figure, "s3.png")


def loader(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Rates as shares of a plain read's: a panel for each row width and place of the data, by batch size."""
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((r["width"], r["mode"]) for r in rows))
    batches = list(dict.fromkeys(r["batch"] for r in rows))
    counts = list(dict.fromkeys(r["threads"] for r in rows))
    names = list(dict.fromkeys(r["what"] for r in rows))
    figure, axes = plt.subplots(
        len(batches),
        len(panels),
        figsize=(3.4 * len(panels) + 1, 2.8 * len(batches) + 0.4),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    height = 0.8 / len(counts)
    for axis, (batch, panel) in zip(axes.flat, product(batches, panels), strict=True):
        for i, count in enumerate(counts):
            case = (*panel, batch, count)
            ours = [r for r in rows if (r["width"], r["mode"], r["batch"], r["threads"]) == case]
            at = [names.index(r["what"]) + (i - (len(counts) - 1) / 2) * height for r in ours]
            label = f"{count} thread{'s' * (count > 1)}"
            colour = (BLUE, ORANGE, GREEN)[i % 3]
            _bars(axis, at, [r["of_plain"] for r in ours], 0.9 * height, colour, label)
        axis.axvline(1, color=INK, linewidth=0.8)
        axis.set(
            title=f"{batch:,} x {panel[0]} x float16, {panel[1]}",
            xlabel="of a plain read",
            yticks=range(len(names)),
            yticklabels=names,
        )
        axis.margins(x=0.2)
        axis.grid(axis="x")
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    _legend_below(figure, axes[0][0])
    return _save(folder, figure, "loader.png")


def _case(row: dict[str, Any]) -> str:
    crew = f"{row['workers']} worker{'s' * (row['workers'] != 1)}" if row["workers"] else "serial"
    levels = f"{row['levels']} level{'s' * (row['levels'] > 1)}" if row["levels"] else "default"
    return f"{row['row_bytes']} B rows, {crew}, {levels}{'' if row['checked'] else ', no digests'}"


def _panels(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    kinds = list(dict.fromkeys((r["mode"], r["size"]) for r in rows))
    return [
        (f"{mode}, {format_bytes(size)}", [r for r in rows if (r["mode"], r["size"]) == (mode, size)])
        for mode, size in kinds
    ]


def fractions(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Each shuffle as a fraction of a copy; a tick where one copy per level would be."""
    import matplotlib.pyplot as plt

    if not rows:
        return ""
    panels = _panels(rows)
    longest = max(len(ours) for _, ours in panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 0.8 + 0.34 * longest), squeeze=False)
    for axis, (title, ours) in zip(axes[0], panels, strict=True):
        for i, row in enumerate(ours):
            colour = (RED, GREY, BLUE, ORANGE, GREEN)[min(row["levels"], 4)]
            _bars(axis, [i], [row["of_copy"]], 0.7, colour)
            axis.plot(
                [1 / max(1, row["levels"])] * 2,
                [i - 0.45, i + 0.45],
                color=RED,
                linewidth=1.6,
                label="one copy per level" if i == 0 else None,
            )
        axis.set(
            title=title,
            xlabel="rate, as a fraction of copying the same files",
            yticks=range(len(ours)),
            yticklabels=[_case(r) for r in ours],
        )
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.margins(x=0.12)
        axis.grid(axis="x")
    figure.tight_layout()
    _legend_below(figure, axes[0][0])
    return _save(folder, figure, "shuffle.png")


def phases(folder: Path, rows: list[dict[str, Any]]) -> str:
    """The workers' time by phase, one stacked bar per case."""
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["phases"]]
    if not rows:
        return ""
    panels = _panels(rows)
    longest = max(len(ours) for _, ours in panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 1.2 + 0.34 * longest), squeeze=False)
    for axis, (title, ours) in zip(axes[0], panels, strict=True):
        left = [0.0] * len(ours)
        for phase in (*PHASES, *OUTSIDE):
            shares = [100 * r["phases"][phase] for r in ours]
            axis.barh(range(len(ours)), shares, 0.72, left=left, color=PHASE_COLOURS[phase], label=phase)
            for y, (at, share) in enumerate(zip(left, shares, strict=True)):
                if share >= 5:
                    axis.text(
                        at + share / 2,
                        y,
                        f"{share:.0f}",
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if phase in ("read", "partition", "write", "other") else INK,
                    )
            left = [at + share for at, share in zip(left, shares, strict=True)]
        axis.set(
            title=title,
            xlabel="% of the workers' time",
            xlim=(0, 100),
            yticks=range(len(ours)),
            yticklabels=[_case(r) for r in ours],
        )
        axis.invert_yaxis()
    figure.tight_layout()
    _legend_below(figure, axes[0][0])
    return _save(folder, figure, "phases.png")


def scheduler(folder: Path, samples: list[dict[str, float]], workers: int) -> str:
    """Memory of scheduler and driver, and time per task, as tasks pass."""
    import matplotlib.pyplot as plt

    unit, word = (1e3, "thousand ") if samples[-1]["tasks"] >= 2e4 else (1, "")
    figure, (memory, pace) = plt.subplots(1, 2, figsize=(9.2, 3.0))
    for name, colour in (("scheduler", BLUE), ("driver", ORANGE)):
        held = [s[f"{name}_memory"] / 1e6 for s in samples]
        memory.plot([s["tasks"] / unit for s in samples], held, color=colour, label=name)
    coarse = samples[:: max(1, len(samples) // 20)]
    for name, colour, label in (
        ("seconds", INK, "wall clock"),
        ("scheduler_cpu", BLUE, "scheduler"),
        ("driver_cpu", ORANGE, "driver"),
    ):
        steps = [(b["tasks"], 1000 * (b[name] - a[name]) / (b["tasks"] - a["tasks"])) for a, b in pairwise(coarse)]
        pace.plot([d / unit for d, _ in steps], [ms for _, ms in steps], color=colour, label=label)
    memory.set(title="memory", xlabel=f"{word}tasks done", ylabel="MB")
    pace.set(
        title=f"time a task, {workers} worker{'s' * (workers != 1)}: wall clock, and processor of",
        xlabel=f"{word}tasks done",
        ylabel="ms",
    )
    for axis in (memory, pace):
        axis.margins(y=0.15)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y")
    figure.tight_layout()
    _legend_below(figure, pace)
    return _save(folder, figure, "scheduler.png")


def costs(folder: Path, rows: list[dict[str, Any]]) -> str:
    """The cost of each part as a ratio, and a line at the limit it should stay below."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 0.5 * len(rows) + 1))
    at = [-float(i) for i in range(len(rows))]
    _bars(axis, at, [r["ratio"] for r in rows], 0.5, BLUE)
    axis.plot([r["limit"] for r in rows], at, "|", color=RED, markersize=18, markeredgewidth=2)
    axis.set_yticks(at, [r["what"] for r in rows])
    axis.set_xlabel("time over that of the same without (red: meant to be below)")
    axis.grid(axis="x")
    return _save(folder, figure, "costs.png")


def growth(folder: Path, rows: list[dict[str, Any]], line: dict[str, float], memory: int) -> str:
    """Time against bytes x levels, and memory against size; a colour for each number of levels."""
    import matplotlib.pyplot as plt

    figure, (pace, held) = plt.subplots(1, 2, figsize=(9.6, 3.6))
    colours = dict(enumerate((GREY, BLUE, ORANGE, GREEN, RED), 1))
    work = [r["bytes"] * r["levels"] / 1e9 for r in rows]
    pace.plot(
        [0, max(work)],
        [line["fixed"], line["fixed"] + line["per_gb"] * max(work)],
        color=GREY,
        linewidth=1,
        label=f"{line['fixed']:.1f} s + {line['per_gb']:.2f} s/GB",
    )
    for levels in dict.fromkeys(r["levels"] for r in rows):
        at = [i for i, r in enumerate(rows) if r["levels"] == levels]
        label = f"{levels} level{'s' * (levels > 1)}"
        for axis, x, key, unit in (
            (pace, work, "seconds", 1.0),
            (held, [r["bytes"] / 1e6 for r in rows], "memory", 1e6),
        ):
            found = [rows[i][key] for i in at]
            middle = [f["median"] / unit for f in found]
            reach = [
                [(f["median"] - f["low"]) / unit for f in found],
                [(f["high"] - f["median"]) / unit for f in found],
            ]
            axis.errorbar(
                [x[i] for i in at],
                middle,
                yerr=reach,
                fmt="o",
                markersize=5,
                capsize=3,
                color=colours.get(levels, INK),
                ecolor=GREY,
                label=label,
            )
    pace.set(title="time", xlabel="GB x levels", ylabel="seconds")
    pace.legend(loc="lower right")
    pace.locator_params(axis="x", nbins=6)
    held.axhline(memory / 1e6, color=RED, linewidth=1, linestyle="--")
    held.annotate(
        "--memory",
        (1.0, memory / 1e6),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        color=RED,
        fontsize=8,
        ha="right",
    )
    held.set(title="peak memory, interpreter and imports included", xlabel="data, MB", ylabel="MB")
    held.set_xscale("log", base=2)
    sizes = [r["bytes"] / 1e6 for r in rows]
    held.set_xticks(sizes, [f"{s:,.0f}" if s >= 10 else f"{s:.2g}" for s in sizes])
    pace.set_xlim(left=0)
    for axis in (pace, held):
        axis.margins(y=0.15)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y")
    figure.tight_layout()
    return _save(folder, figure, "growth.png")


def peers(folder: Path, rows: list[dict[str, Any]], nbytes: int) -> str:
    """Time and memory of each peer, fastest first; those that did not finish are named below."""
    import matplotlib.pyplot as plt

    done = sorted((r for r in rows if "seconds" in r), key=lambda r: r["seconds"]["median"])
    if not done:
        return ""
    figure, (pace, held) = plt.subplots(1, 2, figsize=(9.6, 1.1 + 0.32 * len(done)), sharey=True, width_ratios=(3, 2))

    def colour(row: dict[str, Any]) -> str:
        good = row["exact"] and row["verdict"] == "pass"
        return (ORANGE if row["peer"].startswith("actshuffle") else BLUE) if good else GREY

    for i, row in enumerate(done):
        _bars(pace, [i], [row["seconds"]], 0.7, colour(row))
        memory = {k: v / 1e9 if k != "rounds" else v for k, v in row["memory"].items()}
        _bars(held, [i], [memory], 0.7, colour(row))
    names = [r["title"] + ("" if r["exact"] and r["verdict"] == "pass" else " *") for r in done]
    pace.set(title=f"seconds for {format_bytes(nbytes)}, start-up included", yticks=range(len(done)), yticklabels=names)
    if done[-1]["seconds"]["median"] > 20 * done[0]["seconds"]["median"]:
        pace.set_xscale("log")
        pace.xaxis.set_major_formatter("{x:g}")
    held.set(title="peak memory, GB")
    held.axvline(nbytes / 1e9, color=RED, linewidth=1, linestyle="--")
    held.annotate(
        "the data",
        (nbytes / 1e9, 0.0),
        xycoords=("data", "axes fraction"),
        xytext=(3, 3),
        textcoords="offset points",
        color=RED,
        fontsize=8,
    )
    pace.invert_yaxis()
    for axis in (pace, held):
        axis.margins(x=0.2)
        axis.grid(axis="x")
    figure.tight_layout()
    notes = ["* not exactly uniform"] if any(n.endswith("*") for n in names) else []
    notes += [f"{r['title']}: {r['outcome']}" for r in rows if "seconds" not in r]
    figure.text(0.01, 0.0, "; ".join(notes), ha="left", va="top", fontsize=7.5, color=GREY, wrap=True)
    return _save(folder, figure, "peers.png")


def calibrate(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Predicted against measured seconds; on the line they are equal."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(4.6, 4.2))
    ends = [f(r["measured"]["low"] for r in rows) for f in (min, max)]
    axis.plot(ends, ends, color=GREY, linewidth=1)
    axis.fill_between(ends, [0.85 * x for x in ends], [1.15 * x for x in ends], color=LIGHT, label="15%")
    for known, colour, label in ((True, GREY, "fitted to"), (False, BLUE, "held out")):
        ours = [r for r in rows if r["known"] == known]
        axis.plot(
            [r["measured"]["low"] for r in ours],
            [r["foretold"] for r in ours],
            "o",
            markersize=5,
            color=colour,
            label=label,
        )
    axis.set(xscale="log", yscale="log", xlabel="measured, seconds", ylabel="predicted, seconds")
    axis.legend()
    return _save(folder, figure, "calibrate.png")
