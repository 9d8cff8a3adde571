"""The memory to ask for, where a plan needs more than was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from actshuffle.errors import InfeasibleError
from actshuffle.limits import MOST
from actshuffle.units import parse_bytes, size_at_least


class TooSmallError(InfeasibleError):
    """More memory would do; its text ends where the advice begins."""


def enough_memory(made: Callable[[int], Any], memory: int) -> str | None:
    """A size of memory for which ``made`` makes a plan, at most 2% larger than it must be; None if there is none."""

    def plans(size: int) -> bool:
        try:
            made(size)
        except InfeasibleError:
            return False
        return True

    low, high = memory, 2 * memory
    while not plans(high):
        low, high = high, 2 * high
        if high > MOST:
            return None
    while high - low > high // 256:
        middle = (low + high) // 2
        low, high = (low, middle) if plans(middle) else (middle, high)
    while not plans(parse_bytes(size_at_least(high))):
        high += high // 256 + 1
    return size_at_least(high)
