"""One array of a store as the engine sees it: opaque rows of a fixed width, and where their bytes lie.

::

    rows 5 .. 12 of a field with 4 rows per source object and ``row_bytes`` w

    object 1  |   5 6 7|   offset w, 3 w bytes
    object 2  |8 9 10 11|  offset 0, 4 w bytes
    object 3  |12      |   offset 0,   w bytes
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from actshuffle.arraytypes import I64, U64
from actshuffle.limits import HUGE, PAGE
from actshuffle.storage.directio import Extent


@dataclass(frozen=True)
class Field:
    """One array of the store.  Rows are opaque: ``row_bytes`` little-endian bytes each.

    Attributes
    ----------
    name, source : its name in the output, its path in the source ("" for a bare array).
    source_chunk_rows : rows of a source object (chunk or shard).
    read_rows : rows that one read of the source decodes; whole chunks.
    source_key : key of a source object with ``{}`` for its number, where objects are the plain bytes of
        their rows; empty where zarr must decode them.
    metadata : text of the output array's ``zarr.json``.
    object_key : key of an output object, with ``{}`` for its number.
    chunk_rows, object_rows : rows of an output chunk and of an output object (chunk or shard).
    raw_output : output objects are the plain bytes of their rows.
    """

    name: str
    source: str
    row_bytes: int
    row_shape: tuple[int, ...]
    source_chunk_rows: int
    source_key: str
    read_rows: int = 0
    metadata: str = ""
    object_key: str = ""
    chunk_rows: int = 0
    object_rows: int = 0
    raw_output: bool = True

    def spans(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Rows ``[start, stop)`` by source object: its key, and offset and number of their bytes in it."""
        step, width, key = self.source_chunk_rows, self.row_bytes, self.source_key
        while start < stop:
            number, first = divmod(start, step)
            rows = min(stop - start, step - first)
            yield key.format(number), first * width, rows * width
            start += rows

    def extents(self, start: int, stop: int, out: memoryview, *, once: bool = False) -> Iterator[Extent]:
        """The reads that fill ``out``, the bytes of rows ``[start, stop)``, one for each source object."""
        at = 0
        for key, offset, nbytes in self.spans(start, stop):
            yield Extent(key, offset, [out[at : at + nbytes]], once)
            at += nbytes

    @property
    def slot_bytes(self) -> int:
        """Bytes between the beginnings of source objects that are mapped side by side: whole rows, and whole huge pages
        or, for small objects and odd rows, whole pages."""
        nbytes = self.source_chunk_rows * self.row_bytes
        unit = math.lcm(HUGE, self.row_bytes)
        if nbytes < HUGE or unit > max(HUGE, nbytes // 4):  # few addresses are left unused
            unit = math.lcm(PAGE, self.row_bytes)
        return -(-nbytes // unit) * unit

    def mapped_at(self, rows: U64) -> I64:
        """The places of rows among those of the mapped source objects, gaps included."""
        found = rows.astype(np.int64)
        if gap := self.slot_bytes // self.row_bytes - self.source_chunk_rows:
            found += found // self.source_chunk_rows * gap
        return found

    def scattered(self, rows: I64) -> Iterator[tuple[str, list[int], list[int]]]:
        """Any rows by source object: its key, their offsets in it, and the offset of each in all their bytes."""
        objects, places = np.divmod(rows, self.source_chunk_rows)
        by_object = np.argsort(objects, kind="stable")
        objects = objects[by_object]
        offsets, goals = ((x * self.row_bytes).tolist() for x in (places[by_object], by_object))
        starts = np.flatnonzero(np.diff(objects, prepend=-1))
        cuts = pairwise([*starts.tolist(), len(rows)])
        for number, (a, b) in zip(objects[starts].tolist(), cuts, strict=True):
            yield self.source_key.format(number), offsets[a:b], goals[a:b]
