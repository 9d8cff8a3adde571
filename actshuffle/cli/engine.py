"""Commands of the shuffle: run, plan and status."""

from __future__ import annotations

import inspect
from typing import Any

import click

from actshuffle.cli.options import CLUSTER, WORKERS, forecast_cluster, knobs
from actshuffle.cli.session import Answer, look, work
from actshuffle.cli.values import COUNT, PATH, SIZE
from actshuffle.engine import preview, state
from actshuffle.engine import run as running
from actshuffle.engine.job import Job
from actshuffle.engine.request import KNOBS
from actshuffle.errors import RequestError
from actshuffle.machine import beyond_machine
from actshuffle.planning.forecast import forecast, text
from actshuffle.planning.report import plan_report, plan_text, request_text, way_report, way_text
from actshuffle.planning.strategy import cheapest
from actshuffle.units import format_bytes


@click.command()
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@knobs(name for name, knob in KNOBS.items() if knob.help)
@click.option("--overwrite", is_flag=True, help="Replace a store at DST.")
@click.option("--fsync/--no-fsync", default=True, help="Make objects durable at once.  [default: yes]")
@work()
def run(executor: Any, display: Any, src: str, dst: str, **options: Any) -> Answer:
    """Write the rows of SRC to DST in exactly uniform random order.

    SRC is a Zarr v2 or v3 array, or a group of arrays of equal length; DST becomes a Zarr v3 group.
    A run that was stopped resumes when the same command is given again.

    \b
    Examples:
      actshuffle run acts.zarr shuffled.zarr
      actshuffle run acts.zarr shuffled.zarr --seed 7 --memory 8GB --workers 16
      actshuffle run s3://b/acts s3://b/shuffled --scheduler tls://10.0.0.1:8786
    """

    def planned(job: Job) -> None:
        display.line("plan", _plan_line(job))
        display.before(job.plan.rows * job.plan.row_bytes, job.kind.gathers and not (job.plan.staged or job.plan.apart))

    result = running.shuffle(src, dst, executor=executor, progress=display, planned=planned, **options)
    document = {
        "destination": result.destination,
        "rows": result.plan.rows,
        "bytes": result.nbytes,
        "seed": result.seed,
        "seconds": result.seconds,
        "bytes_per_second": result.nbytes / result.seconds if result.seconds else None,
        "already_finished": result.already_finished,
        "tasks": result.tasks,
        "resumed": result.resumed,
        "workers": result.workers,
        "requests": result.requests,
        "plan": plan_report(result.plan),
    }
    return Answer(document, str(result), next=("actshuffle", "verify", src, dst))


def _plan_line(job: Job) -> str:
    plan = job.plan
    if job.kind.gathers:
        where = "memory, decoded first" if plan.staged else "the disk" if plan.apart else "the page cache"
        return f"1 level, rows taken from {where}, no spill, {format_bytes(plan.memory)} per worker"
    blocks = sum(plan.blocks(level) for level in range(1, plan.levels))
    levels = f"{plan.levels} level{'s' * (plan.levels != 1)}"
    scratch = f"{blocks:,} block{'s' * (blocks != 1)}, {format_bytes(plan.scratch_bytes)} scratch"
    return f"{levels}, {scratch if blocks else 'no scratch'}, {format_bytes(plan.memory)} per worker"


_CHOSEN = ("levels", "block_bytes", "run_bytes", "spill_memory", "gather", "random_reads")  # the planner's choice


@click.command()
@click.argument("src", type=PATH, required=False)
@click.argument("dst", type=PATH, required=False)
@click.option("--rows", type=COUNT, help="Number of rows, if there is no SRC yet: 100e9.")
@click.option("--row-bytes", type=SIZE, help="Bytes per row, if there is no SRC yet.")
@knobs(name for name in KNOBS if name in inspect.signature(preview.plan).parameters)
@WORKERS
@CLUSTER
@look
def plan(simulate: bool, simulation_seed: int, **options: Any) -> Answer:
    """Show the plan of a run: levels, tasks, memory, disk.  Writes nothing.

    The plan is made for the destination DST; without one, for a destination beside SRC.

    Where no option names one, also show the ways to the output, their time, and the one that a run would take now.
    With --hosts, also show its time on that many hosts, its bottleneck, and its cost.

    \b
    Examples:
      actshuffle plan acts.zarr --memory 8GB
      actshuffle plan acts.zarr s3://bucket/shuffled
      actshuffle plan --rows 100e9 --row-bytes 1KB --memory 100GB --run-bytes 1GB
      actshuffle plan --rows 122e9 --row-bytes 8KiB --memory 16GB --hosts 200
    """
    cluster = forecast_cluster(options)
    if cluster is not None and (options["gather"] or options["random_reads"]):
        raise RequestError("--gather and --random-reads are for one machine: leave --hosts out")
    if cluster is not None:
        options["workers"] = options["workers"] or cluster.workers
        options["memory"] = options["memory"] or "4GB"  # of theirs; this machine's is not theirs
        options["remote"] = cluster.scratch == "store"
        options["gather"] = False if options["src"] else None
        if options["spill_memory"] is None:
            options["spill_memory"] = 0  # this machine's memory is not theirs
    ways, made = preview.ways(**options)
    found, told = plan_report(made), plan_text(made)
    found["requests"] = preview.requests_of(made, **options)
    if found["requests"]:
        told += "\n" + request_text(found["requests"])
    if ways:
        found["candidates"] = way_report(ways)
        told += "\n\n" + way_text(ways)
    if options["src"] and cluster is None and not (options["gather"] or options["random_reads"]):
        open_choice = options | dict.fromkeys(_CHOSEN)
        free = (options["gather"] is None and ways) or preview.ways(**open_choice)[0]
        found["gathers_well"] = bool(free) and cheapest(free).name in ("gather", "memory")
    if cluster is None and options["src"] and (note := beyond_machine(made.memory)):
        told += f"\n\nnote: {note}"
    if cluster is not None:
        found["forecast"] = forecast(made, cluster, simulated=simulate, seed=simulation_seed)
        told += "\n\n" + text(found["forecast"])
    return Answer(found, told)


@click.command()
@click.argument("dst", type=PATH)
@look
def status(dst: str, storage_options: dict[str, Any] | None) -> Answer:
    """Show the progress of the run that writes DST.

    \b
    Example:
      actshuffle status shuffled.zarr
    """
    found = state.status(dst, storage_options)
    return Answer(found, state.status_text(found))
