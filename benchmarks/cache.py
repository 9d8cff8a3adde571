"""Warm and cold files: set the state of the page cache before a measurement, and check it."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from random import randrange

import numpy as np

PAGE = 4096
HOLES = 1 << 40  # bytes of a sparse file, which takes no space
FILLED = 16 << 20  # bytes of it that are read in a row
KEPT_FREE = 256 << 20  # free bytes, above the system's reserve
_libc = ctypes.CDLL(None, use_errno=True)


def evict(folders: Iterable[Path]) -> None:
    """Evict files, and those below some folders, from the page cache."""
    for path in _files(folders):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # dirty pages cannot be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def warm(folders: Iterable[Path]) -> None:
    """Read the files below some folders, so that they are in the page cache."""
    buffer = bytearray(1 << 20)
    for path in _files(folders):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def fill_memory(folder: Path, keep: int = KEPT_FREE) -> int:
    """Fill free memory, all but ``keep`` bytes, with pages of a sparse file; returns the number of bytes read.

    Memory is full of other files' pages on any machine in use, and whoever needs some has these pages dropped.
    A virtual machine's host takes free memory back within seconds; to get it again costs more than a second per
    gigabyte, ten times as much as copying it, and whoever comes first would pay for it.
    """
    done, most = 0, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    buffer = bytearray(1 << 20)
    while done < most and os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > keep:
        first = randrange(HOLES // FILLED) * FILLED  # a place that is not cached yet
        for at in range(first, first + FILLED, len(buffer)):
            done += os.preadv(_holes(folder), [buffer], at)
    return done


@lru_cache(maxsize=1)
def _holes(folder: Path) -> int:
    """A file without a name, open until this process ends; its pages are dropped with it."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(HOLES)
        return os.dup(file.fileno())


def settle(folders: Iterable[Path]) -> None:
    """Make files durable, so that write-back does not slow the next measurement."""
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
            with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as map_:
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
        if folder.is_file():
            yield folder
        for place, _, names in os.walk(folder):
            yield from (Path(place, name) for name in sorted(names))
