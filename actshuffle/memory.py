"""What a task holds in memory, in one place.  The planner turns it round: memory given, rows allowed.

A split task holds one block of rows, its keys and labels, and a staging buffer through which the
grouped rows leave.  A leaf task holds one leaf of rows, its keys and order, and one output object.

::

    split = BASE + source_buffer + rows x (row_bytes + AUX_SPLIT) + staging
    leaf  = BASE +                 rows x (row_bytes + AUX_LEAF)  + output_copies x object_bytes

Sizes are bytes of one worker process beyond its idle footprint (interpreter, imports, cluster comms).
"""

from __future__ import annotations

from dataclasses import dataclass

from actshuffle.buffers import ALIGN

BASE = 16 << 20  # zarr metadata, receipts, run tables, hash slices, allocator slack
SPILL_ROW = 16  # bytes that travel with each spilled row: its key's hi word and its source row
AUX_SPLIT = 64  # per row: hi 8, source row 8, bucket 8 + 2, order 8, hashes 16, temporaries
AUX_LEAF = (
    64  # per row: hi 8, source row 8, order 8, radix digits and their argsorts 28, temporaries
)
STAGING = 8 << 20  # a split fills one half while the other is written; less when memory is small


@dataclass(frozen=True)
class MemoryModel:
    """How source, spill and output are reached decides what is held.

    Attributes
    ----------
    row_bytes : bytes of one row over all fields.
    source_buffer : bytes held while one source chunk is decoded (0 when chunk files are read raw).
    whole_block_writes : the spill's store takes an object in one call, so a block is staged whole.
    output_copies : output objects in memory at once: 2 raw (one is filled while one is written), 4 through
        codecs.
    """

    row_bytes: int
    source_buffer: int = 0
    whole_block_writes: bool = False
    output_copies: int = 2

    @property
    def spill_row_bytes(self) -> int:
        return self.row_bytes + SPILL_ROW

    def split_bytes(self, rows: int) -> int:
        """Peak bytes of a task that splits ``rows`` rows."""
        held = rows * (self.row_bytes + AUX_SPLIT)
        return BASE + self.source_buffer + held + self.staging_bytes(rows)

    def leaf_bytes(self, rows: int, object_bytes: int) -> int:
        """Peak bytes of a task that sorts a leaf of ``rows`` rows into objects of ``object_bytes``."""
        held = rows * (self.row_bytes + AUX_LEAF)
        return BASE + self.source_buffer + held + self.output_copies * object_bytes

    def staging_bytes(self, rows: int) -> int:
        whole = rows * self.spill_row_bytes
        if self.whole_block_writes:
            return 2 * whole
        return max(min(2 * whole, STAGING), 2 * self.spill_row_bytes) + 4 * ALIGN

    def rows_within(self, memory: int, object_bytes: int) -> int:
        """The most rows for which both kinds of task stay within ``memory`` bytes (can be <= 0)."""
        per_split = self.row_bytes + AUX_SPLIT
        fixed = BASE + self.source_buffer
        if self.whole_block_writes:
            split = (memory - fixed) // (per_split + 2 * self.spill_row_bytes)
        else:
            split = (
                memory - fixed - max(STAGING, 2 * self.spill_row_bytes) - 4 * ALIGN
            ) // per_split
        leaf = (memory - fixed - self.output_copies * object_bytes) // (self.row_bytes + AUX_LEAF)
        return min(split, leaf)
