"""Executors that die, pause, watch, repeat tasks, or claim to be on another machine."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actshuffle.engine import tasks
from actshuffle.engine.job import Job
from actshuffle.executors import Executor, Serial
from actshuffle.jobs.running import Done
from actshuffle.planning.tree import Task
from support.processes import until
from support.runs import force


class Stops(Serial):
    """Dies as a machine does when it has done ``after`` tasks, not counting those that were done before.

    ``seen`` holds for each task True if it was done now.
    """

    def __init__(self, after: int = -1) -> None:
        self.left, self.seen = after, list[bool]()

    def map(self, fn: Any, calls: Any) -> Any:
        for call in calls:
            if self.left == 0:
                self.die()
            done = fn(*call)
            fresh = getattr(done, "fresh", None)  # None for a call that is no task
            if fresh is not None:
                self.seen.append(fresh)
                self.left -= fresh
            yield done

    def die(self) -> None:
        raise KeyboardInterrupt


class Killed(Stops):
    """Ends its process where `Stops` raises."""

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Watched(Serial):
    """Calls ``look(fn, call)`` before each call."""

    def __init__(self, look: Callable[[Any, Any], object]) -> None:
        self.look = look

    def map(self, fn: Any, calls: Any) -> Any:
        for call in calls:
            self.look(fn, call)
            yield fn(*call)


class Elsewhere(Serial):
    """An executor that may run on other machines."""

    one_machine = False


def _once(rival: bool, job: Job, task: Task) -> tuple[bool, Done]:
    return rival, tasks.run_task(job, task)


def _forced(rival: bool, job: Job, task: Task) -> tuple[bool, Done | None]:
    return rival, force(job, task) if rival else tasks.run_task(job, task)


@dataclass
class Twice(Executor):
    """An executor that runs a share of the tasks twice, as schedulers do that lose a worker.

    ``how`` is "receipt" (the second may meet the receipt of the first), "rewrite" (it writes all bytes
    again, on a cluster while the first still runs) or "late" (it does so when the level is done).
    """

    inner: Any
    how: str
    share: float = 0.2
    repeats: int = 0
    dice: random.Random = field(default_factory=lambda: random.Random(1))

    @property
    def workers(self) -> int:  # type: ignore[override]
        return int(self.inner.workers)

    def map(self, fn: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        if fn is not tasks.run_task:
            yield from self.inner.map(fn, calls)
            return
        late: list[tuple[Any, ...]] = []

        def doubled() -> Iterator[tuple[Any, ...]]:
            for call in calls:
                yield False, *call
                if self.dice.random() < self.share:
                    self.repeats += 1
                    if self.how == "late":
                        late.append(call)
                    else:
                        yield True, *call

        work = _once if self.how == "receipt" else _forced
        yield from (done for rival, done in self.inner.map(work, doubled()) if not rival)
        for _ in self.inner.map(force, late):
            pass


class Paused(Serial):
    """Says in its second call that it is at work, and waits there until it is told to go on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def map(self, fn: Any, calls: Any) -> Iterator[Any]:
        for number, call in enumerate(calls):
            if number == 1:
                (self.folder / "at work").touch()
                until((self.folder / "go on").exists)
            yield fn(*call)
