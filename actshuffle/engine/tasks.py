"""The tasks: plain functions of (job, task), idempotent, safe to run twice, anywhere, at the same time.

::

    count    keys of a row range            -> counts for the boundaries (returned, nothing stored)
    split    one block of rows              -> one spill object, grouped by bucket, and a receipt
    index    receipts of a bucket's blocks  -> the place of each child's runs, and their digests
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
from actshuffle.engine import gather, manifest
from actshuffle.engine.columns import Columns
from actshuffle.engine.conservation import blame, check_conserved, unpack
from actshuffle.engine.job import Job
from actshuffle.engine.leaves import leaf, leaf_objects
from actshuffle.engine.spill import Spill
from actshuffle.errors import FormatError
from actshuffle.executors import Executor
from actshuffle.jobs.receipts import Payload, read_receipt, read_receipts
from actshuffle.jobs.running import Done, Stage, once, sweep
from actshuffle.ordering import bounds
from actshuffle.ordering.digest import add_to_groups, add_up, to_hex
from actshuffle.ordering.partition import bucket_of, group
from actshuffle.planning.tree import Task
from actshuffle.progress import Progress
from actshuffle.storage.buffers import arena, behind, lean_heap, padded

# Rows hashed and assigned to buckets at a time: a few 100 KB of temporaries, however large the block.
LOOK_ROWS = 1 << 13


def run_task(job: Job, task: Task) -> Done:
    """Do one task, unless its receipt shows that it is done."""
    work = {"split": split, "index": index, "leaf": leaf}[task.kind]
    raw = all(f.source_key for f in job.fields) and all(f.raw_output for f in job.outputs)
    with nullcontext() if raw else lean_heap():
        return once(job, task, work, is_done)


def is_done(job: Job, task: Task) -> bool:
    """True if there is a valid receipt and the objects it names exist with the right sizes."""
    if read_receipt(job, task) is None:
        return False
    if task.kind == "split":
        return Spill(job, task.level).has_block(task.number)
    if task.kind == "index":
        spill = Spill(job, task.level)
        return all(spill.has_tables(child) for child in job.plan.children(task.level - 1, task.number))
    objects = job.at_destination
    for field in job.outputs:
        for number in leaf_objects(job, field, task.number):
            size = objects.size(field.object_key.format(number))
            if size is None or (field.raw_output and size != field.object_rows * field.row_bytes):
                return False
    return True


def stages(job: Job) -> list[Stage]:
    """The stages of a job: one per level.  Index tasks close a split level."""
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
                closing=partial(_index_tasks, job, level),
                before=partial(_before_split, job, level),
                after=partial(_delete_spill, job, level - 1),
            )
        )
    last = plan.levels
    name = f"level {last} of {last}" if job.kind.ranked else (job.known.stage or str(job.kind))
    tasks, count = partial(plan.tasks, last), plan.task_count(last)
    found.append(Stage(name, tasks, count, nbytes, run_task, is_done, before=partial(_before_leaves, job)))
    return found


def _index_tasks(job: Job, level: int) -> Iterator[Task]:
    """The tasks that close a split level: one per parent bucket."""
    return (Task("index", level, parent) for parent in range(job.plan.buckets(level - 1)))


def _before_split(job: Job, level: int, executor: Executor, progress: Progress) -> None:
    Spill(job, level).write_metadata()


def _before_leaves(job: Job, executor: Executor, progress: Progress) -> None:
    """For a gather: look at all keys, and bring the whole source into the page cache, or decoded into memory."""
    if job.kind.gathers:
        staged, plain = gather.stage_calls(job), gather.warm_calls(job)
        looks = sweep(gather.KEYS, gather.look, gather.look_calls(job), executor, progress)
        sums = list[tuple[int, U64, int]]()
        if staged:
            decoded = sweep(gather.DECODING, gather.stage, staged, executor, progress, itemgetter(2), job.plan.staged)
            sums.extend(decoded)
        gather.write_runs(job, looks, sums)
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


def count(job: Job, start: int, stop: int, query: bounds.Query) -> NDArray[Any]:
    """Answer one query of the search for bucket boundaries, for one row range."""
    return bounds.answer(job.keys, start, stop, query)


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


def index(job: Job, task: Task) -> tuple[Payload, int]:
    """Gather the receipts of a parent bucket's blocks into one table per child; check that the totals agree."""
    plan, level, parent = job.plan, task.level, task.number
    children = plan.children(level - 1, parent)
    blocks = [Task("split", level, block) for block in plan.blocks_of(level, parent)]
    rows = np.zeros((len(blocks), len(children)), np.uint64)
    sums = np.zeros((len(children), 1 + len(job.fields), 2), np.uint64)
    found = zip(blocks, read_receipts(job, blocks), strict=True)
    for number, (block, receipt) in enumerate(found):
        if receipt is None:
            raise FormatError(f"the receipt of block {block.number} of level {level} vanished; run again to redo it")
        rows[number] = receipt["rows"]
        for field, text in enumerate(receipt["sums"]):
            sums[:, field] += unpack(text)
    for at, child in enumerate(children):
        start, stop = plan.bucket_ranks(level, child)
        if int(rows[:, at].sum()) != stop - start:
            blame(
                job,
                level,
                parent,
                blocks,
                f"bucket {child} of level {level} got {int(rows[:, at].sum()):,} rows, the plan says {stop - start:,}",
            )
    if level > 1:
        expected = Spill(job, level - 1).sums(parent)
        check_conserved(job, level, parent, expected, add_up(sums), blocks)
    spill = Spill(job, level)
    begins = np.zeros(len(blocks), np.uint64)  # byte offset of the child's run in each block
    for at, child in enumerate(children):
        spill.put_tables(child, np.stack([begins, rows[:, at]], axis=1), sums[at])
        begins += rows[:, at] * np.uint64(plan.model.spill_row_bytes)
    return {"blocks": len(blocks)}, 0
