"""Runs of the engine on small stores: the job, the whole run, one task."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

from actshuffle import shuffle
from actshuffle.engine import tasks, totals
from actshuffle.engine.job import Job
from actshuffle.engine.prepare import prepare
from actshuffle.engine.request import Request
from actshuffle.engine.run import Result, execute
from actshuffle.errors import ActshuffleError, DestinationExistsError
from actshuffle.executors import Serial
from actshuffle.jobs.receipts import write_receipt
from actshuffle.planning.tree import Task
from actshuffle.progress import Silent
from actshuffle.storage.place import as_place
from actshuffle.testing import Faults, Killed, drawn


def job_of(src: Path, dst: Path, *, seed: int = 5, **request: Any) -> Job:
    """A job without fsync, one block unless told otherwise; ``key_bits`` in a request forces ties."""
    request = {"run_bytes": 1, "block_bytes": 1 << 30} | request
    return prepare(as_place(src), as_place(dst), Request.of(seed=seed, **request), Serial(), fsync=False)


def run(src: Path, dst: Path, executor: Any = None, **request: Any) -> Result:
    """A whole run of such a job."""
    return execute(job_of(src, dst, **request), executor or Serial(), Silent())


def resumed_until_done(
    src: Path, dst: Path, story: int, rate: float, ends: Counter[str], *, falls: float, **settings: Any
) -> None:
    """A shuffle whose operations fail at random, ever more rarely, and which is resumed until it is done.

    ``story`` draws the faults; ``rate`` is that of the first attempt, and ``falls`` its factor from one to the next;
    ``ends`` counts the errors.
    """
    for attempt in range(10):
        try:
            with Faults(drawn(100 * story + attempt, rate * falls**attempt if attempt < 8 else 0.0), seed=story):
                shuffle(src, dst, **settings)
            break
        except DestinationExistsError:  # it died when all was done
            break
        except (Killed, ActshuffleError) as err:
            ends[type(err).__name__] += 1
    else:
        raise AssertionError("attempts without faults did not finish")
    with Faults():  # what died in zarr's event loop is collected before it is of any interest
        gc.collect()


def force(job: Job, task: Task) -> None:
    """Do the work of a task, whatever its receipt says: it writes all its bytes again."""
    work = {"split": tasks.split, "pack": totals.pack, "index": totals.index, "leaf": tasks.leaf}[task.kind]
    body, _ = work(job, task)
    write_receipt(job, task, body)
