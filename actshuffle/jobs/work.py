"""The common ground of functions that make stores: who works and watches, and how the store is held and written."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from actshuffle.executors import Executor
from actshuffle.executors.choice import as_executor
from actshuffle.jobs.locks import Locks
from actshuffle.progress import Progress, observer
from actshuffle.units import switches


@dataclass(frozen=True)
class Work:
    """One call of such a function.

    Attributes
    ----------
    crew, progress : the executor of the tasks, and the observer of the stages.
    overwrite : replace the store that is there.
    fsync : make every object durable at once.
    locks : hold the places that are written, once they are taken.
    """

    crew: Executor
    progress: Progress
    overwrite: bool = False
    fsync: bool = True
    locks: Locks = field(default_factory=Locks)
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(
        cls, executor: Executor | None, progress: Progress | bool, *, overwrite: bool = False, fsync: bool = True
    ) -> Work:
        """The work as users ask for it; by default in this process."""
        switches(overwrite=overwrite, fsync=fsync)
        return cls(as_executor(executor), observer(progress), overwrite, fsync)

    @property
    def seconds(self) -> float:
        """The time since the call."""
        return time.perf_counter() - self.started
