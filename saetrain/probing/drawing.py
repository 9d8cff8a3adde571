"""The picture of steering: each measure over strength, beside its level in plain text."""

from __future__ import annotations

import json
from pathlib import Path

from saetrain.probing.curves import Curves
from saetrain.reporting.figure import COLOURS, draw, png
from saetrain.reporting.panels import Panel
from saetrain.writing import put

TITLES = {
    "coherence": "log-probability under the plain model, nats",
    "concept": "activation when the plain model reads it",
    "fires": "share of texts where the feature fires",
    "repeated": "repeated 4-grams, share",
    "moved": "edit, share of a row's norm",
}
AXES = {
    "norm": "strength, share of the median norm",
    "max": "strength, share of the largest activation",
    "activation": "strength, activation",
}


def write_curves(curves: Curves, out: Path) -> list[Path]:
    """Write steer.json and steer.png to the folder ``out``; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    table, image = out / "steer.json", out / "steer.png"
    put(table, json.dumps(curves.to_json(), indent=1) + "\n")
    put(image, png(draw(panels_of(curves), {curves.method: COLOURS[0], "plain": COLOURS[6]})))
    return [table, image]


def panels_of(curves: Curves) -> list[Panel]:
    plain, *others = curves.points
    steered = sorted((point.strength or 0.0, point.measures) for point in others)
    panels = []
    for key, title in TITLES.items():
        found = [(at, measures[key]) for at, measures in steered]
        ends = (min(0.0, found[0][0]), found[-1][0])
        lines = {
            curves.method: [(at, value.value) for at, value in found],
            "plain": [(at, plain.measures[key].value) for at in ends],
        }
        bands = {curves.method: [(at, value.low, value.high) for at, value in found]}
        panels.append(Panel(title, lines, bands, x=AXES[curves.unit]))
    return panels
