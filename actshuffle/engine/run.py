"""A run, from first to last: claim, boundaries, one level after the other, publish.

::

    prepare     inspect, plan, refuse                            (prepare.py; nothing is written)
    claim       write run.json in dst and scratch
    boundaries  find the keys at the edges of the leaves         (bounds.py)
    level 1     split source blocks   -> scratch/level1, index
    ...
    level L     sort leaves           -> dst, whole objects
    publish     write digests, zarr.json of arrays and group, marker; then delete scratch and receipts

Array metadata is published last, so no reader takes a half-done destination for a Zarr store.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from actshuffle.arrays.marker import is_finished
from actshuffle.arrays.names import DIGESTS, OUR_GROUP, PACKS, RECEIPTS, RUN_KEY
from actshuffle.arrays.small import group_metadata, put_array
from actshuffle.engine import manifest, tasks
from actshuffle.engine.gather import check_whole
from actshuffle.engine.job import Job
from actshuffle.engine.prepare import prepare
from actshuffle.engine.request import Request
from actshuffle.engine.scratch import claim_memory, clear_scratch
from actshuffle.engine.totals import output_digests
from actshuffle.errors import ConservationError, FormatError, RequestError
from actshuffle.executors import Executor, executor_for
from actshuffle.executors.choice import as_executor
from actshuffle.html import page
from actshuffle.jobs.locks import Locks
from actshuffle.jobs.running import Course, Stage, run
from actshuffle.jobs.work import Work
from actshuffle.ordering.digest import to_hex
from actshuffle.planning.planner import Levels
from actshuffle.planning.tree import Plan
from actshuffle.progress import Progress, observer
from actshuffle.progress.display import shown
from actshuffle.storage import requests
from actshuffle.storage.buffers import kept
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import Place, as_place
from actshuffle.units import counted, format_bytes, format_seconds, switches


@dataclass(frozen=True)
class Result:
    """The outcome of a run.  ``seconds`` is the time of this run; ``resumed`` of the tasks were found done.

    ``requests`` are those to object stores by kind: "get", "put", "list", "head", "delete".  Repetitions, and those of
    tasks that died, are not among them.
    """

    plan: Plan
    seed: int
    destination: str
    seconds: float
    tasks: int
    resumed: int
    workers: int
    already_finished: bool = False  # by an earlier run, so that this one wrote nothing
    requests: dict[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.plan.rows * self.plan.row_bytes

    def __str__(self) -> str:
        if self.already_finished:
            return f"{self.destination}: already finished, {counted(self.plan.rows, 'row')}, seed {self.seed}"
        rate = f"{format_bytes(self.nbytes / self.seconds)}/s" if self.seconds else "-"
        text = (
            f"{counted(self.plan.rows, 'row')}, {format_bytes(self.nbytes)}, {self.plan.levels} "
            f"level{'s' * (self.plan.levels != 1)}, seed {self.seed}: "
            f"{format_seconds(self.seconds)}, {rate} end to end on {self.workers} "
            f"worker{'s' * (self.workers != 1)}"
        )
        if self.requests:
            text += f"; {counted(sum(self.requests.values()), 'request')} to object stores"
        return text + (f"; {self.resumed} of {counted(self.tasks, 'task')} were done before" if self.resumed else "")

    def _repr_html_(self) -> str:
        facts = {"store": self.destination, "rows": f"{self.plan.rows:,}", "bytes": format_bytes(self.nbytes)}
        facts |= {"seed": str(self.seed), "levels": str(self.plan.levels), "workers": str(self.workers)}
        facts["time"] = "already finished" if self.already_finished else format_seconds(self.seconds)
        return page("Shuffled", facts)


@shown
def shuffle(
    src: str | Path,
    dst: str | Path,
    *,
    seed: int | None = None,
    levels: Levels | None = None,
    memory: str | int | None = None,
    block_bytes: str | int | None = None,
    run_bytes: str | int | None = None,
    chunk_rows: int | None = None,
    chunks_per_shard: int | None = None,
    codec: str | None = None,
    fields: Iterable[str] | None = None,
    source_row: bool | None = None,
    missing_chunks: str | None = None,
    scratch: str | Path | None = None,
    spill_memory: str | int | None = None,
    gather: bool | None = None,
    random_reads: bool | None = None,
    workers: int | None = None,
    client: Any = None,
    executor: Executor | None = None,
    overwrite: bool = False,
    fsync: bool = True,
    storage_options: dict[str, Any] | None = None,
    progress: Progress | bool = True,
    planned: Callable[[Job], None] | None = None,
) -> Result:
    """Write ``src`` to ``dst`` in exactly uniform random order.

    The order is a pure function of ``seed`` and the number of rows (see `actshuffle.order`); levels,
    memory, workers and retries change nothing in the output.  A second call with the same arguments on
    a half-done ``dst`` resumes.

    Parameters
    ----------
    src, dst : paths or URLs.  ``src`` is a Zarr v2 or v3 array, or a group of arrays of equal length;
        ``dst`` becomes a Zarr v3 group.
    seed : non-negative int; drawn and recorded if not given.
    levels : passes over the data, or "auto" (default) for the cheapest way: one pass where the source fits into
        memory, else the fewest levels that fit, with spill in free memory.
    memory : the most that one worker uses beyond its idle footprint ("2GB").
    block_bytes, run_bytes : M and P of the arithmetic of passes; derived if not given.
    chunk_rows, chunks_per_shard : chunking of the widest output array; chosen if not given.
    codec : codec of the output, a name in `actshuffle.arrays.codecs.CODECS`; "none" (default) leaves plain bytes.
    fields : names of the arrays to shuffle; all if not given.
    source_row : also write the provenance array, the source row of each output row (default True).
    missing_chunks : "refuse" (default) an absent source chunk, or "fill" it with the fill value.
    scratch : folder or URL for the intermediate; beside ``dst`` if not given.
    spill_memory : keep up to this much of the intermediate in this machine's memory ("8GB"), on top of
        ``memory`` per worker; the rest goes to ``scratch``.  By default "auto" levels take what is free.
    gather : make one pass without spill, in which each row is taken from the source in the page cache, or from
        memory into which it was decoded; False makes levels.  By default "auto" levels decide.
    random_reads : make that pass with each row read from the disk where it lies, for sources that do not fit into
        memory on a disk that serves single rows fast; by default it is tried how many the disk gives.
    workers : processes of a local Dask cluster for this run; 0 or None runs here, without Dask.
    client : a `distributed.Client` to run on instead.
    executor : an executor to run on instead of either; it stays open.
    overwrite : replace the present content of ``dst``, finished or half done.
    fsync : make every object durable before its receipt.
    storage_options : options for URLs, in fsspec's form; never stored.
    progress : True (default) for a bar on a terminal or in a notebook, and lines elsewhere, on stderr, once the call
        has taken a second; False for none; or an observer of the stages (`actshuffle.progress.Progress`).
    planned : called with the settled job before it starts.

    Raises
    ------
    RequestError, SourceError : the request or the source was refused; nothing was written.
    DestinationInUseError : another process is writing ``dst``.
    ActshuffleError : the run stopped (see `actshuffle.errors`); finished tasks are kept.
    """
    request = Request.among(locals())
    switches(overwrite=overwrite, fsync=fsync)
    if not (planned is None or callable(planned)):
        raise RequestError(f"planned must be a function of the job, got {type(planned).__name__}")
    requests.taken()  # those of this process before the run
    with ExitStack() as stack:
        crew = stack.enter_context(executor_for(workers, client)) if executor is None else as_executor(executor)
        if (request.spill_memory or request.gather) and not crew.one_machine:
            raise RequestError(f"{_NOT_SHARED}: leave it out with a scheduler")
        work = Work(crew, observer(progress), overwrite, fsync)
        stack.enter_context(work.locks)
        job = prepared(as_place(src, storage_options), as_place(dst, storage_options), request, work)
        if (job.plan.uses_memory or job.kind.gathers) and not crew.one_machine:  # half done
            raise RequestError(
                f"{_NOT_SHARED}: {dst} is half done with it; resume it without a scheduler, or --overwrite starts again"
            )
        if planned is not None:
            planned(job)
        return execute(job, crew, work.progress, work.locks)


_NOT_SHARED = "spill memory and gathering use the memory of this machine, which workers on other machines cannot read"


class Shuffle(Course[Job]):
    """The driver's side of a shuffle, and of the gathers, merges and copies that run on the same tasks."""

    def stages(self) -> list[Stage]:
        return tasks.stages(self.job)

    def is_finished(self) -> bool:
        return is_finished(self.job.at_destination)

    def claim(self) -> None:
        _claim(self.job)

    def join(self) -> None:
        if self.job.at_destination.size(RUN_KEY) is None:
            manifest.write_run(self.job)

    def ready(self, executor: Executor, progress: Progress) -> None:
        job = self.job
        if not job.kind.ranked or job.kind.gathers or manifest.read_bounds(job) is not None:
            return
        manifest.write_bounds(job, tasks.find_boundaries(job, executor, progress))
        if tasks.key_ranges(job) > 1:
            job.at_scratch.delete_prefix(tasks.COUNTS)

    def publish(self, progress: Progress) -> None:
        """Write digests, metadata and, last of all, the marker.  Every step can be repeated."""
        job, objects = self.job, self.job.at_destination
        digests, keys = output_digests(job)
        sums: dict[str, str] = {}
        files: dict[str, bytes] = {}
        for name, table in digests.items():
            files |= put_array(objects, f"{DIGESTS}/{name}", table)
            sums[name] = to_hex(table.sum(axis=0, dtype=np.uint64))
        if job.kind.gathers:
            check_whole(job, keys, sums)
        promised = sums if job.known.sums is None else job.known.sums
        if promised != sums:
            wrong = ", ".join(sorted(name for name in sums if promised.get(name) != sums[name]))
            raise ConservationError(
                f"rows of {wrong} are not those that {job.source.url} had when they were written: an input "
                "has been damaged since; verify it. Nothing was published"
            )
        metadata = {f"{DIGESTS}/zarr.json": group_metadata({})}
        metadata |= {f"{f.name}/zarr.json": f.metadata.encode() for f in job.outputs}
        metadata["zarr.json"] = group_metadata(json.loads(job.attributes))
        for key, data in metadata.items():
            objects.put(key, data)
        objects.settle([""])
        manifest.write_marker(job, sums, files | metadata)

    def clear(self, progress: Progress) -> None:
        if self.job.at_destination.size(RUN_KEY) is not None:  # nothing is written to a store that is finished
            _clear(self.job, progress)


