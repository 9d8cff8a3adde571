"""The page of a report: what was trained, when and for how long; the frontier, the curves by theme, and all figures.

It is one file without scripts, which loads nothing; it follows the reader's light or dark theme, and prints.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actshuffle.units import counted
from saetrain.reporting.charts import COLOURS, chart, number
from saetrain.reporting.frontier import drawing, frontier, points_of
from saetrain.reporting.panels import Logs, Panel, is_number, themes_of
from saetrain.reporting.style import SHEET
from saetrain.reporting.when import When, when, whole
from saetrain.training.members import FREE

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
    ("loss_recovered", "mean"): "loss recovered, from the mean row",
    ("ce", "clean"): "cross entropy, clean",
    ("ce", "sae"): "cross entropy, through the dictionary",
    ("kl", "sae"): "KL to the clean model",
}
COUNTS = {"step", "tokens", "eval_rows", "tokens_per_s"}
SHARES = {"eval_heavy_share", "eval_dead", "eval_dense", "dead", "mfu", "loader_wait"}
ABOUT = ("store", "rows", "input", "output", "device")  # of a run's config.json


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
        matryoshka = any(config.get("widths") not in (None, [], [config.get("d_sae")]) for config in known)
        names = sorted({name for config in known for name in config if name != "widths" or matryoshka})
        values = {name: [config.get(name) for config in known] for name in names}
        differ = [n for n in names if any(value != values[n][0] for value in values[n])]
        self.varied = [n for n in differ if n not in FREE]  # what decides the model
        self.fixed: dict[str, Any] = {n: values[n][0] for n in names if n not in differ}


def page(told: Told) -> str:
    """The whole page."""
    names = list(told.logs)
    title = names[0] if len(names) == 1 else f"{counted(len(names), 'run')}"
    parts = {
        **({"The model through the dictionary": scores} if (scores := _scores(told)) else {}),
        **{theme: _theme(told, found) for theme, found in themes_of(told.logs).items()},
        "All figures": _figures(told),
        f"Settings {'that all runs share' if len(names) > 1 else ''}".strip(): _settings(told.fixed),
    }
    anchors = "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in parts)
    below = "".join(f'<h2 id="{_anchor(name)}">{name}</h2>{part}' for name, part in parts.items())
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>saetrain: {html.escape(", ".join(names))}</title><style>{SHEET}</style></head><body><main>
<h1>{html.escape(title)}</h1>{_origin(told)}
{_headline(told) if len(names) == 1 else _members(told)}
<nav aria-label="Parts of this page">{anchors}</nav>
{below}</main></body></html>
"""


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _theme(told: Told, panels: Sequence[Panel]) -> str:
    """The charts of a theme, and a sentence on what never changed."""
    still = "; ".join(f"{panel.title} {number(panel.constant)}" for panel in panels if panel.constant is not None)
    drawn = "".join(chart(panel, told.places) for panel in panels if panel.constant is None)
    note = f'<p class="soft">Constant, and not drawn: {html.escape(still)}.</p>' if still else ""
    return f'{_legend(told)}<div class="charts">{drawn}</div>{note}' if drawn else note


def _legend(told: Told) -> str:
    """Whose curves have which colour, where there are several that can be told apart."""
    names = "".join(f"<span>{_name(told, run)}</span>" for run in told.logs)
    return f'<p class="legend soft">{names}</p>' if 1 < len(told.logs) <= COLOURS else ""


