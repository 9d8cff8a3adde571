"""Reused memory: one arena per thread, so that each page is faulted in only once.

A page fault costs up to 11 us per 4 KiB on a virtual machine, several times the cost of copying those bytes,
so a fresh `numpy.empty` per task would make memory the slowest device of all.

Also here: `kept`, which keeps what a process made for one task for the next ones; `Behind`, a thread that writes one
buffer while the next is filled; and settings of the C library's heap: `lean_heap` returns zarr's freed buffers to the
system, and `roomy_heap` keeps freed memory that is soon needed again.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from actshuffle.limits import HUGE, PAGE
from actshuffle.units import counted

T = TypeVar("T")
K = TypeVar("K")


class Arena:
    """Hands out aligned arrays from one block of memory, from its start again after each `reset`."""

    def __init__(self) -> None:
        self._memory: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._at = 0

    def reset(self, nbytes: int, *, huge_from: int = 64 << 20) -> Arena:
        """Start over with room for ``nbytes``; arrays handed out before become invalid.

        New memory of ``huge_from`` bytes and more is in huge pages, so that its size is rounded up.
        """
        if nbytes > len(self._memory):
            self._memory = np.empty(0, np.uint8)  # frees the old block first
            self._memory = pages(max(nbytes, PAGE), huge_from=huge_from)
        self._at = 0
        return self

    def take(self, shape: tuple[int, ...], dtype: DTypeLike = np.uint8) -> NDArray[Any]:
        """An uninitialised C-contiguous array, aligned to pages so that O_DIRECT can write from it."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        start, self._at = self._at, self._at + padded(nbytes)
        if self._at > len(self._memory):
            raise AssertionError(f"arena of {counted(len(self._memory), 'byte')} asked for {self._at}")
        return self._memory[start : start + nbytes].view(dtype).reshape(shape)


def pages(nbytes: int, *, huge_from: int = HUGE) -> NDArray[np.uint8]:
    """Fresh memory that begins on a page; in huge pages from ``huge_from`` bytes.

    With O_DIRECT the device gets the address of every page: on a virtio disk, reads into pages of 4 KiB took
    2 to 3 times as long as reads into huge pages.
    """
    # Private, since by default a process forked from this one would share the pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if not hasattr(mmap, "MADV_HUGEPAGE") or nbytes < huge_from:
        return np.frombuffer(mmap.mmap(-1, nbytes, flags=flags), np.uint8)
    block = mmap.mmap(-1, nbytes + HUGE, flags=flags)  # the excess is never touched
    block.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(block, np.uint8)
    start = -memory.ctypes.data % HUGE
    return memory[start : start + nbytes]


def padded(nbytes: int) -> int:
    """Bytes that an array of ``nbytes`` takes from an arena."""
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
    """A `Behind`; when the block ends, all its calls are done and their errors raised."""
    with ThreadPoolExecutor(1, thread_name_prefix="actshuffle-write") as pool:
        worker = Behind(pool)
        yield worker
        worker.wait(worker.turn)
        worker.wait(worker.turn ^ 1)


# Parameters of glibc's mallopt(3), and the most that glibc itself adjusts them to.
_TRIM, _TRIM_MOST = -1, 64 << 20
_MMAP, _MMAP_MOST = -3, 32 << 20
_RETURNED_FROM = 256 << 10
_ROOMY_MMAP, _ROOMY_TRIM = 8 << 20, 16 << 20  # twice a piece that a store sends; more would be kept by every thread
_TRIM_SECONDS = 4.0
_FIXED = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}  # variables that fix the thresholds


@contextmanager
def lean_heap() -> Iterator[None]:
    """Return freed memory to the system at once, while zarr codes chunks.

    By default glibc serves blocks up to the largest ever freed (32 MB at most) from one heap per thread, and
    keeps them.  With zarr's pool of threads, 20 MB were held after reading in pieces of 2 MB, and 7 output
    objects while one was written.  With fixed thresholds memory is as planned.  Afterwards the thresholds are
    those of any process that has used large arrays.
    """
    mallopt = _mallopt()
    if mallopt is None or (_FIXED & os.environ.keys() and not roomy_heap.cache_info().currsize):
        yield  # as the environment, for example Dask's nanny, has it
        return
    try:
        mallopt(_MMAP, _RETURNED_FROM)
        mallopt(_TRIM, _RETURNED_FROM)
        yield
    finally:
        roomy = roomy_heap.cache_info().currsize
        mallopt(_MMAP, _ROOMY_MMAP if roomy else _MMAP_MOST)
        mallopt(_TRIM, _ROOMY_TRIM if roomy else _TRIM_MOST)


@lru_cache(maxsize=1)
def roomy_heap() -> bool:
    """Keep freed memory for the next block of the same size, from now on; False if this C library cannot.

    Clients of object stores take new memory for every piece that they receive.  Dask's nanny sets
    ``MALLOC_TRIM_THRESHOLD_``, which also fixes the size from which glibc asks the system for each block at 128 KiB;
    the pages of every piece are then mapped, cleared and unmapped anew, which was a third of the processor time of a
    run.
    """
    mallopt = _mallopt()
    return mallopt is not None and bool(mallopt(_MMAP, _ROOMY_MMAP)) and bool(mallopt(_TRIM, _ROOMY_TRIM))


@contextmanager
def settled_heap() -> Iterator[None]:
    """`roomy_heap` where the environment fixes the thresholds, as Dask's nanny does; elsewhere glibc adapts them.

    numpy takes new memory for every temporary array.  The heap keeps freed memory; at the end of the block, at most
    once in `_TRIM_SECONDS`, it returns its free pages, which would otherwise add up from task to task.
    """
    if not _FIXED & os.environ.keys() or not roomy_heap():
        yield
        return
    try:
        yield
    finally:
        _trim(int(time.monotonic() // _TRIM_SECONDS))


@lru_cache(maxsize=1)
def _trim(period: int) -> None:
    """Return all free pages to the system, once in each period."""
    ctypes.CDLL(None).malloc_trim(0)


@lru_cache(maxsize=1)
def _mallopt() -> Callable[[int, int], int] | None:
    """The C library's function, if it has one."""
    found: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    return found


_local = threading.local()


def arena() -> Arena:
    """This thread's arena."""
    if not hasattr(_local, "arena"):
        _local.arena = Arena()
    held: Arena = _local.arena
    return held


@lru_cache(maxsize=1)
def kept(make: Callable[[K], T], key: K) -> T:
    """``make(key)``, kept in this process until another is asked for, or `release` is called."""
    return make(key)


def release() -> None:
    """Give this thread's arena, and what this process has kept, back to the system."""
    kept.cache_clear()
    if hasattr(_local, "arena"):
        del _local.arena
