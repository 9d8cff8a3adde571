"""Processes to kill: a driver, a scheduler and workers, each forked from one that has imported everything.

A fresh interpreter takes seconds to import Dask and Zarr; a fork of one that has imported them starts at
once, and campaigns need thousands of processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actshuffle.engine import tasks
from actshuffle.errors import ActshuffleError, ClusterError
from actshuffle.executors import Dask
from actshuffle.jobs import sums
from actshuffle.jobs.running import Done
from actshuffle.ordering import bounds
from actshuffle.planning import tree
from actshuffle.testing import Faults, differences, leftovers, matching
from support.stores import group, values

FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["actshuffle.testing", "distributed", "numcodecs", "hypothesis"]
FORKS.set_forkserver_preload(PRELOADED)
PATIENCE = 120.0  # seconds after which a process counts as stuck

SEED = 5
ROWS = 120
PLAN = {"levels": 3, "block_bytes": 560, "run_bytes": 1, "chunk_rows": 7}
KEPT = {"spill_memory": 5000}  # some blocks of each level's spill stay in memory, some go to disk

# One operation in each phase, by what it writes.
PHASES = {
    "boundaries": "put bounds/c.*",
    "split": "put level1/blocks/c.2.0",
    "split receipt": "put level1/receipts/1.json",
    "index": "put level1/runs/c.1.*",
    "second split": "put level2/blocks/c.3.0",
    "second index": "put level2/sums/c.2.*",
    "leaf": "put x/c.5.0",
    "leaf receipt": "put _actshuffle/receipts/2.json",
    "publish": "put _actshuffle/digests/doc/c.*",
    "marker": "put _actshuffle/zarr.json",
    "clearing": "delete_prefix _actshuffle/receipts",
}
# What any worker does in each phase that has tasks.
TASKS = {
    "split": "put level1/blocks/*",
    "split receipt": "put level1/receipts/*",
    "index": "put level1/runs/*",
    "index receipt": "put level1/index/*",
    "second split": "read level1/blocks/*",
    "second index": "put level2/sums/*",
    "leaf read": "read level2/blocks/*",
    "leaf": "put x/c.*",
    "leaf receipt": "put _actshuffle/receipts/*",
}


def source(path: Path, rows: int = ROWS) -> Path:
    """Two fields, plain chunks of 7 rows."""
    group(path, {"x": values(rows, (4,)), "doc": values(rows, (), "<i4")})
    return path


def assert_exact(src: Path, dst: Path, seed: int = SEED) -> None:
    """Check that the output is exact, and that nothing is left beside it."""
    found = differences(src, dst, seed) + leftovers(dst)
    assert found == [], found


# --- Processes ----------------------------------------------------------------------------------


def preload(*modules: str) -> None:
    """Have the process that is forked import more modules.  It must not have started: call this from a module."""
    PRELOADED.extend(modules)
    FORKS.set_forkserver_preload(PRELOADED)


def start(target: Callable[..., Any], *args: Any) -> Any:
    process = FORKS.Process(target=target, args=args, daemon=False)
    process.start()
    return process


def ended(process: Any, patience: float = PATIENCE) -> int:
    """The exit code of a process, negative for a signal; fails if the process is stuck."""
    process.join(patience)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"stuck for {patience:.0f} s")
    return int(process.exitcode)


@contextmanager
def busy(target: Any, *args: Any, flags: Path) -> Iterator[Any]:
    """A process that is at work; killed at the end of the block if it has not ended."""
    flags.mkdir()
    process = start(target, *args, flags)
    try:
        until(lambda: (flags / "at work").exists() or not process.is_alive())
        assert process.is_alive()
        yield process
    finally:
        process.kill()
        process.join()


def drive(
    told: Path,
    src: Path,
    dst: Path,
    settings: dict[str, Any],
    fault: Any = None,
    broken: Callable[[], None] | None = None,
) -> None:
    """A driver: run a shuffle and record its end.

    ``settings`` are arguments of `actshuffle.shuffle`, or ``scheduler``, an address, and ``wait``, the
    number of seconds to wait for its return.  ``fault`` is (pattern, kind) of an operation that is this
    process's last; ``broken`` breaks its engine.
    """
    _alone(told.with_suffix(".log"))
    import actshuffle

    if broken is not None:
        broken()
    if fault is not None:
        Faults(matching(*fault), real=True).install()
    settings = {"seed": SEED, "fsync": False, **PLAN, **settings}
    scheduler, wait = settings.pop("scheduler", None), settings.pop("wait", 2.0)
    with ExitStack() as stack:
        try:
            if scheduler is not None:
                from distributed import Client

                try:
                    client = stack.enter_context(Client(scheduler))
                except OSError as err:  # killed before we had anything to do with it
                    raise ClusterError(f"not connected: {err}") from err
                if wait is not None:  # for a scheduler that was killed; Dask waits 30 s
                    client._timeout = wait
                if settings.get("spill_memory"):  # as in a cluster of our own
                    settings["executor"] = Dask(client, one_machine=True)
                else:
                    settings["client"] = client
            result = actshuffle.shuffle(src, dst, **settings)
            body = {"end": "done", "resumed": result.resumed, "tasks": result.tasks}
        except ActshuffleError as err:
            body = {"end": type(err).__name__, "message": str(err)}
        except BaseException as err:
            body = {"end": type(err).__name__, "message": str(err), "unexpected": True}
        partial = told.with_suffix(".partial")
        partial.write_text(json.dumps(body))
        partial.rename(told)
    if body.get("unexpected"):
        sys.exit(1)


def outcome(told: Path) -> dict[str, Any]:
    """The end of a driver, by its own record."""
    found: dict[str, Any] = json.loads(told.read_text())
    return found


def shuffled(told: Path, src: Path, dst: Path, **settings: Any) -> dict[str, Any]:
    """Run a driver in a separate process, from start to end."""
    told.unlink(missing_ok=True)
    ended(start(drive, told, src, dst, settings))
    return outcome(told)


def _alone(log: Path) -> None:
    """Enter a separate process group, so that signals to the tests do not reach this process, nor the reverse."""
    os.setpgrp()
    # Shells have what they start in the background ignore it, children included.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def schedule(pipe: Any, folder: Path) -> None:
    """A Dask scheduler on loopback; its address goes into the pipe."""
    import asyncio

    from distributed import Scheduler

    async def run() -> None:
        async with Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0") as scheduler:
            pipe.send(scheduler.address)
            await scheduler.finished()

    _alone(folder / "scheduler.log")
    with suppress(KeyboardInterrupt):
        asyncio.run(run())


def work(
    address: str, folder: Path, fault: Any = None, victim: int | None = None, broken: Callable[[], None] | None = None
) -> None:
    """A Dask worker without a nanny.

    ``fault`` is (pattern, kind) of an operation at which it dies, if it is the first worker of a folder
    to reach it; or, if a ``victim`` is given, at which that process dies.  ``broken`` breaks its engine.
    """
    import asyncio

    from distributed import Worker

    _alone(folder / "worker.log")
    if broken is not None:
        broken()
    if fault is not None:
        decide = matching(*fault)

        def first(operation: Any) -> str | None:
            kind = decide(operation)
            if kind is None or not first_of_all(folder / "fault"):
                return None
            if victim is not None:
                os.kill(victim, signal.SIGKILL)
                return None
            return kind

        Faults(first, real=True).install()

    async def run() -> None:
        async with Worker(
            address, nthreads=1, host="127.0.0.1", dashboard=False, local_directory=str(folder), death_timeout=PATIENCE
        ) as worker:
            await worker.finished()

    with suppress(BaseException):
        asyncio.run(run())


def first_of_all(flag: Path) -> bool:
    """True for the first of all processes that ask."""
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def as_a_large_run() -> None:
    """Add up counts and receipts a few at a time, as a run does that has very many of them."""
    sums.FAN, tree.PACK, tree.TABLE_BYTES, bounds.COUNT_ROWS = FEW


FEW = (3, 2, 1, 11)


# --- Broken engines, for controls --------------------------------------------------------------


def says_too_early_that_it_is_done() -> None:
    """Claims a destination and writes its completion marker in one go."""
    from actshuffle.engine import manifest
    from actshuffle.engine import run as runs

    inner = runs._claim

    def hasty(job: Any) -> None:
        inner(job)
        manifest.write_marker(job, {f.name: "0" * 32 for f in job.fields}, {})

    runs._claim = hasty


def takes_what_was_begun_for_done() -> None:
    """Records a task as done before it is done."""
    inner = tasks.run_task

    def hasty(job: Any, task: Any) -> Done:
        name = f"{job.scratch.url}.begun-{task.kind}-{task.level}-{task.number}"
        if not first_of_all(Path(name)):
            return Done(task, 0, 0.0, False)
        time.sleep(0.03)  # so that there is time to die in
        return inner(job, task)

    tasks.run_task = hasty


@dataclass
class Cluster:
    """A scheduler and workers, each a process to kill."""

    folder: Path
    scheduler: Any = None
    address: str = ""
    workers: list[Any] = field(default_factory=list)
    broken: Callable[[], None] | None = None

    def start_scheduler(self) -> None:
        ours, theirs = FORKS.Pipe()
        self.scheduler = start(schedule, theirs, self.folder)
        assert ours.poll(PATIENCE)
        self.address = ours.recv()

    def add_worker(self, fault: Any = None, victim: int | None = None) -> None:
        self.workers.append(start(work, self.address, self.folder, fault, victim, self.broken))

    def stop(self) -> None:
        for process in (*self.workers, self.scheduler):
            if process is not None and process.is_alive():
                process.kill()
            if process is not None:
                process.join()
        self.workers.clear()


@contextmanager
def dask_cluster(
    folder: Path, workers: int = 2, fault: Any = None, broken: Callable[[], None] | None = None
) -> Iterator[Cluster]:
    """A scheduler with some workers, one of which has the fault, and all of which are ``broken``."""
    folder.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(folder, broken=broken)
    try:
        cluster.start_scheduler()
        for _ in range(workers):
            cluster.add_worker(fault)
        yield cluster
    finally:
        cluster.stop()


def alive(pid: int) -> bool:
    """True until a process has ended, whether or not anybody has asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def address_in(note: Path) -> str:
    """The address in a scheduler's file, which Dask writes in pieces: the whole file is waited for."""
    return str(
        json.loads(until(lambda: note.exists() and (text := note.read_text()).endswith("}") and text))["address"]
    )


def until(condition: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Wait for something to become true."""
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found
