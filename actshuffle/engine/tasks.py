"""The tasks: plain functions of (job, task), idempotent, safe to run twice, anywhere, at the same time.

::

    count    keys of a row range            -> counts for the boundaries (returned, nothing stored)
    split    one block of rows              -> one spill object, grouped by bucket, and a receipt
    index    receipts of a bucket's blocks  -> where each child's runs are, and their digests
    leaf     all runs of one leaf           -> its objects in the output, and a receipt

Each checks what it is given against what the step before it said (rows per bucket, conservation
digests), writes data first and its receipt last, and does nothing if a valid receipt is there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arrays.field import Field
from actshuffle.arrays.output import Output
from actshuffle.arrays.source import Source
from actshuffle.arraytypes import U64
from actshuffle.engine import manifest
from actshuffle.engine.gather import Gather
from actshuffle.engine.job import Job
from actshuffle.engine.spill import Columns, Spill
from actshuffle.errors import ConservationError, FormatError
from actshuffle.ordering import bounds
from actshuffle.ordering.digest import RowHash, add_to_groups, add_up, from_hex, to_hex
from actshuffle.ordering.partition import bucket_of, group, key_order
from actshuffle.planning.tree import Task
from actshuffle.storage.buffers import arena, behind, lean_heap, padded
from actshuffle.storage.objects import open_objects

# Hashed and told apart at a time: a few 100 KB of temporaries, whatever the block holds.
LOOK_ROWS = 1 << 13


@dataclass(frozen=True)
class Done:
    """What a task tells the driver: small, since the result itself is in the store."""

    task: Task
    nbytes: int  # row bytes moved
    seconds: float
    fresh: bool = True  # False if a receipt said that it was done before


def run_task(job: Job, task: Task) -> Done:
    """Do one task, unless its receipt says that it is done."""
    started = time.perf_counter()
    work = {"split": split, "index": index, "leaf": leaf}[task.kind]
    fresh = not is_done(job, task)
    raw = all(f.source_key for f in job.fields) and all(f.raw_output for f in output_fields(job))
    with nullcontext() if raw else lean_heap():
        rows = work(job, task) if fresh else 0
    return Done(task, rows * job.plan.row_bytes, time.perf_counter() - started, fresh)


def is_done(job: Job, task: Task) -> bool:
    """Is there a valid receipt, and are the objects it speaks of there with their sizes?"""
    receipt = manifest.read_receipt(job, task)
    if receipt is None:
        return False
    if task.kind == "split":
        return Spill(job, task.level).has_block(task.number)
    if task.kind == "index":
        spill = Spill(job, task.level)
        children = job.plan.children(task.level - 1, task.number)
        return all(spill.has_tables(child) for child in children)
    if task.kind == "leaf":
        objects = open_objects(job.destination)
        for field in output_fields(job):
            for number in _leaf_objects(job, field, task.number):
                size = objects.size(field.object_key.format(number))
                if size is None or (field.raw_output and size != field.object_rows * field.row_bytes):
                    return False
    return True


def first_level(job: Job) -> int:
    """Where to go on: after the last level whose results are all there; past the end if leaves are."""
    levels = job.plan.levels
    if complete(job, levels):
        return levels + 1
    return next((level for level in range(levels, 1, -1) if complete(job, level - 1)), 1)


def complete(job: Job, level: int) -> bool:
    """Are all results of a level there?"""
    plan = job.plan
    parents = plan.buckets(level - 1) if level < plan.levels else 0
    index = (Task("index", level, parent) for parent in range(parents))
    # Index receipts come last, so an unfinished level is usually told by the first look.
    return all(manifest.each(job, is_done, chain(index, plan.tasks(level))))


def count(job: Job, start: int, stop: int, query: bounds.Query) -> NDArray[Any]:
    """One row range's part of the search for bucket boundaries."""
    return bounds.answer(job.keys, start, stop, query)


def split(job: Job, task: Task) -> int:
    """Read one block, group its rows by child bucket, write it as one spill object."""
    plan, level = job.plan, task.level
    block = plan.block(level, task.number)
    rows = block.stop - block.start
    staging_bytes = plan.model.staging_bytes
    memory = arena().reset(_columns_bytes(job, rows) + padded(staging_bytes))
    columns = Columns.allocate(job, memory, rows)
    children = plan.children(level - 1, block.parent)
    width = plan.widths[level]
    cutting = boundaries(job)[np.array(children[1:], np.int64) * width - 1]
    buckets = np.empty(rows, np.uint16)
    sums = np.zeros((1 + len(job.fields), len(children), 2), np.uint64)

    def look(parts: Sequence[int], start: int, stop: int) -> None:
        """Find the buckets of rows that have just been read, and add up the hashes of some of their parts."""
        for a in range(start, stop, LOOK_ROWS):
            b = min(a + LOOK_ROWS, stop)
            seen = columns.rows(a, b)
            if parts[0] == 0:  # the hi words, which come before the others or with them
                buckets[a:b] = bucket_of(job.keys, seen.hi, seen.source_row, cutting)
            for number, hashes in zip(parts, seen.hashes(job, parts), strict=True):
                add_to_groups(sums[number], hashes, buckets[a:b])

    with behind() as beside:  # looks at rows while the next are read
        if level == 1:
            for parts, start, stop in _read_source(job, block.start, columns):
                beside.submit(look, parts, start, stop)
        else:
            everything = range(1 + len(job.fields))
            Spill(job, level - 1).read(block.parent, block.start, columns, partial(beside.submit, look, everything))
    order, cuts = group(buckets, len(children))
    Spill(job, level).write_block(task.number, columns, order, cuts, memory.take((staging_bytes,)))
    manifest.write_receipt(
        job,
        task,
        {"rows": np.diff(cuts).tolist(), "sums": ["".join(to_hex(s) for s in per_child) for per_child in sums]},
    )
    return rows


