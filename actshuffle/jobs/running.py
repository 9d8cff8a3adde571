"""Run a job of idempotent tasks: claim, one stage after the other, publish, the marker last, clear.

::

    claim      write the job down where its results will be
    ready      provide the data that tasks of every stage need
    stage 1    run tasks, in any order, on any executor; then closing tasks, which add up their receipts in rounds
    stage 2    ...
    publish    write the objects that readers look for, the completion marker last
    clear      delete the objects that only an unfinished job needs

A task is a plain function of (job, task).  It is deterministic and idempotent: a retry, a duplicate or a
late twin writes the same bytes to the same place.  Its receipt comes after its data.  A run that begins
again resumes after the last stage whose results are all there, task by task.  A stage may delete the results
of earlier stages, since a complete stage stands for all before it.

This module does not know the content of tasks.  The shuffle, `collect`, imports, splits and merges run on it,
and so may the tasks of another package: see `actshuffle.jobs.folder`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Generic, TypeVar

from actshuffle.errors import FormatError
from actshuffle.executors import Executor
from actshuffle.jobs import receipts
from actshuffle.jobs.locks import Locks
from actshuffle.jobs.receipts import J, Job, Payload
from actshuffle.progress import Progress
from actshuffle.storage import requests

T = TypeVar("T")


@dataclass(frozen=True)
class Done:
    """A task's report to the driver: small, since the result itself is in the store."""

    task: Any
    nbytes: int  # bytes moved, for the progress display
    seconds: float
    fresh: bool = True  # False if a receipt showed that it was done before
    requests: dict[str, int] = field(default_factory=dict)  # to object stores, by its process since the last report


@dataclass(frozen=True)
class Stage:
    """Tasks that wait for the stage before them and for which the next stage waits.

    Attributes
    ----------
    name : its name in the progress display.
    tasks : makes the tasks, lazily; a million is fine.
    count, nbytes : the number of tasks, and of the bytes that they move together.
    run : does one task, `once`, on a worker; a module-level function, so that it can be sent there.
    is_done : returns True if a task's receipt and the objects it names exist.
    closing : makes the tasks that run when the others are done and add up their receipts, round after round.
    before, after : steps of the driver around the stage.
    """

    name: str
    tasks: Callable[[], Iterator[Any]]
    count: int
    nbytes: int
    run: Callable[[Any, Any], Done]
    is_done: Callable[[Any, Any], bool]
    closing: tuple[Callable[[], Iterator[Any]], ...] = ()
    before: Callable[[Executor, Progress], None] = lambda executor, progress: None
    after: Callable[[Progress], None] = lambda progress: None


class Course(Generic[J]):
    """The driver's side of a job: its stages, and the steps around them.  Each step can be done again.

    ``locks`` hold the places that the job writes; whoever prepared the job has taken them.
    """

    def __init__(self, job: J, locks: Locks) -> None:
        self.job, self.locks = job, locks

    def stages(self) -> list[Stage]:
        raise NotImplementedError

    def is_finished(self) -> bool:
        """True if the completion marker exists."""
        raise NotImplementedError

    def claim(self) -> None:
        """Write the job down where its results will be."""

    def join(self) -> None:
        """Claim the job beside other processes that do parts of it."""
        self.claim()

    def ready(self, executor: Executor, progress: Progress) -> None:
        """Provide the data that tasks of every stage need."""

    def publish(self, progress: Progress) -> None:
        """Write the objects that readers look for, the completion marker last."""
        raise NotImplementedError

    def clear(self, progress: Progress) -> None:
        """Delete the objects that only an unfinished job needs."""


@dataclass(frozen=True)
class Outcome:
    """The tasks of a run, of which an earlier run had done ``resumed``, and the ``seconds`` that this run took."""

    tasks: int
    resumed: int
    seconds: float
    already_finished: bool = False  # by an earlier run
    requests: dict[str, int] = field(default_factory=dict)  # to object stores, as far as tasks reported them


