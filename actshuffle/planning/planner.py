"""The arithmetic of passes: from rows and memory to levels, buckets, blocks and leaves.  No I/O here.

With M bytes of rows per task and runs no smaller than P bytes, one pass can split a bucket k <= M / P
ways, and a leaf holds M, so::

    reach(levels) = M * (M / P)^(levels - 1)            I/O = 2 * N * levels bytes

>>> plan = make_plan(10**11, 1000, block_bytes=10**11, run_bytes=10**9)
>>> plan.levels, plan.leaves, plan.widths
(3, 1000, (1000, 32, 1))
"""

from __future__ import annotations

import math
from typing import Literal

from actshuffle.errors import InfeasibleError, RequestError, words_of
from actshuffle.limits import MAX_FAN_OUT
from actshuffle.planning.advice import TooSmallError, enough_memory
from actshuffle.planning.memory import MemoryModel
from actshuffle.planning.tree import Plan
from actshuffle.units import counted, format_bytes, size_at_least

LOCAL_RUN_BYTES = 256 << 10  # the run length from which a local disk reads at full speed
REMOTE_RUN_BYTES = 4 << 20  # the same for an object store
CHUNK_BYTES = 32 << 20  # output chunks, for a loader that reads in order
MAX_OBJECTS = 1_000_000  # more chunks of one array than this are packed into shards
MAX_LEVELS = 16
# The first task on a worker pays to fault its memory in (seconds per GB on some VMs); later tasks reuse it.  So
# large tasks are cut in three, provided that each stays above LARGE_BYTES and its runs above LONG_RUN.
FINER, LARGE_BYTES, LONG_RUN = 3, 512 << 20, 16 << 20

Levels = int | Literal["auto"]


def make_plan(
    rows: int,
    row_bytes: int,
    *,
    levels: Levels = "auto",
    memory: int | None = None,
    block_bytes: int | None = None,
    run_bytes: int = LOCAL_RUN_BYTES,
    chunk_rows: int | None = None,
    chunks_per_shard: int | None = None,
    widest_row: int | None = None,
    source_chunk_rows: int = 1,
    tasks_wanted: int = 1,
    spill_memory: int = 0,
    gather: bool = False,
    tasks_per_worker: int = 1,
    model: MemoryModel | None = None,
) -> Plan:
    """Cut ``rows`` rows of ``row_bytes`` bytes into a feasible `Plan`, or raise `InfeasibleError`.

    Give ``memory`` (bytes a worker may use) or ``block_bytes`` (M itself), or both.  ``widest_row`` is
    the row of the widest field in bytes, which sets the chunk size; ``source_chunk_rows`` aligns the first
    level's blocks; ``tasks_wanted`` makes blocks and leaves smaller than memory allows, where that costs no
    extra level, so that all workers are busy and several tasks reuse the memory that the first one touched;
    ``spill_memory`` is the number of bytes of spill that stay in the machine's memory; with ``gather`` the
    plan has leaves only, which read their rows straight from a source that lies in memory.  ``tasks_per_worker``
    tasks share the ``memory`` of a worker, whose memory all messages name.
    """
    if rows < 0 or row_bytes <= 0:
        raise RequestError(
            f"need rows >= 0 and row bytes > 0, got {counted(rows, 'row')} of {counted(row_bytes, 'byte')}"
        )
    if spill_memory < 0:
        raise RequestError(f"spill memory must not be negative, got {spill_memory}")
    if levels != "auto" and not 1 <= levels <= MAX_LEVELS:
        raise RequestError(f"levels must be auto or 1 to {MAX_LEVELS}, got {levels}")

    def made(memory: int | None) -> Plan:
        return _made(
            rows,
            row_bytes,
            levels,
            memory,
            block_bytes,
            run_bytes,
            chunk_rows,
            chunks_per_shard,
            widest_row or row_bytes,
            source_chunk_rows,
            tasks_wanted,
            spill_memory,
            gather,
            tasks_per_worker,
            model or MemoryModel(row_bytes),
        )

    try:
        return made(memory)
    except TooSmallError as error:
        enough = None if memory is None else enough_memory(made, memory)
        raise InfeasibleError(
            f"{words_of(error)} give {'more --memory' if enough is None else f'at least --memory {enough}'}"
        ) from None


