"""Folders of runs and of sweeps, and what is in them."""

from __future__ import annotations

import html
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from actshuffle.errors import words_of
from saetrain.config import Config
from saetrain.errors import ConfigError
from saetrain.opening import load
from saetrain.sae import SAE
from saetrain.training.checkpoint import absence
from saetrain.training.log import LOG, read_log
from saetrain.training.outcome import diverged, read_evaluation


@dataclass(frozen=True)
class Run:
    """The folder of a run, and what is in it."""

    folder: Path

    @cached_property
    def sae(self) -> SAE:
        """The autoencoder of the latest checkpoint."""
        return load(self.folder)

    @property
    def config(self) -> Config:
        """The settings, with every choice made."""
        return recorded(self.folder)[0]

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; docs/training.md says what each number is."""
        return read_log(self.folder)

    @property
    def metrics(self) -> Any:
        """The lines as a pandas DataFrame, one row for each, with the step as index."""
        return _pandas("run.metrics").DataFrame(self.lines).set_index("step")

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """What the model loses through the autoencoder, where that was measured and kept: evaluation.json."""
        return read_evaluation(self.folder)

    @property
    def finished(self) -> bool:
        """True if the last step was reached."""
        lines = self.lines
        return bool(lines) and int(lines[-1]["step"]) >= self.config.steps

    def report(self, out: str | os.PathLike[str] | None = None) -> Path:
        """Draw the curves: report.html, whose path is returned, and report.png, in the folder of the run or `out`."""
        from saetrain.reporting.report import report  # imports matplotlib

        return report([self.folder], self.folder if out is None else Path(out))[0]

    def _repr_html_(self) -> str:
        last = self.lines[-1] if self.lines else {}
        shown = {name: last[name] for name in ("step", "eval_fvu", "eval_l0", "eval_dead") if name in last}
        cells = "".join(f"<tr><th>{name}</th><td>{value:,.4g}</td></tr>" for name, value in shown.items())
        return f"<table><caption>{html.escape(str(self.folder))}</caption>{cells}</table>"


@dataclass(frozen=True)
class Sweep:
    """The folder of a sweep, and its runs."""

    folder: Path

    @property
    def runs(self) -> dict[str, Run]:
        """The members by the names of their folders, which say what differs."""
        return {found.parent.name: Run(found.parent) for found in sorted(self.folder.glob(f"*/{LOG}"))}

    @property
    def diverged(self) -> dict[str, str]:
        """The members that are worthless, and why."""
        reasons = {name: diverged(run.lines[-1]) for name, run in self.runs.items() if run.lines}
        return {name: reason for name, reason in reasons.items() if reason}

    @property
    def metrics(self) -> Any:
        """The last line of each member as a pandas DataFrame, with the settings that differ first."""
        configs = {name: run.config.to_json() for name, run in self.runs.items()}
        varied = [n for n in Config().to_json() if len({json.dumps(c[n]) for c in configs.values()}) > 1]
        rows = {
            name: {n: configs[name][n] for n in varied} | {"diverged": ""} | run.lines[-1]
            for name, run in self.runs.items()
        }
        return _pandas("sweep.metrics").DataFrame.from_dict(rows, orient="index")

    def report(self, out: str | os.PathLike[str] | None = None) -> Path:
        """Draw the members beside each other: report.html, whose path is returned, in the folder or in `out`."""
        from saetrain.reporting.report import report  # imports matplotlib

        return report([self.folder], self.folder if out is None else Path(out))[0]


def recorded(run: Path) -> tuple[Config, dict[str, Any]]:
    """The settings of a run, and what config.json says about it: "location" is the store, "heldout" the other one."""
    path = run / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not describe a run{absence(run) or ': there is no such file'}")
    try:
        found = json.loads(path.read_text())
        about = dict(found["about"])
        about.setdefault("location", about.get("store", ""))  # runs of earlier versions
        return Config.from_json(found["config"]), about
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} does not describe a run: {type(error).__name__}: {words_of(error)}") from error


def _pandas(wanted: str) -> Any:
    try:
        import pandas as pd
    except ImportError as error:
        raise ConfigError(f"{wanted} is a table of pandas: pip install pandas, or read the lines") from error
    return pd
