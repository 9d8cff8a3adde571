"""`calibrate`: the constants of the cost model on this machine, and the accuracy of its predictions.

Small runs are measured, level by level.  A level of n tasks of b bytes on w workers takes

    ceil(n / w) x (overhead + CPU per byte x b)

and the rest of a run (boundaries, index, publishing, clearing) takes a fixed time, plus some time per task and
per byte of spill, which has to be deleted.  The six numbers are fitted per number of workers, since workers of
one machine get in each other's way.  Then `actshuffle.planning.simulate` predicts runs of other sizes and block
sizes, and these are run and compared.

In mode "disk" the source starts out of the cache and every write is durable, so a byte's seconds include its
reads and writes.  In mode "cached" everything is in memory and without fsync, so the seconds are those of the
processor alone, which the cost model needs beside the rates of other disks; keep sizes small there, lest the
kernel starts write-back in the middle of a run.
"""

from __future__ import annotations

import dataclasses
import operator
import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import actshuffle
from actshuffle.errors import InfeasibleError
from actshuffle.executors import Executor, Serial, local_cluster
from actshuffle.planning import simulate
from actshuffle.planning.cost import Cluster
from actshuffle.planning.tree import Plan
from actshuffle.units import format_bytes
from benchmarks import plots
from benchmarks.floor import durable, prepare
from benchmarks.phases import Timed
from benchmarks.results import Bench, need_space, spread, table
from benchmarks.sources import make_source

RUN_BYTES = 32 << 10  # small, so that small data can have any number of levels
UNLIMITED = 1e15  # bytes a second
GOAL = 0.15
PER_BYTE = ("split_cpu", "leaf_cpu", "clear")


@dataclass(frozen=True)
class Case:
    """One run; ``workers`` 0 is the serial executor.  Constants are fitted to the ``known`` ones."""

    size: int
    memory: int
    workers: int
    levels: int
    known: bool


@dataclass(frozen=True)
class Constants:
    """The constants fitted for one number of workers: seconds, and seconds per byte."""

    overhead: float
    split_cpu: float
    leaf_cpu: float
    fixed: float
    per_task: float
    clear: float  # per byte of spill


def run(
    bench: Bench,
    *,
    known: list[int],
    held_out: list[int],
    memories: list[int],
    held_memory: int,
    workers: list[int],
    levels: list[int],
    row_bytes: int,
    rounds: int,
    mode: str,
) -> None:
    need_space(bench.work, int(sum({*known, *held_out}) + 3.5 * max(*known, *held_out)))
    cases = [
        Case(size, memory, count, level, True)
        for size in known
        for memory in memories
        for count in workers
        for level in levels
    ]
    cases += [
        Case(size, held_memory, count, level, False) for size in held_out for count in workers for level in levels
    ]
    bench.plan(rounds * len(cases))
    found: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    plans: dict[Case, Plan] = {}
    with ExitStack() as stack:
        crews: dict[int, Executor] = {n: stack.enter_context(local_cluster(n)) if n else Serial() for n in workers}
        sizes = sorted({case.size for case in cases})
        sources = {size: make_source(bench.work, size, row_bytes, 8 << 20) for size in sizes}
        for crew in crews.values():  # touch buffers and load code
            _one(crew, sources[sizes[0]], bench.work / "out", cases[0], mode)
        for _ in range(rounds):  # each has all sizes, since a disk's speed varies over time
            for case in cases:
                try:
                    plans[case], one = _one(crews[case.workers], sources[case.size], bench.work / "out", case, mode)
                except InfeasibleError as err:
                    bench.did(f"{case}: {err}")
                    continue
                found[case].append(one)
                bench.did(
                    f"{format_bytes(case.size)}, {case.workers} workers, {case.levels} levels: {one['seconds']:.2f} s"
                )
    cases = [case for case in cases if found[case]]
    constants = {
        count: fit([(plans[c], _fastest(found[c])) for c in cases if c.known and c.workers == count], count)
        for count in workers
    }
    rows = [
        asdict(case)
        | {
            "tasks": [plans[case].task_count(level) for level in range(1, case.levels + 1)],
            "measured": spread([one["seconds"] for one in found[case]]),
            "foretold": foretell(plans[case], constants[case.workers], case.workers),
        }
        for case in cases
    ]
    for row in rows:
        row["off"] = row["foretold"] / row["measured"]["low"] - 1
    fitted = {str(count): asdict(c) for count, c in constants.items()}
    images = plots.draw(bench, lambda folder: [plots.calibrate(folder, rows)])
    bench.publish({"constants": fitted, "runs": rows}, page(rows, constants, mode), images)


def _one(crew: Executor, source: Path, target: Path, case: Case, mode: str) -> tuple[Plan, dict[str, Any]]:
    """Time one run, from the call to its end: seconds in total, and of each level's tasks."""
    prepare(mode, [source])
    timed = Timed(crew)
    start = time.monotonic()
    result = actshuffle.shuffle(
        source,
        target,
        seed=1,
        levels=case.levels,
        memory=case.memory,
        run_bytes=RUN_BYTES,
        executor=timed,
        fsync=durable(mode),
        progress=timed,
    )
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    walls = []
    for name, begin, end in timed.stages:
        if name.startswith("level"):
            walls.append(
                max(t.stop for t in timed.traces if begin <= t.stop <= end and t.task.kind not in ("pack", "index"))
                - begin
            )
    return result.plan, {"seconds": seconds, "walls": walls}


