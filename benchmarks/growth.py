"""`growth`: time and peak memory as the data grows at a fixed memory limit.

Each run is a separate process, started by the command line that a user would type, from start to exit.  Time
should follow bytes x levels in a straight line, with a step where a level is added, and memory should stay
constant.  The page names the sizes that do not fit the line.
"""

from __future__ import annotations

import json
import shutil
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from actshuffle.units import format_bytes, format_seconds
from benchmarks import cache, measure, plots
from benchmarks.results import Bench, need_space, ranged, spread, table
from benchmarks.sources import make_source

CHUNK = 8 << 20
KINK = 0.2  # beyond this share of the line's value a size is off the line


def run(
    bench: Bench,
    *,
    start: int,
    factors: list[int],
    row_bytes: int = 8192,
    memory: int,
    block: int | None,
    run_bytes: int,
    workers: int,
    rounds: int,
) -> None:
    need_space(bench.work, int(4.5 * start * max(factors)))
    bench.plan(len(factors) * rounds)
    found: list[dict[str, Any]] = []
    idle = _idle(bench.work)
    for factor in factors:
        source = make_source(bench.work, start * factor, row_bytes, CHUNK)
        for number in range(rounds):
            one = _one(source, bench.work / "out.zarr", memory, block, run_bytes, workers)
            found.append({"factor": factor, "round": number} | one)
            bench.did(
                f"{factor}x, {format_bytes(one['bytes'])}, {one['levels']} levels: "
                f"{format_seconds(one['seconds'])}, largest process "
                f"{format_bytes(one['largest'])}"
            )
        shutil.rmtree(source)
    rows, line = summary(found, idle)
    images = plots.draw(bench, lambda folder: [plots.growth(folder, rows, line, memory)])
    figures = {"idle": idle, "line": line, "rounds": found, "summary": rows}
    bench.publish(figures, page(rows, line, memory, workers), images)


def _one(source: Path, target: Path, memory: int, block: int | None, run_bytes: int, workers: int) -> dict[str, Any]:
    cache.evict([source])
    command = measure.python(
        "-m",
        "actshuffle",
        "run",
        str(source),
        str(target),
        "--json",
        "--quiet",
        "--seed",
        "1",
        "--memory",
        str(memory),
        "--run-bytes",
        str(run_bytes),
        "--workers",
        str(workers),
        *(["--block-bytes", str(block)] if block else []),
    )
    measured = measure.run(command)
    shutil.rmtree(target, ignore_errors=True)
    if measured.outcome != "done":
        raise RuntimeError(f"{' '.join(command)}: {measured.outcome}: {measured.message}")
    told = json.loads(measured.stdout)
    plan = told["plan"]
    return {
        "bytes": told["bytes"],
        "levels": plan["levels"],
        "seconds": measured.seconds,
        "engine_seconds": told["seconds"],
        "memory": measured.memory,
        "largest": measured.largest,
    }


def _idle(work: Path) -> dict[str, float]:
    """Seconds and memory of a run that has almost no work."""
    source = make_source(work, 8192, 8192)
    one = _one(source, work / "out.zarr", 64 << 20, None, 1 << 18, 0)
    shutil.rmtree(source)
    return {"seconds": one["seconds"], "memory": one["largest"]}


def summary(found: list[dict[str, Any]], idle: dict[str, float]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Medians by size, and the line seconds = fixed + per_gb x levels x GB through them.

    The line minimises relative errors (Theil and Sen: the median of the slopes of all pairs), so that
    one slow run does not bend it.
    """
    rows = []
    for factor in dict.fromkeys(one["factor"] for one in found):
        ours = [one for one in found if one["factor"] == factor]
        rows.append(
            {
                "factor": factor,
                "bytes": ours[0]["bytes"],
                "levels": ours[0]["levels"],
                "seconds": spread([one["seconds"] for one in ours]),
                "memory": spread([one["largest"] for one in ours]),
                "beyond_idle": spread([one["largest"] - idle["memory"] for one in ours]),
            }
        )
    work = [(r["bytes"] * r["levels"] / 1e9, r["seconds"]["median"]) for r in rows]
    slopes = [(t2 - t1) / (w2 - w1) for i, (w1, t1) in enumerate(work) for w2, t2 in work[:i] if w1 != w2]
    per_gb = statistics.median(slopes) if slopes else 0.0
    fixed = statistics.median(t - per_gb * w for w, t in work)
    for row, (w, t) in zip(rows, work, strict=True):
        row["predicted"] = fixed + per_gb * w
        row["off"] = t / row["predicted"] - 1 if row["predicted"] > 0 else 0.0
    return rows, {"fixed": fixed, "per_gb": per_gb}


def page(rows: list[dict[str, Any]], line: dict[str, float], memory: int, workers: int) -> list[str]:
    crew = f"{workers} Dask workers" if workers else "one process"
    peaks = [r["memory"]["median"] for r in rows]
    kinks = [f"{r['factor']}x ({100 * r['off']:+.0f}%)" for r in rows if abs(r["off"]) > KINK]
    changes = [
        f"{b['factor']}x ({a['levels']} to {b['levels']})" for a, b in pairwise(rows) if a["levels"] != b["levels"]
    ]
    return [
        f"{crew}, --memory {format_bytes(memory)} at every size; whole processes, start to exit. Memory "
        "is the largest process's peak; *beyond idle* subtracts that of a run with one row.",
        "",
        *table(
            (
                "",
                "data",
                "levels",
                "seconds",
                "line",
                "off the line",
                "s/(GB level)",
                "peak memory MB",
                "beyond idle MB",
            ),
            (
                (
                    f"{r['factor']}x",
                    format_bytes(r["bytes"]),
                    r["levels"],
                    ranged(r["seconds"], "{:.1f}"),
                    f"{r['predicted']:.1f}",
                    f"{100 * r['off']:+.0f}%",
                    f"{r['seconds']['median'] / r['levels'] / r['bytes'] * 1e9:.2f}",
                    ranged({k: v / 1e6 if k != "rounds" else v for k, v in r["memory"].items()}, "{:.0f}"),
                    f"{r['beyond_idle']['median'] / 1e6:.0f}",
                )
                for r in rows
            ),
        ),
        "",
        f"Line: {line['fixed']:.1f} s + {line['per_gb']:.2f} s per GB and level. Levels change at: "
        f"{', '.join(changes) or 'none'}. Further than {100 * KINK:.0f}% off the line: "
        f"{', '.join(kinks) or 'none'}. Peak memory from the smallest to the largest data: "
        f"{100 * (max(peaks) / min(peaks) - 1):.0f}% apart.",
    ]
