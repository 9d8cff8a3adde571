"""What a task holds in memory, in one place.  The planner turns it round: memory given, rows allowed.

A split task holds one block of rows, its keys and labels, and a staging buffer through which the
grouped rows leave.  A leaf task holds one leaf of rows, its keys and order, and one output object.

::

    split = BASE + source_buffer + rows x (row_bytes + AUX_SPLIT) + STAGING
    leaf  = BASE + source_buffer + rows x (row_bytes + AUX_LEAF)  + output_copies x object_bytes

Sizes are bytes of one worker process beyond its idle footprint (interpreter, imports, cluster comms).
"""

from __future__ import annotations

from dataclasses import dataclass

from actshuffle.buffers import ALIGN

BASE = 16 << 20  # zarr metadata, receipts, run tables, hash slices, allocator slack
SPILL_ROW = 16  # bytes that travel with each spilled row: its key's hi word and its source row
AUX_SPLIT = 64  # per row: hi 8, source row 8, bucket 8 + 2, order 8, hashes 16, temporaries
AUX_LEAF = 64  # per row: hi 8, source row 8, order 8, radix digits and argsorts 28, temporaries
STAGING = 8 << 20  # a split fills one half while the other is written
REQUESTS = 128 << 20  # range reads in flight to an object store, and their copies


@dataclass(frozen=True)
class MemoryModel:
    """How source, spill and output are reached decides what is held.

    Attributes
    ----------
    row_bytes : bytes of one row over all fields.
    source_buffer : bytes held while source chunks are decoded (0 when local chunk files are read raw).
    remote : spill and output are in an object store, which takes and gives objects as a whole.
    output_copies : output objects in memory at once: 2 raw (one is filled while one is written), 4
        through codecs or to an object store.
    """

    row_bytes: int
    source_buffer: int = 0
    remote: bool = False
    output_copies: int = 2

    @property
    def spill_row_bytes(self) -> int:
        return self.row_bytes + SPILL_ROW

    @property
    def staging_bytes(self) -> int:
        """Both halves of a split's staging buffer; a half holds whole pages and at least one row."""
        return max(STAGING, 2 * self.spill_row_bytes) + 4 * ALIGN

    def split_bytes(self, rows: int) -> int:
        """Peak bytes of a task that splits ``rows`` rows."""
        return self._split_fixed + rows * self._split_row

    def leaf_bytes(self, rows: int, object_bytes: int) -> int:
        """Peak bytes of a task that sorts a leaf of ``rows`` rows into objects of ``object_bytes``."""
        return self._leaf_fixed(object_bytes) + rows * (self.row_bytes + AUX_LEAF)

    def rows_within(self, memory: int, object_bytes: int) -> int:
        """The most rows for which both kinds of task stay within ``memory`` bytes (can be <= 0)."""
        split = (memory - self._split_fixed) // self._split_row
        leaf = (memory - self._leaf_fixed(object_bytes)) // (self.row_bytes + AUX_LEAF)
        return min(split, leaf)

    @property
    def _fixed(self) -> int:
        return BASE + self.source_buffer + REQUESTS * self.remote

    @property
    def _split_fixed(self) -> int:
        return self._fixed + self.staging_bytes

    @property
    def _split_row(self) -> int:
        # An object store takes a block in one call: its bytes, and the client's copy of them.
        return self.row_bytes + AUX_SPLIT + 2 * self.spill_row_bytes * self.remote

    def _leaf_fixed(self, object_bytes: int) -> int:
        return self._fixed + self.output_copies * object_bytes
