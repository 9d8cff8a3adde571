"""The stages of a plan's run on a cluster, with their tasks, bytes, requests and processor time.

::

    boundaries | level 1 | pack 1 | index 1 | level 2 | pack 2 | index 2 | ... | level L | publish

There are packs where a bucket has more blocks than `tree.PACK`.

COUNT_CPU, INDEX_CPU, TABLE_CPU, DIGEST_CPU and RECEIPT were timed separately; those marked "assumed" are not measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from actshuffle.arraytypes import I64
from actshuffle.limits import FAN, RECEIPTS_AT_ONCE, STORE_PIECE, uploads
from actshuffle.ordering import bounds
from actshuffle.planning.cost import DRIVER_RATE, OVERHEAD, Cluster, Stage
from actshuffle.planning.tree import PACK, Plan
from actshuffle.units import format_bytes

COUNT_CPU = 20e-9  # seconds per row and pass of the search for boundaries
INDEX_CPU = 2e-6  # seconds per run in the receipts that are read for tables; 0.4e-6 measured
TABLE_CPU = 1e-7  # seconds per run of a table that is made of packs; 0.3e-7 measured
RECEIPT_CPU = 1e-4  # seconds per receipt of a leaf; assumed
DIGEST_CPU = 2e-6  # seconds per output object in such a receipt
RECEIPT = 72  # bytes of a split's receipt per child bucket, for one field


def stages(plan: Plan, cluster: Cluster) -> Iterator[Stage]:
    """The stages of a run, in the order of run.py."""
    yield _boundaries(plan, cluster)
    for level in range(1, plan.levels):
        yield _split(plan, cluster, level)
        yield from _index(plan, cluster, level)
    yield _leaves(plan, cluster)
    yield _publish(plan, cluster)


def task_rows(plan: Plan, level: int) -> I64:
    """Rows of each task of a level, int64 ``(tasks,)``; they add up to all rows."""
    if level == plan.levels:
        edges = np.minimum(np.arange(plan.leaves + 1, dtype=np.int64) * plan.leaf_rows, plan.rows)
        return np.diff(edges)
    number = np.arange(plan.blocks(level), dtype=np.int64)
    parent, at = np.divmod(number, plan.blocks_per_parent(level))
    size, step = plan.widths[level - 1] * plan.leaf_rows, plan.block_rows[level - 1]
    parent_rows = np.minimum(size, plan.rows - parent * size)
    rows: I64 = np.minimum(step, parent_rows - at * step)
    return rows


def _boundaries(plan: Plan, cluster: Cluster) -> Stage:
    """The passes of the search: counts go to scratch and are added up there in a tree, and the last pass returns keys.

    Each pass also writes its question, which is no longer than an answer, and every task reads it.
    """
    ranges = -(-plan.rows // bounds.range_rows(plan.rows))
    answers = bounds.answers(plan.rows, plan.leaves)
    cpu = plan.rows * COUNT_CPU * len(answers)
    if ranges <= 1 or not answers:  # computed by the driver
        return Stage("boundaries", ranges * len(answers), cpu=cpu)
    counts, passes, stored = sum(answers[:-1]), len(answers) - 1, cluster.scratch == "store"
    one = FAN * counts / passes  # bytes that a task adds up
    rate = min(cluster.stream or math.inf, cluster.channel_rate("disk" if cluster.disk else "in"))
    rounds = max(1, math.ceil(math.log(ranges, FAN)))
    add = one / rate + FAN * cluster.latency * stored + OVERHEAD + cluster.dispatch
    through = 2 * counts + ranges * answers[-1]  # sums and questions, and the keys of the last pass
    return Stage(
        "boundaries",
        ranges * len(answers),
        2 * ranges * counts,
        ranges * counts,
        gets=3 * ranges * passes * stored,
        puts=2 * ranges * passes * stored,
        cpu=cpu,
        driver=passes * rounds * add + through / DRIVER_RATE,
        read_from=cluster.scratch,
        write_to=cluster.scratch,
        passes=len(answers),
    )


def _split(plan: Plan, cluster: Cluster, level: int) -> Stage:
    rows, (read, written) = task_rows(plan, level), plan.level_bytes(level)
    k, stored = _fan_out(plan, level), cluster.scratch == "store"
    source = cluster.ends if level == 1 else cluster.scratch
    gets = read / STORE_PIECE if level == 1 else _range_reads(plan, level)
    block = plan.block_rows[level - 1] * plan.model.spill_row_bytes
    return Stage(
        f"level {level}",
        len(rows),
        read,
        written + len(rows) * RECEIPT * k,
        gets=(gets if source == "store" else 0) + 3 * len(rows) * stored,
        puts=len(rows) * (uploads(block) + 1) * stored,
        cpu=cluster.split_cpu * read,
        rows=rows,
        read_from=source,
        write_to=cluster.scratch,
    )


def _index(plan: Plan, cluster: Cluster, level: int) -> Iterator[Stage]:
    """The tasks that read the receipts of blocks and write tables one by one, of packs where there are packs."""
    parents, blocks, stored = plan.buckets(level - 1), plan.blocks(level), cluster.scratch == "store"
    runs = blocks * _fan_out(plan, level)
    packs = sum(len(plan.packs_of(level, parent)) for parent in range(parents))
    tasks = sum(len(plan.index_tasks(level, parent)) for parent in range(parents))
    place = cluster.scratch
    if packs:
        gets, puts = blocks + packs, 2 * packs
        at_once = (gets + puts) / (gets / RECEIPTS_AT_ONCE + puts)
        yield Stage(
            f"pack {level}",
            packs,
            RECEIPT * runs,
            16 * runs,
            gets=gets * stored,
            puts=puts * stored,
            cpu=INDEX_CPU * runs,
            at_once=at_once,
            read_from=place,
            write_to=place,
        )
    gets = 2 * packs * tasks // parents + tasks if packs else blocks + parents
    puts = 2 * plan.buckets(level) + tasks
    yield Stage(
        f"index {level}",
        tasks,
        (16 if packs else RECEIPT) * runs,
        16 * runs,
        cpu=(TABLE_CPU if packs else INDEX_CPU) * runs,
        gets=gets * stored,
        puts=puts * stored,
        at_once=(gets + puts) / (gets / RECEIPTS_AT_ONCE + puts),
        read_from=place,
        write_to=place,
    )


def _leaves(plan: Plan, cluster: Cluster) -> Stage:
    rows, (read, written) = task_rows(plan, plan.levels), plan.level_bytes(plan.levels)
    source = cluster.ends if plan.levels == 1 else cluster.scratch
    gets = read / STORE_PIECE if plan.levels == 1 else _range_reads(plan, plan.levels)
    objects = -(-plan.rows // plan.object_rows)
    puts = objects * uploads(plan.object_rows * plan.row_bytes) + 2 * len(rows)
    return Stage(
        f"level {plan.levels}",
        len(rows),
        read,
        written + 8 * plan.rows,
        gets=(gets + 3 * len(rows)) * (source == "store"),
        puts=puts * (cluster.ends == "store"),
        cpu=cluster.leaf_cpu * read,
        rows=rows,
        read_from=source,
        write_to=cluster.ends,
    )


def _publish(plan: Plan, cluster: Cluster) -> Stage:
    """Receipts of leaves: read by the driver or, where they are many, by tasks that put them into packs; the driver
    then reads these, and writes the digests of all objects."""
    packs, objects = len(plan.packs_of(plan.levels, 0)), -(-plan.rows // plan.object_rows)
    stored, cpu = cluster.ends == "store", plan.leaves * RECEIPT_CPU + objects * DIGEST_CPU
    gets = plan.leaves * stored
    if not packs:
        return Stage("publish", 0, gets=gets, driver=max(gets * cluster.latency / RECEIPTS_AT_ONCE, cpu))
    waits = packs * stored * cluster.latency / RECEIPTS_AT_ONCE
    return Stage(
        "publish",
        packs,
        32 * objects,
        16 * objects,
        gets=gets + packs * stored,
        puts=2 * packs * stored,
        cpu=cpu,
        driver=max(waits, 16 * objects / DRIVER_RATE) + 16 * objects / DRIVER_RATE,
        read_from=cluster.ends,
        write_to=cluster.ends,
        at_once=RECEIPTS_AT_ONCE,
    )


def _fan_out(plan: Plan, level: int) -> int:
    return len(plan.children(level - 1, 0))


def _range_reads(plan: Plan, level: int) -> float:
    """Range reads of the spill of level - 1 by a level: every run in pieces, and a run cut between two tasks twice."""
    runs = plan.blocks(level - 1) * _fan_out(plan, level - 1)
    run_bytes = plan.rows * plan.model.spill_row_bytes / max(runs, 1)
    return runs * math.ceil(run_bytes / STORE_PIECE) + plan.task_count(level)


def concerns(plan: Plan, c: Cluster) -> list[str]:
    """Warnings about this cluster: the parts of a valid plan that would fail on it, or run badly."""
    found = []
    for level in range(1, plan.levels):
        blocks = min(plan.blocks(level), plan.blocks_per_parent(level))
        held = 8 * blocks * _fan_out(plan, level)
        if plan.packs_per_parent(level):  # what a pack holds, or the tables of an index task and what they are made of
            held = 32 * max(PACK * _fan_out(plan, level), blocks * len(plan.indexed(level, 0)[1]))
        if held > plan.memory:
            found.append(f"index {level}: one task holds {format_bytes(held)} of tables, more than --memory")
    return found
