"""Shares of a store: ranges of its rows, or documents and rows by lots that depend on their numbers and a seed alone.

::

    lot(seed, n)  = word n of Philox(SeedSequence(seed, spawn_key=(6,))).random_raw      uint64, rule 1
    part          = the one whose share of [0, 2^64) holds the lot        0 |----train----|-val-|-test-| 2^64

So a number keeps its part whatever is added to a store, and parts of one split have no number in common.

>>> cuts = dict(train=(0.0, 0.8), val=(0.8, 1.0))
>>> [name for n in range(6) for name, cut in cuts.items() if in_share(lots(0, np.array([n])), *cut)[0]]
['train', 'train', 'train', 'val', 'train', 'train']
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arraytypes import U64
from actshuffle.errors import RequestError
from actshuffle.ordering.keys import Stream, words_at
from actshuffle.units import counted

Share = int | float | str

RULE = 1  # the version of the rule; another one would put numbers elsewhere
_SLACK = 1e-9  # by which fractions may miss 1 and still count as all


def lots(seed: int, numbers: NDArray[np.integer[Any]]) -> U64:
    """The lots of some numbers; negative ones count modulo 2^64."""
    different, back = np.unique(numbers, return_inverse=True)
    return words_at(seed, Stream.LOT, different.astype(np.int64).view(np.uint64))[back]


def in_share(words: U64, start: float, stop: float) -> NDArray[np.bool_]:
    """Which lots lie in the share ``[start, stop)`` of all."""
    low, high = (math.floor(Fraction(edge) * (1 << 64)) for edge in (start, stop))
    if low >= high:
        return np.zeros(len(words), bool)
    return (words >= np.uint64(low)) & (words <= np.uint64(high - 1))


def edges(parts: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The ends of the interval of lots that each part takes, in the order of the parts; ``"rest"`` ends at 1.

    >>> edges({"val": 0.1, "train": "rest"})
    {'val': (0.0, 0.1), 'train': (0.1, 1.0)}
    """
    if not isinstance(parts, Mapping) or not parts:
        raise RequestError("give at least one part, as a dict of sizes by name")
    if list(parts.values()).count("rest") > 1:
        raise RequestError("only one part can be the rest")
    for name, share in parts.items():
        if share != "rest" and (type(share) is not float or not 0 < share <= 1):
            raise RequestError(
                f'part {name}: a split by a rule takes fractions above 0 up to 1, and "rest", since the number of rows '
                f"in a part changes when the store grows; got {share!r}"
            )
    given = [share for share in parts.values() if share != "rest"]
    if (total := math.fsum(given)) > 1 + _SLACK:
        raise RequestError(f"the fractions add up to {total:g}, and all is 1")
    rest = max(0.0, 1 - total)
    if "rest" in parts.values() and rest <= _SLACK:
        raise RequestError(f"no rest is left: the fractions add up to {total:g}")
    found, taken = {}, list[float]()
    for name, share in parts.items():
        start = round(math.fsum(taken), 12)
        taken.append(rest if share == "rest" else share)
        stop = round(math.fsum(taken), 12)  # 0.9 is one edge, whether it is 0.9 or 0.7 and 0.2
        found[name] = start, 1.0 if stop > 1 - _SLACK else stop
    return found


def shares(rows: int, parts: Mapping[str, Share]) -> dict[str, tuple[int, int]]:
    """Row ranges, one after the other, by name.

    An int is a number of rows, a float a fraction of all rows, and "rest" (at most once) all remaining rows.
    Fractions are rounded where they end, so fractions that add up to one leave out no row.

    >>> shares(1000, {"train": 0.9, "test": 50, "spare": "rest"})
    {'train': (0, 900), 'test': (900, 950), 'spare': (950, 1000)}
    """
    if not isinstance(parts, Mapping) or not parts:
        raise RequestError("give at least one part, as a dict of sizes by name")
    if list(parts.values()).count("rest") > 1:
        raise RequestError("only one part can be the rest")
    wanted = {name: _rows_of(name, share, rows) for name, share in parts.items()}
    total = sum(w for w in wanted.values() if w is not None)
    if total > rows + 1e-9 * rows:
        raise RequestError(f"{counted(round(total), 'row')} are asked for in total, and there are {rows:,}")
    counts, exact = {}, 0.0
    for name, count in wanted.items():
        if isinstance(count, float):
            counts[name], exact = round(exact + count) - round(exact), exact + count
        else:
            counts[name] = count or 0
    spare = rows - sum(counts.values())
    ends = np.cumsum([spare if wanted[name] is None else count for name, count in counts.items()])
    starts = [0, *ends[:-1].tolist()]
    return {name: (start, int(end)) for name, start, end in zip(counts, starts, ends, strict=True)}


def _rows_of(name: str, share: Share, rows: int) -> float | None:
    """The rows that a share asks for, not rounded; None for the rest."""
    if share == "rest":
        return None
    if not isinstance(share, Real) or isinstance(share, bool) or not share >= 0:
        raise RequestError(f'part {name}: {share!r} is no number of rows, no fraction and not "rest"')
    if isinstance(share, Integral):
        return int(share)
    if share > 1:
        raise RequestError(f"part {name}: a fraction is at most 1, got {share}; write counts as whole numbers")
    return float(share) * rows
