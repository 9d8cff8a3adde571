"""The rows of every leaf, from one look at all keys.

The leading bits of a key name its *bin*.  Every range of rows is grouped by bin, and the sizes of the bins say which
of them hold the ranks of a leaf, so that no boundary between leaves must be known::

    range 0 of the rows   | bin 0 | bin 1 | bin 2 | bin 3 | ...
    range 1               | bin 0 | bin 1 | bin 2 | bin 3 | ...
    ranks of one leaf            ^^^^^^^^^^^^^^^^^^^

A leaf reads its bins from each range, orders their rows by key, and drops the few rows before its first rank and
after its last.

>>> keys = Keys(0)
>>> words, cuts = binned(keys.hi(0, 8), 0, bits=2)
>>> words[1], cuts
(array([1, 4, 5, 2, 6, 0, 3, 7], dtype=uint64), array([0, 3, 5, 6, 8]))
>>> first_rank, begin, end = runs(cuts[None], np.array([3, 6]))[0].tolist()
>>> picked(keys, words[:, begin:end], 3 - first_rank, 3)[1]
array([6, 2, 0], dtype=uint64)
"""

from __future__ import annotations

import numpy as np

from actshuffle.arraytypes import I64, U64
from actshuffle.ordering.keys import Keys
from actshuffle.ordering.partition import group, key_order

_BINS = 64  # per leaf, so that a leaf reads some 2 / 64 more rows than it holds
_MOST_BITS = 16  # numpy sorts numbers of bins by radix


def bin_bits(leaves: int) -> int:
    """Leading bits of a key that name its bin."""
    return min(max((_BINS * leaves - 1).bit_length(), 1), _MOST_BITS)


def binned(hi: U64, start: int, bits: int) -> tuple[U64, I64]:
    """Group rows from ``start`` on by bin, given their first key words, uint64 ``(m,)``.

    Returns these words and the rows' numbers, uint64 ``(2, m)``, and ``cuts`` int64 ``(2**bits + 1,)``: bin j is
    columns ``cuts[j]:cuts[j + 1]``.
    """
    order, cuts = group((hi >> np.uint64(64 - bits)).astype(np.uint16), 1 << bits)
    words = np.empty((2, len(hi)), np.uint64)
    np.take(hi, order, out=words[0], mode="clip")
    words[1] = order
    words[1] += np.uint64(start)
    return words, cuts


def runs(cuts: I64, ranks: I64) -> I64:
    """The bins of every leaf, int64 ``(leaves, 1 + 2 * ranges)``.

    ``cuts`` is int64 ``(ranges, bins + 1)``; leaf j holds ranks ``[ranks[j], ranks[j + 1])``.  A line has the rank of
    the first row in the leaf's bins, where the bins begin in each range, and where they end.
    """
    ends = cuts.sum(axis=0)
    first = np.searchsorted(ends, ranks[:-1], side="right") - 1
    last = np.searchsorted(ends, ranks[1:], side="left")
    return np.concatenate([ends[first, None], cuts[:, first].T, cuts[:, last].T], axis=1)


def picked(keys: Keys, words: U64, skip: int, count: int) -> tuple[U64, U64]:
    """First key words and numbers of ``count`` rows in key order, after the first ``skip`` of those in ``words``."""
    order = key_order(keys, words[0], words[1])[skip : skip + count]
    # Several times as fast as an index.
    return np.take(words[0], order, mode="clip"), np.take(words[1], order, mode="clip")
