"""The cost of a plan on many hosts, by arithmetic: bytes, requests, seconds, dollars, and the limit of each stage.

A run is a sequence of stages (stages.py).  Each stage has tasks that any worker may take.  A task reads,
computes and writes, in this order; the capacity of the hosts, the store, the scheduler and the driver bounds
the time that a stage takes::

    seconds >= max(network, disk, store, requests, workers, longest task, scheduler) + driver

`limits` gives each of these terms; the largest names the resource to buy more of.  `simulate` plays the
stages out, task by task, with the effects that lie between the terms: waiting for the last task,
stragglers, hosts that die.

Sources of the constants: ``python -m benchmarks calibrate --mode cached`` measured SPLIT_CPU, LEAF_CPU and
OVERHEAD with all cores at work (rounded up), and ``scheduler`` measured DISPATCH; those marked "assumed" are not
measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from actshuffle.arraytypes import I64
from actshuffle.errors import RequestError
from actshuffle.limits import STORE_REQUESTS
from actshuffle.planning.tree import Plan

SPLIT_CPU = 0.7e-9  # seconds of processor time per byte of a split, beside its reads and writes
LEAF_CPU = 0.9e-9  # the same for a leaf
OVERHEAD = 0.01  # seconds per task, whatever its size
DISPATCH = 1.5e-3  # seconds of scheduler and driver per task
DRIVER_RATE = 300e6  # bytes of answers per second that a driver receives; assumed
LATENCY = 0.03  # seconds per request to an object store; assumed


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
        for name in ("hosts", "workers_per_host", "network", "disk", "store", "requests", "stream"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                told = "store rate" if name == "store" else name.replace("_", " ")
                raise RequestError(f"{told} must be positive, got {value}")
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
        return "disk" if self.disk is not None and self.store is None and self.requests is None else "store"

    def channel_rate(self, channel: str) -> float:
        """Bytes per second of one host: of its "disk", or of its network "in" or "out"."""
        return min(self.disk or math.inf, self.network) if channel == "disk" else self.network


@dataclass(frozen=True)
class Stage:
    """Tasks that start when the stage before has ended; the stage after waits for all of them.

    ``rows`` (int64) holds the rows of each task, or is None if all tasks are alike.  Bytes, requests and
    ``cpu`` seconds are totals over all tasks; ``driver`` seconds follow them, in which the driver or few tasks work.
    A task has ``at_once`` requests in flight.  ``read_from`` and ``write_to`` are "disk" or "store".  The tasks are
    as many equal lots as ``passes``, each of which waits for the one before.
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
    passes: int = 1

    def on(self, place: str) -> tuple[float, float]:
        """Bytes read from and written to a place."""
        return self.read * (self.read_from == place), self.written * (self.write_to == place)


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
        largest = stage.passes * ((own - stage.tasks * c.overhead) * share + c.overhead)
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
    return found[name] + stage.driver, "driver" if stage.driver > found[name] else name


def dollars(plan: Plan, found: list[Stage], c: Cluster, seconds: float) -> dict[str, float]:
    """The cost of requests, hosts and scratch in dollars; scratch counts as full all the time."""
    parts = {
        "requests": sum(s.puts * c.put_price + s.gets * c.get_price for s in found),
        "hosts": c.hosts * seconds * c.host_price,
        "scratch": plan.scratch_bytes * seconds * c.scratch_price,
    }
    return parts | {"total": sum(parts.values())}
