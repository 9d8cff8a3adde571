"""The totals of a level: tables made of their receipts, and proof that it adds up.

::

    pack     receipts of many blocks or leaves     -> one object
    index    receipts of a bucket's blocks, or the -> the place of each child's runs, and their digests
             packs that were made of them

One task reads the receipts of a bucket's blocks, or the driver those of all leaves, where they are few
(`planning.tree.PACK`).  Otherwise packs hold them, made by many tasks, and tables are made of packs, several at a
time.  A pack of blocks has a part for each child bucket, so that whoever makes the child's table reads no more::

    level1/packs/7.bin               totals | child 0: sums, runs | child 1: sums, runs | ...
    dst/_actshuffle/packs/7.bin      digest of keys | digests of the objects of field 0 | of field 1 | ...

Each part carries a checksum.  The rows that go into a bucket come out of it; if not, `blame` finds the spilled runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actshuffle.arraytypes import U8, U64
from actshuffle.engine.columns import Columns
from actshuffle.engine.job import Job
from actshuffle.engine.spill import Spill
from actshuffle.errors import ConservationError, FormatError
from actshuffle.jobs.receipts import Payload, each, read_receipt, read_receipts, withdraw
from actshuffle.jobs.records import CHECK_BYTES, marked, unmarked
from actshuffle.ordering.digest import add_up
from actshuffle.planning.tree import Task
from actshuffle.storage.buffers import arena
from actshuffle.storage.directio import Extent
from actshuffle.storage.objects import Objects
from actshuffle.units import counted


def pack(job: Job, task: Task) -> tuple[Payload, int]:
    """Put the receipts of some blocks, or of some leaves, into one object."""
    members = job.plan.packed(task.level, task.number)
    objects, key = _pack(job, task)
    if task.level == job.plan.levels:
        data = marked(f"{job.identity} {key}", _leaf_digests(job, members).astype("<u8").tobytes())
    else:
        runs, sums = _runs(job, task.level, members)
        totals = add_up(sums)
        data = marked(f"{job.identity} {key}", totals.astype("<u8").tobytes())
        for child, parts in enumerate(zip(sums, runs, strict=True)):
            body = b"".join(part.astype("<u8").tobytes() for part in parts)
            data += marked(f"{job.identity} {key} {child}", body)
    objects.put(key, data)
    return {"receipts": len(members)}, 0


def has_pack(job: Job, task: Task) -> bool:
    """True if the object of a pack exists with the right size."""
    objects, key = _pack(job, task)
    members = job.plan.packed(task.level, task.number)
    if task.level == job.plan.levels:
        size = 16 * (1 + sum(len(job.output_objects(f, members)) for f in job.fields)) + CHECK_BYTES
    else:
        parent = task.number // job.plan.packs_per_parent(task.level)
        children = len(job.plan.children(task.level - 1, parent))
        size = _head_bytes(job) + children * _part_bytes(job, len(members))
    return objects.size(key) == size


def index(job: Job, task: Task) -> tuple[Payload, int]:
    """Make the table of some children of a bucket from its blocks' receipts; check that the totals agree."""
    plan, level = job.plan, task.level
    parent, children = plan.indexed(level, task.number)
    blocks = plan.blocks_of(level, parent)
    if plan.packs_per_parent(level):
        runs, sums, totals = _unpacked(job, level, parent, children)
    else:
        runs, sums = _runs(job, level, blocks)
        totals = add_up(sums)
    for at, child in enumerate(children):
        start, stop = plan.bucket_ranks(level, child)
        if (got := int(runs[at, :, 1].sum())) != stop - start:
            what = f"bucket {child} of level {level} got {counted(got, 'row')}, the plan says {stop - start:,}"
            blame(job, level, parent, blocks, what)
    if level > 1:
        check_conserved(job, level, parent, Spill(job, level - 1).sums(parent), totals, blocks)
    spill = Spill(job, level)

    def put(job: Job, which: tuple[int, int]) -> None:
        at, child = which
        spill.put_tables(child, runs[at], sums[at])

    for _ in each(job, put, enumerate(children)):
        pass
    return {"blocks": len(blocks)}, 0