def index(job: Job, task: Task) -> int:
    """Gather the receipts of a parent bucket's blocks into one table per child; check that all adds up."""
    plan, level, parent = job.plan, task.level, task.number
    children = plan.children(level - 1, parent)
    blocks = [Task("split", level, block) for block in plan.blocks_of(level, parent)]
    rows = np.zeros((len(blocks), len(children)), np.uint64)
    sums = np.zeros((len(children), 1 + len(job.fields), 2), np.uint64)
    found = zip(blocks, manifest.read_receipts(job, blocks), strict=True)
    for number, (block, receipt) in enumerate(found):
        if receipt is None:
            raise FormatError(f"receipt of block {block.number} of level {level} vanished; run again")
        rows[number] = receipt["rows"]
        for field, text in enumerate(receipt["sums"]):
            sums[:, field] += _unpack(text)
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
        _check_conserved(job, level, parent, expected, add_up(sums), blocks)
    spill = Spill(job, level)
    begins = np.zeros(len(blocks), np.uint64)  # of the child's run in each block
    for at, child in enumerate(children):
        spill.put_tables(child, np.stack([begins, rows[:, at]], axis=1), sums[at])
        begins += rows[:, at] * np.uint64(plan.model.spill_row_bytes)
    manifest.write_receipt(job, task, {"blocks": len(blocks)})
    return 0


def leaf(job: Job, task: Task) -> int:
    """Read one leaf, sort it by key, write its output objects.

    Of a job that gathers, wide fields are read straight to where they are written from: with nothing in
    between, there is nothing to compare their digest with.  That all rows are there once is seen at the
    end, by the digests of their keys.
    """
    plan = job.plan
    first, stop = plan.bucket_ranks(plan.levels - 1, task.number)
    rows = stop - first
    out_bytes = max(f.object_rows * f.row_bytes for f in output_fields(job))
    memory = arena().reset(_columns_bytes(job, rows) + 2 * padded(out_bytes))
    columns = Columns.allocate(job, memory, rows)
    gather = Gather(job) if job.kind == "gather" else None
    straight = gather.straight if gather else []
    if gather:
        read = gather.fill(boundaries(job), task.number, columns.hi, columns.source_row, columns.fields)
        hashed = [0, *(1 + number for number in read)]
        expected = np.zeros((1 + len(job.fields), 2), np.uint64)
        expected[hashed] = [add_up(h) for h in columns.hashes(job, hashed)]
    elif plan.levels == 1:
        for _ in _read_source(job, first, columns):
            pass
        expected = np.array([add_up(h) for h in columns.hashes(job)])
    else:
        before = Spill(job, plan.levels - 1)
        before.read(task.number, 0, columns)
        expected = before.sums(task.number)
    copied = job.kind == "copy"
    order = np.arange(rows) if copied else key_order(job.keys, columns.hi, columns.source_row)
    source_row = columns.source_row[order]
    found = np.zeros_like(expected)
    found[0] = RowHash(job.keys.seed, 0, 8).total(columns.parts()[0], columns.source_row)
    output = Output(job.destination, fsync=job.fsync)
    buffers = [memory.take((out_bytes,)), memory.take((out_bytes,))]
    digests: dict[str, list[str]] = {field.name: [] for field in job.fields}
    parts = [*columns.fields, columns.parts()[1]]  # source rows are the last field's rows
    with behind() as writing:
        for number, field in enumerate(output_fields(job)):
            width = field.row_bytes
            row_hash = RowHash(job.keys.seed, 1 + number, width)
            for at in _leaf_objects(job, field, task.number):
                a = at * field.object_rows - first
                b = min(a + field.object_rows, rows)
                whole = buffers[writing.turn][: field.object_rows * width].reshape(-1, width)
                used = whole[: b - a]
                if gather and number in straight:
                    gather.read(number, source_row[a:b], used)
                else:
                    np.take(parts[number], order[a:b], axis=0, out=used, mode="clip")
                writing.submit(output.write, field, at, whole, b - a)
                if field is not job.source_row:  # while they are written
                    digest = row_hash.total(used, source_row[a:b])
                    found[1 + number] += digest
                    digests[field.name].append(to_hex(digest))
    for number in straight:
        expected[1 + number] = found[1 + number]
    _check_conserved(job, plan.levels, task.number, expected, found, [])
    keys = {"keys": to_hex(found[0])} if gather else {}
    manifest.write_receipt(job, task, {"rows": rows, "digests": digests, **keys})
    return rows


