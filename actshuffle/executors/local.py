"""Executors of this process.  The serial one is the specification of all others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from actshuffle.executors.base import Executor
from actshuffle.machine import cores
from actshuffle.storage import buffers

T = TypeVar("T")


class Serial(Executor):
    """One call after the other, in this process."""

    def map(self, fn: Callable[..., T], calls: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        for call in calls:
            yield fn(*call)

    def close(self) -> None:
        buffers.release()


class Threads(Executor):
    """Threads of this process, for work that numpy does without the interpreter's lock."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or cores()

    def map(self, fn: Callable[..., T], calls: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        with ThreadPoolExecutor(self.workers, "actshuffle") as pool:
            yield from pool.map(lambda call: fn(*call), calls)
