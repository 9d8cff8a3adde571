"""Exchange two local folders, so that what opens either name finds one of them whole at any time."""

from __future__ import annotations

import ctypes
import os

from actshuffle.storage.place import Place, local_path


def exchange(grown: Place, old: Place) -> None:
    """Exchange the names of two local folders, in one step where the system can (Linux: renameat2)."""
    first, second = local_path(grown), local_path(old)
    assert first is not None
    assert second is not None
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if libc.renameat2(here, os.fsencode(first), here, os.fsencode(second), swap) == 0:
            return
    aside = second.with_name(f"{second.name}.before")  # in three steps where it cannot
    second.rename(aside)
    first.rename(second)
    aside.rename(first)
