"""The page of a report: who is compared, the frontier, the curves by theme, and all figures.

It is one file without scripts, which loads nothing; it follows the reader's light or dark theme, and prints.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actshuffle.units import counted
from saetrain.reporting.charts import COLOURS, chart
from saetrain.reporting.frontier import drawing, frontier, points_of
from saetrain.reporting.panels import Logs, is_number, themes_of

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
ABOUT = {"store": "store", "rows": "rows", "input": "input", "output": "output", "device": "device", "ranks": "ranks"}
STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c1f23;--soft:#5b626b;--rule:#d9dde2;
--c0:#0b62a4;--c1:#c2354a;--c2:#257a4a;--c3:#7d4f9e;--c4:#a8650a;--c5:#1f8080;--c6:#5f6368;--c7:#a3315d}
@media (prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e6e8ea;--soft:#a2a9b1;--rule:#343a41;
--c0:#5aa9e6;--c1:#f0788a;--c2:#62c08a;--c3:#bd95dc;--c4:#e3a24f;--c5:#5cc4c4;--c6:#a9afb6;--c7:#e77fae}}
*{box-sizing:border-box} body{margin:0 auto;padding:24px 20px 48px;max-width:1240px;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,sans-serif} h1{font-size:24px;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:18px;margin:32px 0 8px} p{margin:8px 0;max-width:75ch} .soft{color:var(--soft)}
.wide{overflow-x:auto} table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:4px 12px 4px 0;border-bottom:1px solid var(--rule);text-align:right;vertical-align:top}
tr>*{white-space:nowrap}
thead th{color:var(--soft);font-weight:500} th:first-child,td.text{text-align:left}
tr>td.text{white-space:normal;min-width:18em}
tbody th{font-weight:600} .swatch{display:inline-block;width:1.6em;margin-right:6px;border-radius:4px;
text-align:center;font-size:12px;background:currentColor} .swatch b{color:var(--paper);font-weight:600}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:20px}
.first{max-width:640px} figure{margin:0;break-inside:avoid}
figcaption{font-size:13px;color:var(--soft);margin-bottom:2px}
svg{display:block;width:100%;height:auto} svg text{font:10px system-ui,sans-serif;fill:var(--soft)}
svg .name{fill:var(--ink);font-weight:600} .grid{stroke:var(--rule);stroke-width:.7} .front{fill:none;stroke:var(--ink);
stroke-width:1;stroke-dasharray:4 3} .line{fill:none;stroke:currentColor;stroke-width:1.4;stroke-linecap:round}
.band{fill:currentColor;opacity:.18} .dot{fill:var(--paper);stroke:currentColor;stroke-width:1.6}
.dot.on{fill:currentColor} details{margin-top:24px} summary{cursor:pointer} code{overflow-wrap:anywhere}
@media print{:root{color-scheme:light;--paper:#fff;--ink:#000;--soft:#444;--rule:#ccc} body{padding:0;max-width:none;
font-size:11px} .charts{grid-template-columns:repeat(3,1fr);gap:12px} h2{break-after:avoid} .wide{overflow:visible}
tr>*{white-space:normal;padding-right:8px}}
"""


@dataclass
class Told:
    """The logs, settings and results of runs, by name."""

    logs: Logs
    configs: dict[str, dict[str, Any]]
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)  # why a run diverged
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)  # evaluation.json

    def __post_init__(self) -> None:
        self.last = {run: {k: v for line in lines for k, v in line.items()} for run, lines in self.logs.items()}
        for run, reason in self.ends.items():
            if "diverged" in self.logs[run][-1]:  # it left: earlier figures are of no final model
                self.last[run] = dict(self.logs[run][-1])
            self.last[run]["diverged"] = reason
        self.places = {run: place for place, run in enumerate(self.logs)}
        known = [config for config in self.configs.values() if config]
        names = sorted({name for config in known for name in config})
        values = {name: [config.get(name) for config in known] for name in names}
        self.varied = [n for n in names if any(value != values[n][0] for value in values[n])]
        self.fixed = {n: values[n][0] for n in names if n not in self.varied}


