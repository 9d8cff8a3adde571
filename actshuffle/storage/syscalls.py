"""System calls that Python lacks: exchange two folders, set space for a file aside."""

from __future__ import annotations

import ctypes
import errno
import os
from functools import lru_cache
from typing import Any

from actshuffle.storage.place import Place, local_path


@lru_cache(maxsize=1)
def _libc() -> Any:
    """The C library, whose functions leave their error in ``ctypes.get_errno()``."""
    return ctypes.CDLL(None, use_errno=True)


def exchange(grown: Place, old: Place) -> None:
    """Exchange the names of two local folders, in one step where the system can (Linux: renameat2).

    What opens either name finds one of them whole at any time.
    """
    first, second = local_path(grown), local_path(old)
    assert first is not None
    assert second is not None
    if hasattr(_libc(), "renameat2"):
        here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if _libc().renameat2(here, os.fsencode(first), here, os.fsencode(second), swap) == 0:
            return
    aside = second.with_name(f"{second.name}.before")  # in three steps where it cannot
    second.rename(aside)
    first.rename(second)
    aside.rename(first)


def allocate(fd: int, size: int) -> None:
    """Set space for a new file aside on the disk in one step, where the file system can (Linux: fallocate).

    Otherwise ext4 does so block by block while pages of the cache are written, which takes up to a third of the time of
    writing.  The file stays empty: if the machine fails, one that was not written whole is too short, as ever.
    ``os.posix_fallocate`` would write into every block where the file system cannot.  Raises OSError if there is no
    space.
    """
    call, keep_size = getattr(_libc(), "fallocate", None), 1  # FALLOC_FL_KEEP_SIZE
    if call is None:
        return
    if call(fd, keep_size, ctypes.c_int64(0), ctypes.c_int64(size)):
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise OSError(code, os.strerror(code))
