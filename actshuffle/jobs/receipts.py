"""Receipts: the proof that a task is done, written after its data and checked before it is trusted.

A receipt names the job and the task and carries its own checksum.  One that is torn, stale or of another
job counts as absent, and so does one whose content the job does not accept; its task then runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar

from actshuffle.jobs.records import sealed, unsealed
from actshuffle.limits import RECEIPTS_AT_ONCE
from actshuffle.storage.objects import Objects

T = TypeVar("T")
Task = tuple[str | int, ...]  # names one piece of work; a NamedTuple, usually of a stage's name and a number
Payload = dict[str, Any]  # plain values that JSON keeps as they are


class Job(Protocol):
    """A frozen plan and its places: everything that a task needs.  It travels to the workers with each task."""

    @property
    def identity(self) -> str:
        """Digest of everything that decides the reads and writes of tasks."""

    @property
    def is_local(self) -> bool:
        """True if all receipts lie on local disk, where one look costs next to nothing."""

    def receipt(self, task: Any) -> tuple[Objects, str]:
        """The objects and the key of a task's receipt, which lies beside the task's data."""

    def accepts(self, task: Any, payload: Payload) -> bool:
        """True if a receipt's content holds every value that its readers need, and no impossible one."""


J = TypeVar("J", bound=Job)
K = TypeVar("K", bound=Task)


def write_receipt(job: Job, task: Task, payload: Payload) -> None:
    """Record that a task is done.  Its data must be in place."""
    objects, key = job.receipt(task)
    objects.put(key, sealed({"job": job.identity, "task": list(task), **payload}))


def read_receipt(job: Job, task: Task) -> Payload | None:
    """The content of a task's receipt, or None if there is no valid one of this job and task."""
    objects, key = job.receipt(task)
    body = unsealed(objects.get(key))
    if body is None or body.get("job") != job.identity or body.get("task") != list(task):
        return None
    return body if job.accepts(task, body) else None


def read_receipts(job: Job, tasks: Iterable[Task]) -> Iterator[Payload | None]:
    """The receipts of many tasks, in order."""
    return each(job, read_receipt, tasks)


def withdraw(job: Job, task: Task) -> None:
    """Remove a receipt, so that the next run does the task again."""
    objects, key = job.receipt(task)
    objects.delete(key)


def each(job: J, look: Callable[[J, K], T], tasks: Iterable[K]) -> Iterator[T]:
    """Yield ``look(job, task)`` for many tasks, in order; concurrently in an object store, which has latency.

    The first batch is one task and later ones grow, so that a caller who stops early costs few requests.
    """
    tasks, size = iter(tasks), 1
    if job.is_local:
        yield from (look(job, task) for task in tasks)
        return
    with ThreadPoolExecutor(RECEIPTS_AT_ONCE) as pool:
        while batch := list(islice(tasks, size)):
            yield from pool.map(partial(look, job), batch)
            size = min(RECEIPTS_AT_ONCE * size, 32 * RECEIPTS_AT_ONCE)
