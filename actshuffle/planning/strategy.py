"""The ways to one output on one machine, what each costs, and the cheapest of them.

::

    gather   one pass: rows are taken from the source, which lies in the page cache
    memory   one pass: rows are decoded once into memory, and taken from there
    disk     one pass: each row is read from the disk where it lies, for sources that do not fit into memory
    spill    levels, with as much of the spill in free memory as fits
    levels   levels, with all spill in scratch

All give the same bytes.  `candidates` estimates each from what the planner can see, a `Site`.  A task of a level
reads, computes and writes in turn, so transfers and processor time add up; a leaf that takes rows from memory does so
while it writes, so the longer of the two counts.

Sources of the constants: SPLIT_CPU, LEAF_CPU and OVERHEAD are those of cost.py.  On one core, with rows of 512 B to
8 KiB, `numpy.take` from mapped files took 0.08 ns a byte and the digest 0.11 ns; a key took 68 ns to be computed,
grouped, sorted and hashed.  FILL_CPU lies between the costs of a page of the cache that are measured on virtual
machines (directio.py).  Those marked "assumed" are not measured: the constants have to put the ways in order, and
no more.  The rate of single rows differs a hundredfold between disks, so that a `Site` brings one that was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from actshuffle.errors import InfeasibleError, words_of
from actshuffle.planning.cost import LEAF_CPU, OVERHEAD, SPLIT_CPU
from actshuffle.planning.tree import Plan
from actshuffle.units import counted, format_bytes

TAKE_CPU = 0.3e-9  # seconds per byte of a row that is taken from mapped files and hashed, page faults included
TAKE_ROW = 10e-9  # seconds per row and field of the same; assumed
KEY_ROW = 70e-9  # seconds per row for its key, in each level
FILL_CPU = 1e-9  # seconds per byte of a page that comes into the page cache or into tmpfs
DECODE_CPU = 2e-9  # seconds per byte of rows that a codec makes; assumed
DISK_RATE = 2e9  # bytes per second of a machine's disk, reads and writes together; assumed
STORE_RATE = 5e8  # the same for an object store; assumed
USABLE = 0.9  # of the free memory
COLUMN_CPU = 0.2e-9  # seconds per byte of a narrow column, which each leaf reads whole; assumed
APART_FROM = 4096  # least bytes of a row that is worth a read of its own: a disk reads whole pages
TRIAL, TRIAL_SECONDS = 0.01, 1.0  # a trial of the disk takes this share of the time of plain levels, or these seconds
LESS = (1, 2, 4)  # parts into which the memory of a worker is cut, to leave some for spill
WORTH = 1.03  # a run may take so many times as long before workers take less memory, which makes more tasks
IDLE = 64 << 20  # bytes of a process beside its work, what processes share counted in parts; 49 MB measured

Name = Literal["gather", "memory", "disk", "spill", "levels"]


@dataclass(frozen=True)
class Site:
    """The machine and the source as the planner sees them.

    Attributes
    ----------
    workers : processes that work.
    one_machine : all of them certainly run on this machine.
    free : bytes of memory that are free, or that the page cache would give back.
    shared : bytes of free room in the file system in memory (tmpfs).
    cached : share of the source's bytes that the page cache holds.
    fields : arrays of the source.
    staged : bytes of a row that must be decoded or fetched before rows can be taken; the rest lies in plain files here.
    coded : bytes of a row that come out of a codec.
    elastic : the memory of workers is the planner's choice.
    resident : the source lies in a file system in memory, so that it needs no free memory to be there.
    wide : arrays of the source whose rows are worth a read of their own, those of `APART_FROM` bytes and more.
    rate : tries, for about so many seconds, how many single rows the disk gives in one second.
    remote, remote_output : the source, or spill and output, are in an object store.
    """

    workers: int
    one_machine: bool
    free: int
    shared: int
    cached: float
    fields: int
    staged: int
    coded: int
    remote: bool = False
    remote_output: bool = False
    elastic: bool = False
    resident: bool = False
    wide: int = 0
    rate: Callable[[float], float] = lambda _: 0.0


@dataclass(frozen=True)
class Candidate:
    """A way: its plan and estimate, or the reason for which it is impossible.

    ``asks`` are the fields of a request that force it.  ``nbytes`` go from and to disks and stores.
    """

    name: Name
    reason: str
    asks: dict[str, Any]
    plan: Plan | None = None
    seconds: float = 0.0
    nbytes: int = 0


Planner = Callable[..., Plan]  # makes the plan of a request with some of its fields changed


def candidates(site: Site, plan: Planner) -> Iterator[Candidate]:
    """All ways, possible or not.  ``plan(**asks)`` makes a plan, or raises `InfeasibleError`."""
    ways: dict[Name, Callable[[Site, Planner], Candidate]]
    ways = {"gather": _gather, "memory": _memory, "disk": _disk, "spill": _spill, "levels": _levels}
    for name, make in ways.items():
        try:
            yield make(site, plan)
        except InfeasibleError as err:
            yield Candidate(name, words_of(err), {})


def cheapest(found: list[Candidate]) -> Candidate:
    """The possible way that takes the least time; raises `InfeasibleError` if there is none."""
    possible = [one for one in found if one.plan is not None]
    if not possible:
        raise InfeasibleError(found[-1].reason)
    return min(possible, key=lambda one: one.seconds)


# --- One pass ---------------------------------------------------------------------------------------------------


def _gather(site: Site, plan: Planner) -> Candidate:
    made = _one_pass(site, plan, decoded=False)
    size = made.rows * made.row_bytes
    missing = size * (1 - site.cached)
    seconds = max(missing / DISK_RATE, missing * FILL_CPU / site.workers) + _taking(site, made)
    there = "lies" if missing < size / 100 else "fits"
    reason = f"the source {there} in the page cache ({format_bytes(size)} of {format_bytes(site.free)} free)"
    if site.resident:
        reason = "the source lies in memory already"
    return Candidate("gather", reason, {"gather": True}, made, seconds, int(missing) + made.output_bytes)


def _memory(site: Site, plan: Planner) -> Candidate:
    made = _one_pass(site, plan, decoded=True)
    staged, size = made.rows * site.staged, made.rows * made.row_bytes
    if staged > site.shared:
        raise InfeasibleError(f"{format_bytes(staged)} of rows, {format_bytes(site.shared)} free in tmpfs")
    missing = size if site.remote else size * (1 - site.cached)
    cpu = made.rows * site.coded * DECODE_CPU + staged * FILL_CPU
    seconds = max(missing / _rate(site.remote), cpu / site.workers) + _taking(site, made)
    reason = f"decoded once into memory ({format_bytes(staged)} of {format_bytes(site.free)} free)"
    return Candidate("memory", reason, {"gather": True}, made, seconds, int(missing) + made.output_bytes)


def _disk(site: Site, plan: Planner) -> Candidate:
    _refuse_apart(site)
    if site.staged:
        raise InfeasibleError("rows must be decoded or fetched first")
    if not site.wide:
        raise InfeasibleError(f"rows of less than {format_bytes(APART_FROM)} are not worth a read each")
    made = plan(gather=True, random_reads=True, spill_memory=None)
    size = made.rows * made.row_bytes
    if site.resident or size + site.workers * made.memory <= USABLE * site.free:
        raise InfeasibleError("the source fits into memory, and is read faster in order")
    rate = site.rate(_patience(site, plan))
    reads = made.rows * site.wide / rate
    columns = made.rows * (site.fields - site.wide) * 8 * made.leaves * COLUMN_CPU / _busy(site, made.leaves)
    cpu = made.rows * KEY_ROW + made.rows * made.row_bytes * LEAF_CPU + made.leaves * OVERHEAD
    seconds = reads + columns + made.output_bytes / DISK_RATE + cpu / _busy(site, made.leaves)
    reason = f"the disk gives {rate:,.0f} single rows a second ({format_bytes(rate * size / made.rows)})"
    return Candidate("disk", reason, {"gather": True, "random_reads": True}, made, seconds, size + made.output_bytes)


def _patience(site: Site, plan: Planner) -> float:
    """Seconds that a trial of the disk may take: little beside the run for which it decides."""
    with suppress(InfeasibleError):
        return min(TRIAL_SECONDS, TRIAL * _levels(site, plan).seconds)
    return TRIAL_SECONDS


def _one_pass(site: Site, plan: Planner, *, decoded: bool) -> Plan:
    """The plan of one pass over rows that lie in memory beside the workers: in plain files, or ``decoded``."""
    _refuse_apart(site)
    if bool(site.staged) != decoded:
        raise InfeasibleError("rows need no decoding" if decoded else "rows must be decoded or fetched first")
    made = plan(gather=True, spill_memory=None)
    size = 0 if site.resident and not decoded else made.rows * made.row_bytes
    need, room = size + site.workers * made.memory, int(USABLE * site.free)
    if need > room:
        raise InfeasibleError(
            f"the source and the workers need {format_bytes(need)}, and {format_bytes(room)} of memory are free"
        )
    return made


def _refuse_apart(site: Site) -> None:
    """Refuse what workers do in the memory of one machine, if they may be on several."""
    if not site.one_machine:
        raise InfeasibleError("workers may run on other machines")


def _taking(site: Site, made: Plan) -> float:
    """Seconds from rows in memory to the output: the keys, then the leaves."""
    size, busy = made.rows * made.row_bytes, _busy(site, made.leaves)
    keys = made.rows * KEY_ROW + made.leaves * OVERHEAD
    take = size * TAKE_CPU + made.rows * site.fields * TAKE_ROW + 2 * made.leaves * OVERHEAD
    return keys / busy + max(made.output_bytes / _rate(site.remote_output), take / busy)


# --- Levels -----------------------------------------------------------------------------------------------------


def _spill(site: Site, plan: Planner) -> Candidate:
    """Levels with spill in free memory, of which there is more if workers take less."""
    _refuse_apart(site)
    made = plan(spill_memory=None, gather=None)
    if made.levels == 1:
        raise InfeasibleError("one level has no spill")
    found, refusals = list[Candidate](), list[InfeasibleError]()
    for share in LESS if site.elastic else LESS[:1]:
        asks = {"memory": made.memory // share} if share > 1 else {}
        try:
            one = _spill_beside(site, plan, asks)
        except InfeasibleError as err:
            refusals.append(err)
            continue
        if one.plan and (one.plan.chunk_rows, one.plan.object_rows) == (made.chunk_rows, made.object_rows):
            found.append(one)  # the output does not depend on the memory that is free
    if not found:
        raise refusals[0]
    return min(found, key=lambda one: one.seconds * (WORTH if "memory" in one.asks else 1))


def _spill_beside(site: Site, plan: Planner, asks: dict[str, Any]) -> Candidate:
    """Levels with spill in memory, beside workers that take some of it."""
    made = plan(spill_memory=None, gather=None, **asks)
    # The processes of the workers are yet to be started, and the scheduler in this one.
    idle = (site.workers + 1) * IDLE if site.workers > 1 else 0
    room = int(min(site.shared, USABLE * site.free - site.workers * made.memory - idle))
    most = made.rows * made.model.spill_row_bytes * min(2, made.levels - 1)
    asks = {"spill_memory": max(min(room, most), 0), **asks}
    made = plan(gather=None, **asks)
    if not made.kept_bytes:
        raise InfeasibleError(f"{format_bytes(max(room, 0))} of memory are free, not enough for a block")
    seconds, nbytes = _passes(site, made)
    less = f", since workers take {format_bytes(made.memory)} each" if "memory" in asks else ""
    reason = f"{format_bytes(made.kept_bytes)} of spill stay in memory, {format_bytes(made.scratch_bytes)} do not{less}"
    return Candidate("spill", reason, asks, made, seconds, nbytes)


def _levels(site: Site, plan: Planner) -> Candidate:
    """As few levels as memory allows or, where that leaves workers idle and takes longer, two."""
    made = plan(spill_memory=None, gather=None)
    seconds, nbytes = _passes(site, made)
    reason = (
        "one task holds all rows" if made.levels == 1 else f"{counted(made.levels, 'level')}, with all spill in scratch"
    )
    found = Candidate("levels", reason, {}, made, seconds, nbytes)
    if made.levels > 1 or site.workers == 1:
        return found
    try:
        two = plan(spill_memory=None, gather=None, levels=2)
    except InfeasibleError:
        return found
    seconds, nbytes = _passes(site, two)
    reason = "two levels, since the task of one would leave workers idle"
    return min(found, Candidate("levels", reason, {"levels": 2}, two, seconds, nbytes), key=lambda one: one.seconds)


def _passes(site: Site, made: Plan) -> tuple[float, int]:
    """Seconds and bytes of all levels; spill in memory is written to tmpfs, and read from there."""
    seconds, moved, kept_before = 0.0, 0.0, 0
    for level in range(1, made.levels + 1):
        read, written = made.level_bytes(level)
        kept = 0
        if level < made.levels:
            kept = min(written, made.kept(level) * made.block_rows[level - 1] * made.model.spill_row_bytes)
        cpu = made.rows * KEY_ROW + kept * FILL_CPU + read * (SPLIT_CPU if level < made.levels else LEAF_CPU)
        if level == 1:
            cpu += made.rows * site.coded * DECODE_CPU
            incoming = read if site.remote else read * (1 - site.cached)
        else:
            incoming = read - kept_before
        outgoing = written - kept
        tasks = made.task_count(level)
        transfers = incoming / _rate(site.remote if level == 1 else site.remote_output)
        transfers += outgoing / _rate(site.remote_output)
        if not site.one_machine:  # which share no disk and no network
            transfers /= _busy(site, tasks)
        seconds += transfers + (cpu + tasks * OVERHEAD) / _busy(site, tasks)  # a task does one after the other
        moved, kept_before = moved + incoming + outgoing, kept
    return seconds, int(moved)


def _busy(site: Site, tasks: int) -> int:
    return max(1, min(site.workers, tasks))


def _rate(remote: bool) -> float:
    return STORE_RATE if remote else DISK_RATE
