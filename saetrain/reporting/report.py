"""`saetrain report`: one or more runs as report.html, a page for people, and as report.png."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saetrain.errors import ConfigError
from saetrain.reporting.figure import COLOURS, draw, png
from saetrain.reporting.page import Told, page
from saetrain.reporting.panels import themes_of
from saetrain.training.log import LOG, read_log
from saetrain.training.outcome import diverged, read_evaluation
from saetrain.writing import put


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
    recorded = {_name(run, runs): _recorded(run) for run in runs}
    told = Told(
        logs,
        {run: found.get("config", {}) for run, found in recorded.items()},
        {run: found.get("about", {}) for run, found in recorded.items()},
        {run: reason for run, lines in logs.items() if (reason := diverged(lines[-1]))},
        {_name(run, runs): found for run in runs if (found := read_evaluation(run))},
    )
    panels = [panel for found in themes_of(logs).values() for panel in found]
    picture = draw(panels, {run: COLOURS[place % len(COLOURS)] for run, place in told.places.items()})
    out.mkdir(parents=True, exist_ok=True)
    written, image = out / "report.html", out / "report.png"
    put(written, page(told))
    put(image, png(picture))
    return [written, image]


def _members(run: Path) -> list[Path]:
    """The runs of a sweep, by the folder of the sweep; a run itself."""
    if (run / LOG).exists():
        return [run]
    return sorted(found.parent for found in run.glob(f"*/{LOG}")) or [run]


def _name(run: Path, runs: Sequence[Path]) -> str:
    return run.name if [r.name for r in runs].count(run.name) == 1 else str(run)


def _recorded(run: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run / "config.json").read_text()))
    except (OSError, ValueError):
        return {}