def execute(job: Job, executor: Executor, progress: Progress, locks: Locks | None = None) -> Result:
    """Run or resume a prepared job to its completion marker."""
    try:
        done = run(Shuffle(job, locks or Locks()), executor, progress)
    finally:
        kept.cache_clear()  # this process need not hold the source's files any longer
    place = str(job.destination)
    return Result(
        job.plan,
        job.keys.seed,
        place,
        done.seconds,
        done.tasks,
        done.resumed,
        executor.workers,
        done.already_finished,
        done.requests,
    )


def prepared(source: Place, target: Place, request: Request, work: Work) -> Job:
    """The job of a request for some work; see `prepare`."""
    return prepare(source, target, request, work.crew, locks=work.locks, overwrite=work.overwrite, fsync=work.fsync)


def copy_through(source: Place, target: Place, request: Request, work: Work, *, keep: bool = False) -> Result:
    """Make ``target`` of the virtual source that was written for that, and remove the source unless ``keep``."""
    requests.taken()
    job = prepared(source, target, request, work)
    result = execute(job, work.crew, work.progress, work.locks)
    if not keep:
        open_objects(source).delete_prefix("")
    return result


def _claim(job: Job) -> None:
    scratch = job.at_scratch
    body = None
    with suppress(FormatError):
        body = manifest.read_run(scratch, "run.json")
    if body is None or body["job"] != job.identity:
        clear_scratch(job)  # left by an earlier run to this destination that no longer exists
    scratch.settle([""])
    claim_memory(job)
    job.at_destination.settle([""])
    manifest.write_run(job)
    job.at_destination.settle([OUR_GROUP])


def _clear(job: Job, progress: Progress) -> None:
    """Delete the objects that only an unfinished run needs; ``run.json`` last, since it leads to the others.

    Scratch goes before the receipts: Dask repeats a finished task if its worker dies just then, and such a
    late task must find either its receipt or no input.
    """
    objects = job.at_destination
    objects.settle([OUR_GROUP])  # the marker is durable before anything is deleted
    with tasks.clearing(progress):
        clear_scratch(job)
        objects.delete_prefix(RECEIPTS)
        objects.delete_prefix(PACKS)
        objects.settle([OUR_GROUP])
        objects.delete(RUN_KEY)
