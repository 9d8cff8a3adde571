"""`revisions`: two checkouts of this project, the same benchmarks run from each in turn.

Each checkout runs its own code, its own benchmark included, with the Python of its own environment (`make
.venv/test.done`), in a process of its own.  A round runs both, one right after the other and in turns first, so that
other load on the machine weighs on both; a ratio is that of the two runs of one round.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from actshuffle.units import format_bytes
from benchmarks.results import Bench, ranged, spread, table

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Compared:
    """A benchmark to run: its options, and the fields of its figures that tell one case from another."""

    options: dict[str, str]
    case: tuple[str, ...]


COMPARED = {
    "shuffle": Compared(
        # Revisions that do not know the default command are not asked for it; it takes a megabyte.
        {"--levels": "1,2,3", "--workers": "0,2", "--row-bytes": "512B,8KiB", "--whole": "1MB", "--whole-rounds": "1"},
        ("mode", "row_bytes", "workers", "levels"),
    ),
    "loader": Compared({"--threads": "1,2"}, ("mode", "width", "batch", "threads", "what")),
}
SIZE_OPTION = {"shuffle": "--sizes", "loader": "--size"}
ROUNDS_OPTION = {"shuffle": ("--rounds",), "loader": ("--rounds", "--disk-rounds")}


def run(bench: Bench, *, other: Path | None, names: list[str], size: int, modes: list[str], rounds: int) -> None:
    checkouts = {"new": ROOT, "old": other or ROOT}
    for folder in checkouts.values():
        if not _python(folder).exists():
            raise click.ClickException(f"{folder} has no environment: run `make .venv/test.done` there")
    commits = {side: _commit(folder) for side, folder in checkouts.items()}
    bench.plan(2 * rounds * len(names))
    found: list[dict[str, Any]] = []
    dropped: set[str] = set()
    for number in range(rounds):
        sides = sorted(checkouts, reverse=bool(number % 2))
        for name in names:
            for side in sides:
                figures, unknown = _measure(bench, name, checkouts[side], size, modes)
                dropped |= {f"`{name} {option}` by the {side} one" for option in unknown}
                found += [{"benchmark": name, "side": side, "round": number, **one} for one in figures]
                bench.did(f"{name}, {side} ({commits[side]}), round {number + 1}")
    rows = summary(found)
    figures_of_all = {"commits": commits, "dropped": sorted(dropped), "rounds": found, "summary": rows}
    bench.publish(figures_of_all, page(rows, commits, size, sorted(dropped)))


def _python(checkout: Path) -> Path:
    return Path(sys.executable) if checkout == ROOT else checkout / ".venv/bin/python"


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _measure(
    bench: Bench, name: str, checkout: Path, size: int, modes: list[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run one benchmark once from one checkout.

    Returns case, seconds and bytes of each thing that it measured, and the options that it does not know.
    """
    command = [str(_python(checkout)), "-m", "benchmarks", name]
    known = subprocess.run([*command, "--help"], cwd=checkout, capture_output=True, text=True, check=True).stdout
    out = bench.work / "results"
    (out / "results.json").unlink(missing_ok=True)  # of the other checkout
    options = COMPARED[name].options | {SIZE_OPTION[name]: str(size), "--modes": ",".join(modes)}
    options |= dict.fromkeys(ROUNDS_OPTION[name], "1") | {"--work": str(bench.work / "data"), "--out": str(out)}
    unknown = [option for option in options if option not in known.split()]
    for option in options.keys() - unknown:
        command += [option, options[option]]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} failed in {checkout}:\n{done.stderr.strip()[-2000:]}")
    figures = json.loads((out / "results.json").read_text())["figures"]["rounds"]
    found = [
        {"case": {key: one[key] for key in COMPARED[name].case}, "seconds": one["seconds"], "bytes": one["bytes"]}
        for one in figures
    ]
    return found, unknown


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per case of both checkouts: their rates, and the ratio of the new one's to the old one's by round."""
    cases: dict[tuple[str, str], dict[str, list[float]]] = {}
    for one in found:
        key = one["benchmark"], json.dumps(one["case"])
        cases.setdefault(key, {"new": [], "old": []})[one["side"]].append(one["bytes"] / one["seconds"] / 1e9)
    return [
        {
            "benchmark": name,
            "case": json.loads(case),
            "new": spread(rates["new"]),
            "old": spread(rates["old"]),
            "ratio": spread([new / old for new, old in zip(rates["new"], rates["old"], strict=True)]),
        }
        for (name, case), rates in cases.items()
        if len(rates["new"]) == len(rates["old"])
    ]


def page(rows: list[dict[str, Any]], commits: dict[str, str], size: int, dropped: list[str]) -> Iterable[str]:
    yield (
        f"New: {commits['new']}; old: {commits['old']}, checked out elsewhere and given as `--other`; "
        f"{format_bytes(size)} of data. Median (range) over rounds; *new over old*: the rate of the new revision "
        "over that of the old one in the same round. 1.00 is the same speed."
    )
    if dropped:
        yield f"\nOptions that one revision does not know were left out: {', '.join(dropped)}."
    yield ""
    yield from table(
        ("benchmark", "case", "new GB/s", "old GB/s", "new over old"),
        (
            (
                row["benchmark"],
                ", ".join(str(v) if k in ("what", "mode") else f"{k} {v}" for k, v in row["case"].items()),
                ranged(row["new"]),
                ranged(row["old"]),
                ranged(row["ratio"]),
            )
            for row in rows
        ),
    )
