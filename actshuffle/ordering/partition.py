"""The two row-moving decisions of the engine, as numpy kernels on keys: into which bucket, in which order.

::

    split     keys of a block ->  bucket of each row  ->  rows grouped by bucket, cut points
    leaf      keys of a leaf  ->  rows in key order

Both follow the total order (hi, lo, source row) of keys.py.  `lo` is computed only for rows whose
`hi` meets an equal one.

>>> keys = Keys(0)
>>> hi, rows = keys.hi(0, 8), np.arange(8, dtype=np.uint64)
>>> key_order(keys, hi, rows)
array([1, 4, 5, 6, 2, 0, 3, 7])
>>> buckets = bucket_of(keys, hi, rows, boundaries_at(keys, np.array([2, 3], np.uint64)))
>>> group(buckets, 3)
(array([1, 4, 5, 6, 0, 2, 3, 7]), array([0, 4, 6, 8]))
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arraytypes import I64, U64
from actshuffle.ordering.keys import Keys


def boundaries_at(keys: Keys, rows: U64) -> U64:
    """The full keys of some rows, uint64 ``(m, 3)``: hi, lo, source row."""
    return np.stack([keys.hi_at(rows), keys.lo_at(rows), rows], axis=1)


def bucket_of(keys: Keys, hi: U64, source_row: U64, bounds: U64) -> NDArray[np.uint16]:
    """The bucket of each row, uint16 ``(m,)``.

    ``bounds`` is uint64 ``(k - 1, 3)``, ascending full keys; a row goes to bucket j when exactly j
    bounds are less than or equal to its key.
    """
    buckets = np.searchsorted(bounds[:, 0], hi, side="right").astype(np.uint16)
    if len(bounds):
        met = np.flatnonzero(bounds[np.maximum(buckets, 1) - 1, 0] == hi)
        if len(met):
            buckets[met] = _buckets_by_full_key(keys, hi[met], source_row[met], bounds)
    return buckets


def group(buckets: NDArray[np.uint16], count: int) -> tuple[I64, I64]:
    """Group rows by bucket, keeping their order within it.

    Returns ``order`` int64 ``(m,)`` and ``cuts`` int64 ``(count + 1,)``: bucket j is rows
    ``order[cuts[j]:cuts[j + 1]]``.
    """
    order = np.argsort(buckets, kind="stable")
    cuts = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(buckets, minlength=count), out=cuts[1:])
    return order, cuts


def key_order(keys: Keys, hi: U64, source_row: U64) -> I64:
    """The order of the keys, int64 ``(m,)``: ``hi[order]`` ascends, ties by lo, then source row.

    Numbers that hold the leading bits of a key and, below them, the number of its row are sorted by themselves:
    numpy does that several times faster than an argsort.  Then the few rows that agree on the leading bits, of
    which the keys' range has 32 at least, are sorted by their full keys.
    """
    if len(hi) < 2:
        return np.zeros(len(hi), np.int64)
    low = hi.min()
    mask = np.uint64((1 << (len(hi) - 1).bit_length()) - 1)
    packed = hi - low
    packed <<= np.uint64(min(64 - int(hi.max() - low).bit_length(), 63))  # all are zero where it would be 64
    packed &= ~mask
    packed |= np.arange(len(hi), dtype=np.uint64)
    packed.sort()
    equal = (packed[1:] ^ packed[:-1]) <= mask
    packed &= mask
    order: I64 = packed.view(np.int64)
    if equal.any():
        tied = np.zeros(len(hi), bool)
        tied[1:] = equal
        tied[:-1] |= equal
        at = np.flatnonzero(tied)
        part = order[at]
        order[at] = part[_full_order(keys, hi[part], source_row[part])]
    return order


def _full_order(keys: Keys, hi: U64, source_row: U64) -> NDArray[Any]:
    """Argsort by (hi, lo, source row); lo is computed only where two hi are equal."""
    lo = np.zeros_like(hi)
    _, inverse, counts = np.unique(hi, return_inverse=True, return_counts=True)
    tied = counts[inverse] > 1
    lo[tied] = keys.lo_at(source_row[tied])
    return np.lexsort((source_row, lo, hi))


def _buckets_by_full_key(keys: Keys, hi: U64, source_row: U64, bounds: U64) -> NDArray[Any]:
    # Rows and bounds in one sort; a bound goes before the row that equals it, since buckets are
    # closed on the left.  The bucket is the number of bounds passed.
    lo = keys.lo_at(source_row)
    is_row = np.repeat(np.array([False, True]), [len(bounds), len(hi)])
    both = [np.concatenate([bounds[:, i], x]) for i, x in enumerate((hi, lo, source_row))]
    order = np.lexsort((is_row, both[2], both[1], both[0]))
    passed = np.cumsum(~is_row[order])
    buckets = np.empty(len(order), np.int64)
    buckets[order] = passed
    return buckets[len(bounds) :]
