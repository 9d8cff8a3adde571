"""The cost of a plan on many hosts, by arithmetic: bytes, requests, seconds, dollars, and the limit of each stage.

A run is a sequence of stages (run.py)::

    boundaries | level 1 | index 1 | level 2 | index 2 | ... | level L | publish

Each stage has tasks that any worker may take.  A task reads, computes and writes, in this order; the
capacity of the hosts, the store, the scheduler and the driver bounds the time that a stage takes::

    seconds >= max(network, disk, store, requests, workers, longest task, scheduler) + driver

`limits` gives each of these terms; the largest names the resource to buy more of.  `simulate` plays the
stages out, task by task, with the effects that lie between the terms: waiting for the last task,
stragglers, hosts that die.

Sources of the constants: ``python -m benchmarks calibrate --mode cached`` measured SPLIT_CPU, LEAF_CPU and
OVERHEAD with all cores at work (rounded up), and ``scheduler`` measured DISPATCH; COUNT_CPU, INDEX_CPU and
RECEIPT were timed separately; those marked "assumed" are not measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from actshuffle.arraytypes import I64
from actshuffle.errors import RequestError
from actshuffle.limits import RECEIPTS_AT_ONCE, STORE_PIECE, STORE_REQUESTS
from actshuffle.ordering import bounds
from actshuffle.planning.planner import CHUNK_BYTES
from actshuffle.planning.tree import Plan
from actshuffle.units import format_bytes

SPLIT_CPU = 0.7e-9  # seconds of processor time per byte of a split, beside its reads and writes
LEAF_CPU = 0.9e-9  # the same for a leaf
COUNT_CPU = 20e-9  # seconds per row and pass of the search for boundaries
INDEX_CPU = 2e-6  # seconds per run in the receipts that an index task reads; 2.9e-6 on a busy core
RECEIPT_CPU = 1e-4  # seconds per receipt that the driver reads; assumed
OVERHEAD = 0.01  # seconds per task, whatever its size
DISPATCH = 1.5e-3  # seconds of scheduler and driver per task
DRIVER_RATE = 300e6  # bytes of answers per second that a driver receives; assumed
LATENCY = 0.03  # seconds per request to an object store; assumed
PART = 50 << 20  # bytes of one part of a large upload, as s3fs cuts them
RECEIPT = 72  # bytes of a split's receipt per child bucket, for one field


@dataclass(frozen=True)
class Cluster:
    """Hosts with their network, disks and object store, and their prices.  Rates are in bytes per second.

    With ``disk``, scratch lies on a filesystem over the hosts' own disks, and so do source and
    destination unless there is a store; without it, everything lies in an object store.

    Attributes
    ----------
    hosts, workers_per_host : numbers of each; a worker is a process with one thread and one core.
    network : rate of one host's network, each way.
    disk : rate of one host's disks, reads and writes together.
    store, requests : limits of the object store as a whole: bytes, and GETs plus PUTs, per second.
    latency : seconds per request; a task has 16 requests in flight.
    stream : rate at which one worker reads or writes at most, whatever its host can do.
    split_cpu, leaf_cpu : seconds of processor time per byte.
    overhead, dispatch : seconds per task, of its worker and of scheduler plus driver.
    jitter : variation of a task's processor time, as a share of it.
    straggling, slowness : the share of tasks that straggle, and how many times as long they take.
    mtbf, repair : seconds between a host's failures (0: it never fails), and seconds until it is back.
    put_price, get_price, host_price, scratch_price : dollars per PUT, GET, host second, byte second.
    """

    hosts: int = 1
    workers_per_host: int = 1
    network: float = 1.25e9
    disk: float | None = None
    store: float | None = None
    requests: float | None = None
    latency: float = LATENCY
    stream: float | None = None
    split_cpu: float = SPLIT_CPU
    leaf_cpu: float = LEAF_CPU
    overhead: float = OVERHEAD
    dispatch: float = DISPATCH
    jitter: float = 0.05
    straggling: float = 0.0
    slowness: float = 1.0
    mtbf: float = 0.0
    repair: float = 600.0
    put_price: float = 0.0
    get_price: float = 0.0
    host_price: float = 0.0
    scratch_price: float = 0.0

    def __post_init__(self) -> None:
        positive = {
            "hosts": self.hosts,
            "workers per host": self.workers_per_host,
            "network": self.network,
            "disk": self.disk,
            "store rate": self.store,
            "requests": self.requests,
            "stream": self.stream,
        }
        for name, value in positive.items():
            if value is not None and not 0 < value < math.inf:
                raise RequestError(f"{name} must be positive, got {value}")
        if not 0 <= self.straggling <= 1 or not 1 <= self.slowness < math.inf:
            raise RequestError(
                "stragglers are a share of the tasks (0 to 1) and times as long (1 or more), got "
                f"{self.straggling:g}:{self.slowness:g}"
            )
        if min(self.mtbf, self.repair, self.latency) < 0:
            raise RequestError("mtbf, repair and latency cannot be negative")

    @property
    def workers(self) -> int:
        return self.hosts * self.workers_per_host

    @property
    def scratch(self) -> str:
        """The place of the spill: "disk" or "store"."""
        return "store" if self.disk is None else "disk"

    @property
    def ends(self) -> str:
        """The place of source and destination: "disk" or "store"."""
        return "disk" if self.disk is not None and self.remote_rates == (None, None) else "store"

    @property
    def remote_rates(self) -> tuple[float | None, float | None]:
        return self.store, self.requests

    def channel_rate(self, channel: str) -> float:
        """Bytes per second of one host: of its "disk", or of its network "in" or "out"."""
        return min(self.disk or math.inf, self.network) if channel == "disk" else self.network


@dataclass(frozen=True)
class Stage:
    """Tasks that start when the stage before has ended; the stage after waits for all of them.

    ``rows`` (int64) holds the rows of each task, or is None if all tasks are alike.  Bytes, requests and
    ``cpu`` seconds are totals over all tasks; ``driver`` seconds follow them.  A task has ``at_once``
    requests in flight.  ``read_from`` and ``write_to`` are "disk" or "store".
    """

    name: str
    tasks: int
    read: float = 0.0
    written: float = 0.0
    gets: float = 0.0
    puts: float = 0.0
    cpu: float = 0.0
    driver: float = 0.0
    rows: I64 | None = None
    read_from: str = "store"
    write_to: str = "store"
    at_once: float = STORE_REQUESTS

    def on(self, place: str) -> tuple[float, float]:
        """Bytes read from and written to a place."""
        return self.read * (self.read_from == place), self.written * (self.write_to == place)


def stages(plan: Plan, cluster: Cluster) -> Iterator[Stage]:
    """The stages of a run, in the order of run.py."""
    yield _boundaries(plan)
    for level in range(1, plan.levels):
        yield _split(plan, cluster, level)
        yield _index(plan, cluster, level)
    yield _leaves(plan, cluster)
    gets = plan.leaves if cluster.ends == "store" else 0
    waits = gets * cluster.latency / RECEIPTS_AT_ONCE
    yield Stage("publish", 0, gets=gets, driver=max(waits, plan.leaves * RECEIPT_CPU))


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


def _boundaries(plan: Plan) -> Stage:
    ranges = -(-plan.rows // bounds.range_rows(plan.rows))
    answers = bounds.answers(plan.rows, plan.leaves)
    gathered = ranges * sum(answers) if ranges > 1 else 0
    return Stage(
        "boundaries", ranges * len(answers), cpu=plan.rows * COUNT_CPU * len(answers), driver=gathered / DRIVER_RATE
    )


def _split(plan: Plan, cluster: Cluster, level: int) -> Stage:
    rows, (read, written) = task_rows(plan, level), plan.level_bytes(level)
    k, stored = _fan_out(plan, level), cluster.scratch == "store"
    source = cluster.ends if level == 1 else cluster.scratch
    gets = read / CHUNK_BYTES if level == 1 else _range_reads(plan, level)
    block = plan.block_rows[level - 1] * plan.model.spill_row_bytes
    return Stage(
        f"level {level}",
        len(rows),
        read,
        written + len(rows) * RECEIPT * k,
        gets=(gets if source == "store" else 0) + 3 * len(rows) * stored,
        puts=len(rows) * (_uploads(block) + 1) * stored,
        cpu=cluster.split_cpu * read,
        rows=rows,
        read_from=source,
        write_to=cluster.scratch,
    )


def _index(plan: Plan, cluster: Cluster, level: int) -> Stage:
    """The index stage: one task per parent bucket reads its blocks' receipts and writes tables one by one."""
    parents, blocks, stored = (plan.buckets(level - 1), plan.blocks(level), cluster.scratch == "store")
    runs, gets, puts = (blocks * _fan_out(plan, level), blocks + parents, 2 * plan.buckets(level) + parents)
    return Stage(
        f"index {level}",
        parents,
        RECEIPT * runs,
        16 * runs,
        cpu=INDEX_CPU * runs,
        gets=gets * stored,
        puts=puts * stored,
        read_from=cluster.scratch,
        write_to=cluster.scratch,
        at_once=(gets + puts) / (gets / RECEIPTS_AT_ONCE + puts),
    )


