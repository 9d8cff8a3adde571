"""Bucket boundaries as exact rank quantiles of the keys, found without touching row data.

Which key has rank r among n?  Count keys by their leading bits; the counts say which bin holds each
wanted rank; look again only into those bins, with more bits, until the keys left in them are few;
collect these, sort them, and pick::

    count      0000 ....|....|..x.|....|....|x...|....   16 to 20 leading bits, all keys
    refine             |..:..:x.:..|       |.x:..:..|     8 bits more, keys in marked bins only
    collect                 [a b c d]     [e f]           sort, take the wanted ones

Each pass makes every key once (about 7 ns a row) in tasks over row ranges that run anywhere.  So every
bucket holds exactly the rows it should, memory is bounded exactly and not on average, and a leaf
is a whole number of output objects.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actshuffle.keys import I64, U64, Keys
from actshuffle.partition import boundaries_at, key_order

_FIRST_BITS, _MORE_BITS = 16, 8
_COLLECT = 1 << 17  # collect when no more keys than this are left in marked bins: 11 MB to sort
_SLICE = 1 << 18  # keys made at a time
COUNT_ROWS = 1 << 27  # rows of one count task, about a second


class Query(NamedTuple):
    """What one pass asks of every row range.

    Bins are the leading ``bits`` of hi; those of interest are ``marked``, ascending.  Inside each,
    ``more`` further bits are counted; 0 means: return the keys themselves.
    """

    bits: int
    marked: U64
    more: int


def answer(keys: Keys, start: int, stop: int, query: Query) -> NDArray[Any]:
    """One row range's part: counts int64 ``(len(marked) << more,)``, or, if ``more`` is 0, the keys
    in marked bins as uint64 ``(m, 2)``: hi, row."""
    if query.more:
        counts = np.zeros(len(query.marked) << query.more, np.int64)
        for _, hi in _slices(keys, start, stop):
            at, which = _inside(hi, query)
            digit = (hi[at] >> _shift(query.bits + query.more)).view(np.int64) & (
                (1 << query.more) - 1
            )
            counts += np.bincount((which << query.more) + digit, minlength=len(counts))
        return counts
    found = [np.zeros((0, 2), np.uint64)]
    for first, hi in _slices(keys, start, stop):
        at, _ = _inside(hi, query)
        found.append(np.stack([hi[at], at.astype(np.uint64) + np.uint64(first)], axis=1))
    return np.concatenate(found)


def find(keys: Keys, ranks: I64, ask: Callable[[Query], Iterable[NDArray[Any]]]) -> U64:
    """The full keys at some ranks, uint64 ``(len(ranks), 3)``: hi, lo, source row.

    ``ranks`` ascend; ``ask`` puts a query to all row ranges and yields their answers in any order.
    """
    if not len(ranks):
        return np.zeros((0, 3), np.uint64)
    bits, more = 0, min(max(_FIRST_BITS, len(ranks).bit_length() + 2), 20)
    bin_of, rank_in_bin = np.zeros(len(ranks), np.uint64), ranks.copy()
    remaining = _COLLECT + 1
    while remaining > _COLLECT and bits < 64:
        marked = np.unique(bin_of)
        counts = functools.reduce(np.add, ask(Query(bits, marked, more)))
        ends = np.cumsum(counts)
        first_digit = np.searchsorted(marked, bin_of) << more
        position = ends[first_digit] - counts[first_digit] + rank_in_bin
        digit = np.searchsorted(ends, position, side="right")
        rank_in_bin = position - (ends - counts)[digit]
        bin_of = (bin_of << np.uint64(more)) | (digit & ((1 << more) - 1)).astype(np.uint64)
        remaining = int(counts[np.unique(digit)].sum())
        bits, more = bits + more, min(_MORE_BITS, 64 - bits - more)
    found = np.concatenate(list(ask(Query(bits, np.unique(bin_of), 0))))
    hi, rows = found[:, 0].copy(), found[:, 1].copy()
    by_key = key_order(keys, hi, rows)
    first = np.searchsorted(hi[by_key] >> _shift(bits), bin_of)
    return boundaries_at(keys, rows[by_key[first + rank_in_bin]])


def _slices(keys: Keys, start: int, stop: int) -> Iterator[tuple[int, U64]]:
    for first in range(start, stop, _SLICE):
        yield first, keys.hi(first, min(first + _SLICE, stop))


def _inside(hi: U64, query: Query) -> tuple[I64, I64]:
    """Positions of the keys inside marked bins, and which marked bin each is in."""
    if query.bits == 0:
        return np.arange(len(hi)), np.zeros(len(hi), np.int64)
    # Most keys are ruled out by a table over 16 bits, much cheaper than a search.
    table = np.zeros(1 << 16, bool)
    table[(query.marked << _shift(query.bits)) >> np.uint64(48)] = True
    at = np.flatnonzero(table[hi >> np.uint64(48)])
    prefix = hi[at] >> _shift(query.bits)
    which = np.minimum(np.searchsorted(query.marked, prefix), len(query.marked) - 1)
    hit = query.marked[which] == prefix
    return at[hit], which[hit]


def _shift(bits: int) -> np.uint64:
    return np.uint64(64 - bits)
