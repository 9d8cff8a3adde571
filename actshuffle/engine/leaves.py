"""The last level: read one leaf, order its rows by key, write its objects of the output."""

from __future__ import annotations

import numpy as np

from actshuffle.arrays.field import Field
from actshuffle.arrays.output import Output
from actshuffle.arraytypes import I64, U8, U64
from actshuffle.engine import manifest
from actshuffle.engine.columns import Columns
from actshuffle.engine.conservation import check_conserved
from actshuffle.engine.gather import Gather
from actshuffle.engine.job import Job
from actshuffle.engine.spill import Spill
from actshuffle.jobs.receipts import Payload
from actshuffle.ordering.digest import RowHash, add_up, to_hex
from actshuffle.ordering.partition import key_order
from actshuffle.planning.tree import Task
from actshuffle.storage.buffers import arena, behind, padded


def leaf(job: Job, task: Task) -> tuple[Payload, int]:
    """Do one leaf; returns the content of its receipt and the bytes it moved.

    The digests of the rows written must equal those of the rows that went into the leaf.  A gather reads
    wide fields straight into the buffer that is written, so for these there is nothing to compare:
    `run.publish` checks by the digests of the keys that every row is there once.
    """
    plan = job.plan
    first, stop = plan.bucket_ranks(plan.levels - 1, task.number)
    rows = stop - first
    out_bytes = max(f.object_rows * f.row_bytes for f in job.outputs)
    memory = arena().reset(Columns.nbytes(job, rows) + 2 * padded(out_bytes))
    columns = Columns.allocate(job, memory, rows)
    gather = Gather(job) if job.kind.gathers else None
    expected = _read(job, task.number, first, columns, gather)
    order = key_order(job.keys, columns.hi, columns.source_row) if job.kind.sorts else np.arange(rows)
    buffers = [memory.take((out_bytes,)), memory.take((out_bytes,))]
    found, digests = _write(job, task.number, first, columns, order, gather, buffers)
    for number in gather.straight if gather else ():
        expected[1 + number] = found[1 + number]
    check_conserved(job, plan.levels, task.number, expected, found, [])
    keys = {"keys": to_hex(found[0])} if gather else {}
    return {"rows": rows, "digests": digests, **keys}, rows * plan.row_bytes


def _read(job: Job, leaf: int, first: int, columns: Columns, gather: Gather | None) -> U64:
    """Fill the columns; return the expected digests of the hi words and of each field, uint64 (1 + fields, 2)."""
    if gather is not None:
        fields = gather.fill(manifest.boundaries(job), leaf, columns.hi, columns.source_row, columns.fields)
        hashed = [0, *(1 + number for number in fields)]
        expected = np.zeros((1 + len(job.fields), 2), np.uint64)
        expected[hashed] = [add_up(h) for h in columns.hashes(job, hashed)]
        return expected
    if job.plan.levels == 1:
        for _ in columns.read_source(job, first):
            pass
        return np.array([add_up(h) for h in columns.hashes(job)])
    spill = Spill(job, job.plan.levels - 1)
    spill.read(leaf, 0, columns)
    return spill.sums(leaf)


def _write(
    job: Job, leaf: int, first: int, columns: Columns, order: I64, gather: Gather | None, buffers: list[U8]
) -> tuple[U64, dict[str, list[str]]]:
    """Write the leaf's objects, each from one of two buffers while the other is filled.

    Returns the digests of the hi words and of each field, uint64 ``(1 + fields, 2)``, and those of each
    object of each field, in hexadecimal.
    """
    rows, source_row = len(order), columns.source_row[order]
    found = np.zeros((1 + len(job.fields), 2), np.uint64)
    found[0] = RowHash(job.keys.seed, 0, 8).total(columns.parts()[0], columns.source_row)
    output = Output(job.destination, fsync=job.fsync)
    digests: dict[str, list[str]] = {field.name: [] for field in job.fields}
    parts = [*columns.fields, columns.parts()[1]]  # source rows are the last field's rows
    with behind() as writing:
        for number, field in enumerate(job.outputs):
            width = field.row_bytes
            row_hash = RowHash(job.keys.seed, 1 + number, width)
            for at in leaf_objects(job, field, leaf):
                a = at * field.object_rows - first
                b = min(a + field.object_rows, rows)
                whole = buffers[writing.turn][: field.object_rows * width].reshape(-1, width)
                used = whole[: b - a]
                if gather is not None and number in gather.straight:
                    gather.read(number, source_row[a:b], used)
                else:
                    np.take(parts[number], order[a:b], axis=0, out=used, mode="clip")
                writing.submit(output.write, field, at, whole, b - a)
                if field is not job.source_row:  # the digest is computed while they are written
                    digest = row_hash.total(used, source_row[a:b])
                    found[1 + number] += digest
                    digests[field.name].append(to_hex(digest))
    return found, digests


def leaf_objects(job: Job, field: Field, leaf: int) -> range:
    """Numbers of the output objects of a field that a leaf holds."""
    start, stop = job.plan.bucket_ranks(job.plan.levels - 1, leaf)
    return range(start // field.object_rows, -(-stop // field.object_rows))
