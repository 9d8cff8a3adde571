"""Warm and cold files: what is in the page cache before a measurement, and proof of it."""

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
HOLES = 1 << 40  # bytes of a file that takes no space
FILLED = 16 << 20  # of it that are read in a row
KEPT_FREE = 256 << 20  # above what the system keeps for itself
_libc = ctypes.CDLL(None, use_errno=True)


def evict(folders: Iterable[Path]) -> None:
    """Put the files below some folders out of the page cache."""
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
    """Have free memory be full of pages of a file of holes, all but ``keep`` bytes; returns how many it read.

    So it is on a machine in use, full of other files' pages: who wants memory has some of them dropped.  What
    is free, a virtual machine's host takes back within seconds, and to get it again costs more than a second
    for a gigabyte, ten times what copying it does: whoever comes first would pay for it.
    """
    done, most = 0, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    buffer = bytearray(1 << 20)
    while done < most and os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > keep:
        first = randrange(HOLES // FILLED) * FILLED  # at a place that is not cached yet
        for at in range(first, first + FILLED, len(buffer)):
            done += os.preadv(_holes(folder), [buffer], at)
    return done


@lru_cache(maxsize=1)
def _holes(folder: Path) -> int:
    """A file without a name, open until this process ends: when it goes, so do its pages."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(HOLES)
        return os.dup(file.fileno())


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
        for place, _, names in os.walk(folder):
            yield from (Path(place, name) for name in sorted(names))
