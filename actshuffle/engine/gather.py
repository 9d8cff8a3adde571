"""One pass and no spill: every leaf picks its rows from a source that lies in the machine's memory.

Where the page cache has room for the whole source, rows need no intermediate.  A leaf finds its rows from
their keys alone, and reads them from the source::

    source, in the page cache    | r0 r1 r2 r3 r4 r5 r6 r7 r8 ...
    rows of one leaf                   .     .        .
    output object                | r6 r1 r4 ...     in key order, each by a separate read

So the source is read once from the disk, in order (`warm`), and the output is written once: the bytes of a
copy.  Wide rows go straight into the buffer that is written.  A separate read costs as much processor time
as some `READ_BYTES` within one long read, so where the rows of a leaf lie closer together than that, every
leaf reads the whole column and picks its rows out.

Copies: a wide row is copied once in memory on its way in, a narrow one twice more; none on the way out.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np

from actshuffle.arrays.field import Field
from actshuffle.arrays.source import Source
from actshuffle.arraytypes import U8, U64
from actshuffle.engine.job import Job
from actshuffle.errors import FormatError
from actshuffle.ordering.digest import RowHash
from actshuffle.ordering.keys import Keys
from actshuffle.ordering.partition import bucket_of
from actshuffle.storage.directio import Extent

READ_BYTES = 16 << 10  # bytes that the page cache copies in the time that one more read costs
KEY_ROWS = 1 << 18  # keys computed at a time
AT_ONCE = 1 << 15  # rows requested by separate reads at a time
PIECE = 1 << 20  # bytes of a column read at a time
LOOKS = 8  # samples of the page cache, for each object
READING = "reading"  # the stage that reads the source into the page cache
WARM_BYTES = 256 << 20  # bytes that one task reads


def keys_total(keys: Keys, rows: int) -> U64:
    """Digest of the first key words of all rows, to which the digests of the leaves must add up."""
    total, row_hash = np.zeros(2, np.uint64), RowHash(keys.seed, 0, 8)
    for start in range(0, rows, KEY_ROWS):
        stop = min(start + KEY_ROWS, rows)
        words = keys.hi(start, stop).view(np.uint8).reshape(-1, 8)
        total += row_hash.total(words, np.arange(start, stop, dtype=np.uint64))
    return total


class Gather:
    """Reads the rows of one leaf from the source of a job.

    Attributes
    ----------
    straight : numbers of the fields whose rows are read one by one, into the buffer that is written.
    """

    def __init__(self, job: Job) -> None:
        self.job, self._source = job, Source(job.source)
        leaves = job.plan.leaves
        self.straight = [n for n, f in enumerate(job.fields) if f.row_bytes * leaves > READ_BYTES]

    def fill(self, bounds: U64, leaf: int, hi: U64, source_row: U64, fields: Sequence[U8]) -> list[int]:
        """Fill in the leaf's keys and source rows, in source order, and the rows of all fields not in ``straight``.

        Returns the numbers of these fields.
        """
        find_rows(self.job.keys, bounds, leaf, hi, source_row, self.job.plan.rows)
        others = [n for n in range(len(fields)) if n not in self.straight]
        for number in others:
            read_column(self._source, self.job.fields[number], source_row, fields[number])
        return others

    def read(self, number: int, rows: U64, out: U8) -> None:
        """Read any rows of a field, in the order given, straight from the source."""
        read_rows(self._source, self.job.fields[number], rows, out)


def find_rows(keys: Keys, bounds: U64, leaf: int, hi: U64, source_row: U64, total: int) -> None:
    """Put the rows of a leaf, in source order, and their first key words into ``source_row`` and ``hi``.

    ``bounds`` are the full keys at the first rank of leaves 1, 2, ..., uint64 ``(leaves - 1, 3)``.  Computes
    all ``total`` keys: some 8 ns each.
    """
    around = bounds[max(0, leaf - 1) : leaf + 1]  # the leaf's bounds; the first and the last leaf have one
    inside = min(leaf, 1)  # the number of the bucket between them
    low = around[0, 0] if leaf else np.uint64(0)
    high = around[-1, 0] if leaf < len(bounds) else np.uint64(2**64 - 1)
    at = 0
    for start in range(0, total, KEY_ROWS):
        words = keys.hi(start, min(start + KEY_ROWS, total))
        near = np.flatnonzero((words >= low) & (words <= high))
        rows = near.astype(np.uint64) + np.uint64(start)
        words = words[near]
        ours = bucket_of(keys, words, rows, around) == inside
        end = at + int(np.count_nonzero(ours))
        if end > len(hi):
            break
        hi[at:end], source_row[at:end] = words[ours], rows[ours]
        at = end
    if at != len(hi) or end > len(hi):
        raise FormatError(
            f"leaf {leaf} has other rows than the {len(hi):,} of the plan: the bucket boundaries are "
            "damaged; --overwrite starts again"
        )


def read_column(source: Source, field: Field, rows: U64, out: U8) -> None:
    """Read ascending rows of a field, and every row between them, and pick them into uint8 ``(m, row_bytes)``."""
    width = field.row_bytes
    piece = np.empty((max(1, PIECE // width), width), np.uint8)
    at = 0
    while at < len(rows):
        first = int(rows[at])
        end = at + int(np.searchsorted(rows[at:], np.uint64(first + len(piece))))
        part = piece[: int(rows[end - 1]) - first + 1]
        source.objects.read([*field.extents(first, first + len(part), part.data.cast("B"))])
        picked = (rows[at:end] - np.uint64(first)).astype(np.intp)
        np.take(part, picked, axis=0, out=out[at:end], mode="clip")
        at = end


def read_rows(source: Source, field: Field, rows: U64, out: U8) -> None:
    """Read any rows of a field, in the order given, by one read each, into uint8 ``(m, row_bytes)``."""
    width, view = field.row_bytes, out.data.cast("B")
    for start in range(0, len(rows), AT_ONCE):
        goal = view[start * width :]
        for key, offsets, goals in field.scattered(rows[start : start + AT_ONCE].astype(np.int64)):
            source.objects.read_rows(key, width, offsets, goal, goals)


def warm_calls(job: Job) -> list[tuple[Job, Field, int, int]]:
    """The calls of `warm` that cover the whole source."""
    calls = []
    for field in job.fields:
        objects = -(-job.plan.rows // field.source_chunk_rows)
        some = max(1, WARM_BYTES // (field.source_chunk_rows * field.row_bytes))
        calls += [(job, field, at, min(at + some, objects)) for at in range(0, objects, some)]
    return calls


def warm(job: Job, field: Field, first: int, stop: int) -> int:
    """Read objects of the source in order into the page cache, unless they are there; return their bytes."""
    objects, step, total = Source(job.source).objects, field.source_chunk_rows, 0
    piece = memoryview(bytearray(PIECE))
    for key, _, size in field.spans(first * step, min(stop * step, job.plan.rows)):
        # The places are random, since a look at an absent page brings it into the cache.
        looks = (secrets.randbelow(size) for _ in range(LOOKS))
        if not all(objects.is_cached(key, at) for at in looks):
            for at in range(0, size, PIECE):
                objects.read([Extent(key, at, [piece[: min(PIECE, size - at)]])])
        total += size
    return total
