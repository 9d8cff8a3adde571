"""`saetrain report`: the curves of one or more runs, as one self-contained HTML page and a PNG.

The page needs nothing but a browser: curves are inline SVG, drawn here.  The PNG needs matplotlib.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from saetrain.errors import SaetrainError
from saetrain.log import read_log
from saetrain.metrics import EDGES

COLOURS = ("#0b62a4", "#d1495b", "#2e8b57", "#8a5ea8", "#c77f1a", "#3aa6a6", "#6b6b6b", "#a3315d")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 340, 220, 52, 26, 24
Points = list[tuple[float, float]]


@dataclass
class Panel:
    title: str
    curves: dict[str, Points]
    bands: dict[str, list[tuple[float, float, float]]]
    log: bool = False
    x: str = "step"
    share: bool = False  # of something: drawn from 0, and no less than a hundredth up


CURVES = {  # key of metrics.jsonl: (title, logarithmic)
    "loss": ("loss", True), "fvu": ("FVU of the batch", True), "eval_fvu": ("FVU, held-out rows, 95 %", True),
    "l0": ("active latents a token (L0)", False), "dead": ("dead latents, share", False),
    "dense": ("dense latents, share", False), "reconstruction": ("loss: reconstruction", True),
    "sparsity": ("loss: sparsity", True), "aux": ("loss: dead latents (AuxK)", True),
    "preact": ("loss: pre-activations", True), "gradient_norm.all": ("gradient norm, all", True),
    "gradient_norm.W_enc": ("gradient norm, encoder", True), "gradient_norm.W_dec": ("gradient norm, decoder", True),
    "update_norm.W_enc": ("update norm, encoder", True), "update_norm.W_dec": ("update norm, decoder", True),
    "decoder_cosine_mean": ("largest cosine of decoder rows, mean", False),
    "encoder_cosine": ("cosine of encoder and decoder rows", False), "decoder_norm": ("decoder row norm, mean", False),
    "threshold": ("activation threshold, mean", False), "document_entropy": ("document entropy of batches", False),
    "lr": ("learning rate", False), "tokens_per_s": ("tokens a second", False),
    "mfu": ("share of the machine's matrix speed (MFU)", False),
    "loader_wait": ("share of time waiting for rows", False),
}  # fmt: skip
SHARES = ("dead", "dense", "mfu", "loader_wait")
TABLE = (
    "step", "tokens", "loss", "eval_fvu", "eval_l0", "l0", "dead", "dense", "decoder_cosine_mean",
    "tokens_per_s", "mfu", "loader_wait",
)  # fmt: skip


def report(runs: Sequence[Path], out: Path) -> list[Path]:
    """Write report.html, and report.png where matplotlib is installed; returns what was written."""
    logs = {}
    for run in runs:
        logs[_name(run, runs)] = read_log(run)
        if not logs[_name(run, runs)]:
            raise SaetrainError(f"{run} has no metrics.jsonl with a line in it")
    configs = {_name(run, runs): _config(run) for run in runs}
    panels = panels_of(logs)
    out.mkdir(parents=True, exist_ok=True)
    page = out / "report.html"
    page.write_text(_page(logs, configs, panels))
    return [page, *([out / "report.png"] if _png(panels, out / "report.png") else [])]


def panels_of(logs: dict[str, list[dict[str, Any]]]) -> list[Panel]:
    found = []
    for key, (title, log) in CURVES.items():
        curves = {
            run: [(float(x["step"]), float(x[key])) for x in lines if _finite(x.get(key))]
            for run, lines in logs.items()
        }
        low, high = f"{key}_low", f"{key}_high"
        bands = {
            run: [(x["step"], x[low], x[high]) for x in lines if low in x]
            for run, lines in logs.items()
        }
        if any(curves.values()):
            log = log and all(y > 0 for points in curves.values() for _, y in points)
            found.append(Panel(title, curves, bands, log, share=key in SHARES))
    last = {
        run: next((line["density"] for line in reversed(lines) if "eval_fvu" in line), None)
        for run, lines in logs.items()
    }
    shown = {
        r: list(zip([e - 0.25 for e in EDGES], map(float, d[1:]), strict=True))
        for r, d in last.items()
        if d
    }
    if shown:
        title = "latents by log10 of firing rate, last window"
        found.insert(6, Panel(title, shown, {}, x="log10 rate"))
    return found


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _name(run: Path, runs: Sequence[Path]) -> str:
    return run.name if [r.name for r in runs].count(run.name) == 1 else str(run)


def _config(run: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run / "config.json").read_text())["config"])
    except (OSError, ValueError, KeyError):
        return {}


def _frame(panel: Panel) -> tuple[float, float, float, float]:
    """Limits of the axes; y in log10 if the panel is logarithmic."""
    xs = [x for points in panel.curves.values() for x, _ in points]
    ys = [y for points in panel.curves.values() for _, y in points]
    edges = [v for band in panel.bands.values() for _, *ends in band for v in ends]
    ys += [v for v in edges if v > 0 or not panel.log]
    low, high = min(ys), max(ys)
    if panel.share:
        low, high = 0.0, max(high, 0.01)
    if panel.log:
        low, high = math.log10(low), math.log10(high)
    elif low > 0 and low < 0.5 * high:
        low = 0.0
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    right = max(xs) if max(xs) > min(xs) else min(xs) + 1
    return min(xs), right, low - (pad if low else 0), high + pad


def svg(panel: Panel, colours: dict[str, str]) -> str:
    x0, x1, y0, y1 = _frame(panel)

    def at(x: float, y: float) -> str:
        y = math.log10(max(y, 1e-300)) if panel.log else y
        px = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - 8)
        py = TOP + (1 - min(max((y - y0) / (y1 - y0), 0), 1)) * (HEIGHT - TOP - BOTTOM)
        return f"{px:.1f},{py:.1f}"

    parts = [f'<text x="{LEFT}" y="15" class="t">{html.escape(panel.title)}</text>']
    for i in range(5):
        y = y0 + (y1 - y0) * i / 4
        shown = 10**y if panel.log else y
        left, right = at(x0, shown), at(x1, shown)
        parts.append(f'<path class="g" d="M{left}L{right}"/><text class="y" x="{LEFT - 5}" '
                     f'y="{float(left.split(",")[1]) + 3:.1f}">{_number(shown)}</text>')  # fmt: skip
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x = x0 + (x1 - x0) * share
        parts.append(
            f'<text x="{at(x, 1).split(",")[0]}" y="{HEIGHT - 8}" text-anchor="{anchor}">{x:.5g}</text>'
        )
    for run, points in panel.curves.items():
        band = panel.bands.get(run) or []
        colour, line = colours[run], " ".join(at(x, y) for x, y in points)
        if band:
            edge = [at(x, high) for x, _, high in band]
            edge += [at(x, low) for x, low, _ in reversed(band)]
            parts.append(f'<polygon points="{" ".join(edge)}" fill="{colour}" opacity="0.2"/>')
        name = f"<title>{html.escape(run)}</title>"
        parts.append(f'<polyline points="{line}" stroke="{colour}">{name}</polyline>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">{"".join(parts)}</svg>'


def _page(
    logs: dict[str, list[dict[str, Any]]], configs: dict[str, dict[str, Any]], panels: list[Panel]
) -> str:
    colours = {run: COLOURS[i % len(COLOURS)] for i, run in enumerate(logs)}
    last = {run: {k: v for line in lines for k, v in line.items()} for run, lines in logs.items()}
    keys = [k for k in TABLE if any(k in values for values in last.values())]

    def cell(value: Any) -> str:
        text = f"{value:,.4g}" if _finite(value) else "" if value is None else str(value)
        return f"<td>{html.escape(text)}</td>"

    rows = "".join(
        f'<tr><th style="color:{colours[run]}">{html.escape(run)}</th>{"".join(cell(values.get(k)) for k in keys)}</tr>'
        for run, values in last.items()
    )
    names = sorted({n for c in configs.values() for n in c})
    varied = [n for n in names if len({json.dumps(c.get(n)) for c in configs.values()}) > 1]
    fixed = {n: next(iter(configs.values())).get(n) for n in names if n not in varied}
    settings = "".join(
        f"<tr><th>{html.escape(run)}</th>{''.join(cell(c.get(n)) for n in varied)}</tr>"
        for run, c in configs.items()
    )
    heads = "".join(f"<th>{html.escape(n)}</th>" for n in varied)
    return f"""<!doctype html><meta charset="utf-8"><title>saetrain: {html.escape(", ".join(logs))}</title><style>
