"""Runs of the engine on small stores: the job, the whole run, one task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actshuffle.engine import tasks, totals
from actshuffle.engine.job import Job
from actshuffle.engine.prepare import prepare
from actshuffle.engine.request import Request
from actshuffle.engine.run import Result, execute
from actshuffle.executors import Serial
from actshuffle.jobs.receipts import write_receipt
from actshuffle.planning.tree import Task
from actshuffle.progress import Silent
from actshuffle.storage.place import as_place


def job_of(src: Path, dst: Path, *, seed: int = 5, **request: Any) -> Job:
    """A job without fsync, one block unless told otherwise; ``key_bits`` in a request forces ties."""
    request = {"run_bytes": 1, "block_bytes": 1 << 30} | request
    return prepare(as_place(src), as_place(dst), Request.of(seed=seed, **request), Serial(), fsync=False)


def run(src: Path, dst: Path, executor: Any = None, **request: Any) -> Result:
    """A whole run of such a job."""
    return execute(job_of(src, dst, **request), executor or Serial(), Silent())


def force(job: Job, task: Task) -> None:
    """Do the work of a task, whatever its receipt says: it writes all its bytes again."""
    work = {"split": tasks.split, "pack": totals.pack, "index": totals.index, "leaf": tasks.leaf}[task.kind]
    body, _ = work(job, task)
    write_receipt(job, task, body)
