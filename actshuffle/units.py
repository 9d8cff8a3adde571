"""Read and write sizes, counts and durations in the forms that people use."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from numbers import Integral
from os import PathLike
from typing import Any

from actshuffle.errors import RequestError

_FACTOR: dict[str, int] = {
    "": 1,
    **{u: 1000**i for i, u in enumerate(["", "k", "m", "g", "t", "p", "e"]) if u},
    **{u + "b": 1000**i for i, u in enumerate(["", "k", "m", "g", "t", "p", "e"])},
    **{u + "ib": 1024**i for i, u in enumerate(["", "k", "m", "g", "t", "p", "e"]) if u},
}


def parse_bytes(text: str | int | float) -> int:
    """Read a number of bytes from ``"8GB"`` (10^9), ``"8GiB"`` (2^30), ``"1.5 MB"`` or a plain number.

    >>> parse_bytes("8GB"), parse_bytes("64KiB"), parse_bytes(512)
    (8000000000, 65536, 512)
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e\+?[0-9]+)?)\s*([a-z]*)\s*", str(text).lower())
    if not match or match[2] not in _FACTOR or float(match[1]) > 1e30:
        raise RequestError(f"cannot read {text!r} as a size; write it like 512MB, 8GB or 64KiB")
    return round(float(match[1]) * _FACTOR[match[2]])


def parse_count(text: str | int | float) -> int:
    """Read a whole number from ``"100e9"``, ``"1_000"`` or an int; exact below 2^53.

    >>> parse_count("100e9"), parse_count("1_000")
    (100000000000, 1000)
    """
    try:
        value = int(text) if not isinstance(text, float) else text
    except (ValueError, TypeError):
        try:
            value = float(text)
        except (ValueError, TypeError):
            raise RequestError(f"cannot read {text!r} as a whole number") from None
    if value != value or value in (float("inf"), float("-inf")) or value != int(value):
        raise RequestError(f"{text!r} is not a whole number")
    return int(value)


def format_bytes(n: float) -> str:
    """Write bytes in decimal units with three digits: ``1.23 GB``."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(n) < 999.5:  # from here on three digits round to 1000
            return f"{n:.0f} B" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} PB" if n < 999.5 else f"{n:,.0f} PB"


def size_at_least(n: float) -> str:
    """A size that people can give and that is no less than ``n`` bytes: three digits, rounded up.

    >>> size_at_least(46_100_001), size_at_least(1_230_000_001)
    ('46.2MB', '1.24GB')
    """
    unit = 1000 ** max(0, min(5, (len(str(math.ceil(n))) - 1) // 3))
    step = max(1, 10 ** (len(str(math.ceil(n))) - 3))
    rounded = -(-math.ceil(n) // step) * step
    return f"{rounded / unit:.6g}{('B', 'KB', 'MB', 'GB', 'TB', 'PB')[round(math.log10(unit)) // 3]}"


def counted(n: int, noun: str, plural: str = "") -> str:
    """A number with its noun.

    >>> counted(1, "row"), counted(1200, "row"), counted(2, "batch", "batches")
    ('1 row', '1,200 rows', '2 batches')
    """
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def dropped_text(counts: Mapping[str, int]) -> str:
    """Counts of dropped rows by the option that dropped them, in words; empty if there are none.

    >>> dropped_text({"prefix": 1200, "skip_first": 0, "drop_norm": 3})
    '1,200 by --prefix, 3 by --drop-norm'
    """
    return ", ".join(f"{count:,} by --{option.replace('_', '-')}" for option, count in counts.items() if count)


def format_seconds(s: float) -> str:
    """Write a duration as ``4.2 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    if s < 59.95:
        return f"{s:.1f} s"
    minutes, seconds = divmod(round(s), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def whole(name: str, value: Any, least: int = 0) -> int:
    """A whole number of at least ``least``, Python's or numpy's; True is none."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise RequestError(f"{name} must be a whole number of at least {least}, got {repr(value)[:60]}")
    return int(value)


def several(name: str, value: Any, *, of: str) -> list[Any]:
    """The items of a list or another iterable; text is no list of its letters, and a path none of its parts."""
    if isinstance(value, str | bytes | PathLike) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list of {of}, got {repr(value)[:60]}")
    return list(value)


def switches(**values: Any) -> None:
    """Refuse anything but True and False: a text such as "no" would count as yes."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be True or False, got {repr(value)[:60]}")
