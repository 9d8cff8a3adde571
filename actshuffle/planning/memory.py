"""The memory model of a task, in one place.  The planner inverts it: given memory, how many rows fit?

A split task holds one block of rows with their keys and numbers, and a staging buffer through which the
grouped rows leave.  A leaf task holds one leaf of rows, and output objects.  Besides these it holds, one
after the other, the buffers that decode source rows and the arrays that order them::

    split = BASE + rows x spill_row_bytes + staging      + max(source_buffer, rows x AUX_SPLIT)
    leaf  = BASE + rows x spill_row_bytes + max(staging, 2 x object_bytes)
                                + copies x object_bytes  + max(source_buffer, rows x AUX_LEAF)

Staging counts in a leaf too, because a worker keeps the memory of its largest task so far.
Sizes are in bytes of one worker process beyond its idle footprint (interpreter, imports, cluster comms).
The constants are measured peaks (tests/test_memory.py), rounded up.
"""

from __future__ import annotations

from dataclasses import dataclass

from actshuffle.limits import PAGE, STORE_BYTES

BASE = 12 << 20  # zarr, receipts, run tables, hash slices: 3 to 5 MB raw, 5 to 9 MB through codecs
SPILL_ROW = 16  # bytes that travel with each row: its key's hi word and its source row
# Per row: bucket 2, order 8, and the sort's scratch.  46 were measured when hashes of a whole block were held;
# a lower figure would cut half-done runs in another way, and they could not be resumed.
AUX_SPLIT = 48
AUX_LEAF = 44  # per row: order 8, source row 8, radix digits and argsorts; 38 measured
STAGING = 8 << 20  # two halves: a split fills one while the other is written


@dataclass(frozen=True)
class MemoryModel:
    """Peak memory of a task, by the way in which it reaches source, spill and output.

    Attributes
    ----------
    row_bytes : bytes of one row over all fields.
    source_buffer : bytes held while source chunks are decoded (0 when local chunk files are read raw).
    remote : True if spill and output are in an object store: bytes are then on their way to it and from it.
    output_copies : output objects in memory besides the two that are filled in turn: 0 for raw bytes that are
        written, or sent, from where they lie; 2 through codecs or fsspec.
    block_copies : copies of a block that its writer holds: 0 where it leaves in parts, 2 through fsspec, which
        takes an object as a whole.
    """

    row_bytes: int
    source_buffer: int = 0
    remote: bool = False
    output_copies: int = 0
    block_copies: int = 0

    @property
    def spill_row_bytes(self) -> int:
        return self.row_bytes + SPILL_ROW

    @property
    def staging_bytes(self) -> int:
        """Both halves of a split's staging buffer; a half holds whole pages and at least one row."""
        return max(STAGING, 2 * self.spill_row_bytes) + 4 * PAGE

    def split_bytes(self, rows: int) -> int:
        """Peak bytes of a task that splits ``rows`` rows."""
        aux = max(self.source_buffer, rows * AUX_SPLIT)
        return self._fixed + self.staging_bytes + rows * self._split_row + aux

    def leaf_bytes(self, rows: int, object_bytes: int) -> int:
        """Peak bytes of a task that sorts a leaf of ``rows`` rows into objects of ``object_bytes``."""
        aux = max(self.source_buffer, rows * AUX_LEAF)
        return self._leaf_fixed(object_bytes) + rows * self.spill_row_bytes + aux

    def rows_within(self, memory: int, object_bytes: int) -> int:
        """The most rows for which both kinds of task stay within ``memory`` bytes (can be <= 0)."""
        split = memory - self._fixed - self.staging_bytes
        leaf = memory - self._leaf_fixed(object_bytes)
        return min(
            split // (self._split_row + AUX_SPLIT),
            (split - self.source_buffer) // self._split_row,
            leaf // (self.spill_row_bytes + AUX_LEAF),
            (leaf - self.source_buffer) // self.spill_row_bytes,
        )

    @property
    def _fixed(self) -> int:
        return BASE + STORE_BYTES * self.remote

    def _leaf_fixed(self, object_bytes: int) -> int:
        buffers = max(self.staging_bytes, 2 * object_bytes)
        return self._fixed + buffers + self.output_copies * object_bytes

    @property
    def _split_row(self) -> int:
        return self.spill_row_bytes * (1 + self.block_copies)