def _runs(job: Job, level: int, blocks: range) -> tuple[U64, U64]:
    """By child of the blocks' parent: byte offset and rows of its run in each block, uint64 ``(children, blocks, 2)``,
    and the digests of its rows, uint64 ``(children, 1 + fields, 2)``."""
    parent = job.plan.block(level, blocks[0]).parent
    children = len(job.plan.children(level - 1, parent))
    rows = np.zeros((len(blocks), children), np.uint64)
    sums = np.zeros((children, 1 + len(job.fields), 2), np.uint64)
    tasks = (Task("split", level, block) for block in blocks)
    for at, receipt in enumerate(read_receipts(job, tasks)):
        if receipt is None:
            raise FormatError(f"the receipt of block {blocks[at]} of level {level} vanished; run again to redo it")
        rows[at] = receipt["rows"]
        for field, text in enumerate(receipt["sums"]):
            sums[:, field] += digests(text)
    begins = (np.cumsum(rows, axis=1) - rows) * np.uint64(job.plan.model.spill_row_bytes)
    return np.stack([begins.T, rows.T], axis=2), sums


def _unpacked(job: Job, level: int, parent: int, children: range) -> tuple[U64, U64, U64]:
    """The same as `_runs` for some children, from packs, and the digests of all children together."""
    plan, width = job.plan, 1 + len(job.fields)
    first = children[0] - plan.children(level - 1, parent)[0]
    packs = [Task("pack", level, number) for number in plan.packs_of(level, parent)]
    extents, heads, parts = list[Extent](), list[U8](), list[U8]()
    for task in packs:
        size = _part_bytes(job, len(plan.packed(level, task.number)))
        heads.append(np.empty(_head_bytes(job), np.uint8))
        parts.append(np.empty((len(children), size), np.uint8))
        key = _pack(job, task)[1]
        extents.append(Extent(key, 0, [heads[-1].data]))
        extents.append(Extent(key, _head_bytes(job) + first * size, [parts[-1].data.cast("B")]))
    job.at_scratch.read(extents)
    totals = np.zeros((width, 2), np.uint64)
    sums, runs = np.zeros((len(children), width, 2), np.uint64), list[U64]()
    for task, head, part in zip(packs, heads, parts, strict=True):
        totals += _checked(job, task, "", head.tobytes()).reshape(width, 2)
        found = np.array([_checked(job, task, f" {first + at}", one.tobytes()) for at, one in enumerate(part)])
        sums += found[:, : 2 * width].reshape(len(children), width, 2)
        runs.append(found[:, 2 * width :].reshape(len(children), -1, 2))
    return np.concatenate(runs, axis=1), sums, totals


def _checked(job: Job, task: Task, part: str, data: bytes) -> U64:
    """The numbers of a part of a pack; a pack that is damaged is deleted, so that the next run makes it anew."""
    objects, key = _pack(job, task)
    body = unmarked(f"{job.identity} {key}{part}", data)
    if body is None:
        objects.delete(key)
        raise FormatError(f"{key} is damaged (its checksum does not match its bytes); run again to rebuild it")
    return np.frombuffer(body, "<u8")


def _pack(job: Job, task: Task) -> tuple[Objects, str]:
    objects, key = job.receipt(task)
    return objects, f"{key.removesuffix('.json')}.bin"


def _head_bytes(job: Job) -> int:
    return 16 * (1 + len(job.fields)) + CHECK_BYTES


def _part_bytes(job: Job, blocks: int) -> int:
    return 16 * (1 + len(job.fields) + blocks) + CHECK_BYTES


# --- The output -------------------------------------------------------------------------------------------------


