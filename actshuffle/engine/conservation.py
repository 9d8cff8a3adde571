"""Conservation: the rows that go into a bucket come out of it; if not, find the spilled runs to blame."""

from __future__ import annotations

import numpy as np

from actshuffle.arraytypes import U64
from actshuffle.engine.columns import Columns
from actshuffle.engine.job import Job
from actshuffle.engine.spill import Spill
from actshuffle.errors import ConservationError
from actshuffle.jobs.receipts import read_receipt, withdraw
from actshuffle.ordering.digest import add_up, from_hex
from actshuffle.planning.tree import Task
from actshuffle.storage.buffers import arena


def check_conserved(job: Job, level: int, bucket: int, expected: U64, found: U64, blocks: list[Task]) -> None:
    wrong = np.flatnonzero((expected != found).any(axis=1))
    if len(wrong):
        names = ["keys", *(f.name for f in job.fields)]
        blame(
            job,
            level,
            bucket,
            blocks,
            f"rows of {', '.join(names[i] for i in wrong)} in bucket {bucket} "
            f"read by level {level} are not the rows that went into it",
        )


def blame(job: Job, level: int, parent: int, blocks: list[Task], what: str) -> None:
    """Find the spilled runs of a bucket that differ from their receipts, withdraw these receipts, and raise.

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
            receipt = read_receipt(job, source)
            memory = arena().reset(Columns.nbytes(job, int(rows)))
            columns = Columns.allocate(job, memory, int(rows))
            spill.read(parent, position, columns)
            position += int(rows)
            sums = [add_up(h) for h in columns.hashes(job)]
            if receipt is None or any(
                not np.array_equal(unpack(text)[child], total)
                for text, total in zip(receipt["sums"], sums, strict=True)
            ):
                guilty.append(spill.block_key(source.number))
                withdraw(job, source)
                withdraw(job, Task("index", level - 1, grand))
    for task in blocks:  # they were made of damaged rows, or are damaged themselves
        withdraw(job, task)
    if not guilty and level > 1:  # then the sums of level - 1 are wrong
        Spill(job, level - 1).distrust(parent)
    where = f"; damaged in scratch: {', '.join(guilty[:5])}" if guilty else ""
    raise ConservationError(f"{what}{where}; none of these rows was published; run again to redo them")


def unpack(text: str) -> U64:
    """Digests of all children of a block, uint64 ``(children, 2)``."""
    return np.array([from_hex(text[i : i + 32]) for i in range(0, len(text), 32)], np.uint64).reshape(-1, 2)
