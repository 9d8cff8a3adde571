"""Where a shuffle's time goes, seen from outside: an executor that times the tasks it passes on.

Nothing in actshuffle knows of this.  `Timed` wraps any executor and sends `timed_task` in place of
`tasks.run_task`; that sets timers around a few functions of the engine while the task runs, and records its
start and end.  A timer excludes the time of timers inside it; the rest of a task is "other".  The time of the
thread that works beside a task (looks at rows that were read, writes rows that were gathered) counts
separately as "behind"; the task itself loses only the time that it waits for that thread, "write".
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from actshuffle.arrays.source import Source
from actshuffle.engine import gather, leaves, spill, tasks
from actshuffle.engine.gather import READING
from actshuffle.engine.job import Job
from actshuffle.engine.tasks import CLEARING
from actshuffle.executors import Executor
from actshuffle.jobs import receipts
from actshuffle.jobs.running import Done
from actshuffle.ordering import digest, keys
from actshuffle.planning.tree import Task
from actshuffle.storage import buffers, files
from actshuffle.storage import directio as reading

PHASES = ("read", "key", "partition", "hash", "gather", "write", "receipt", "other")
OUTSIDE = ("scheduler", "idle", "driver", "clearing")
WHOLE = {READING: "read", CLEARING: "clearing"}  # stages that are one phase of all workers

PROBES: tuple[tuple[str, Any, str], ...] = (
    ("read", Source, "_decode"),
    ("read", files.LocalObjects, "read"),
    ("read", spill.Spill, "read"),
    ("read", reading, "_by_two"),
    ("key", keys.Keys, "hi"),
    ("key", keys.Keys, "hi_at"),
    ("partition", tasks, "bucket_of"),
    ("partition", tasks, "group"),
    ("partition", leaves, "key_order"),
    ("hash", digest.RowHash, "_add_up"),
    ("hash", digest.RowHash, "_mixed"),
    ("hash", tasks, "add_to_groups"),
    ("gather", spill._Gather, "append"),
    ("read", gather.Gather, "read"),
    ("partition", gather, "look"),
    ("read", gather, "read_column"),
    ("partition", gather, "find_rows"),
    ("gather", tasks, "leaf"),  # the rest of a leaf is the gathering of its rows
    ("write", spill.Spill, "write_block"),  # the rest of it is fsync and rename
    ("write", buffers.Behind, "wait"),
    ("write", reading.FileWriter, "write"),
    ("receipt", receipts, "write_receipt"),
    ("receipt", receipts, "read_receipt"),
)


@dataclass(frozen=True)
class Trace:
    """One task as a worker saw it; times are in seconds of the machine's monotonic clock."""

    task: Task
    worker: int
    start: float
    stop: float
    cpu: float
    phases: dict[str, float]


