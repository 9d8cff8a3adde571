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
# A container's hard limit, its use, and its pages by kind; cgroup v1 and v2.
CGROUP_USAGE = (
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ("memory.max", "memory.current", "memory.stat"),
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


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that are free, or that the page cache would give back, here and within this container's limit."""
    found = [machine_memory()]
    with suppress(OSError, ValueError, StopIteration):
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) << 10)
    for limit, usage, cache in CGROUP_USAGE:
        with suppress(OSError, ValueError):
            facts = dict(line.split() for line in (cgroup / cache).read_text().splitlines())
            dropped = sum(int(facts.get(name, 0)) for name in ("inactive_file", "active_file"))
            found.append(int((cgroup / limit).read_text()) - int((cgroup / usage).read_text()) + dropped)
    return max(0, min(found))


def beyond_machine(memory: int | None) -> str:
    """The refusal of a limit that no worker here can reach alive; an empty text for others."""
    there: float = machine_memory()
    if memory is None or memory <= there:
        return ""
    given, there = round(memory / 1e9, 1), round(there / 1e9, 1)
    return (
        f"--memory {given:,g} GB is more than the {there:,g} GB of this machine, which kills a process that takes more "
        "than there is: give less"
    )


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))