def page(told: Told) -> str:
    """The whole page."""
    names = list(told.logs)
    title = names[0] if len(names) == 1 else f"{counted(len(names), 'run')}"
    colours = "".join(f".c{i}{{color:var(--c{i})}}" for i in range(COLOURS))
    panels = "".join(
        f'<h2>{theme}</h2><div class="charts">{"".join(chart(panel, told.places) for panel in found)}</div>'
        for theme, found in themes_of(told.logs).items()
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>saetrain: {html.escape(", ".join(names))}</title><style>{STYLE}{colours}</style>
<h1>{html.escape(title)}</h1>{_origin(told)}
{_members(told)}
{_scores(told)}
{panels}
<h2>All figures</h2>{_figures(told)}
<details open><summary>Settings {"that all runs share" if len(names) > 1 else ""}</summary>
<p><code>{html.escape(json.dumps(told.fixed))}</code></p></details></html>
"""


def _origin(told: Told) -> str:
    """What was trained on what."""
    found: dict[str, list[str]] = {}
    for about in told.about.values():
        for key in ABOUT:
            value = about.get(key)
            text = f"{value:,}" if isinstance(value, int) else str(value or "")
            if text and text not in found.setdefault(key, []):
                found[key].append(text)
    facts = "; ".join(f"{ABOUT[key]} {', '.join(values)}" for key, values in found.items() if values)
    return f'<p class="soft">Trained on {html.escape(facts)}.</p>' if facts else ""


def _members(told: Told) -> str:
    """The runs by what differs, with the figures that decide; and the frontier where there are several."""
    best = frontier(points_of(told.last)) if len(told.logs) > 1 else []
    heads = [*told.varied, "FVU", "L0", "dead latents", *(["frontier"] if best else []), "steps"]
    if told.ends:
        heads.append("diverged")
    rows = []
    for run, line in told.last.items():
        cells = [cell(told.configs[run].get(name)) for name in told.varied]
        cells += [f"<td>{_interval(line, 'eval_fvu')}</td>", f"<td>{_interval(line, 'eval_l0')}</td>"]
        share = line.get("eval_dead")
        cells.append(f"<td>{f'{share:.1%}' if is_number(share) else ''}</td>")
        cells += [f"<td>{'yes' if run in best else ''}</td>"] if best else []
        cells.append(cell(line.get("step")))
        cells += [f'<td class="text">{html.escape(told.ends.get(run, ""))}</td>'] if told.ends else []
        rows.append(f"<tr><th>{_name(told, run)}</th>{''.join(cells)}</tr>")
    top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    table = f"<thead><tr><th>run</th>{top}</tr></thead><tbody>{''.join(rows)}</tbody>"
    shown = f'<div class="wide"><table>{table}</table></div>'
    note = "FVU, L0 and dead latents are those of the final model on held-out rows, with 95 % intervals."
    if not best:
        return f'{shown}<p class="soft">{note}</p>'
    on = ", ".join(html.escape(run) for run in best)
    return f"""{shown}<p class="soft">{note}</p><h2>Frontier of FVU and L0</h2><p>On the frontier: {on}.  No other run
here has a lower FVU at the same or a lower L0.  Filled dots are on it; numbers are those of the table.</p>
<div class="first">{drawing(told.last, told.places)}</div>"""


def _scores(told: Told) -> str:
    """A table of what models lose through the dictionaries, or nothing where none was evaluated."""
    rows = []
    for run, found in told.measured.items():
        values = (found[group][name] for group, name in SCORES)
        cells = "".join(f"<td>{v['value']:.4f} ({v['low']:.4f} to {v['high']:.4f})</td>" for v in values)
        step, last = found["step"], told.logs[run][-1]["step"]
        when = "" if step == last else f"step {step:,} of {last:,}, "
        what = f"{when}layer {found['layer']} of {found['model']}, {counted(found['documents'], 'document')}"
        rows.append(f'<tr><th>{html.escape(run)}</th>{cells}<td class="text">{html.escape(what)}</td></tr>')
    heads = "".join(f"<th>{heading}</th>" for heading in [*SCORES.values(), "measured on"])
    table = f"<thead><tr><th>run</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
    shown = f'<h2>The model through the dictionary</h2><div class="wide"><table>{table}</table></div>'
    return f'{shown}<p class="soft">In nats, with 95 % intervals over documents.</p>' if rows else ""


def _figures(told: Told) -> str:
    """Every final figure, one in a row, so that a phone shows them too."""
    runs = "".join(f"<th>{_name(told, run)}</th>" for run in told.last)
    rows = "".join(
        f"<tr><th>{html.escape(heading)}</th>{''.join(_figure(key, line) for line in told.last.values())}</tr>"
        for key, heading in TABLE.items()
        if any(key in line for line in told.last.values())
    )
    note = "The figures without another word are those of the final model on the held-out rows."
    return f"""<div class="wide"><table><thead><tr><th></th>{runs}</tr></thead><tbody>{rows}</tbody></table></div>
<p class="soft">{note}</p>"""


def _figure(key: str, line: Mapping[str, Any]) -> str:
    left_out = key == "mfu" and key in line and line[key] is None
    return cell("left out: training was faster than the product measured" if left_out else line.get(key))


def _name(told: Told, run: str) -> str:
    """A run with its number, in the colour of its curves."""
    place = told.places[run]
    return f'<span class="swatch c{place % COLOURS}"><b>{place + 1}</b></span>{html.escape(run)}'


def _interval(line: Mapping[str, Any], key: str) -> str:
    if not is_number(line.get(key)):
        return ""
    half = (line[f"{key}_high"] - line[f"{key}_low"]) / 2 if is_number(line.get(f"{key}_high")) else None
    return f"{line[key]:,.4g}" + (f" &plusmn; {half:.2g}" if half is not None else "")


def cell(value: Any) -> str:
    text = f"{value:,.4g}" if is_number(value) and not isinstance(value, bool) else "" if value is None else str(value)
    return f"<td>{html.escape(text)}</td>"
