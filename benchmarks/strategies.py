"""`strategies`: the way that the planner chooses, beside every way that can be forced, with more data than memory.

A run is a whole process with all that it starts, in a memory cgroup if a limit is given: then the page cache and
files in memory count too, as in a container.  Sources start out of the page cache, and outputs end on disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from actshuffle.machine import machine_memory
from actshuffle.units import format_bytes
from benchmarks import cache, measure
from benchmarks.results import Bench, need_space, ranged, spread, table
from benchmarks.sources import make_source

T = TypeVar("T")
CGROUPS = Path("/sys/fs/cgroup")
CHOSEN = "chosen"
NEAR = 1.1  # times the fastest way
SECONDS = 3600.0  # limit of one run


def run(
    bench: Bench,
    *,
    limit: int | None,
    factors: list[float],
    sizes: list[int] | None,
    row_bytes: int,
    memory: int | None,
    rounds: int,
    chunk: int,
) -> None:
    most = limit or machine_memory()
    each = sizes or [int(most * factor) for factor in factors]
    need_space(bench.work, int(4.5 * max(each)))  # source, output, and two spills
    ways = _ways(most)
    bench.plan(rounds * len(each) * len(ways))
    found: list[dict[str, Any]] = []
    with _limited(limit) as prefix:
        for size in each:
            source, target = make_source(bench.work, size, row_bytes, chunk), bench.work / "out"
            for number in range(rounds):
                for name, options in turned(list(ways.items()), number):
                    words = ("-m", "actshuffle", "run", str(source), str(target), "--seed", "1", "--json", *options)
                    words += () if memory is None else ("--memory", str(memory))
                    cache.evict([source])
                    process = measure.run([*prefix, *measure.python(*words)], seconds=SECONDS)
                    one = process.as_dict() | {"way": name, "size": size, "round": number, "bytes": size}
                    if process.outcome == "done":
                        one["plan"] = json.loads(process.stdout)["plan"]
                    found.append(one)
                    failed = process.message or process.outcome
                    told = f"{process.seconds:.1f} s" if process.outcome == "done" else failed
                    bench.did(f"{format_bytes(size)}, {name}: {told}")
                    for path in (target, *target.parent.glob(f"{target.name}.*")):
                        shutil.rmtree(path, ignore_errors=True)
                    os.sync()  # some disks go on deleting for seconds
            shutil.rmtree(source)
    rows = summary(found)
    bench.publish({"rounds": found, "summary": rows}, page(rows, most, limit is not None))


def _ways(memory: int) -> dict[str, tuple[str, ...]]:
    """Options of ``actshuffle run`` that force each way; those that are impossible here are refused, and say so."""
    spills = {
        f"spill, {share:.0%} of memory": ("--no-gather", "--spill-memory", str(int(share * memory)))
        for share in (0.25, 0.5, 0.75)
    }
    levels = {f"{count} levels": ("--levels", str(count), "--spill-memory", "0", "--no-gather") for count in (2, 3)}
    return {CHOSEN: (), "gather": ("--gather",), **spills, **levels}


def turned(ways: list[T], number: int) -> list[T]:
    """The ways in the order of one round: each round begins one way later, so that none is always first."""
    at = number % len(ways)
    return ways[at:] + ways[:at]


@contextmanager
def _limited(limit: int | None) -> Iterator[list[str]]:
    """Words before a command that put it into a memory cgroup of its own, mounted where a container sees its own."""
    if limit is None:
        yield []
        return
    old = CGROUPS / "memory"  # version 1, or else version 2
    top, name, procs = (
        (old, "memory.limit_in_bytes", "cgroup.procs") if old.is_dir() else (CGROUPS, "memory.max", "cgroup.procs")
    )
    folder = top / f"actshuffle-strategies-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / name).write_text(str(limit))
    except OSError as err:
        raise click.ClickException(
            f"no memory cgroup can be made in {top} ({err.strerror}): leave --limit out, and run this in a container "
            "with a memory limit"
        ) from err
    try:
        enter = f'echo $$ > "{folder}/{procs}" && mount --bind "{folder}" "{top}" && exec "$@"'
        yield ["unshare", "--mount", "sh", "-c", enter, "sh"]
    finally:
        folder.rmdir()


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per size and way; ``of_fastest`` compares medians with that of the fastest forced way."""
    rows = []
    for size, way in dict.fromkeys((one["size"], one["way"]) for one in found):
        ours = [one for one in found if (one["size"], one["way"]) == (size, way)]
        done = [one for one in ours if one["outcome"] == "done"]
        row: dict[str, Any] = {"size": size, "way": way, "outcome": ours[0]["outcome"], "message": ours[0]["message"]}
        if len(done) == len(ours):
            row |= {"outcome": "done", "seconds": spread([one["seconds"] for one in done]), "plan": done[0]["plan"]}
        rows.append(row)
    for row in rows:
        rivals = [
            r["seconds"]["median"] for r in rows if r["size"] == row["size"] and r["way"] != CHOSEN and "seconds" in r
        ]
        row["of_fastest"] = row["seconds"]["median"] / min(rivals) if rivals and "seconds" in row else None
    return rows


def holds(rows: list[dict[str, Any]]) -> bool:
    """True if the chosen way is within 10% of the fastest forced one at all sizes."""
    chosen = [row for row in rows if row["way"] == CHOSEN]
    return bool(chosen) and all(row["of_fastest"] is not None and row["of_fastest"] <= NEAR for row in chosen)


def page(rows: list[dict[str, Any]], memory: int, limited: bool) -> Iterator[str]:
    where = f"In a memory cgroup of {format_bytes(memory)}" if limited else f"With {format_bytes(memory)} of memory"
    verdict = "is" if holds(rows) else "is NOT"
    yield (
        f"{where}; seconds of whole processes, medians (ranges). *of fastest*: the median over that of the fastest way "
        f"that was forced. The chosen way {verdict} within {NEAR - 1:.0%} of it at all sizes."
    )
    yield ""
    yield from table(("data", "way", "levels", "spill in memory", "seconds", "of fastest"), map(_cells, rows))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    size = format_bytes(row["size"])
    if "seconds" not in row:
        return size, row["way"], "", "", row["message"] or row["outcome"], ""
    kept, times = row["plan"]["spill_memory"], row["of_fastest"]
    spilled = format_bytes(kept) if kept else ""
    return size, row["way"], row["plan"]["levels"], spilled, ranged(row["seconds"]), f"{times:.2f}" if times else ""