def once(job: J, task: Any, do: Callable[[J, Any], tuple[Payload, int]], is_done: Callable[[J, Any], bool]) -> Done:
    """Do a task unless it is done: ``do`` returns the content of its receipt and the number of bytes it moved."""
    started = time.perf_counter()
    nbytes, fresh = 0, not is_done(job, task)
    if fresh:
        payload, nbytes = do(job, task)
        receipts.write_receipt(job, task, payload)
    return Done(task, nbytes, time.perf_counter() - started, fresh, requests.taken())


def run(course: Course[Any], executor: Executor, progress: Progress) -> Outcome:
    """Run or resume a job to its completion marker."""
    started = time.perf_counter()
    if course.is_finished():
        course.clear(progress)  # an earlier run got this far
        return Outcome(0, 0, 0.0, already_finished=True, requests=requests.taken())
    course.locks.check()
    course.claim()
    course.ready(executor, progress)
    stages, total, resumed, sent = course.stages(), 0, 0, Counter[str]()
    for stage in stages[first_unfinished(course.job, stages) :]:
        course.locks.check()
        stage.before(executor, progress)
        progress.begin(stage.name, stage.count, stage.nbytes)
        for done in executor.map(stage.run, ((course.job, task) for task in stage.tasks())):
            total, resumed = total + 1, resumed + (not done.fresh)
            sent.update(done.requests)
            progress.advance(done.nbytes, done.fresh)
            course.locks.look()
        for done in _close(course, stage, executor):
            sent.update(done.requests)
        progress.end()
        stage.after(progress)
    course.locks.check()
    course.publish(progress)
    course.clear(progress)
    sent.update(requests.taken())
    return Outcome(total, resumed, time.perf_counter() - started, requests=dict(sent))


def run_part(course: Course[Any], part: tuple[int, int], executor: Executor, progress: Progress) -> bool:
    """Do the i-th of n parts of a job of one stage; the process that finds all parts done publishes.

    ``part`` is (i, n), i from 1.  Returns True if the job is finished, by this process or another.
    """
    number, count = part
    (stage,) = course.stages()
    tasks = list(stage.tasks())
    mine = tasks[len(tasks) * (number - 1) // count : len(tasks) * number // count]
    course.join()
    progress.begin(f"part {number} of {count}", len(mine), stage.nbytes * len(mine) // max(1, len(tasks)))
    for done in executor.map(stage.run, ((course.job, task) for task in mine)):
        progress.advance(done.nbytes, done.fresh)
        course.locks.look()
    progress.end()
    course.locks.check()
    if course.is_finished():  # another part was the last
        return True
    if not all(receipts.each(course.job, stage.is_done, iter(tasks))):
        return course.is_finished()
    try:
        for _ in _close(course, stage, executor):
            pass
        course.publish(progress)
    except FormatError:  # a receipt is gone: another part publishes, or has published
        if not course.is_finished():
            raise
    else:
        course.clear(progress)
    return True


def _close(course: Course[Any], stage: Stage, executor: Executor) -> Iterator[Done]:
    for round_of_tasks in stage.closing:
        for done in executor.map(stage.run, ((course.job, task) for task in round_of_tasks())):
            course.locks.look()
            yield done


def first_unfinished(job: Job, stages: list[Stage]) -> int:
    """The index of the stage to resume at: after the last one whose results are all there."""
    return next((number for number in range(len(stages), 0, -1) if is_complete(job, stages[number - 1])), 0)


def is_complete(job: Job, stage: Stage) -> bool:
    """True if all results of a stage exist."""
    # The last receipts to come are looked at first, so that one look usually shows that a stage is unfinished.
    closing = chain.from_iterable(round_of_tasks() for round_of_tasks in reversed(stage.closing))
    return all(receipts.each(job, stage.is_done, chain(closing, stage.tasks())))


def sweep(
    name: str,
    fn: Callable[..., T],
    calls: list[tuple[Any, ...]],
    executor: Executor,
    progress: Progress,
    nbytes: Callable[[T], int] = lambda result: 0,
    total: int = 0,
) -> Iterator[T]:
    """Run calls whose results go straight to the driver; they leave no receipts, so a resume repeats them.

    The progress display shows one stage of ``total`` bytes, of which each result stands for ``nbytes(result)``.
    """
    progress.begin(name, len(calls), total)
    for result in executor.map(fn, calls):
        progress.advance(nbytes(result), True)
        yield result
    progress.end()
