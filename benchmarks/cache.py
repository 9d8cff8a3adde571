"""Warm and cold files: what is in the page cache before a measurement, and proof of it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

PAGE = 4096
_DROP = Path("/proc/sys/vm/drop_caches")
_libc = ctypes.CDLL(None, use_errno=True)


def evict(folders: Iterable[Path]) -> None:
    """Put the files below some folders out of the page cache: all caches where we may, else theirs."""
    for path in _files(folders):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # dirty pages cannot be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    with contextlib.suppress(OSError):
        _DROP.write_text("1")


def warm(folders: Iterable[Path]) -> None:
    """Read the files below some folders, so that they are in the page cache."""
    buffer = bytearray(1 << 20)
    for path in _files(folders):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def touch_free_memory(nbytes: int) -> None:
    """Have the machine own so much of its free memory, or half of what is free.

    A virtual machine's host takes free memory back within seconds, and to get it again costs more than a
    second for a gigabyte, ten times what copying it does: whoever comes first would pay for it.
    """
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = min(nbytes, available // 2) // PAGE * PAGE
    if not size:
        return
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        pages = np.frombuffer(block, np.uint8)
        pages[::PAGE] = 1
        del pages


def settle(folders: Iterable[Path]) -> None:
    """Make files durable, so that writing them back does not weigh on what is measured next."""
    for path in _files(folders):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def cached_share(folders: Iterable[Path]) -> float:
    """Share of the files' pages that are in the page cache, by mincore(2), which loads none."""
    pages = hits = 0
    for path in _files(folders):
        size = path.stat().st_size
        if size:
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as map_,
            ):
                view = np.frombuffer(map_, np.uint8)
                found = np.zeros(-(-size // PAGE), np.uint8)
                args = view.ctypes.data, size, found.ctypes.data
                if _libc.mincore(*map(ctypes.c_void_p, args)):
                    return -1.0
                del view
            pages, hits = pages + len(found), hits + int((found & 1).sum())
    return hits / pages if pages else -1.0


def _files(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        for place, _, names in os.walk(folder):
            yield from (Path(place, name) for name in sorted(names))