@dataclass
class Timed:
    """An executor that keeps a record.  Give it to `actshuffle.shuffle` as executor and as progress."""

    inner: Executor
    traces: list[Trace] = field(default_factory=list)
    stages: list[list[Any]] = field(default_factory=list)  # name, start, stop

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def workers(self) -> int:
        return self.inner.workers

    @property
    def one_machine(self) -> bool:
        return self.inner.one_machine

    @property
    def tasks_per_worker(self) -> int:
        return self.inner.tasks_per_worker

    @property
    def dashboard(self) -> str | None:
        return self.inner.dashboard

    def task_memory(self) -> int:
        return self.inner.task_memory()

    def close(self) -> None: ...

    def map(self, fn: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        if fn is not tasks.run_task:
            yield from self.inner.map(fn, calls)
            return
        for done, trace in self.inner.map(timed_task, calls):
            self.traces.append(trace)
            yield done

    def begin(self, stage: str, _tasks: int, _nbytes: int) -> None:
        self.stages.append([stage, time.monotonic(), 0.0])

    def advance(self, _nbytes: int, _fresh: bool) -> None: ...

    def end(self) -> None:
        self.stages[-1][2] = time.monotonic()


def breakdown(timed: Timed, start: float, stop: float) -> dict[str, float]:
    """Worker-seconds of a run by phase; they add up to (stop - start) x workers.

    "scheduler" is a worker's time between tasks of a level, "idle" the time after its last one while others
    still work, "clearing" the time to delete spill, "driver" all other time in which no level has tasks to
    run.  The time to read the source into the page cache beforehand counts as "read".
    """
    spent: dict[str, float] = dict.fromkeys((*PHASES, *OUTSIDE, "behind"), 0.0)
    working = 0.0
    for name, begin, end in timed.stages:
        if name in WHOLE:
            spent[WHOLE[name]] += (end - begin) * timed.workers
            working += end - begin
            continue
        traces = [t for t in timed.traces if begin <= t.start and t.stop <= end]
        if not name.startswith("level") or not traces:
            continue
        last = max(t.stop for t in traces)
        working += last - begin
        by_worker: defaultdict[int, list[Trace]] = defaultdict(list)
        for trace in traces:
            by_worker[trace.worker].append(trace)
        spent["idle"] += (last - begin) * (timed.workers - len(by_worker))
        for mine in by_worker.values():
            busy = sum(t.stop - t.start for t in mine)
            leaves = max(t.stop for t in mine)
            spent["idle"] += last - leaves
            spent["scheduler"] += leaves - begin - busy
    for trace in timed.traces:
        for phase, seconds in trace.phases.items():
            spent[phase] += seconds
    spent["driver"] = (stop - start - working) * timed.workers
    return spent


def published(timed: Timed) -> float:
    """The time at which a run's result was complete; its last stage, which removes spill, began then."""
    return float(timed.stages[-1][1])


def summarise(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Shares of several runs' worker-seconds, "behind" beside them."""
    names = (*PHASES, *OUTSIDE, "behind")
    total = sum(part[name] for part in parts for name in (*PHASES, *OUTSIDE)) or 1.0
    return {name: sum(part[name] for part in parts) / total for name in names}


# --- In the worker --------------------------------------------------------------------------------

_lock = threading.Lock()
_here = threading.local()


def timed_task(job: Job, task: Task) -> tuple[Done, Trace]:
    """Do `tasks.run_task` and time it."""
    start, cpu = time.monotonic(), time.process_time()
    with _timers() as spent:
        done = tasks.run_task(job, task)
    stop, cpu = time.monotonic(), time.process_time() - cpu
    spent["other"] = stop - start - sum(spent.values()) + spent["behind"]
    return done, Trace(task, os.getpid(), start, stop, cpu, dict(spent))


@contextmanager
def _timers() -> Iterator[defaultdict[str, float]]:
    """Set timers around the engine's functions, for one task that has the process to itself."""
    spent: defaultdict[str, float] = defaultdict(float)
    task_thread = threading.get_ident()
    before = [(owner, name, getattr(owner, name)) for _, owner, name in PROBES]
    submit = buffers.Behind.submit

    def submit_timed(self: buffers.Behind, call: Callable[..., None], *args: Any) -> None:
        submit(self, _beside(spent, call), *args)

    try:
        for phase, owner, name in PROBES:
            setattr(owner, name, _timer(spent, phase, getattr(owner, name), task_thread))
        buffers.Behind.submit = submit_timed  # type: ignore[method-assign]
        yield spent
    finally:
        buffers.Behind.submit = submit  # type: ignore[method-assign]
        for owner, name, function in before:
            setattr(owner, name, function)


def _beside(spent: defaultdict[str, float], call: Callable[..., None]) -> Callable[..., None]:
    """Time a call on the thread beside the task."""

    def run(*args: Any) -> None:
        started = time.perf_counter()
        try:
            call(*args)
        finally:
            with _lock:
                spent["behind"] += time.perf_counter() - started

    return run


def _timer(spent: defaultdict[str, float], phase: str, function: Callable[..., Any], thread: int) -> Callable[..., Any]:
    """Time calls on the task's thread only; work on other threads costs it time only where it waits."""

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return function(*args, **kwargs)
        inside: list[float] = _here.__dict__.setdefault("inside", [])  # seconds of inner timers, per timer under way
        inside.append(0.0)
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds = time.perf_counter() - started
            own = seconds - inside.pop()
            if inside:
                inside[-1] += seconds
            spent[phase] += own

    return timed