body{{font:14px system-ui,sans-serif;margin:24px;color:#222}} svg{{margin:4px;background:#fff;border:1px solid #ddd}}
svg text{{font-size:10px;fill:#555}} svg .t{{font-size:12px;fill:#111}} svg .y{{text-anchor:end}}
svg .g{{stroke:#e6e6e6}} polyline{{fill:none;stroke-width:1.5}} table{{border-collapse:collapse;margin:12px 0}}
td,th{{padding:3px 10px;border-bottom:1px solid #ddd;text-align:right}} th:first-child{{text-align:left}}
code{{color:#555}}</style><h1>Sparse autoencoder runs</h1><table><tr><th>run, last values</th>
{"".join(f"<th>{k}</th>" for k in keys)}</tr>{rows}</table>
{"".join(svg(panel, colours) for panel in panels)}
<h2>Settings</h2>{f"<table><tr><th>run</th>{heads}</tr>{settings}</table>" if varied else ""}
<p>The same in all runs: <code>{html.escape(json.dumps(fixed))}</code></p>
"""


def _png(panels: list[Panel], path: Path) -> bool:
    try:
        import_module("matplotlib").use("Agg")
        pyplot, ticker = (import_module(f"matplotlib.{name}") for name in ("pyplot", "ticker"))
    except ImportError:
        return False
    columns, rows = 4, -(-len(panels) // 4)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 2.8 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for i, (run, points) in enumerate(panel.curves.items()):
            colour = COLOURS[i % len(COLOURS)]
            axis.plot(*zip(*points, strict=True), color=colour, lw=1.2, label=run)
            if band := panel.bands.get(run):
                axis.fill_between(*zip(*band, strict=True), color=colour, alpha=0.2, lw=0)
        axis.set_title(panel.title, fontsize=9)
        _, _, low, high = _frame(panel)
        axis.set_yscale("log" if panel.log else "linear")
        axis.set_ylim(*((10**low, 10**high) if panel.log else (low, high)))
        axis.yaxis.set_major_formatter(lambda y, _: _number(y))
        if panel.log:
            between = range(2, 10) if high - low < 0.5 else (2, 5) if high - low < 2 else ()
            axis.yaxis.set_minor_locator(ticker.LogLocator(subs=list(between)))
            axis.yaxis.set_minor_formatter(lambda y, _: _number(y))
        axis.set_xlabel(panel.x, fontsize=7)
        axis.tick_params(which="both", labelsize=7)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
