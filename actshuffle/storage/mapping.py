"""Map files side by side into one range of addresses, so that a field over many files is one array.

::

    addresses  | file 0 .......... | gap | file 1 .......... | gap | file 2 ...
               0                         slot                      2 slots

Nothing is copied: the pages are those of the page cache, and numpy picks rows out of them at the speed of memory,
where a read for each row costs some microseconds.  The gaps belong to no file, and nobody may touch them.  The range
begins on a huge page, and so do slots of whole huge pages: where the page cache holds a file in huge pages, as it does
after large writes, the first touch of each costs one fault instead of 32, which together take as long as picking rows.

The system kills a process that touches a page beyond the end of a mapped file, or one that cannot be read (SIGBUS).
So sizes are checked before files are mapped, and `MappedFiles.check` looks at them again.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from actshuffle.arraytypes import I64, U8
from actshuffle.errors import StorageError
from actshuffle.limits import HUGE, PAGE

_NOTHING, _FIXED, _NORESERVE = 0, 0x10, 0x4000  # PROT_NONE, MAP_FIXED, MAP_NORESERVE of Linux; Python lacks them
_FAILED = ctypes.c_void_p(-1).value
_REFUSALS = (errno.ENOMEM, errno.ENODEV, errno.EACCES, errno.EPERM, errno.EINVAL, errno.EOVERFLOW)
_TOUCHED = 1 << 10  # bytes of a row from which on its pages are touched before it is copied
_SHARE = 4  # a process maps files by a quarter of its mappings at most; a file and its gap are two


class MappedFiles:
    """A range of ``size`` addresses, into which files are mapped for reading.

    The range is given back when neither this object nor an array of its bytes exists any more.
    """

    def __init__(self, size: int) -> None:
        self._range = _Range(size)
        self._files: list[tuple[Path, int]] = []

    def add(self, start: int, fd: int, nbytes: int, path: Path) -> bool:
        """Map the first bytes of a file from ``start`` on, a whole number of pages; False if the system refuses."""
        _check_size(path, os.fstat(fd).st_size, nbytes)
        try:
            self._range.map(start, fd, nbytes)
        except OSError as err:
            if err.errno not in _REFUSALS:
                raise
            return False
        self._files.append((path, nbytes))
        return True

    def rows(self, width: int) -> U8:
        """All bytes as read-only rows, uint8 ``(size // width, width)``."""
        found: U8 = np.asarray(self._range)
        return found[: len(found) // width * width].reshape(-1, width)

    def take(self, at: I64, out: U8) -> None:
        """Copy rows to uint8 ``(m, width)``; ``at`` are their places among all rows of that width, `rows`.

        A row begins with a wait for memory, and so does each of its pages.  Reading a word in every 4 KiB of all rows
        first lets these waits overlap: that makes rows of 1 KiB and more come a fifth faster.
        """
        width = out.shape[1]
        if width >= _TOUCHED and width % 8 == 0:
            words = self.rows(8).view(np.uint64)[:, 0]
            pages = at[:, None] * (width // 8) + np.arange(0, width // 8, PAGE // 8)
            np.take(words, pages, mode="clip")
        np.take(self.rows(width), at, axis=0, out=out, mode="clip")

    def check(self) -> None:
        """Raise `StorageError` if a file has become shorter than what is mapped of it."""
        for path, nbytes in self._files:
            try:
                size = path.stat().st_size
            except OSError as err:
                raise StorageError(f"{err.strerror}: {path}") from err
            _check_size(path, size, nbytes)


def reserve(count: int, slot: int) -> MappedFiles | None:
    """Addresses for ``count`` files, ``slot`` bytes apart; None if they are too many for one process."""
    if count > _most_mappings() // (2 * _SHARE):
        return None
    try:
        return MappedFiles(count * slot)
    except OSError as err:
        if err.errno not in _REFUSALS:
            raise
        return None


def _check_size(path: Path, size: int, nbytes: int) -> None:
    if size < nbytes:
        raise StorageError(f"file ends at byte {size}, {nbytes} were expected: {path}")


class _Range:
    """Reserved addresses; numpy takes it for an array of bytes, which keeps it alive."""

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        reserved = _map(None, size + HUGE, _NOTHING, flags, -1)
        self._address = -(-reserved // HUGE) * HUGE
        self.__array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (self._address, True), "version": 3}
        weakref.finalize(self, _libc().munmap, reserved, size + HUGE).atexit = False

    def map(self, start: int, fd: int, nbytes: int) -> None:
        assert start % PAGE == 0
        _map(self._address + start, nbytes, mmap.PROT_READ, mmap.MAP_SHARED | _FIXED, fd)


def _map(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    found: int = _libc().mmap(address, max(size, 1), protection, flags, fd, 0)
    if found == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found


@lru_cache(maxsize=1)
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes = [address, size, number, number, number, ctypes.c_long]
    libc.munmap.argtypes = [address, size]
    return libc


def _most_mappings() -> int:
    with suppress(OSError, ValueError):
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    return 1 << 16
