"""The curves of runs, by theme: what a report draws, from the lines of metrics.jsonl."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from saetrain.training.metrics import EDGES

Points = list[tuple[float, float]]
LEFT_OUT = "left out"  # where a line has null
Logs = dict[str, list[dict[str, Any]]]  # of each run, by its name


@dataclass
class Panel:
    """One small plot: for each run a curve of (x, y), and a band of (x, low, high) if there is one."""

    title: str
    curves: dict[str, Points]
    bands: dict[str, list[tuple[float, float, float]]]
    log: bool = False
    x: str = "step"
    share: bool = False  # a fraction: the axis starts at 0 and reaches at least 0.01
    ends: dict[str, float | str] = field(default_factory=dict)  # of each run the last value, or that it was left out

    @property
    def constant(self) -> float | None:
        """The one value that all runs had at all times, if there is one: a sentence says as much as a chart."""
        values = [y for points in self.curves.values() for _, y in points]
        still = len(values) > 1 and not self.log and min(values) == max(values)
        return values[0] if still and LEFT_OUT not in self.ends.values() else None


THEMES = {  # theme: key of metrics.jsonl: (title with its unit, logarithmic)
    "Reconstruction": {
        "eval_fvu": ("FVU, held-out rows, 95 %", True),
        "eval_fvu_median": ("FVU of the median held-out row", True),
        "fvu": ("FVU of the batch", True),
    },
    "Sparsity and dead latents": {
        "l0": ("active latents a token (L0)", False),
        "eval_dead": ("dead latents, share, held-out rows", False),
        "eval_dense": ("dense latents, share, held-out rows", False),
        "dead": ("dead latents, share, in training", False),
        "dense": ("dense latents, share, in training", False),
        "threshold": ("activation threshold, mean", False),
    },
    "Loss": {
        "loss": ("loss", True),
        "reconstruction": ("loss: reconstruction", True),
        "sparsity": ("loss: sparsity", True),
        "aux": ("loss: dead latents (AuxK)", True),
        "preact": ("loss: pre-activations", True),
        "gate": ("loss: reconstruction from the gate (gated)", True),
    },
    "Optimisation": {
        "lr": ("learning rate", False),
        "gradient_norm.all": ("gradient norm, all", True),
        "gradient_norm.W_enc": ("gradient norm, encoder", True),
        "gradient_norm.W_dec": ("gradient norm, decoder", True),
        "update_norm.W_enc": ("update norm, encoder", True),
        "update_norm.W_dec": ("update norm, decoder", True),
    },
    "Geometry": {
        "decoder_cosine_mean": ("largest cosine of decoder rows, mean", False),
        "encoder_cosine": ("cosine of encoder and decoder rows", False),
        "decoder_norm": ("decoder row norm, mean", False),
    },
    "Speed and data": {
        "tokens_per_s": ("tokens a second", False),
        "mfu": ("share of the machine's matrix speed (MFU)", False),
        "loader_wait": ("share of time waiting for rows", False),
        "document_entropy": ("document entropy of batches", False),
    },
}
SHARES = ("eval_dead", "eval_dense", "dead", "dense", "mfu", "loader_wait")


def themes_of(logs: Logs) -> dict[str, list[Panel]]:
    """By theme, the panels for which at least one run has numbers."""
    found = {
        theme: [p for key, how in keys.items() if (p := _panel(logs, key, *how))] for theme, keys in THEMES.items()
    }
    arrays = {key: key.partition(".")[2] for lines in logs.values() for x in lines for key in x if "eval_fvu." in key}
    of_arrays = (_panel(logs, key, f"FVU of {name}, held-out rows", True) for key, name in arrays.items())
    found["Reconstruction"] += [panel for panel in of_arrays if panel]
    tenths = {run: list(enumerate(map(float, v), 1)) for run, v in _last(logs, "eval_fvu_by_norm").items()}
    if tenths:
        points = {run: [(float(i), v) for i, v in values] for run, values in tenths.items()}
        found["Reconstruction"].append(Panel("FVU by norm, held-out rows", points, {}, x="tenth of the rows, by norm"))
    rates = _last(logs, "eval_density")
    if rates:
        places = [edge - 0.25 for edge in EDGES]
        curves = {run: list(zip(places, map(float, counts[1:]), strict=True)) for run, counts in rates.items()}
        title = "latents by log10 of firing rate, held-out rows"
        found["Sparsity and dead latents"].append(Panel(title, curves, {}, x="log10 rate"))
    return {theme: panels for theme, panels in found.items() if panels}


def _panel(logs: Logs, key: str, title: str, log: bool) -> Panel | None:
    curves = {
        run: [(float(x["step"]), float(x[key])) for x in lines if is_number(x.get(key))] for run, lines in logs.items()
    }
    if not any(curves.values()):
        return None
    low, high = f"{key}_low", f"{key}_high"
    bands = {run: [(x["step"], x[low], x[high]) for x in lines if low in x] for run, lines in logs.items()}
    positive = all(y > 0 for points in curves.values() for _, y in points)
    last = {run: next((x[key] for x in reversed(lines) if key in x), "") for run, lines in logs.items()}
    ends = {
        run: value if is_number(value) else LEFT_OUT for run, value in last.items() if value is None or is_number(value)
    }
    return Panel(title, curves, bands, log and positive, share=key in SHARES, ends=ends)


def _last(logs: Logs, key: str) -> dict[str, list[Any]]:
    """The last list under a key, of each run that has one that is not empty."""
    found = {run: next((x[key] for x in reversed(lines) if key in x), None) for run, lines in logs.items()}
    return {run: values for run, values in found.items() if values}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
