"""Check that the keys of an output's rows ascend.

The key of a row is (first word, second word, row), a total order.  Second words are made only where first words are
equal or where the neighbour is not known.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from actshuffle.arraytypes import U64
from actshuffle.ordering.keys import Keys

# Up to so many rows first words are looked up in a table of them all, 8 bytes a row, which takes 5 ns a row; beyond,
# each is computed by itself, which takes 70.
TABLE_ROWS = 1 << 24


def check_ascent(keys: Keys, rows: U64, n: int, before: U64 | None) -> tuple[NDArray[np.int64], U64]:
    """Find the descents of rows that follow each other in an output of ``n`` rows; there is at least one row.

    Returns the positions of `descents`, and the keys of the first and the last row, uint64 ``(2, 3)``.
    """
    inside = bool((rows < np.uint64(n)).all())
    if inside and n <= TABLE_ROWS:
        hi = np.take(_table(keys, n), rows.astype(np.int64), mode="clip")  # twice as fast as an index
    else:
        hi = keys.hi_at(rows)
    if inside and bool((hi[1:] > hi[:-1]).all()):
        ends = np.stack([hi[[0, -1]], keys.lo_at(rows[[0, -1]]), rows[[0, -1]]], axis=1)
        if before is None or tuple(before) < tuple(ends[0]):
            return np.zeros(0, np.int64), ends
    found = full_keys(keys, rows)
    return descents(found, rows, n, before), found[[0, -1]]


def full_keys(keys: Keys, rows: U64) -> U64:
    """hi, lo (where two neighbours' hi are equal, else 0) and row, uint64 ``(m, 3)``."""
    hi, lo = keys.hi_at(rows), np.zeros(len(rows), np.uint64)
    tied = np.zeros(len(rows), bool)
    tied[1:] = hi[1:] == hi[:-1]
    tied[:-1] |= tied[1:]
    tied[:1] = tied[-1:] = True  # neighbours beyond the edges are not known here
    lo[tied] = keys.lo_at(rows[tied])
    return np.stack([hi, lo, rows], axis=1)


def descents(keys: U64, rows: U64, n: int, before: U64 | None) -> NDArray[np.int64]:
    """Positions of keys that do not exceed the key before them, and of rows that the source does not have."""
    both = keys if before is None else np.concatenate([before[None], keys])
    (h0, l0, r0), (h1, l1, r1) = both[:-1].T, both[1:].T
    ascends = (h0 < h1) | ((h0 == h1) & ((l0 < l1) | ((l0 == l1) & (r0 < r1))))
    bad = np.flatnonzero(~ascends) + (1 if before is None else 0)
    return np.union1d(bad, np.flatnonzero(rows >= np.uint64(n)))


def _made_once(make: Callable[[Keys, int], U64]) -> Callable[[Keys, int], U64]:
    """Keep the last result of ``make``; several threads wait for one result instead of making one each."""
    kept, lock = lru_cache(maxsize=1)(make), threading.Lock()

    def made(keys: Keys, rows: int) -> U64:
        with lock:
            return kept(keys, rows)

    return made


@_made_once
def order_of(keys: Keys, rows: int) -> U64:
    """The order of all rows, uint64, made once in this process; 40 bytes a row."""
    return keys.order(rows).astype(np.uint64)


@_made_once
def _table(keys: Keys, rows: int) -> U64:
    """First key words of all rows, from the definition: numpy's own generator, from its start."""
    return keys.hi(0, rows)
