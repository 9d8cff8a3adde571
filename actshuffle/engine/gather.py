"""One pass and no spill: every leaf takes its rows from a source that lies in the machine's memory.

Where the page cache has room for the whole source, rows need not be put down in between.  A leaf finds
which rows are its own from their keys alone, and reads them where they are::

    source, in the page cache    | r0 r1 r2 r3 r4 r5 r6 r7 r8 ...
    rows of one leaf                   .     .        .
    output object                | r6 r1 r4 ...     in key order, each by a read of its own

So the source is read once from the disk, in order (`warm`), and the output written once: the bytes of a
copy.  Wide rows go straight to where they are written from.  A read of its own costs as much processor
time as some `READ_BYTES` read in one go, so a column of which a leaf wants one row in fewer bytes than
that is read as a whole by every leaf, and its rows are picked out.

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

READ_BYTES = 16 << 10  # as long as one more read takes, the page cache copies so many bytes
KEY_ROWS = 1 << 18  # whose keys are looked at in one go
AT_ONCE = 1 << 15  # rows of their own reads that are asked for in one go
PIECE = 1 << 20  # bytes of a column that are read in one go
LOOKS = 8  # at the page cache, for each object
READING = "reading"  # the stage in which the source comes into the page cache
WARM_BYTES = 256 << 20  # read by one task


def keys_total(keys: Keys, rows: int) -> U64:
    """Digest of the first key words of all rows: what those of the leaves must add up to."""
    total, row_hash = np.zeros(2, np.uint64), RowHash(keys.seed, 0, 8)
    for start in range(0, rows, KEY_ROWS):
        stop = min(start + KEY_ROWS, rows)
        words = keys.hi(start, stop).view(np.uint8).reshape(-1, 8)
        total += row_hash.total(words, np.arange(start, stop, dtype=np.uint64))
    return total


class Gather:
    """Takes the rows of one leaf from the source of a job.

    Attributes
    ----------
    straight : numbers of the fields whose rows are read one by one, to where they are written from.
    """

    def __init__(self, job: Job) -> None:
        self.job, self._source = job, Source(job.source)
        leaves = job.plan.leaves
        self.straight = [n for n, f in enumerate(job.fields) if f.row_bytes * leaves > READ_BYTES]

    def fill(self, bounds: U64, leaf: int, hi: U64, source_row: U64, fields: Sequence[U8]) -> list[int]:
        """The leaf's keys and numbers, in source order, and rows of the other fields; returns these' numbers."""
        find_rows(self.job.keys, bounds, leaf, hi, source_row, self.job.plan.rows)
        others = [n for n in range(len(fields)) if n not in self.straight]
        for number in others:
            read_column(self._source, self.job.fields[number], source_row, fields[number])
        return others

    def read(self, number: int, rows: U64, out: U8) -> None:
        """Any rows of a field, in the order given, straight from the source."""
        read_rows(self._source, self.job.fields[number], rows, out)


def find_rows(keys: Keys, bounds: U64, leaf: int, hi: U64, source_row: U64, total: int) -> None:
    """The rows of a leaf in source order, and their first key words, into ``source_row`` and ``hi``.

    ``bounds`` are the full keys at the first rank of leaves 1, 2, ..., uint64 ``(leaves - 1, 3)``.  Looks at
    all ``total`` keys: some 8 ns each.
    """
    around = bounds[max(0, leaf - 1) : leaf + 1]  # of its two ends those that are inside
    inside = min(leaf, 1)  # the bucket between them
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
            f"leaf {leaf} has other rows than the {len(hi):,} that were planned: the bucket boundaries are "
            "damaged; --overwrite starts again"
        )


def read_column(source: Source, field: Field, rows: U64, out: U8) -> None:
    """Some rows of a field, ascending, picked from all that lies between them, into uint8 ``(m, row_bytes)``."""
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
    """Any rows of a field, in the order given, by a read each, into uint8 ``(m, row_bytes)``."""
    width, view = field.row_bytes, out.data.cast("B")
    for start in range(0, len(rows), AT_ONCE):
        goal = view[start * width :]
        for key, offsets, goals in field.scattered(rows[start : start + AT_ONCE].astype(np.int64)):
            source.objects.read_rows(key, width, offsets, goal, goals)


def warm_calls(job: Job) -> list[tuple[Job, Field, int, int]]:
    """Calls of `warm` for the whole source."""
    calls = []
    for field in job.fields:
        objects = -(-job.plan.rows // field.source_chunk_rows)
        some = max(1, WARM_BYTES // (field.source_chunk_rows * field.row_bytes))
        calls += [(job, field, at, min(at + some, objects)) for at in range(0, objects, some)]
    return calls


def warm(job: Job, field: Field, first: int, stop: int) -> int:
    """Objects of the source, read in order into the page cache, unless they are there; their bytes."""
    objects, step, total = Source(job.source).objects, field.source_chunk_rows, 0
    piece = memoryview(bytearray(PIECE))
    for key, _, size in field.spans(first * step, min(stop * step, job.plan.rows)):
        # At random places, since looking at a page that is absent brings it into the cache.
        looks = (secrets.randbelow(size) for _ in range(LOOKS))
        if not all(objects.is_cached(key, at) for at in looks):
            for at in range(0, size, PIECE):
                objects.read([Extent(key, at, [piece[: min(PIECE, size - at)]])])
        total += size
    return total
