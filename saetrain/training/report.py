"""`saetrain report`: the curves of one or more runs, as one self-contained HTML page and a PNG.

Both show the same figure; the page embeds it as SVG and loads nothing from elsewhere.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from actshuffle.units import counted
from saetrain.errors import ConfigError
from saetrain.training.log import LOG, read_log
from saetrain.training.metrics import EDGES
from saetrain.training.outcome import read_evaluation
from saetrain.writing import put

COLOURS = ("#0b62a4", "#d1495b", "#2e8b57", "#8a5ea8", "#c77f1a", "#3aa6a6", "#6b6b6b", "#a3315d")
Points = list[tuple[float, float]]


@dataclass
class Panel:
    """One small plot: for each run a curve of (x, y), and a band of (x, low, high) if there is one."""

    title: str
    curves: dict[str, Points]
    bands: dict[str, list[tuple[float, float, float]]]
    log: bool = False
    x: str = "step"
    share: bool = False  # a fraction: the axis starts at 0 and reaches at least 0.01


CURVES = {  # key of metrics.jsonl: (title, logarithmic)
    "loss": ("loss", True),
    "fvu": ("FVU of the batch", True),
    "eval_fvu": ("FVU, held-out rows, 95 %", True),
    "eval_fvu_median": ("FVU of the median held-out row", True),
    "l0": ("active latents a token (L0)", False),
    "eval_dead": ("dead latents, share, held-out rows", False),
    "eval_dense": ("dense latents, share, held-out rows", False),
    "dead": ("dead latents, share, in training", False),
    "dense": ("dense latents, share, in training", False),
    "reconstruction": ("loss: reconstruction", True),
    "sparsity": ("loss: sparsity", True),
    "aux": ("loss: dead latents (AuxK)", True),
    "preact": ("loss: pre-activations", True),
    "gate": ("loss: reconstruction from the gate (gated)", True),
    "gradient_norm.all": ("gradient norm, all", True),
    "gradient_norm.W_enc": ("gradient norm, encoder", True),
    "gradient_norm.W_dec": ("gradient norm, decoder", True),
    "update_norm.W_enc": ("update norm, encoder", True),
    "update_norm.W_dec": ("update norm, decoder", True),
    "decoder_cosine_mean": ("largest cosine of decoder rows, mean", False),
    "encoder_cosine": ("cosine of encoder and decoder rows", False),
    "decoder_norm": ("decoder row norm, mean", False),
    "threshold": ("activation threshold, mean", False),
    "document_entropy": ("document entropy of batches", False),
    "lr": ("learning rate", False),
    "tokens_per_s": ("tokens a second", False),
    "mfu": ("share of the machine's matrix speed (MFU)", False),
    "loader_wait": ("share of time waiting for rows", False),
}
SHARES = ("eval_dead", "eval_dense", "dead", "dense", "mfu", "loader_wait")
TABLE = {  # key of metrics.jsonl: heading; of the final model on held-out rows, or it says that it is not
    "step": "steps",
    "tokens": "training tokens",
    "eval_fvu": "FVU",
    "eval_fvu_median": "FVU of the median row",
    "eval_heavy_share": "squared norm in heavy rows",
    "eval_l0": "L0",
    "eval_dead": "dead latents",
    "eval_dense": "dense latents",
    "decoder_cosine_mean": "largest decoder cosine, mean",
    "eval_rows": "held-out rows",
    "loss": "loss of the last batch",
    "l0": "L0 of the last batch",
    "dead": "dead in training",
    "tokens_per_s": "tokens/s at the end",
    "mfu": "MFU at the end",
    "loader_wait": "share of time waiting for rows",
}
SCORES = {  # of evaluation.json: path, heading
    ("loss_recovered", "zero"): "loss recovered, from zero",
    ("loss_recovered", "mean"): "from mean",
    ("ce", "clean"): "cross entropy, clean",
    ("ce", "sae"): "through the dictionary",
    ("kl", "sae"): "KL",
}


def report(runs: Sequence[Path], out: Path) -> list[Path]:
    """Write report.html and report.png to the folder `out`; returns their paths.

    A sweep's folder stands for its runs, and files, which a shell's `sweep/*` gives too, for nothing.
    """
    runs = [member for run in runs if not run.is_file() for member in _members(run)]
    if not runs:
        raise ConfigError("none of these is the folder of a run or a sweep")
    logs = {}
    for run in runs:
        logs[_name(run, runs)] = read_log(run)
        if not logs[_name(run, runs)]:
            raise ConfigError(f"{run} has no metrics.jsonl, or an empty one: it is no run that was trained")
    configs = {_name(run, runs): _config(run) for run in runs}
    colours = {run: COLOURS[i % len(COLOURS)] for i, run in enumerate(logs)}
    figure = draw(panels_of(logs), colours)
    out.mkdir(parents=True, exist_ok=True)
    page, image = out / "report.html", out / "report.png"
    measured = {_name(run, runs): found for run in runs if (found := read_evaluation(run))}
    put(page, _page(logs, configs, colours, _svg(figure), _scores(measured, logs)))
    put(image, png(figure))
    return [page, image]


def _members(run: Path) -> list[Path]:
    """The runs of a sweep, by the folder of the sweep; a run itself."""
    if (run / LOG).exists():
        return [run]
    return sorted(found.parent for found in run.glob(f"*/{LOG}")) or [run]


def panels_of(logs: dict[str, list[dict[str, Any]]]) -> list[Panel]:
    """The panels for which at least one run has numbers, from the lines of each run's log."""
    found = []
    arrays = {key: key.partition(".")[2] for lines in logs.values() for x in lines for key in x if "eval_fvu." in key}
    of_arrays = {key: (f"FVU of {name}, held-out rows", True) for key, name in arrays.items()}
    for key, (title, log) in {**CURVES, **of_arrays}.items():
        curves = {
            run: [(float(x["step"]), float(x[key])) for x in lines if _finite(x.get(key))]
            for run, lines in logs.items()
        }
        low, high = f"{key}_low", f"{key}_high"
        bands = {run: [(x["step"], x[low], x[high]) for x in lines if low in x] for run, lines in logs.items()}
        if any(curves.values()):
            log = log and all(y > 0 for points in curves.values() for _, y in points)
            found.append(Panel(title, curves, bands, log, share=key in SHARES))
    last = {
        run: next((line["eval_density"] for line in reversed(lines) if "eval_density" in line), None)
        for run, lines in logs.items()
    }
    shown = {r: list(zip([e - 0.25 for e in EDGES], map(float, d[1:]), strict=True)) for r, d in last.items() if d}
    if shown:
        title = "latents by log10 of firing rate, held-out rows"
        found.insert(6, Panel(title, shown, {}, x="log10 rate"))
    tenths = {
        run: next((line["eval_fvu_by_norm"] for line in reversed(lines) if "eval_fvu_by_norm" in line), None)
        for run, lines in logs.items()
    }
    curves = {run: [(float(i), float(v)) for i, v in enumerate(values, 1)] for run, values in tenths.items() if values}
    if curves:
        found.append(Panel("FVU by norm, held-out rows", curves, {}, x="tenth of the rows, by norm"))
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


