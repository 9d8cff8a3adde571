"""The last level: read one leaf, order its rows by key, write its objects of the output."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial

import numpy as np

from actshuffle.arrays.field import Field
from actshuffle.arrays.output import write_object
from actshuffle.arraytypes import U8, U64
from actshuffle.engine.columns import Columns
from actshuffle.engine.gather import Gather
from actshuffle.engine.job import Job
from actshuffle.engine.spill import Spill
from actshuffle.engine.totals import check_conserved
from actshuffle.jobs.receipts import Payload
from actshuffle.ordering.digest import RowHash, add_up, to_hex
from actshuffle.ordering.partition import key_order
from actshuffle.planning.tree import Task
from actshuffle.storage.buffers import Arena, arena, behind, padded
from actshuffle.storage.directio import is_in_memory
from actshuffle.storage.files import typed
from actshuffle.storage.place import local_path

PIECE = 4 << 20  # bytes that are picked, written and hashed in turn while they are in the processor's cache


def leaf(job: Job, task: Task) -> tuple[Payload, int]:
    """Do one leaf; returns the content of its receipt and the bytes it moved.

    The digests of the rows written must equal those of the rows that went into the leaf.
    """
    if job.kind.gathers:
        return _gathered(job, task)
    plan = job.plan
    first, stop = plan.bucket_ranks(plan.levels - 1, task.number)
    rows = stop - first
    memory = arena().reset(Columns.nbytes(job, rows) + 2 * padded(_out_bytes(job)))
    columns = Columns.allocate(job, memory, rows)
    expected = _read(job, task.number, first, columns)
    order = key_order(job.keys, columns.hi, columns.source_row) if job.kind.sorts else np.arange(rows)

    def read(number: int, start: int, stop: int, out: U8) -> None:
        np.take(columns.fields[number], order[start:stop], axis=0, out=out, mode="clip")

    found, digests = _write(job, task.number, first, columns.source_row[order], read, memory)
    found[0] = _keys_digest(job, columns.hi, columns.source_row)
    check_conserved(job, plan.levels, task.number, expected, found)
    return {"rows": rows, "digests": digests}, rows * plan.row_bytes


def _gathered(job: Job, task: Task) -> tuple[Payload, int]:
    """Do one leaf of a gather.

    Rows go straight from the source into the buffer that is written, so there is nothing to compare:
    `run.Shuffle.publish` checks by the digests of the keys that every row is there once.
    """
    first, stop = job.plan.bucket_ranks(job.plan.levels - 1, task.number)
    rows, gather = stop - first, Gather(job)
    memory = arena().reset(gather.nbytes(rows) + 2 * padded(_out_bytes(job)))
    hi, source_row = gather.find(task.number, memory)
    _, digests = _write(job, task.number, first, source_row, gather.read, memory)
    keys = to_hex(_keys_digest(job, hi, source_row))
    return {"rows": rows, "digests": digests, "keys": keys}, rows * job.plan.row_bytes


def _out_bytes(job: Job) -> int:
    return max(f.object_rows * f.row_bytes for f in job.outputs)


def _keys_digest(job: Job, hi: U64, source_row: U64) -> U64:
    return RowHash(job.keys.seed, 0, 8).total(hi.view(np.uint8).reshape(-1, 8), source_row)


def _read(job: Job, leaf: int, first: int, columns: Columns) -> U64:
    """Fill the columns; return the expected digests of the hi words and of each field, uint64 (1 + fields, 2)."""
    if job.plan.levels == 1:
        for _ in columns.read_source(job, first):
            pass
        return np.array([add_up(h) for h in columns.hashes(job)])
    spill = Spill(job, job.plan.levels - 1)
    spill.read(leaf, 0, columns)
    return spill.sums(leaf)


def _write(
    job: Job, leaf: int, first: int, source_row: U64, read: Callable[[int, int, int, U8], None], memory: Arena
) -> tuple[U64, dict[str, list[str]]]:
    """Write the leaf's objects: in pieces where they go through the page cache, and else each from one of two buffers
    while the other is filled.

    ``source_row`` are the rows of the leaf in key order; ``read(number, start, stop, out)`` fills ``out`` with some of
    them, of one field.  Returns the digests of each field, uint64 ``(1 + fields, 2)`` with the first line free for that
    of the keys, and those of each object of each field, in hexadecimal.
    """
    out_bytes = _out_bytes(job)
    buffers = [memory.take((out_bytes,)), memory.take((out_bytes,))]
    found = np.zeros((1 + len(job.fields), 2), np.uint64)
    write = partial(write_object, job.destination, fsync=job.fsync)
    digests: dict[str, list[str]] = {field.name: [] for field in job.fields}
    cached = _through_cache(job) and not job.plan.apart  # many single rows are read at a time

    def fill(number: int, start: int, out: U8) -> None:
        if number < len(job.fields):
            read(number, start, start + len(out), out)
        else:
            out[:] = source_row[start : start + len(out)].view(np.uint8).reshape(-1, 8)

    with behind() as writing:
        for number, field in enumerate(job.outputs):
            width, size = field.row_bytes, field.object_rows * field.row_bytes
            row_hash, hashed = RowHash(job.keys.seed, 1 + number, width), field is not job.source_row
            for at in job.output_objects(field, range(leaf, leaf + 1)):
                start = at * field.object_rows - first
                rows, digest = source_row[start : start + field.object_rows], np.zeros(2, np.uint64)
                if cached and field.raw_output:
                    of_leaf = range(start, start + len(rows))
                    with closing(_written(job, field, at, partial(fill, number), of_leaf, buffers[0])) as parts:
                        if hashed:
                            digest = row_hash.total_of_parts(parts, rows)
                        else:
                            deque(parts, 0)
                else:
                    whole = buffers[writing.turn][:size].reshape(-1, width)
                    used = whole[: len(rows)]
                    fill(number, start, used)
                    writing.submit(write, field, at, whole, len(rows))
                    if hashed:
                        digest = row_hash.total(used, rows)  # while they are written
                if hashed:
                    found[1 + number] += digest
                    digests[field.name].append(to_hex(digest))
    return found, digests


def _through_cache(job: Job) -> bool:
    """True if output goes through the page cache, or lies in memory; a disk does best with whole objects, past it."""
    path = local_path(job.destination)
    if path is None or not job.fsync:
        return path is not None
    with typed(path, ""):
        return is_in_memory(path.stat().st_dev)


def _written(
    job: Job, field: Field, at: int, fill: Callable[[int, U8], None], rows: range, memory: U8
) -> Generator[tuple[int, U8], None, None]:
    """Write an object in pieces; yields each, with the number of rows before it, when nobody needs its bytes any more.

    ``fill(start, out)`` fills ``out`` with rows of the leaf, from row ``start`` on; ``rows`` are those of the object.
    """
    step, size = max(1, PIECE // field.row_bytes), field.object_rows * field.row_bytes
    with job.at_destination.writer(field.object_key.format(at), size) as out:
        for start in rows[::step]:
            piece = memory[:size].reshape(-1, field.row_bytes)[: min(step, rows.stop - start)]
            fill(start, piece)
            out.write(piece.data.cast("B"))
            yield start - rows.start, piece
