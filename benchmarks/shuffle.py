"""`shuffle`: the default command beside other tools; the engine beside the copier; where its time goes.

The command is run as a whole process (whole.py).  For the engine, a round is, for every source, two kinds of copy,
each shuffle of it, and the copies again; a shuffle is compared with the mean of the two copies around it, and the
ratios of several rounds give a median and a range.
"""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import actshuffle
from actshuffle.engine.job import Job
from actshuffle.errors import InfeasibleError
from actshuffle.executors import Executor, Serial, Threads, local_cluster
from actshuffle.machine import cores
from actshuffle.units import format_bytes
from benchmarks import costs, plots
from benchmarks.copier import Copier
from benchmarks.floor import Floor, durable, prepare
from benchmarks.phases import OUTSIDE, PHASES, Timed, breakdown, published, summarise
from benchmarks.results import Bench, need_space, ranged, rate, spread, table
from benchmarks.sources import make_source, rows_of
from benchmarks.whole import measure, settings, space, steps
from benchmarks.whole import page as whole_page
from benchmarks.whole import summary as whole_summary

SEED = 1
COPIES = ("copy", "plain copy")


@dataclass(frozen=True)
class Case:
    """One shuffle to measure; ``workers`` 0 is the serial executor, in this process.

    ``levels`` 0 is the way that the planner chooses, on threads as in `actshuffle run`.  One that is not ``checked``
    takes no digests, which shows their cost.
    """

    mode: str
    size: int
    row_bytes: int
    workers: int
    levels: int
    checked: bool = True

    @property
    def processes(self) -> int:
        return max(1, self.workers)

    def __str__(self) -> str:
        crew = f"{self.workers} workers" if self.workers else "serial"
        levels = f"{self.levels} level{'s' * (self.levels > 1)}" if self.levels else "default"
        digests = "" if self.checked else ", no digests"
        return f"{self.mode}, {format_bytes(self.size)}, rows of {self.row_bytes} B, {crew}, {levels}{digests}"


def run(
    bench: Bench,
    *,
    sizes: list[int],
    row_bytes: list[int],
    workers: list[int],
    levels: list[int],
    modes: list[str],
    rounds: int,
    memory: int,
    chunk: int,
    whole: list[int],
    whole_rounds: int,
    whole_only: bool = False,
    engine_only: bool = False,
    unchecked: bool = False,
    python: tuple[tuple[str, str], ...] = (),
) -> None:
    whole = [] if engine_only else whole
    need_space(bench.work, space(whole))
    interpreters = settings(python)
    bench.plan(steps(whole, whole_rounds))
    runs = measure(bench, whole, whole_rounds, cores(), chunk, interpreters)
    bench.step = 0
    commands = whole_summary(runs)
    first = [*whole_page(commands), ""] if whole else []
    if whole_only:
        bench.publish({"whole": runs, "commands": commands}, first)
        return
    # Source, spill with keys and source rows, and output take about as much each.
    need_space(bench.work, int(max(sizes) * (len(row_bytes) + 3.5)))
    ways = [(level, True) for level in levels] + [(0, False)] * (unchecked and 0 in levels)
    bench.plan(rounds * len(sizes) * len(row_bytes) * len(workers) * len(modes) * (len(ways) + 2 * len(COPIES)))
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        crews: dict[int, Executor] = {n: stack.enter_context(local_cluster(n)) if n else Serial() for n in workers}
        copiers = {n: stack.enter_context(Copier(n)) for n in sorted({max(1, w) for w in workers})}
        for size in sizes:
            sources = {width: make_source(bench.work, size, width, chunk) for width in row_bytes}
            floors = {(width, n): Floor(copiers[n], sources[width], bench.work) for width in row_bytes for n in copiers}
            for floor in floors.values():
                floor.warm_up()
            # One run without measurement touches buffers, loads code and fills the allocator's pools.
            for crew in crews.values():
                _shuffle(crew, next(iter(sources.values())), bench.work / "out", memory, max(1, *levels), True)
            for number in range(rounds):
                for mode in modes:
                    for count, crew in crews.items():
                        for width, source in sources.items():
                            cases = [Case(mode, size, width, count, *way) for way in ways]
                            group = _group(bench, cases, crew, source, floors[width, max(1, count)], memory)
                            found += [one | {"round": number} for one in group]
            for path in sources.values():
                shutil.rmtree(path)
    rows = summary(found)
    images = plots.draw(bench, lambda folder: [plots.fractions(folder, rows), plots.phases(folder, rows)])
    figures = {"whole": runs, "commands": commands, "rounds": found, "summary": rows}
    bench.publish(figures, [*first, *page(rows, memory)], images)


