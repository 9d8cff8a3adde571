"""The base of all executors: map a function over the argument tuples of many calls, results in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from actshuffle import machine
from actshuffle.errors import InfeasibleError
from actshuffle.machine import machine_memory

T = TypeVar("T")
SHARE = 0.6  # of a worker's memory that one task uses by default


class Executor:
    """Runs ``fn(*call)`` for every call and yields results as they come, in any order.

    A new executor implements `map`; the defaults describe one worker in this process.  `Serial` is the
    specification: every other executor must give exactly its results.
    """

    workers: int = 1
    dashboard: str | None = None
    one_machine: bool = True  # every worker certainly runs on this machine
    tasks_per_worker: int = 1  # run at the same time in one process and share its memory
    processes: bool = False  # tasks run in other processes, and a run that is stopped waits for them

    def map(self, fn: Callable[..., T], calls: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        raise NotImplementedError

    def task_memory(self) -> int:
        """Bytes that one task may use by default."""
        return int(SHARE * machine_memory() / self.workers)

    def described(self) -> str:
        """The workers, and where to look at their work."""
        page = self.dashboard or "no page of Dask: pip install bokeh shows one"
        return f"{self.workers} worker{'s' * (self.workers != 1)}, {page}"

    def close(self) -> None:
        """Give back the memory that workers hold between tasks."""


def check_memory(executor: Executor | None, memory: int | None) -> None:
    """Refuse a worker's limit beyond the memory of this machine, where all workers are on it."""
    if (executor is None or executor.one_machine) and (told := machine.beyond_machine(memory)):
        raise InfeasibleError(told)
