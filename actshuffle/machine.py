"""The machine this process runs on: its memory and its processors."""

from __future__ import annotations

import os


def machine_memory() -> int:
    """Memory of this machine or of the container that we are in, bytes."""
    from distributed.system import MEMORY_LIMIT

    return int(MEMORY_LIMIT)


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))