def _group(
    bench: Bench, cases: list[Case], crew: Executor, source: Path, floor: Floor, memory: int
) -> list[dict[str, Any]]:
    """Measure shuffles of one source between two copies of it."""
    mode, target = cases[0].mode, bench.work / "out"
    copies: dict[str, list[float]] = {kind: [] for kind in COPIES}

    def copy() -> None:
        for kind in COPIES:
            copies[kind].append(floor.measure(kind, 2, mode)["seconds"])
            bench.did(f"{mode}, {floor.copier.processes} processes, {kind}: {rate(floor.nbytes, copies[kind][-1])}")

    copy()
    found = []
    for case in cases:
        prepare(mode, [source])
        try:
            with nullcontext() if case.checked else costs.unchecked():
                one = _shuffle(crew, source, target, memory, case.levels, durable(mode))
        except InfeasibleError as err:
            bench.did(f"{case}: {err}")
            continue
        found.append(one | asdict(case))
        bench.did(f"{case}: {rate(one['bytes'], one['seconds'])}")
    copy()
    mean, plain = (sum(copies[kind]) / 2 for kind in COPIES)
    return [
        one
        | {"copies": copies["copy"], "plain_copies": copies["plain copy"]}
        | {"of_copy": mean / one["seconds"], "of_copy_published": mean / one["published"]}
        | {"of_plain_copy": plain / one["seconds"]}
        for one in found
    ]


