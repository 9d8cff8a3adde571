"""The default command as a whole process, beside a copy, numpy in memory and DuckDB, at several sizes.

It is the first table of `shuffle`.  Start-up counts: a command that is quick with gigabytes may be slow with
megabytes.  Sources start out of the page cache, outputs end on disk, and memory is full of another file's pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zarr

from actshuffle.machine import machine_memory
from actshuffle.units import format_bytes
from benchmarks.peers import PEERS, Work, driver
from benchmarks.results import Bench, ranged, spread, table
from benchmarks.sources import make_source

TOOLS = ("command", "copy", "numpy", "duckdb")
ROW_BYTES = 8192
SECONDS = 600.0  # limit of one run


def measure(
    bench: Bench, sizes: list[int], rounds: int, workers: int, chunk: int, python: dict[str, str]
) -> list[dict[str, Any]]:
    """All rounds of all tools at all sizes; a tool that is not installed has its message instead of seconds."""
    installed = {name: driver.versions_of(name, python.get(name)) for name in TOOLS}
    found = []
    for size in sizes:
        source = make_source(bench.work, size, ROW_BYTES, min(chunk, max(size // 8, ROW_BYTES)))
        array = zarr.open_array(source, mode="r")
        sources, target = driver.Sources(bench.work, source), bench.work / "out"
        work = Work(str(source), str(target), array.shape[0], ROW_BYTES, array.chunks[0], workers, None, seed=1)
        for number in range(rounds):
            for name in TOOLS:
                one: dict[str, Any] = {"tool": name, "size": size, "round": number, "bytes": work.nbytes}
                if "versions" in installed[name]:
                    limit = int(driver.MOST * machine_memory())
                    one |= driver.measured(name, python.get(name), work, sources, SECONDS, limit)
                else:
                    one |= {"outcome": "not installed", "message": installed[name]["message"]}
                found.append(one)
                bench.did(f"{PEERS[name].title}, {format_bytes(size)}: {driver.told(one)}")
        driver.remove(bench.work.glob("source-*"))
    return found


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per size and tool; ``of_numpy`` compares the seconds of the same round."""
    rows = []
    for size, name in dict.fromkeys((one["size"], one["tool"]) for one in found):
        ours = [one for one in found if (one["size"], one["tool"]) == (size, name)]
        row = {"tool": name, "title": PEERS[name].title, "size": size, "outcome": ours[0]["outcome"]}
        if all(one["outcome"] == "done" for one in ours):
            rounds = {one["round"]: one for one in found if (one["size"], one["tool"]) == (size, "numpy")}
            times = [rounds[one["round"]]["seconds"] / one["seconds"] for one in ours if _done(rounds, one)]
            row |= {
                "seconds": spread([one["seconds"] for one in ours]),
                "memory": spread([one["memory"] for one in ours]),
                "of_numpy": spread(times) if times else None,
                "verdict": next((v for one in ours if (v := one["mixing"]["verdict"]) != "pass"), "pass"),
            }
        rows.append(row)
    return rows


def _done(rounds: dict[int, dict[str, Any]], one: dict[str, Any]) -> bool:
    return rounds.get(one["round"], {}).get("outcome") == "done"


def page(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "## The default command, from the start of the process"
    yield ""
    yield (
        f"Rows of {ROW_BYTES} B; sources are out of the page cache, and the clock stops when the output is on disk. "
        "*times numpy*: how many times as fast as numpy in the same round. Memory is the peak over all processes, "
        "mapped files not included. The copy is our own copier with as many processes as there are cores. Medians "
        "(ranges) of interleaved rounds; converting rows to a tool's format is not counted."
    )
    yield ""
    yield from table(("data", "", "seconds", "times numpy", "memory GB", "order of the rows"), map(_cells, rows))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "seconds" not in row:
        return format_bytes(row["size"]), row["title"], row["outcome"], "", "", ""
    times = ranged(row["of_numpy"]) if row["of_numpy"] else ""
    memory = f"{row['memory']['median'] / 1e9:.2f}"
    order = "unchanged" if row["tool"] == "copy" else f"mixing statistics: {row['verdict']}"
    return format_bytes(row["size"]), row["title"], ranged(row["seconds"]), times, memory, order


def space(sizes: list[int]) -> int:
    """Bytes of disk that the largest size needs: two sources, an output, and what DuckDB writes on the way."""
    return 5 * max(sizes, default=0)


def steps(sizes: list[int], rounds: int) -> int:
    return len(sizes) * rounds * len(TOOLS)


def settings(python: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Interpreters by tool."""
    unknown = sorted({name for name, _ in python} - set(TOOLS))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: none of {', '.join(TOOLS)}")
    return {name: str(Path(path)) for name, path in python}