def output_fields(job: Job) -> tuple[Field, ...]:
    """All arrays of the output."""
    return job.fields if job.source_row is None else (*job.fields, job.source_row)


@lru_cache(maxsize=2)
def boundaries(job: Job) -> U64:
    """Full keys at the first rank of leaves 1, 2, ...; uint64 ``(leaves - 1, 3)``."""
    found = manifest.read_bounds(job)
    if found is None:
        raise FormatError(f"the bucket boundaries in {job.scratch.url} are damaged; run again to remake them")
    return found


def blame(job: Job, level: int, parent: int, blocks: list[Task], what: str) -> None:
    """Find which spilled runs of a bucket differ from their receipts, have them redone next time, and raise.

    ``level`` is the one that noticed: its input is bucket ``parent`` as level - 1 wrote it.
    """
    guilty: list[str] = []
    if level > 1:
        spill, plan = Spill(job, level - 1), job.plan
        grand = parent * plan.widths[level - 1] // plan.widths[level - 2]
        child = parent - plan.children(level - 2, grand)[0]
        position = 0
        for number, (_, rows) in enumerate(spill.runs(parent)):
            source = Task("split", level - 1, grand * plan.blocks_per_parent(level - 1) + number)
            receipt = manifest.read_receipt(job, source)
            memory = arena().reset(_columns_bytes(job, int(rows)))
            columns = Columns.allocate(job, memory, int(rows))
            spill.read(parent, position, columns)
            position += int(rows)
            sums = [add_up(h) for h in columns.hashes(job)]
            if receipt is None or any(
                not np.array_equal(_unpack(text)[child], total)
                for text, total in zip(receipt["sums"], sums, strict=True)
            ):
                guilty.append(spill.block_key(source.number))
                manifest.withdraw(job, source)
                manifest.withdraw(job, Task("index", level - 1, grand))
    for task in blocks:  # made of damaged rows, or damaged themselves
        manifest.withdraw(job, task)
    if not guilty and level > 1:  # or the sums that this level was told are wrong
        Spill(job, level - 1).distrust(parent)
    where = f"; damaged in scratch: {', '.join(guilty[:5])}" if guilty else ""
    raise ConservationError(f"{what}{where}; nothing of it was published; run again to redo those rows")


def _check_conserved(job: Job, level: int, bucket: int, expected: U64, found: U64, blocks: list[Task]) -> None:
    wrong = np.flatnonzero((expected != found).any(axis=1))
    if len(wrong):
        names = ["keys", *(f.name for f in job.fields)]
        blame(
            job,
            level,
            bucket,
            blocks,
            f"rows of {', '.join(names[i] for i in wrong)} in bucket {bucket} "
            f"read by level {level} are not the rows that were put into it",
        )


def _read_source(job: Job, start: int, columns: Columns) -> Iterator[tuple[Sequence[int], int, int]]:
    """Fill columns from the source; yields which parts (0: hi words; then fields) of which rows are there."""
    stop = start + len(columns.hi)
    source = Source(job.source, job.fill_missing)
    columns.source_row[:] = numbers = source.numbers(start, stop)
    first, last = int(numbers[0]), int(numbers[-1])
    if job.kind == "copy":
        columns.hi[:] = 0  # nobody asks for its order
    elif job.kind == "shuffle" and last - first == len(numbers) - 1:  # a shuffle's numbers ascend
        columns.hi[:] = job.keys.hi(first, last + 1)
    else:
        columns.hi[:] = job.keys.hi_at(numbers)
    yield [0], 0, len(columns.hi)
    for number, field in enumerate(job.fields):
        for a, b in source.parts(field, start, columns.fields[number]):
            yield [1 + number], a, b


def _leaf_objects(job: Job, field: Field, leaf: int) -> range:
    start, stop = job.plan.bucket_ranks(job.plan.levels - 1, leaf)
    return range(start // field.object_rows, -(-stop // field.object_rows))


def _columns_bytes(job: Job, rows: int) -> int:
    widths = [8, 8, *(f.row_bytes for f in job.fields)]
    return sum(padded(rows * w) for w in widths)


def _unpack(text: str) -> U64:
    """Digests of all children of a block, uint64 ``(children, 2)``."""
    return np.array([from_hex(text[i : i + 32]) for i in range(0, len(text), 32)], np.uint64).reshape(-1, 2)