def _shuffle(crew: Executor, source: Path, target: Path, memory: int, levels: int, fsync: bool) -> dict[str, Any]:
    """Measure one shuffle, from the call to the completion marker; workers are running already."""
    timed, jobs = Timed(crew), list[Job]()
    way = {"levels": levels, "gather": levels == 1, "memory": memory} if levels else {}
    alone = Threads(crew.workers) if crew.workers > 1 else Serial()
    start = time.monotonic()
    result = actshuffle.shuffle(
        source,
        target,
        seed=SEED,
        executor=timed if levels else alone,
        fsync=fsync,
        progress=timed,
        planned=jobs.append,
        **way,
    )
    stop = time.monotonic()
    shutil.rmtree(target)
    plan = result.plan
    return {
        "seconds": stop - start,
        "published": published(timed) - start,
        "bytes": result.nbytes,
        "rows": rows_of(source),
        "way": str(jobs[0].kind),
        "tasks": len(timed.traces),
        "leaves": plan.leaves,
        "block_bytes": plan.block_bytes,
        "leaf_bytes": plan.leaf_rows * plan.row_bytes,
        "task_cpu": sum(t.cpu for t in timed.traces),
        "phases": breakdown(timed, start, stop) if levels else None,
    }


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per case: medians and ranges over the rounds."""
    cases: dict[Case, list[dict[str, Any]]] = {}
    for one in found:
        case = Case(**{f.name: one[f.name] for f in fields(Case)})
        cases.setdefault(case, []).append(one)
    rows = []
    for case, ours in cases.items():
        widest = cases[
            max((c for c in cases if replace(c, row_bytes=case.row_bytes) == case), key=lambda c: c.row_bytes)
        ]
        rows.append(
            asdict(case)
            | {
                "of_widest": spread(
                    [
                        w["seconds"] / one["seconds"] * one["bytes"] / w["bytes"]
                        for w, one in zip(widest, ours, strict=False)
                    ]
                ),
                "rate": spread([one["bytes"] / one["seconds"] / 1e9 for one in ours]),
                "copy_rate": spread([one["bytes"] / s / 1e9 for one in ours for s in one["copies"]]),
                "of_copy": spread([one["of_copy"] for one in ours]),
                "of_copy_published": spread([one["of_copy_published"] for one in ours]),
                "of_plain_copy": spread([one["of_plain_copy"] for one in ours]),
                "of_floor": spread([one["of_copy"] * max(1, case.levels) for one in ours]),
                "cpu_per_gb": spread([one["task_cpu"] / one["bytes"] * 1e9 for one in ours]) if case.levels else None,
                "leaves": ours[0]["leaves"],
                "leaf_bytes": ours[0]["leaf_bytes"],
                "phases": summarise([one["phases"] for one in ours]) if case.levels else None,
            }
        )
    return rows


def _way(row: dict[str, Any]) -> str:
    return (str(row["levels"]) if row["levels"] else "default") + ("" if row["checked"] else ", no digests")


def page(rows: list[dict[str, Any]], memory: int) -> list[str]:
    names = (*PHASES, *OUTSIDE)
    return [
        "## The engine, beside a copy",
        "",
        f"At most {format_bytes(memory)} a worker; median (range) over interleaved rounds. *of copy*: "
        "the rate of the shuffle over that of a copy by our own copier with as many processes: 0.50 is half "
        "as fast as copying. *published*: the same up to the moment when the result is complete and only the "
        "last spill is left to delete, which a copy does not have, and which some disks delete slowly. "
        "*of plain copy*: against a copier that writes as any program would, through the page cache and into files "
        "for which no space was set aside. *of floor*: *of copy* against one copy per level, which no shuffle "
        "that reads and writes everything at each level can beat. *of widest*: the "
        "rate over that of the widest rows in the same round. *1 level* is `--gather`: no spill, rows "
        "come from the page cache, into which the source is read first if it is not there. *default*: the way that "
        "the planner chooses, on threads of one process, with the memory that it takes by itself; *no digests*: rows "
        "are not hashed. Workers are running when the clock starts. *leaves* is the number of pieces sorted in memory.",
        "",
        *table(
            (
                "mode",
                "data",
                "row",
                "workers",
                "levels",
                "leaves",
                "GB/s",
                "copy GB/s",
                "of copy",
                "published",
                "of plain copy",
                "of floor",
                "of widest",
                "CPU s/GB",
            ),
            (
                (
                    r["mode"],
                    format_bytes(r["size"]),
                    f"{r['row_bytes']} B",
                    r["workers"] or "serial",
                    _way(r),
                    r["leaves"],
                    ranged(r["rate"]),
                    ranged(r["copy_rate"]),
                    ranged(r["of_copy"]),
                    ranged(r["of_copy_published"]),
                    ranged(r["of_plain_copy"]),
                    ranged(r["of_floor"]),
                    ranged(r["of_widest"]),
                    ranged(r["cpu_per_gb"]) if r["levels"] else "",
                )
                for r in rows
            ),
        ),
        "",
        "## Where the time goes",
        "",
        "Percent of the workers' time. *write* is the time that a task waits for the thread beside it, fsync "
        "and rename included; *behind* is the time, on top of the rest, in which that thread hashes rows that "
        "were read and writes rows that were gathered. *scheduler*: "
        "between tasks. *idle*: after a worker's last task of a level. *clearing*: deleting spill. "
        "*driver*: preparing, boundaries, publishing, while no level has tasks to run.",
        "",
        *table(
            ("mode", "row", "workers", "levels", *names, "(behind)"),
            (
                (
                    r["mode"],
                    f"{r['row_bytes']} B",
                    r["workers"] or "serial",
                    r["levels"],
                    *(f"{100 * r['phases'][n]:.0f}" for n in (*names, "behind")),
                )
                for r in rows
                if r["levels"]
            ),
        ),
    ]
