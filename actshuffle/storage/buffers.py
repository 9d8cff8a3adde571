"""Memory that is used again: one arena per thread, so that pages are touched for the first time once.

A page fault costs up to 11 us per 4 KiB on a virtual machine, several times what copying those bytes
costs, so a fresh `numpy.empty` per task would make memory the slowest device of all.  And a thread that
writes one buffer while the next is filled; and what makes zarr's own buffers go when they are freed.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from actshuffle.limits import PAGE

HUGE = 2 << 20  # bytes of a huge page


class Arena:
    """Hands out aligned arrays from one block of memory, from its start again after each `reset`."""

    def __init__(self) -> None:
        self._memory: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._at = 0

    def reset(self, nbytes: int) -> Arena:
        """Start over with room for ``nbytes``; arrays handed out before are no longer valid."""
        if nbytes > len(self._memory):
            self._memory = np.empty(0, np.uint8)  # let the old block go first
            self._memory = pages(max(nbytes, PAGE), huge_from=64 << 20)  # they round up
        self._at = 0
        return self

    def take(self, shape: tuple[int, ...], dtype: DTypeLike = np.uint8) -> NDArray[Any]:
        """An uninitialised C-contiguous array, aligned to pages, so that it can be written directly."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        start, self._at = self._at, self._at + padded(nbytes)
        if self._at > len(self._memory):
            raise AssertionError(f"arena of {len(self._memory)} bytes asked for {self._at}")
        return self._memory[start : start + nbytes].view(dtype).reshape(shape)


def pages(nbytes: int, *, huge_from: int = HUGE) -> NDArray[np.uint8]:
    """Fresh memory that begins on a page, in huge pages where it is large enough to have some.

    With O_DIRECT a device is told of every page by itself: reading into pages of 4 KiB took 2 to 3
    times as long on a virtio disk as reading into huge ones.
    """
    # Private: by default a process forked from this one would share the pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if not hasattr(mmap, "MADV_HUGEPAGE") or nbytes < huge_from:
        return np.frombuffer(mmap.mmap(-1, nbytes, flags=flags), np.uint8)
    block = mmap.mmap(-1, nbytes + HUGE, flags=flags)  # what is over is never touched
    block.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(block, np.uint8)
    start = -memory.ctypes.data % HUGE
    return memory[start : start + nbytes]


def padded(nbytes: int) -> int:
    """What an array of ``nbytes`` takes from an arena."""
    return -(-nbytes // PAGE) * PAGE


class Behind:
    """Runs calls on one other thread, in order, while the caller fills the next buffer.

    Two buffers take turns: `turn` waits until the call that used the next one is done.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._running: list[Future[None] | None] = [None, None]
        self.turn = 0

    def submit(self, call: Callable[..., None], *args: Any) -> None:
        """Start a call that reads the buffer whose turn it is; the turn passes to the other one."""
        self._running[self.turn] = self._pool.submit(call, *args)
        self.turn ^= 1
        self.wait(self.turn)

    def wait(self, turn: int) -> None:
        running, self._running[turn] = self._running[turn], None
        if running is not None:
            running.result()


@contextmanager
def behind() -> Iterator[Behind]:
    """A `Behind` whose calls are all done, and whose errors are raised, when the block ends."""
    with ThreadPoolExecutor(1, thread_name_prefix="actshuffle-write") as pool:
        worker = Behind(pool)
        yield worker
        worker.wait(worker.turn)
        worker.wait(worker.turn ^ 1)


# glibc's mallopt(3) parameters, and where its own adjusting of them ends.
_TRIM, _TRIM_MOST = -1, 64 << 20
_MMAP, _MMAP_MOST = -3, 32 << 20
_RETURNED_FROM = 256 << 10


@contextmanager
def lean_heap() -> Iterator[None]:
    """While zarr codes chunks: what is freed goes back to the system at once.

    Left to itself, glibc serves blocks up to the largest ever freed (32 MB at most) from heaps of which
    each thread has one, and keeps them.  With zarr's pool of threads, 20 MB were held after reading in
    pieces of 2 MB, and 7 output objects while one was written.  With fixed thresholds it is what the
    plan says.  After that they stand where they end up in any process that has used large arrays.
    """
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    try:
        mallopt(_MMAP, _RETURNED_FROM)
        mallopt(_TRIM, _RETURNED_FROM)
        yield
    finally:
        mallopt(_MMAP, _MMAP_MOST)
        mallopt(_TRIM, _TRIM_MOST)


@lru_cache(maxsize=1)
def _mallopt() -> Callable[[int, int], int] | None:
    """The C library's function, unless it has none or somebody (Dask's nanny) has fixed the thresholds."""
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return None
    found: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    return found


_local = threading.local()


def arena() -> Arena:
    """This thread's arena."""
    if not hasattr(_local, "arena"):
        _local.arena = Arena()
    held: Arena = _local.arena
    return held


def release() -> None:
    """Give this thread's arena back to the system."""
    if hasattr(_local, "arena"):
        del _local.arena
