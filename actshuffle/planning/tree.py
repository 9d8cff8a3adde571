"""The immutable data that planning makes and tasks read.

A `Plan` is pure arithmetic: how many rows there are, how they are cut, and in how many passes they move.  A
`Job` is a plan bound to places: source, destination, scratch, fields and seed.  A `Task` names one piece of
work in a job; a plain function of (job, task) does it.

The rows of a job form a tree of *buckets*.  Depth 0 has one bucket, all rows; depth ``levels - 1``
has the leaves.  Bucket ``b`` at depth ``d`` is a range of ranks in the shuffled order, known before any
data is read, because boundaries are exact rank quantiles::

    depth 0   [----------------------------- all rows -----------------------------]   widths[0] leaves
    depth 1   [------- bucket 0 ------][------- bucket 1 ------][---- bucket 2 ----]   widths[1] leaves each
    depth 2   [ leaf 0][ leaf 1][ leaf 2][ leaf 3][ leaf 4][ leaf 5][ leaf 6][ l. 7]   1 leaf each

Level ``l`` (1 .. levels - 1) splits every bucket of depth ``l - 1`` into its children of depth ``l``,
one *block* of rows at a time; the last level sorts each leaf and writes it to its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from actshuffle.html import page
from actshuffle.planning.memory import MemoryModel
from actshuffle.units import counted, format_bytes


class Task(NamedTuple):
    """One unit of work: ``kind`` is "split", "pack", "index" or "leaf"; ``level`` counts from 1."""

    kind: str
    level: int
    number: int


class Block(NamedTuple):
    """The rows that one split task reads: ``[start, stop)`` of its parent bucket, in spill order."""

    parent: int
    start: int
    stop: int


PACK = 1024  # receipts that one task reads
TABLE_BYTES = 16 << 20  # bytes of the tables that one task makes of packs, if one bucket's are not more

# Fields of a plan that were added after runs of this format were first written, and the values that stand for
# their absence: a half-done run without them is the same run, and resumes.
LATER = {"spill_memory": 0}


@dataclass(frozen=True)
class Plan:
    """The cut of ``rows`` rows into blocks, buckets and leaves.  See `actshuffle.planning.planner.make_plan`.

    Attributes
    ----------
    rows, row_bytes : size of the data; row_bytes counts all fields, without keys.
    levels : passes over the data.
    leaf_rows : rows of a leaf, a whole number of output objects (the last leaf has the remainder).
    object_rows : rows of one output object of the widest field (a chunk, or a shard).
    chunk_rows : rows of one output chunk of the widest field.
    widths : leaves per bucket at depth 0 .. levels - 1.
    block_rows : rows of a full block at split levels 1 .. levels - 1.
    block_bytes, run_bytes : M and P of the arithmetic of passes.
    memory : bytes one worker uses at most beyond its idle footprint.
    spill_memory : bytes of spill that may stay in the machine's memory, all workers together.
    staged : bytes of source rows that are decoded once into the machine's memory, to be gathered from there.
    apart : rows are gathered from the disk, each by a read of its own, and not from memory.
    """

    rows: int
    row_bytes: int
    levels: int
    leaf_rows: int
    object_rows: int
    chunk_rows: int
    widths: tuple[int, ...]
    block_rows: tuple[int, ...]
    block_bytes: int
    run_bytes: int
    memory: int
    model: MemoryModel
    spill_memory: int = 0
    staged: int = 0
    apart: bool = False

    @property
    def leaves(self) -> int:
        return -(-self.rows // self.leaf_rows) if self.rows else 0

    def buckets(self, depth: int) -> int:
        """Number of buckets at a depth."""
        return -(-self.leaves // self.widths[depth]) if self.rows else 0

    def bucket_ranks(self, depth: int, bucket: int) -> tuple[int, int]:
        """The output rows ``[start, stop)`` that a bucket becomes."""
        size = self.widths[depth] * self.leaf_rows
        return bucket * size, min((bucket + 1) * size, self.rows)

    def children(self, depth: int, bucket: int) -> range:
        """The buckets of ``depth + 1`` inside a bucket of ``depth``."""
        fan_out = -(-self.widths[depth] // self.widths[depth + 1])
        return range(bucket * fan_out, min((bucket + 1) * fan_out, self.buckets(depth + 1)))

    def blocks_per_parent(self, level: int) -> int:
        """Blocks of a full parent bucket at a split level."""
        full = min(self.widths[level - 1] * self.leaf_rows, self.rows)
        return -(-full // self.block_rows[level - 1])

    def blocks(self, level: int) -> int:
        """Number of blocks, which is the number of split tasks, at a level."""
        parents = self.buckets(level - 1)
        if not parents:
            return 0
        start, stop = self.bucket_ranks(level - 1, parents - 1)
        last = -(-(stop - start) // self.block_rows[level - 1])
        return (parents - 1) * self.blocks_per_parent(level) + last

    def block(self, level: int, index: int) -> Block:
        """The rows that block ``index`` of a split level reads."""
        parent, at = divmod(index, self.blocks_per_parent(level))
        start, stop = self.bucket_ranks(level - 1, parent)
        step = self.block_rows[level - 1]
        return Block(parent, at * step, min((at + 1) * step, stop - start))

    def blocks_of(self, level: int, parent: int) -> range:
        """The blocks of one parent bucket."""
        start, stop = self.bucket_ranks(level - 1, parent)
        first = parent * self.blocks_per_parent(level)
        return range(first, first + -(-(stop - start) // self.block_rows[level - 1]))

    def tasks(self, level: int) -> Iterator[Task]:
        """The row-moving tasks of a level, in order."""
        kind, count = ("split", self.blocks(level)) if level < self.levels else ("leaf", self.leaves)
        return (Task(kind, level, i) for i in range(count))

    def packs_per_parent(self, level: int) -> int:
        """Packs of the receipts of a full parent bucket's tasks; 0 if they are so few that they need no packs.

        The last level's leaves have all rows as their parent.
        """
        count = self.blocks_per_parent(level) if level < self.levels else self.leaves
        return -(-count // PACK) if count > PACK else 0

    def packs_of(self, level: int, parent: int) -> range:
        """The packs of one parent bucket."""
        per = self.packs_per_parent(level)
        count = len(self.blocks_of(level, parent)) if level < self.levels else self.leaves
        return range(parent * per, parent * per + (-(-count // PACK) if per else 0))

    def packed(self, level: int, pack: int) -> range:
        """The tasks of a level, blocks or leaves, whose receipts a pack holds."""
        parent, at = divmod(pack, self.packs_per_parent(level))
        members = self.blocks_of(level, parent) if level < self.levels else range(self.leaves)
        return members[at * PACK : (at + 1) * PACK]

    def index_tasks(self, level: int, parent: int) -> range:
        """The tasks that make the tables of a parent bucket's children: several if its receipts are in packs."""
        fan_out, some = len(self.children(level - 1, 0)), self._children_each(level)
        per = -(-fan_out // some)
        return range(parent * per, parent * per + -(-len(self.children(level - 1, parent)) // some))

    def indexed(self, level: int, number: int) -> tuple[int, range]:
        """The parent bucket of an index task, and the children whose tables it makes."""
        some = self._children_each(level)
        parent, at = divmod(number, -(-len(self.children(level - 1, 0)) // some))
        return parent, self.children(level - 1, parent)[at * some : (at + 1) * some]

    def _children_each(self, level: int) -> int:
        if not self.packs_per_parent(level):
            return len(self.children(level - 1, 0))
        return max(1, TABLE_BYTES // (16 * self.blocks_per_parent(level)))

    def task_count(self, level: int) -> int:
        return self.blocks(level) if level < self.levels else self.leaves

    def level_bytes(self, level: int) -> tuple[int, int]:
        """Bytes read and written by a level: rows, plus the key and source row of each in a spill."""
        bare, spilled = self.rows * self.row_bytes, self.rows * self.model.spill_row_bytes
        return (bare if level == 1 else spilled), (spilled if level < self.levels else bare)

    def kept(self, level: int) -> int:
        """Number of spill blocks of a split level that stay in memory; two levels' spills live side by side."""
        share = self.spill_memory // min(2, self.levels - 1)
        block = self.block_rows[level - 1] * self.model.spill_row_bytes
        return min(self.blocks(level), share // block) if block else 0

    def is_kept(self, level: int, block: int) -> bool:
        """True if this block stays in memory.  Such blocks are spread evenly, so that disk and memory work at once."""
        count, kept = self.blocks(level), self.kept(level)
        return (block + 1) * kept // count > block * kept // count

    @property
    def kept_bytes(self) -> int:
        """Most bytes in the machine's memory at once: of spill, or of rows that are gathered from there."""
        return max((sum(held) for held in self._side_by_side(self._kept_bytes)), default=self.staged)

    @property
    def uses_memory(self) -> bool:
        """True if something may lie in the machine's memory, all workers together."""
        return bool(self.spill_memory or self.staged)

    @property
    def disk_io_bytes(self) -> int:
        """Bytes that all levels read from disk and write to it: everything but the spill that stays in memory."""
        moved = sum(sum(self.level_bytes(level)) for level in range(1, self.levels + 1))
        return moved - 2 * sum(self._kept_bytes(level) for level in range(1, self.levels))

    @property
    def scratch_bytes(self) -> int:
        """Most bytes in scratch at once: one spill, or two while one is split into the next."""
        return max((sum(held) for held in self._side_by_side(self._spilled_bytes)), default=0)

    @property
    def disk_bytes(self) -> int:
        """Most bytes in scratch and output together."""
        last = self._spilled_bytes(self.levels - 1) if self.levels > 1 else 0
        return max(self.scratch_bytes, last + self.output_bytes)

    def _side_by_side(self, size: Callable[[int], int]) -> Iterator[tuple[int, ...]]:
        """Sizes of the spills that exist at once: one, then each with the one it is split into."""
        sizes = [size(level) for level in range(1, self.levels)]
        return pairwise(sizes) if len(sizes) > 1 else ((s,) for s in sizes)

    def _kept_bytes(self, level: int) -> int:
        whole = self.kept(level) * self.block_rows[level - 1]
        return min(whole, self.rows) * self.model.spill_row_bytes

    def _spilled_bytes(self, level: int) -> int:
        """Bytes of a level's spill that go to disk; any block may be the short one."""
        left = (self.blocks(level) - self.kept(level)) * self.block_rows[level - 1]
        return min(left, self.rows) * self.model.spill_row_bytes

    def _repr_html_(self) -> str:
        """The plan as a page: its reads, writes and needs."""
        facts = {
            "data": f"{counted(self.rows, 'row')} x {format_bytes(self.row_bytes)} = "
            f"{format_bytes(self.rows * self.row_bytes)}",
            "levels": self.levels,
            "blocks": f"M = {format_bytes(self.block_bytes)}, runs P >= {format_bytes(self.run_bytes)}",
            "leaves": f"{self.leaves:,} of {counted(self.leaf_rows, 'row')}",
            "memory": f"{format_bytes(self.memory)} per worker at most",
            "disk": f"scratch up to {format_bytes(self.scratch_bytes)}, with the output up to "
            f"{format_bytes(self.disk_bytes)}",
        }
        rows = []
        for level in range(1, self.levels + 1):
            read, written = self.level_bytes(level)
            work = "split" if level < self.levels else "sort"
            rows.append((level, work, f"{self.task_count(level):,}", format_bytes(read), format_bytes(written)))
        return page("Shuffle plan", facts, ("level", "work", "tasks", "reads", "writes"), rows)

    @property
    def output_bytes(self) -> int:
        """Bytes of the output before any codec, source rows included."""
        return self.rows * (self.row_bytes + 8)