def _made(
    rows: int,
    row_bytes: int,
    levels: Levels,
    memory: int | None,
    block_bytes: int | None,
    run_bytes: int,
    chunk_rows: int | None,
    chunks_per_shard: int | None,
    widest: int,
    source_chunk_rows: int,
    tasks_wanted: int,
    spill_memory: int,
    gather: bool,
    tasks_per_worker: int,
    model: MemoryModel,
) -> Plan:
    """`make_plan`, whose refusals for want of memory give no advice."""
    if memory is not None:
        memory //= tasks_per_worker  # from here on, that of a task
    if memory is None and block_bytes is None:
        raise RequestError("give memory or block bytes")
    for name, value in (("memory", memory), ("block bytes", block_bytes), ("run bytes", run_bytes)):
        if value is not None and value <= 0:
            raise RequestError(f"{name} must be positive, got {value}")

    most_rows, chunk_rows, per_shard = _fit(
        rows, row_bytes, widest, memory, block_bytes, chunk_rows, chunks_per_shard, model, tasks_per_worker
    )
    object_rows = chunk_rows * per_shard
    run = max(run_bytes, row_bytes)
    fan_out = min(most_rows * row_bytes // run, MAX_FAN_OUT)
    leaf_rows = _round_down(most_rows, object_rows)
    needed = 1
    if not gather:
        needed = _levels_needed(rows, most_rows, leaf_rows, fan_out, row_bytes, run)
    if levels == "auto":
        levels = needed
    elif levels < needed:
        raise InfeasibleError(_too_few(levels, needed, rows, row_bytes, most_rows, run, fan_out))

    out_of_reach = levels == 1 or _reach(leaf_rows, fan_out, levels) < rows
    if rows <= leaf_rows or (out_of_reach and not gather):
        leaf_rows = max(object_rows, -(-rows // object_rows) * object_rows)
    wanted = max(1, -(-rows // tasks_wanted))
    if levels > 1 and tasks_wanted > 1:
        wanted = _finer(wanted, rows, row_bytes, levels, run)
    if levels > 1 or gather:
        smaller = -(-wanted // object_rows) * object_rows
        if 0 < smaller < leaf_rows and (gather or _reach(smaller, fan_out, levels) >= rows):
            leaf_rows = smaller
    leaves = -(-rows // leaf_rows)
    k = _root(leaves, levels - 1)
    top = 1 if gather else max(leaves, 1)
    widths = (top, *(k ** (levels - 1 - depth) for depth in range(1, levels)))
    block_rows = tuple(
        _block_rows(level, min(widths[level - 1] * leaf_rows, rows), most_rows, source_chunk_rows, wanted)
        for level in range(1, levels)
    )
    peak = model.leaf_bytes(min(leaf_rows, rows), object_rows * widest)
    peak = max([peak, *(model.split_bytes(b) for b in block_rows)])
    if memory is not None and peak > memory:
        raise InfeasibleError(
            f"memory {format_bytes(memory * tasks_per_worker)} is below the {size_at_least(peak * tasks_per_worker)} "
            f"that {_tasks(tasks_per_worker)} with blocks of {format_bytes(most_rows * row_bytes)}; "
            "lower --block-bytes or raise --memory"
        )
    return Plan(
        rows=rows,
        row_bytes=row_bytes,
        levels=levels,
        leaf_rows=leaf_rows,
        object_rows=object_rows,
        chunk_rows=chunk_rows,
        widths=widths,
        block_rows=block_rows,
        block_bytes=most_rows * row_bytes,
        run_bytes=run_bytes,
        memory=(peak if memory is None else memory) * tasks_per_worker,
        model=model,
        spill_memory=spill_memory,
    )


def reach_table(block_bytes: int, run_bytes: int, up_to: int = 4) -> list[tuple[int, int]]:
    """``(levels, bytes that can be shuffled)`` for 1 .. up_to levels.

    >>> [f"{reach:.0e}" for _, reach in reach_table(10**11, 10**9)]
    ['1e+11', '1e+13', '1e+15', '1e+17']
    """
    ratio = min(block_bytes // run_bytes, MAX_FAN_OUT)
    return [(levels, block_bytes * ratio ** (levels - 1)) for levels in range(1, up_to + 1)]


def _fit(
    rows: int,
    row_bytes: int,
    widest: int,
    memory: int | None,
    block_bytes: int | None,
    chunk_rows: int | None,
    per_shard: int | None,
    model: MemoryModel,
    tasks_per_worker: int,
) -> tuple[int, int, int]:
    """Rows of the largest block, rows of an output chunk, chunks of an output shard."""

    def most(object_rows: int) -> int:
        fits = [] if block_bytes is None else [block_bytes // row_bytes]
        if memory is not None:
            fits.append(model.rows_within(memory, object_rows * widest))
        return min(fits)

    room = min(x for x in (memory, block_bytes) if x is not None)
    target = max(1, min(CHUNK_BYTES, room // 8) // widest)
    if chunk_rows is None:
        chunk_rows = 1 << (target.bit_length() - 1)
        if rows <= chunk_rows:
            chunk_rows = max(rows, 1)
        elif block_bytes is not None:
            # The largest divisor of a block within a factor two under the target, if there is one.
            block_rows = block_bytes // row_bytes
            chunk_rows = next((d for d in range(target, target // 2, -1) if d and block_rows % d == 0), chunk_rows)
        while chunk_rows > 1 and most(chunk_rows * (per_shard or 1)) < chunk_rows * (per_shard or 1):
            chunk_rows //= 2  # the keys of narrow rows take more memory than the rows
    if chunk_rows < 1 or (per_shard is not None and per_shard < 1):
        raise RequestError(f"chunk rows and chunks per shard must be positive, got {chunk_rows}, {per_shard}")
    if per_shard is None:
        wanted = max(1, -(-rows // (chunk_rows * MAX_OBJECTS)))
        allowed = max(1, room // (8 * (2 + model.output_copies) * chunk_rows * widest))
        per_shard = 1 << min((wanted - 1).bit_length(), allowed.bit_length() - 1)
        whole, rest = divmod((block_bytes or 0) // row_bytes, chunk_rows)
        if whole and not rest:  # chunks fill M exactly, and so should shards
            small = [d for d in range(1, min(allowed, math.isqrt(whole)) + 1) if whole % d == 0]
            dividing = sorted(d for d in {*small, *(whole // d for d in small)} if d <= allowed)
            per_shard = next((d for d in dividing if d >= wanted), dividing[-1])
    object_rows = chunk_rows * per_shard
    most_rows = most(object_rows)
    if most_rows < min(object_rows, max(rows, 1)):
        shape = (
            f"one output object is {counted(object_rows, 'row')} of {counted(row_bytes, 'byte')} and "
            f"{most_rows if most_rows > 0 else 'no'} {'row fits' if most_rows == 1 else 'rows fit'}"
        )
        if block_bytes is not None and block_bytes // row_bytes < object_rows:
            raise InfeasibleError(f"blocks too small: {shape}; give at least --block-bytes {object_rows * row_bytes}B")
        least = max(model.leaf_bytes(object_rows, object_rows * widest), model.split_bytes(object_rows))
        of = f"{_tasks(tasks_per_worker)} {format_bytes(least)} each" if tasks_per_worker > 1 else ""
        decoding = (
            f"a task keeps {format_bytes(model.source_buffer)} for reading the source" if model.source_buffer else ""
        )
        why = "; ".join(part for part in (of, decoding) if part)
        raise TooSmallError(f"memory too small for its rows: {shape}" + (f" ({why});" if why else ";"))
    return most_rows, chunk_rows, per_shard


def _tasks(number: int) -> str:
    """Who needs the memory of a worker."""
    return "one task needs" if number == 1 else f"the {counted(number, 'task')} of a worker need"


def _round_down(most_rows: int, object_rows: int) -> int:
    """Round down to a whole number of objects; large numbers keep four leading bits, so that narrow
    fields, whose chunks span several objects of the widest, find a divisor."""
    objects = max(1, most_rows // object_rows)
    if most_rows % object_rows:
        spare = max(0, objects.bit_length() - 4)
        objects = objects >> spare << spare
    return objects * object_rows


def _reach(leaf_rows: int, fan_out: int, levels: int) -> int:
    return int(leaf_rows * max(fan_out, 1) ** (levels - 1))


def _levels_needed(rows: int, most_rows: int, leaf_rows: int, fan_out: int, row_bytes: int, run: int) -> int:
    if rows <= max(most_rows, leaf_rows):
        return 1
    if fan_out < 2:
        raise TooSmallError(
            f"{format_bytes(rows * row_bytes)} do not fit in one block of "
            f"{format_bytes(most_rows * row_bytes)}, "
            f"and blocks of that size cannot be split into runs of {format_bytes(run)} (M/P < 2); "
            "lower --run-bytes, or"
        )
    levels = next((n for n in range(2, MAX_LEVELS + 1) if _reach(leaf_rows, fan_out, n) >= rows), None)
    if levels is None:
        raise TooSmallError(
            f"{format_bytes(rows * row_bytes)} need more than {MAX_LEVELS} levels at M/P = {fan_out}; "
            "lower --run-bytes, or"
        )
    return levels


def _too_few(levels: int, needed: int, rows: int, row_bytes: int, most_rows: int, run: int, fan_out: int) -> str:
    m, reach = most_rows * row_bytes, most_rows * row_bytes * max(fan_out, 1) ** (levels - 1)
    return (
        f"{levels} level{'s' * (levels != 1)} reach M x (M/P)^{levels - 1} = {format_bytes(reach)} "
        f"(M = {format_bytes(m)}, P = {format_bytes(run)}, M/P = {fan_out}), and the data is "
        f"{format_bytes(rows * row_bytes)}: use --levels {needed}, or more memory"
    )


def _root(leaves: int, power: int) -> int:
    """The smallest k with k^power >= leaves; the even fan-out of ``power`` splits."""
    if power < 1:
        return 1
    k: int = max(1, round(leaves ** (1 / power)))
    while k > 1 and (k - 1) ** power >= leaves:
        k -= 1
    while k**power < leaves:
        k += 1
    return k


def _finer(wanted: int, rows: int, row_bytes: int, levels: int, least_run: int) -> int:
    """Rows per task: a third of ``wanted`` where smaller tasks cost nothing, else ``wanted``."""
    finer = max(-(-wanted // FINER), LARGE_BYTES // row_bytes)
    run = finer * row_bytes // _root(-(-rows // finer), levels - 1)
    return finer if finer < wanted and run >= max(LONG_RUN, least_run) else wanted


def _block_rows(level: int, parent_rows: int, most_rows: int, align: int, wanted: int) -> int:
    """Even blocks of a parent bucket; at level 1, blocks of whole source chunks where they fit."""
    if level > 1:
        return max(1, -(-parent_rows // max(1, -(-parent_rows // most_rows))))
    step = min(most_rows, wanted)
    if align <= most_rows:
        step = min(-(-step // align) * align, most_rows // align * align)
    return step
