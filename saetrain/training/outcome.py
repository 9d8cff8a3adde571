"""How a run ended: finished, stopped by a signal, or diverged.

A member of a sweep that diverges leaves diverged.json in its folder: {"reason", "config"}.  The others go on, and the
same command given again leaves that member out.

A run that was evaluated inside its model has evaluation.json: the result of `saetrain evaluate`, and the model, text
and step that it was measured with.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from saetrain.config import Config
from saetrain.errors import CheckpointError
from saetrain.training.checkpoint import find
from saetrain.writing import put_json

MARKER, EVALUATION = "diverged.json", "evaluation.json"


def diverged(line: dict[str, Any]) -> str:
    """The reason why the model of the last line of metrics is worthless, or an empty text.

    A model that answers every row with the mean row has an FVU of 1.  The line itself may say why its member left.
    """
    if "diverged" in line:
        return str(line["diverged"])
    key = "eval_fvu" if "eval_fvu" in line else "fvu"
    value = line.get(key, 0.0)
    if math.isfinite(value) and value <= 1:
        return ""
    where = "on held-out rows" if key == "eval_fvu" else "on the last batch"
    return f"diverged: the FVU {where} is {value:.4g} after step {line['step']:,}; the mean row alone has 1"


def mark(run: Path, config: Config, reason: str) -> None:
    run.mkdir(parents=True, exist_ok=True)
    put_json(run / MARKER, {"reason": reason, "config": config.to_json()})


def marked(run: Path, config: Config) -> str:
    """The reason that `mark` recorded for a run with these settings, or an empty text."""
    try:
        found = json.loads((run / MARKER).read_text())
        return str(found["reason"]) if Config.from_json(found["config"]) == config else ""
    except FileNotFoundError:
        return ""


def keep_evaluation(run: Path, found: dict[str, Any]) -> Path:
    """Write the result of an evaluation into the folder of a run, with the step of its latest checkpoint."""
    try:
        step: int | None = int(find(run).state["step"])
    except CheckpointError:  # another tool's folder
        step = None
    put_json(run / EVALUATION, {"step": step, **found})
    return run / EVALUATION


def read_evaluation(run: Path) -> dict[str, Any] | None:
    """What `keep_evaluation` wrote; None if there is nothing, or nothing that can be read."""
    try:
        found = json.loads((run / EVALUATION).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "loss_recovered" in found else None
