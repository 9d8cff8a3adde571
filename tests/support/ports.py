"""Ports for servers that cannot be told to choose one and say which."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from pathlib import Path

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> list[int]:
    """Ports of loopback at which nobody listens.

    The system gives none of them to a connection of its own accord, so that they are still free seconds later,
    whatever else the machine does.
    """
    least = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32768
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, max(least, 20_000)), 5_000):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"fewer than {count} ports are free")
