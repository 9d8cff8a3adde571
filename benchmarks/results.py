"""Results: a dated folder with the raw figures, a page to read, and plots; statistics over rounds."""

from __future__ import annotations

import datetime
import json
import shutil
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from actshuffle.units import format_bytes, format_seconds
from benchmarks import hardware

HERE = Path(__file__).parent
TINY_NOTE = "A miniature run, to show that the suite works: its figures mean nothing."


@dataclass
class Bench:
    """One benchmark under way: its folders, its settings, its results, and its messages to the terminal."""

    name: str
    work: Path
    results: Path
    settings: dict[str, Any]
    steps: int = 0
    step: int = 0
    loads: list[float] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        click.echo(text, err=True)

    def plan(self, steps: int) -> None:
        """Set the number of steps ahead."""
        self.steps = steps

    def did(self, text: str) -> None:
        """Count one step as done, and print its result."""
        self.step += 1
        self.loads.append(hardware.load())
        self.say(f"[{self.step:>{len(str(self.steps))}}/{self.steps}] {text}")

    def publish(self, figures: Any, page: Iterable[str], plots: Sequence[str] = ()) -> None:
        """Write results.json and README.md; ``plots`` are names of images that exist already."""
        document = {
            "benchmark": self.name,
            "date": datetime.date.today().isoformat(),
            "machine": self.machine,
            "load": spread(self.loads) if self.loads else None,
            "settings": self.settings,
            "figures": figures,
        }
        text = json.dumps(document, indent=1, default=str)
        (self.results / "results.json").write_text(text + "\n")
        (self.results / "README.md").write_text("\n".join(self._page(page, plots)) + "\n")
        self.say(f"results in {self.results}")

    def _page(self, body: Iterable[str], plots: Sequence[str]) -> Iterator[str]:
        yield f"# {self.name}, {datetime.date.today().isoformat()}"
        yield ""
        if self.settings.get("tiny"):
            yield f"**{TINY_NOTE}**\n"
        yield hardware.in_words(self.machine)
        if self.loads:
            found = spread(self.loads)
            yield (
                f"Load average while it ran: {found['median']:.1f} "
                f"({found['low']:.1f} to {found['high']:.1f}) on {self.machine['cores']} cores."
            )
        yield ""
        yield from body
        for name in plots:
            yield f"\n![{name}]({name})"
        yield "\nReproduce: `" + command_line(self.name, self.settings) + "`"


@contextmanager
def bench(name: str, work: Path | None, out: Path | None, settings: dict[str, Any]) -> Iterator[Bench]:
    """A work folder, deleted when the benchmark is over, and a dated folder for its results."""
    base = work or HERE / ".work"
    folder = base / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (base / ".gitignore").write_text("*\n")
    results = out or HERE / "results" / f"{datetime.date.today().isoformat()}-{name}"
    results.mkdir(parents=True, exist_ok=True)
    for old in results.glob("*.png"):
        old.unlink()
    try:
        yield Bench(name, folder, results, settings, machine=hardware.describe(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def need_space(folder: Path, nbytes: int) -> None:
    """Refuse work that would fill the disk."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise click.ClickException(
            f"this needs {format_bytes(nbytes)} of disk, but {format_bytes(free)} are free: "
            "give a smaller --size, or --work on another disk"
        )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range over several rounds."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "rounds": len(values)}


def ranged(found: dict[str, float], form: str = "{:.2f}") -> str:
    """Write median and range as ``0.41 (0.38 to 0.44)``."""
    low, high = form.format(found["low"]), form.format(found["high"])
    return form.format(found["median"]) + (f" ({low} to {high})" if found["rounds"] > 1 else "")


def rate(nbytes: float, seconds: float) -> str:
    return f"{format_bytes(nbytes / seconds)}/s"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """A Markdown table; columns of figures are aligned right."""
    lines = [[str(cell) for cell in row] for row in rows]
    yield "| " + " | ".join(head) + " |"
    right = [all(line[i][:1] in "0123456789-." for line in lines) for i in range(len(head))]
    yield "|" + "|".join(" ---: " if r else " --- " for r in right) + "|"
    for line in lines:
        yield "| " + " | ".join(line) + " |"


def command_line(name: str, settings: dict[str, Any]) -> str:
    words = ["python -m benchmarks", name]
    for key, value in settings.items():
        option = "--" + key.replace("_", "-")
        if value is True:
            words.append(option)
        elif isinstance(value, list | tuple):
            words += [option, ",".join(map(str, value))] if value else []
        elif value is not None and value is not False and value != "":  # 0 is a value
            words += [option, str(value)]
    return " ".join(words)


def seconds(value: float) -> str:
    return format_seconds(value)