def _origin(told: Told) -> str:
    """Name the store, the rows and the steps of the runs, and when and how long they trained."""
    fixed, found = told.fixed, {key: _values(told, key) for key in ABOUT}
    what = [str(fixed["arch"])] if "arch" in fixed else []
    what += [counted(int(fixed["d_sae"]), "latent")] if "d_sae" in fixed else []
    what += [f"k {fixed['k']}"] if "k" in fixed and "topk" in str(fixed.get("arch", "")) else []
    differ = f"that differ in {', '.join(told.varied)}" if told.varied else ""
    lead = ", ".join(html.escape(word) for word in [*what, *([differ] if differ else [])])
    lengths = {run: span for run, lines in told.logs.items() if (span := when(lines))}
    span = whole(list(lengths.values()))
    through = [*found["input"], *found["output"]]
    ranks = sorted({int(about.get("ranks", 1)) for about in told.about.values()})
    facts = {
        "Store": ", ".join(found["store"]),
        "Rows": ", ".join(found["rows"]),
        "Array": ", ".join(found["input"]) + (f" to {', '.join(found['output'])}" if len({*through}) > 1 else ""),
        "Trained": _trained(told, span),
        "On": ", ".join([*found["device"], *(counted(n, "rank") for n in ranks if n > 1)]),
    }
    rows = "".join(f"<dt>{key}</dt><dd>{html.escape(text)}</dd>" for key, text in facts.items() if text)
    return (f'<p class="lead soft">{lead}</p>' if lead else "") + (f'<dl class="facts">{rows}</dl>' if rows else "")


def _values(told: Told, key: str) -> list[str]:
    """Return the values of the runs under a key, each once."""
    found: list[str] = []
    for about in told.about.values():
        value = about.get(key)
        text = f"{value:,}" if isinstance(value, int) else str(value or "")
        if text and text not in found:
            found.append(text)
    return found


def _trained(told: Told, span: When | None) -> str:
    """Steps, tokens and dates; for one run how long it took, which several have in their table."""
    tokens = {int(line["tokens"]) for line in told.last.values() if is_number(line.get("tokens"))}
    steps = {int(line["step"]) for line in told.last.values() if is_number(line.get("step"))}
    size = f"{counted(max(steps), 'step')}, {counted(max(tokens), 'token')}" if tokens and steps else ""
    size = f"up to {size}" if len(steps) > 1 and size else size
    length = f"{span.length()} of training" if span and len(told.logs) == 1 else ""
    return "; ".join(part for part in (size, span and span.span(), length) if part)


def _headline(told: Told) -> str:
    """The figures of one run that decide, large."""
    [(run, line)] = told.last.items()
    if run in told.ends:
        return f"<p><b>{html.escape(told.ends[run])}</b></p>"
    dead, rows = line.get("eval_dead"), line.get("eval_rows", "")
    tiles = [(_interval(line, "eval_fvu"), "FVU, held-out variance not explained")]
    tiles += [(_interval(line, "eval_l0"), "active latents a token (L0)")]
    tiles += [(f"{dead:.1%}", "dead latents: active on no held-out row")] if is_number(dead) else []
    if run in told.measured:
        value = told.measured[run]["loss_recovered"]["zero"]
        shown = around(value["value"], (value["high"] - value["low"]) / 2)
        tiles += [(shown, "loss recovered, from zero ablation")]
    drawn = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in tiles if value)
    held = f"{counted(int(rows), 'held-out row')}, with 95 % intervals" if is_number(rows) else "held-out rows"
    note = f'<p class="soft">Of the final model, on {held}.</p>'
    return f'<div class="tiles">{drawn}</div>{note}' if drawn else ""


def _settings(fixed: Mapping[str, Any]) -> str:
    told = {n: "" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for n, v in fixed.items()}
    rows = "".join(
        f"<div><dt>{html.escape(n)}</dt><dd>{html.escape(v) or '&ndash;'}</dd></div>" for n, v in told.items()
    )
    return f'<dl class="settings">{rows}</dl>'


