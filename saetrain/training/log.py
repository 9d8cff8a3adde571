"""The log of a run: metrics.jsonl, and the trackers that --log names, each an optional library.  Only rank 0 writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from saetrain.errors import ConfigError
from saetrain.settings import split_names

LOG = "metrics.jsonl"


class Log:
    """Appends one line of metrics at a time."""

    def __init__(self, run: Path, step: int, trackers: str = "none", config: Mapping[str, Any] | None = None) -> None:
        """Continue after `step`: lines of later steps are dropped, since those steps are about to be repeated."""
        self.path = run / LOG
        kept = [line for line in read_log(run) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        part = self.path.with_name(".metrics.part")
        part.write_text(text)
        part.replace(self.path)
        self.trackers: list[Tracker] = [TRACKERS[name](run, step, config or {}) for name in wanted(trackers)]

    def write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for tracker in self.trackers:
            tracker.write(dict(_numbers(line)), line["step"])

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def _numbers(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """What trackers draw, under names in groups."""
    for name, value in line.items():
        if isinstance(value, (int, float)) and name != "step":
            yield name.replace(".", "/"), value


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


# --- Trackers


class Tracker(Protocol):
    def write(self, numbers: dict[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in the folder tensorboard of the run."""

    def __init__(self, run: Path, step: int, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board: Any = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.board.close()


class Wandb:
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_MODE=offline and the like act as they do everywhere.

    A run that is resumed goes on under the same id, which comes from its folder.
    """

    def __init__(self, run: Path, step: int, config: Mapping[str, Any]) -> None:
        import wandb

        name = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        self.run: Any = wandb.init(
            id=name, name=run.name, dir=str(run), config=dict(config), resume="allow", reinit="create_new"
        )

    def write(self, numbers: dict[str, float], step: int) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[Path, int, Mapping[str, Any]], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def wanted(names: str) -> list[str]:
    """The trackers in a text A,B; "auto" is TensorBoard where it is installed, "none" is none.

    Refuses one that is not installed.
    """
    if names in ("auto", "none"):
        return ["tensorboard"] if names == "auto" and find_spec("tensorboard") else []
    for name in split_names(names):
        if find_spec(name) is None:
            raise ConfigError(f"--log {name} needs the package {name}, which is not installed: pip install {name}")
    return split_names(names)
