"""Requests to object stores, counted in each process: a store bills them, and answers so many a second.

A count says what a client was asked for: a repetition after a failure is not seen.
"""

from __future__ import annotations

import threading
from collections import Counter

from actshuffle.limits import STORE_NAMES

_lock = threading.Lock()
_counted: Counter[str] = Counter()


def count(kind: str, number: int = 1) -> None:
    """Count requests of a kind: "get", "put", "list", "head" or "delete"."""
    with _lock:
        _counted[kind] += number


def taken() -> dict[str, int]:
    """The requests of this process since the last call, by kind; those that were none are left out."""
    global _counted
    with _lock:
        found, _counted = _counted, Counter()
    return dict(found)


def pages(number: int) -> int:
    """Requests that list, or delete, a number of objects."""
    return max(1, -(-number // STORE_NAMES))