def _members(told: Told) -> str:
    """Several runs by what differs, with the figures that decide, and their frontier."""
    best = frontier(points_of(told.last))
    spans = {run: span for run, lines in told.logs.items() if (span := when(lines))}
    heads = [*told.varied, "FVU", "L0", "dead latents", *(["frontier"] if best else [])]
    heads.append("steps done" if "steps" in told.varied else "steps")
    heads += ["trained for"] if spans else []
    if told.ends:
        heads.append("diverged")
    rows = []
    for run, line in told.last.items():
        cells = [cell(told.configs[run].get(name)) for name in told.varied]
        cells += [f"<td>{_interval(line, 'eval_fvu')}</td>", f"<td>{_interval(line, 'eval_l0')}</td>"]
        share = line.get("eval_dead")
        cells.append(f"<td>{f'{share:.1%}' if is_number(share) else ''}</td>")
        cells += [f"<td>{'yes' if run in best else ''}</td>"] if best else []
        cells.append(cell(line.get("step"), "step"))
        cells += [f"<td>{spans[run].length() if run in spans else ''}</td>"] if spans else []
        cells += [f'<td class="text">{html.escape(told.ends.get(run, ""))}</td>'] if told.ends else []
        rows.append(f"<tr><th>{_name(told, run)}</th>{''.join(cells)}</tr>")
    top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    table = f"<thead><tr><th>run</th>{top}</tr></thead><tbody>{''.join(rows)}</tbody>"
    shown = f'<h2>The runs</h2><div class="wide"><table>{table}</table></div>'
    note = "FVU, L0 and dead latents are those of the final model on held-out rows, with 95 % intervals."
    if not best:
        return f'{shown}<p class="soft">{note}</p>'
    on = ", ".join(html.escape(run) for run in best)
    return f"""{shown}<p class="soft">{note}</p><h2>Frontier of FVU and L0</h2><p>On the frontier: {on}.  No other run
here has a lower FVU at the same or a lower L0.  Filled dots are on it; numbers are those of the table.</p>
<div class="first">{drawing(told.last, told.places)}</div>"""


def _scores(told: Told) -> str:
    """Show the loss of the model through each dictionary, a run in a column; empty where none was evaluated."""
    if not told.measured:
        return ""
    heads = "".join(f"<th>{_name(told, run)}</th>" for run in told.measured)
    rows = ""
    for (group, name), heading in SCORES.items():
        values = [found[group][name] for found in told.measured.values()]
        cells = "".join(f"<td>{v['value']:.4f} ({v['low']:.4f} to {v['high']:.4f})</td>" for v in values)
        rows += f"<tr><th>{heading}</th>{cells}</tr>"
    where = "".join(f'<td class="text">{html.escape(_where(told, run))}</td>' for run in told.measured)
    table = f"<thead><tr><th></th>{heads}</tr></thead><tbody>{rows}<tr><th>measured on</th>{where}</tr></tbody>"
    note = '<p class="soft">Cross entropy and KL are in nats; intervals are 95 %, over documents.</p>'
    return f'<div class="wide"><table>{table}</table></div>{note}'


def _where(told: Told, run: str) -> str:
    found, last = told.measured[run], told.logs[run][-1]["step"]
    at = "" if found["step"] in (last, None) else f"step {found['step']:,} of {last:,}, "
    return f"{at}layer {found['layer']} of {found['model']}, {counted(found['documents'], 'document')}"


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
    return cell("left out: training was faster than the product measured" if left_out else line.get(key), key)


def _name(told: Told, run: str) -> str:
    """A run with its number, in the colour of its curves."""
    place = told.places[run]
    return f'<span class="swatch c{place % COLOURS}"><b>{place + 1}</b></span>{html.escape(run)}'


def _interval(line: Mapping[str, Any], key: str) -> str:
    if not is_number(line.get(key)):
        return ""
    if not is_number(line.get(f"{key}_high")):
        return f"{line[key]:,.4g}"
    return around(line[key], (line[f"{key}_high"] - line[f"{key}_low"]) / 2)


def around(value: float, half: float) -> str:
    """A value and half the width of its interval, to the place of that half's second digit."""
    if not 0 < half < math.inf:
        return f"{value:,.4g} &plusmn; {half:.2g}"
    places = min(max(1 - math.floor(math.log10(half)), 0), 8)
    return f"{value:,.{places}f} &plusmn; {half:,.{places}f}"


def cell(value: Any, key: str = "") -> str:
    """A cell of a table; under the key of a count or a share, written as one."""
    text = "" if value is None else str(value)
    if is_number(value) and not isinstance(value, bool):
        whole = isinstance(value, int) or key in COUNTS
        text = f"{value:,.0f}" if whole else f"{value:.2%}" if key in SHARES else f"{value:,.4g}"
    return f"<td>{html.escape(text)}</td>"