def output_digests(job: Job) -> tuple[dict[str, U64], U64]:
    """The digest of every output object of each field, uint64 ``(objects, 2)``, and the sum of those of all keys,
    which only a gather has."""
    level, keys = job.plan.levels, np.zeros(2, np.uint64)
    found: dict[str, list[U64]] = {f.name: [] for f in job.fields}
    packs = job.plan.packs_of(level, 0)
    if packs:
        tasks = [Task("pack", level, number) for number in packs]
        tables = zip((job.plan.packed(level, number) for number in packs), each(job, _leaf_pack, tasks), strict=True)
    else:
        leaves = range(job.plan.leaves)
        tables = zip([leaves], [_leaf_digests(job, leaves)], strict=True)
    for leaves, table in tables:
        keys += table[0]
        at = 1
        for field in job.fields:
            count = len(job.output_objects(field, leaves))
            found[field.name].append(table[at : at + count])
            at += count
    return {name: np.concatenate(parts) for name, parts in found.items()}, keys


def _leaf_pack(job: Job, task: Task) -> U64:
    objects, key = _pack(job, task)
    return _checked(job, task, "", objects.get(key) or b"").reshape(-1, 2)


def _leaf_digests(job: Job, leaves: range) -> U64:
    """The digest of the keys of some leaves, then those of the objects of each field; uint64 ``(1 + objects, 2)``."""
    keys = np.zeros((1, 2), np.uint64)
    found: dict[str, list[str]] = {f.name: [] for f in job.fields}
    receipts = read_receipts(job, (Task("leaf", job.plan.levels, leaf) for leaf in leaves))
    for number, receipt in zip(leaves, receipts, strict=True):
        if receipt is None:
            raise FormatError(f"the receipt of leaf {number} vanished from {job.destination.url}; run again to redo it")
        for name, texts in receipt["digests"].items():
            found[name] += texts
        if job.kind.gathers:
            keys[0] += digests(receipt["keys"])[0]
    return np.concatenate([keys, *(digests("".join(texts)) for texts in found.values())])


# --- Conservation -----------------------------------------------------------------------------------------------


def check_conserved(job: Job, level: int, bucket: int, expected: U64, found: U64, blocks: Sequence[int] = ()) -> None:
    """Check that the rows that a bucket gave are those that went into it."""
    wrong = np.flatnonzero((expected != found).any(axis=1))
    if len(wrong):
        names = ["keys", *(f.name for f in job.fields)]
        rows = f"rows of {', '.join(names[i] for i in wrong)} in bucket {bucket} read by level {level}"
        blame(job, level, bucket, blocks, f"{rows} are not the rows that went into it")


def blame(job: Job, level: int, parent: int, blocks: Sequence[int], what: str) -> None:
    """Find the spilled runs of a bucket that differ from their receipts, withdraw these receipts, and raise.

    ``level`` is the one that noticed: its input is bucket ``parent`` as level - 1 wrote it, and made ``blocks`` of it.
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
                not np.array_equal(digests(text)[child], total)
                for text, total in zip(receipt["sums"], sums, strict=True)
            ):
                guilty.append(spill.block_key(source.number))
                withdraw(job, source)
                _withdraw_tables(job, level - 1, grand)
    if blocks:  # they were made of damaged rows, or are damaged themselves
        for _ in each(job, withdraw, [Task("split", level, block) for block in blocks]):
            pass
        _withdraw_tables(job, level, parent)
    if not guilty and level > 1:  # then the sums of level - 1 are wrong
        Spill(job, level - 1).distrust(parent)
    where = f"; damaged in scratch: {', '.join(guilty[:5])}" if guilty else ""
    raise ConservationError(f"{what}{where}; none of these rows was published; run again to redo them")


def _withdraw_tables(job: Job, level: int, parent: int) -> None:
    """Withdraw all that was made of the receipts of a bucket's blocks."""
    made = {"pack": job.plan.packs_of(level, parent), "index": job.plan.index_tasks(level, parent)}
    for task in [Task(kind, level, number) for kind, numbers in made.items() for number in numbers]:
        withdraw(job, task)


def digests(text: str) -> U64:
    """Digests that follow each other in hexadecimal, uint64 ``(count, 2)``."""
    found: U64 = np.frombuffer(bytes.fromhex(text), ">u8").astype(np.uint64).reshape(-1, 2)
    return found