def _leaves(plan: Plan, cluster: Cluster) -> Stage:
    rows, (read, written) = task_rows(plan, plan.levels), plan.level_bytes(plan.levels)
    source = cluster.ends if plan.levels == 1 else cluster.scratch
    gets = read / CHUNK_BYTES if plan.levels == 1 else _range_reads(plan, plan.levels)
    objects = -(-plan.rows // plan.object_rows)
    puts = objects * _uploads(plan.object_rows * plan.row_bytes) + 2 * len(rows)
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


def _fan_out(plan: Plan, level: int) -> int:
    return len(plan.children(level - 1, 0))


def _range_reads(plan: Plan, level: int) -> float:
    """Range reads of the spill of level - 1 by a level: every run in pieces, and a run cut between two tasks twice."""
    runs = plan.blocks(level - 1) * _fan_out(plan, level - 1)
    run_bytes = plan.rows * plan.model.spill_row_bytes / max(runs, 1)
    return runs * math.ceil(run_bytes / STORE_PIECE) + plan.task_count(level)


def _uploads(nbytes: int) -> int:
    """Requests that upload one object: one PUT, or a start, the parts and a completion."""
    return 1 if nbytes < 2 * PART else 2 + math.ceil(nbytes / PART)


def limits(stage: Stage, c: Cluster) -> dict[str, float]:
    """The least seconds that a stage takes, by each resource that it needs."""
    into, out = stage.on("store")
    requests = stage.gets + stage.puts
    own = stage.cpu + stage.tasks * c.overhead
    for nbytes, count in ((stage.read, stage.gets), (stage.written, stage.puts)):
        streamed = nbytes / c.stream if c.stream else 0.0
        own += max(streamed, count * c.latency / stage.at_once)
    largest = 0.0
    if stage.tasks:
        share = 1 / stage.tasks if stage.rows is None else float(stage.rows.max() / stage.rows.sum())
        largest = (own - stage.tasks * c.overhead) * share + c.overhead
    return {
        "network": max(into, out) / (c.hosts * c.network),
        "disk": sum(stage.on("disk")) / (c.hosts * c.channel_rate("disk")),
        "store": (into + out) / c.store if c.store else 0.0,
        "requests": requests / c.requests if c.requests and stage.tasks else 0.0,
        "workers": own / c.workers if stage.tasks else 0.0,
        "one task": largest,
        "scheduler": stage.tasks * c.dispatch,
    }


def least_seconds(stage: Stage, c: Cluster) -> tuple[float, str]:
    """The lower bound of a stage in seconds, and the name of the resource that sets it."""
    found = limits(stage, c)
    name = max(found, key=lambda key: found[key])
    if stage.driver > found[name]:
        return found[name] + stage.driver, "driver"
    return found[name] + stage.driver, name


def dollars(plan: Plan, found: list[Stage], c: Cluster, seconds: float) -> dict[str, float]:
    """The cost of requests, hosts and scratch in dollars; scratch counts as full all the time."""
    parts = {
        "requests": sum(s.puts * c.put_price + s.gets * c.get_price for s in found),
        "hosts": c.hosts * seconds * c.host_price,
        "scratch": plan.scratch_bytes * seconds * c.scratch_price,
    }
    return parts | {"total": sum(parts.values())}


def concerns(plan: Plan, c: Cluster) -> list[str]:
    """Warnings about this cluster: the parts of a valid plan that would fail on it, or run badly."""
    found = []
    answers = bounds.answers(plan.rows, plan.leaves)
    ranges = -(-plan.rows // bounds.range_rows(plan.rows))
    waiting = min(ranges, max(64, 4 * c.workers)) * max(answers, default=0)
    if waiting > 64e9:
        found.append(f"boundaries: the driver may hold {format_bytes(waiting)} of counts at once")
    for level in range(1, plan.levels):
        blocks = min(plan.blocks(level), plan.blocks_per_parent(level))
        held = 8 * blocks * _fan_out(plan, level)
        if held > plan.memory:
            found.append(f"index {level}: one task holds {format_bytes(held)} of tables, more than --memory")
    return found
