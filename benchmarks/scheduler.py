"""`scheduler`: tasks that do nothing, through the real executor and a real Dask scheduler.

Scheduler and workers are separate processes, as on a cluster; the calls carry a real job, as those of a run
do.  With the work taken away, the overhead of a task remains, and any memory that scheduler or driver keep for
each task that has passed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actshuffle.engine.job import Job
from actshuffle.engine.prepare import prepare
from actshuffle.engine.request import Request
from actshuffle.executors import Dask, Serial
from actshuffle.jobs.running import Done
from actshuffle.planning.tree import Task
from actshuffle.storage.place import as_place
from actshuffle.units import format_bytes
from benchmarks import measure, plots
from benchmarks.results import Bench, table
from benchmarks.sources import make_source

SAMPLES = 100
SETTLED = 0.1  # share of all tasks by which pools and logs are full; memory should be flat from there on


def nothing(job: Job, task: Task) -> Done:
    """A task without work."""
    return Done(task, 0, 0.0)


def run(bench: Bench, *, tasks: int, workers: int) -> None:
    from distributed import Client

    bench.plan(SAMPLES)
    with _cluster(bench.work, workers) as (address, processes), Client(address) as client:
        client.wait_for_workers(workers, timeout=60)
        job = _job(bench.work)
        crew = Dask(client)
        for _ in crew.map(nothing, ((job, Task("split", 1, i)) for i in range(20 * workers))):
            pass  # these load the code
        samples = list(_watch(bench, crew, job, tasks, processes))
    figures = summary(samples, tasks, workers)
    images = plots.draw(bench, lambda folder: [plots.scheduler(folder, samples, workers)])
    bench.publish({"samples": samples, "summary": figures}, page(figures), images)


def _watch(bench: Bench, crew: Dask, job: Job, tasks: int, processes: dict[str, int]) -> Iterator[dict[str, float]]:
    """Sample time, processor time and memory at regular numbers of tasks, from none to all."""
    pids = processes | {"driver": os.getpid()}
    started, step = time.monotonic(), max(1, tasks // SAMPLES)

    def sample(done: int) -> dict[str, float]:
        memory = {f"{name}_memory": measure.memory_of(pid) for name, pid in pids.items()}
        cpu = {f"{name}_cpu": _cpu(pid) for name, pid in pids.items()}
        return {"tasks": done, "seconds": time.monotonic() - started, **memory, **cpu}

    yield sample(0)
    calls = ((job, Task("split", 1, i)) for i in range(tasks))
    for done, _ in enumerate(crew.map(nothing, calls), 1):
        if done % step == 0 or done == tasks:
            found = sample(done)
            if done % step == 0:
                bench.did(
                    f"{done:,} tasks, {1000 * found['seconds'] / done:.2f} ms each, scheduler "
                    f"{format_bytes(found['scheduler_memory'])}, driver "
                    f"{format_bytes(found['driver_memory'])}"
                )
            yield found


def summary(samples: list[dict[str, float]], tasks: int, workers: int) -> dict[str, Any]:
    last = samples[-1]
    settled = [s for s in samples if s["tasks"] >= SETTLED * tasks]
    per_task = {}
    for name in ("scheduler", "driver"):
        per_task[name] = _slope(settled, f"{name}_memory")
    return {
        "tasks": tasks,
        "workers": workers,
        "seconds": last["seconds"],
        "ms_per_task": 1000 * last["seconds"] / tasks,
        "cpu_ms_per_task": {
            n: 1000 * (last[f"{n}_cpu"] - samples[0][f"{n}_cpu"]) / tasks for n in ("scheduler", "driver")
        },
        "memory_first": {n: settled[0][f"{n}_memory"] for n in ("scheduler", "driver")},
        "memory_last": {n: last[f"{n}_memory"] for n in ("scheduler", "driver")},
        "bytes_per_task": per_task,
    }


def page(figures: dict[str, Any]) -> list[str]:
    per_task = figures["bytes_per_task"]
    return [
        f"{figures['tasks']:,} tasks on {figures['workers']} workers: {figures['seconds']:.0f} s, "
        f"**{figures['ms_per_task']:.2f} ms a task**. Memory after a tenth of them and at the end, and "
        "the bytes that each task left behind in between (least squares):",
        "",
        *table(
            ("", "CPU ms a task", "memory after a tenth", "at the end", "bytes left by a task"),
            (
                (
                    name,
                    f"{figures['cpu_ms_per_task'][name]:.2f}",
                    format_bytes(figures["memory_first"][name]),
                    format_bytes(figures["memory_last"][name]),
                    f"{per_task[name]:.0f}",
                )
                for name in ("scheduler", "driver")
            ),
        ),
    ]


def _slope(samples: list[dict[str, float]], name: str) -> float:
    """Bytes per task by least squares."""
    n = len(samples)
    x, y = [s["tasks"] for s in samples], [s[name] for s in samples]
    mx, my = sum(x) / n, sum(y) / n
    spread = sum((a - mx) ** 2 for a in x)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0


def _cpu(pid: int) -> float:
    """Processor seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _job(work: Path) -> Job:
    source = make_source(work, 1 << 20, 512, 1 << 18)
    request = Request.of(seed=1, levels=2, memory=64 << 20)
    return prepare(as_place(source), as_place(work / "out"), request, Serial())


@contextmanager
def _cluster(work: Path, workers: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Start a scheduler and workers by Dask's commands; yields its address, and the pids to watch."""
    note = work / "scheduler.json"
    env = {
        **os.environ,
        "DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "100",
        "DASK_LOGGING__DISTRIBUTED": "critical",
        "PYTHONPATH": str(measure.ROOT),
    }

    def start(module: str, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.{module}", *words]
        return subprocess.Popen(command, env=env, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    scheduler = start(
        "dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(note)
    )
    crew = []
    try:
        deadline = time.monotonic() + 60
        while not note.exists():
            if scheduler.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the Dask scheduler did not start")
            time.sleep(0.1)
        address = json.loads(note.read_text())["address"]
        for _ in range(workers):
            crew.append(
                start("dask_worker", address, "--nthreads", "1", "--no-nanny", "--memory-limit", "0", "--no-dashboard")
            )
        yield address, {"scheduler": scheduler.pid}
    finally:
        for process in (*crew, scheduler):
            process.kill()  # an orderly end would wait for the others
            process.wait()