def _scores(measured: dict[str, dict[str, Any]], logs: dict[str, list[dict[str, Any]]]) -> str:
    """A table of what models lose through the dictionaries, or nothing where none was evaluated."""
    rows = []
    for run, found in measured.items():
        cells = "".join(f"<td>{_interval(found[group][name])}</td>" for group, name in SCORES)
        step, last = found["step"], logs[run][-1]["step"]
        when = "" if step == last else f"step {step:,} of {last:,}, "
        what = f"{when}layer {found['layer']} of {found['model']}, {counted(found['documents'], 'document')}"
        rows.append(f"<tr><th>{html.escape(run)}</th>{cells}<td>{html.escape(what)}</td></tr>")
    heads = "".join(f"<th>{heading}</th>" for heading in [*SCORES.values(), "measured on"])
    table = f"<h2>The model through the dictionary</h2><table><tr><th>run</th>{heads}</tr>{''.join(rows)}</table>"
    return f"{table}<p>In nats, with 95 % intervals over documents.</p>" if rows else ""


def _interval(value: dict[str, float]) -> str:
    return f"{value['value']:.4f} ({value['low']:.4f} to {value['high']:.4f})"


def _page(
    logs: dict[str, list[dict[str, Any]]],
    configs: dict[str, dict[str, Any]],
    colours: dict[str, str],
    figure: str,
    scores: str,
) -> str:
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
        f"<tr><th>{html.escape(run)}</th>{''.join(cell(c.get(n)) for n in varied)}</tr>" for run, c in configs.items()
    )
    heads = "".join(f"<th>{html.escape(n)}</th>" for n in varied)
    return f"""<!doctype html><meta charset="utf-8"><title>saetrain: {html.escape(", ".join(logs))}</title><style>
body{{font:14px system-ui,sans-serif;margin:24px;color:#222}} svg{{width:100%;height:auto}}
table{{border-collapse:collapse;margin:12px 0}}
td,th{{padding:3px 10px;border-bottom:1px solid #ddd;text-align:right}} th:first-child{{text-align:left}}
code{{color:#555}}</style><h1>Sparse autoencoder runs</h1><table><tr><th>run</th>
{"".join(f"<th>{TABLE[k]}</th>" for k in keys)}</tr>{rows}</table>
<p>The figures without another word are those of the final model on the held-out rows.</p>
{scores}
{figure}
<h2>Settings</h2>{f"<table><tr><th>run</th>{heads}</tr>{settings}</table>" if varied else ""}
<p>The same in all runs: <code>{html.escape(json.dumps(fixed))}</code></p>
"""


def draw(panels: list[Panel], colours: dict[str, str]) -> Figure:
    """All panels, four in a row."""
    rows = -(-len(panels) // 4)
    figure = Figure(figsize=(16, 2.8 * rows), layout="tight")
    for number, panel in enumerate(panels, 1):
        axis = figure.add_subplot(rows, 4, number)
        for run, points in panel.curves.items():
            axis.plot(*zip(*points, strict=True), color=colours[run], lw=1.2, label=run)
            if band := panel.bands.get(run):
                x, low, high = zip(*band, strict=True)
                axis.fill_between(x, low, high, color=colours[run], alpha=0.2, lw=0)
        if number == 1:
            axis.legend(fontsize=7)
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
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def _svg(figure: Figure) -> str:
    """The figure as an element of a page; its text stays text."""
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(text, format="svg")
    whole = text.getvalue()
    return re.sub("<metadata>.*</metadata>", "", whole[whole.index("<svg") :], flags=re.DOTALL)
