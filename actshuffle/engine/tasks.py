"""The tasks: plain functions of (job, task), idempotent, safe to run twice, anywhere, at the same time.

::

    count    keys of a row range            -> counts for the boundaries, added up by further tasks (jobs/sums.py)
    split    one block of rows              -> one spill object, grouped by bucket, and a receipt
    index    receipts of a bucket's blocks  -> the place of each child's runs, and their digests (totals.py)
    leaf     all runs of one leaf           -> its objects in the output, and a receipt

Each task checks its input against the record of the step before (rows per bucket, conservation digests),
writes its data first and its receipt last, and does nothing if a valid receipt exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arraytypes import U64
from actshuffle.engine import gather, manifest, totals
from actshuffle.engine.columns import Columns
from actshuffle.engine.job import Job
from actshuffle.engine.leaves import leaf
from actshuffle.engine.spill import Spill
from actshuffle.errors import FormatError
from actshuffle.executors import Executor
from actshuffle.jobs.receipts import Payload, read_receipt
from actshuffle.jobs.running import Done, Stage, once, sweep
from actshuffle.jobs.sums import Sums
from actshuffle.ordering import bounds
from actshuffle.ordering.digest import add_to_groups, to_hex
from actshuffle.ordering.partition import bucket_of, group
from actshuffle.planning.tree import Task
from actshuffle.progress import Progress
from actshuffle.storage.buffers import arena, behind, lean_heap, padded

# Rows hashed and assigned to buckets at a time: a few 100 KB of temporaries, however large the block.
LOOK_ROWS = 1 << 13


def run_task(job: Job, task: Task) -> Done:
    """Do one task, unless its receipt shows that it is done."""
    work = {"split": split, "pack": totals.pack, "index": totals.index, "leaf": leaf}[task.kind]
    raw = all(f.source_key for f in job.fields) and all(f.raw_output for f in job.outputs)
    with nullcontext() if raw else lean_heap():
        return once(job, task, work, is_done)


def is_done(job: Job, task: Task) -> bool:
    """True if there is a valid receipt and the objects it names exist with the right sizes."""
    if read_receipt(job, task) is None:
        return False
    if task.kind == "split":
        return Spill(job, task.level).has_block(task.number)
    if task.kind == "pack":
        return totals.has_pack(job, task)
    if task.kind == "index":
        spill = Spill(job, task.level)
        return all(spill.has_tables(child) for child in job.plan.indexed(task.level, task.number)[1])
    objects = job.at_destination
    for field in job.outputs:
        for number in job.output_objects(field, range(task.number, task.number + 1)):
            size = objects.size(field.object_key.format(number))
            if size is None or (field.raw_output and size != field.object_rows * field.row_bytes):
                return False
    return True


def stages(job: Job) -> list[Stage]:
    """The stages of a job: one per level.  Packs and tables of receipts close a level."""
    plan, found = job.plan, []
    nbytes = plan.rows * plan.row_bytes
    for level in range(1, plan.levels):
        found.append(
            Stage(
                f"level {level} of {plan.levels}",
                partial(plan.tasks, level),
                plan.task_count(level),
                nbytes,
                run_task,
                is_done,
                closing=(partial(_closing, job, "pack", level), partial(_closing, job, "index", level)),
                before=partial(_before_split, job, level),
                after=partial(_delete_spill, job, level - 1),
            )
        )
    last = plan.levels
    name = f"level {last} of {last}" if job.kind.ranked else (job.known.stage or str(job.kind))
    tasks, count = partial(plan.tasks, last), plan.task_count(last)
    closing = (partial(_closing, job, "pack", last),)
    found.append(Stage(name, tasks, count, nbytes, run_task, is_done, closing, before=partial(_before_leaves, job)))
    return found


def _closing(job: Job, kind: str, level: int) -> Iterator[Task]:
    """The tasks of a kind that close a level."""
    plan = job.plan
    numbers = plan.packs_of if kind == "pack" else plan.index_tasks
    parents = plan.buckets(level - 1) if level < plan.levels else 1
    return (Task(kind, level, number) for parent in range(parents) for number in numbers(level, parent))


def _before_split(job: Job, level: int, executor: Executor, progress: Progress) -> None:
    Spill(job, level).write_metadata()


def _before_leaves(job: Job, executor: Executor, progress: Progress) -> None:
    """For a gather: look at all keys, and bring the source into the page cache, or decoded into memory."""
    if job.kind.gathers:
        staged, plain = gather.stage_calls(job), [] if job.plan.apart else gather.warm_calls(job)
        looks = sweep(gather.KEYS, gather.look, gather.look_calls(job), executor, progress)
        decoded = sweep(gather.DECODING, gather.stage, staged, executor, progress, itemgetter(2), job.plan.staged)
        gather.write_runs(job, looks, list(decoded) if staged else [])
        nbytes = job.plan.rows * job.plan.row_bytes - job.plan.staged
        if plain:
            for _ in sweep(gather.READING, gather.warm, plain, executor, progress, int, nbytes):
                pass


def _delete_spill(job: Job, level: int, progress: Progress) -> None:
    """Remove a level whose rows are all in the next one."""
    if level:
        with clearing(progress):
            Spill(job, level).delete()


CLEARING = "clearing"  # the stage in which used spill, or all of the scratch, is removed


@contextmanager
def clearing(progress: Progress) -> Iterator[None]:
    """Show a deletion as a separate stage, since it can take long: some disks free their space slowly."""
    progress.begin(CLEARING, 1, 0)
    yield
    progress.advance(0, True)
    progress.end()


def find_boundaries(job: Job, executor: Executor, progress: Progress) -> U64:
    """The keys at the boundaries between leaves; counts of many row ranges are added up by tasks, in scratch."""
    plan, ranges = job.plan, key_ranges(job)
    first, stop = job.key_rows or (0, plan.rows)

    def ask(query: bounds.Query) -> Iterator[NDArray[Any]]:
        if ranges <= 1:  # computed faster here than on a worker
            yield bounds.answer(job.keys, first, stop, query)
            return
        sums = _sums(job, query.bits, ranges)
        done = sums.total() if query.more else None
        if done is None:
            sums.write("query", np.array([query.more, *query.marked.view(np.int64)]))
            for found in executor.map(count, ((job, query.bits, number, ranges) for number in range(ranges))):
                progress.advance(0, True)
                if found is not None:
                    yield found
            done = sums.add_up(executor) if query.more else None
        if done is not None:
            yield done

    progress.begin("boundaries", ranges, 0)
    ranks = np.arange(1, plan.leaves, dtype=np.int64) * plan.leaf_rows
    found = bounds.find(job.keys, ranks, ask)
    progress.end()
    return found


def key_ranges(job: Job) -> int:
    """The number of row ranges whose keys are looked at one by one; of more than one the counts go to scratch."""
    first, stop = job.key_rows or (0, job.plan.rows)
    return -(-(stop - first) // bounds.range_rows(stop - first))


def count(job: Job, bits: int, number: int, ranges: int) -> NDArray[Any] | None:
    """Answer one query of the search for boundaries, for one row range: keys are returned, counts go to scratch."""
    first, stop = job.key_rows or (0, job.plan.rows)
    step = bounds.range_rows(stop - first)
    start = first + number * step
    sums = _sums(job, bits, ranges)
    asked = sums.read("query")
    if asked is None:
        raise FormatError(f"{sums.folder}/query in {job.scratch} is gone or damaged; run again")
    query = bounds.Query(bits, asked[1:].view(np.uint64), int(asked[0]))
    if query.more and sums.read(f"0/{number}") is not None:
        return None
    found = bounds.answer(job.keys, start, min(start + step, stop), query)
    if not query.more:
        return found
    sums.write(f"0/{number}", found)
    return None


COUNTS = "counts"  # the folder of the search for boundaries in scratch


def _sums(job: Job, bits: int, ranges: int) -> Sums:
    return Sums(job.scratch, f"{COUNTS}/{bits}", job.identity, ranges)


def split(job: Job, task: Task) -> tuple[Payload, int]:
    """Read one block, group its rows by child bucket, write it as one spill object."""
    plan, level = job.plan, task.level
    block = plan.block(level, task.number)
    rows = block.stop - block.start
    staging_bytes = plan.model.staging_bytes
    memory = arena().reset(Columns.nbytes(job, rows) + padded(staging_bytes))
    columns = Columns.allocate(job, memory, rows)
    children = plan.children(level - 1, block.parent)
    width = plan.widths[level]
    cutting = manifest.boundaries(job)[np.array(children[1:], np.int64) * width - 1]
    buckets = np.empty(rows, np.uint16)
    sums = np.zeros((1 + len(job.fields), len(children), 2), np.uint64)

    def look(parts: Sequence[int], start: int, stop: int) -> None:
        """Find the buckets of rows that have just been read, and add up the hashes of some of their parts."""
        for a in range(start, stop, LOOK_ROWS):
            b = min(a + LOOK_ROWS, stop)
            seen = columns.rows(a, b)
            if parts[0] == 0:  # the hi words, which arrive before the fields or together with them
                buckets[a:b] = bucket_of(job.keys, seen.hi, seen.source_row, cutting)
            for number, hashes in zip(parts, seen.hashes(job, parts), strict=True):
                add_to_groups(sums[number], hashes, buckets[a:b])

    with behind() as beside:  # look at rows while the next ones are read
        if level == 1:
            for parts, start, stop in columns.read_source(job, block.start):
                beside.submit(look, parts, start, stop)
        else:
            everything = range(1 + len(job.fields))
            Spill(job, level - 1).read(block.parent, block.start, columns, partial(beside.submit, look, everything))
    order, cuts = group(buckets, len(children))
    Spill(job, level).write_block(task.number, columns, order, cuts, memory.take((staging_bytes,)))
    packed = ["".join(to_hex(s) for s in per_child) for per_child in sums]
    return {"rows": np.diff(cuts).tolist(), "sums": packed}, rows * plan.row_bytes
