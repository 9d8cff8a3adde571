"""The log of a run: metrics.jsonl, and TensorBoard where it is installed.  Only rank 0 writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG = "metrics.jsonl"


class Log:
    """Appends one line of metrics at a time."""

    def __init__(self, run: Path, step: int) -> None:
        """Continue after `step`: lines of later steps are dropped, since those steps are about to be repeated."""
        self.path = run / LOG
        kept = [line for line in read_log(run) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        part = self.path.with_name(".metrics.part")
        part.write_text(text)
        part.replace(self.path)
        self.board = _tensorboard(run, step)

    def write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board is not None:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(name.replace(".", "/"), value, line["step"])

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run.  Lines that a crash cut short are skipped."""
    path = run / LOG
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def _tensorboard(run: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
