"""The machine this process runs on: its memory and its processors."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

# Limits of the container in bytes: cgroup v1 hard and soft; cgroup v2 hard, soft and softest.
CGROUP_FILES = (
    "memory/memory.limit_in_bytes",
    "memory/memory.soft_limit_in_bytes",
    "memory.max",
    "memory.high",
    "memory.low",
)


@lru_cache(maxsize=2)
def machine_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory of this machine, or of the container or resource limit that this process runs under.

    The same number as ``distributed.system.memory_limit()``, without its import, which takes half a second.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), resource.getrlimit(resource.RLIMIT_RSS)[1]]
    for name in CGROUP_FILES:
        with suppress(OSError, ValueError):  # no such limit: the file is absent, or says "max"
            limits.append(int((cgroup / name).read_text()))
    return min(limit for limit in limits if limit > 0)


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))