def _fastest(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest round, since other load on the machine can only slow a run down."""
    return min(found, key=operator.itemgetter("seconds"))


def fit(runs: list[tuple[Plan, dict[str, Any]]], workers: int) -> Constants:
    """Fit by least squares of relative errors; ``runs`` are plans and their measurements."""
    levels, rests = [], []
    for plan, one in runs:
        for level, seconds in enumerate(one["walls"], 1):
            n, nbytes = plan.task_count(level), plan.level_bytes(level)[0]
            turns = -(-n // max(1, workers))
            split, moved = level < plan.levels, turns * nbytes / n
            levels.append(([turns, moved * split, moved * (not split)], seconds))
        rests.append(([1.0, *_amounts(plan)], one["seconds"] - sum(one["walls"])))
    return Constants(*_solve(levels), *_solve(rests))


def _amounts(plan: Plan) -> tuple[int, int]:
    """Tasks of all levels, and bytes of spill."""
    tasks = sum(plan.task_count(level) for level in range(1, plan.levels + 1))
    return tasks, sum(plan.level_bytes(level)[1] for level in range(1, plan.levels))


def _solve(equations: list[tuple[list[float], float]]) -> list[float]:
    """Coefficients, none below 0, that fit the right sides by least squares of relative errors.

    Errors are relative to the prediction.  Relative to the measurement, runs that were slow by chance would
    weigh less than those that were quick, and all predictions would be too fast.
    """
    left, right = np.array([a for a, _ in equations]), np.array([y for _, y in equations])
    scale = right
    for _ in range(5):
        found = _not_negative(left / scale[:, None], right / scale)
        scale = np.maximum(left @ found, right / 4)  # never 0
    return found.tolist()


def _not_negative(left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    """Least squares without the coefficients that would come out below 0."""
    found, used = np.zeros(left.shape[1]), list(range(left.shape[1]))
    while True:
        found[used] = np.linalg.lstsq(left[:, used], right, rcond=None)[0]
        if (found >= 0).all():
            return found
        worst = used[int(np.argmin(found[used] * np.abs(left[:, used]).max(axis=0)))]
        found[worst] = 0.0
        used.remove(worst)


def foretell(plan: Plan, constants: Constants, workers: int) -> float:
    """Predict the seconds of a run: its levels by simulation, the rest by the fitted line."""
    cluster = Cluster(
        hosts=1,
        workers_per_host=max(1, workers),
        network=UNLIMITED,
        disk=UNLIMITED,
        dispatch=0.0,
        overhead=constants.overhead,
        split_cpu=constants.split_cpu,
        leaf_cpu=constants.leaf_cpu,
    )
    played = simulate.simulate(plan, cluster, grain=0)
    tasks, spilled = _amounts(plan)
    seconds = sum(stage.seconds for stage in played if stage.name.startswith("level"))
    return seconds + constants.fixed + constants.per_task * tasks + constants.clear * spilled


MODES = {
    "disk": "The source starts out of the page cache and every write is durable: a byte's seconds include its "
    "reads and writes",
    "cached": "Everything is in memory (page cache or tmpfs), without fsync",
}


def page(rows: list[dict[str, Any]], constants: dict[int, Constants], mode: str) -> list[str]:
    names = [f.name for f in dataclasses.fields(Constants)]
    unseen = [abs(r["off"]) for r in rows if not r["known"]]
    within = sum(off <= GOAL for off in unseen)
    crew = {count: "serial" if not count else f"{count} workers" for count in constants}
    return [
        f"{MODES[mode]}. Constants are fitted to the *known* runs, per "
        "number of workers; the others were run only to be compared with the prediction of the simulation. "
        "The fastest of the rounds counts, in both: other load on the machine can only slow a run down. "
        "The range of the rounds is in brackets.",
        "",
        *table(
            ("", "overhead ms", "split s/GB", "leaf s/GB", "fixed ms", "more ms a task", "clearing s/GB"),
            (
                (crew[count], *(f"{getattr(c, n) * (1e9 if n in PER_BYTE else 1e3):.2f}" for n in names))
                for count, c in constants.items()
            ),
        ),
        "",
        *table(
            ("", "data", "memory", "", "levels", "tasks", "measured s", "predicted s", "off"),
            (
                (
                    "known" if r["known"] else "**held out**",
                    format_bytes(r["size"]),
                    format_bytes(r["memory"]),
                    crew[r["workers"]],
                    r["levels"],
                    " + ".join(map(str, r["tasks"])),
                    "{low:.2f} ({low:.2f} to {high:.2f})".format(**r["measured"]),
                    f"{r['foretold']:.2f}",
                    f"{100 * r['off']:+.0f}%",
                )
                for r in rows
            ),
        ),
        "",
        f"Held out: {within} of {len(unseen)} within {100 * GOAL:.0f}%, the worst "
        f"{100 * max(unseen, default=0):.0f}% off.",
    ]
