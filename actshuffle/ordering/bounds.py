"""Bucket boundaries as exact rank quantiles of the keys, found without touching row data.

Which key has rank r among n?  Count keys by their leading bits; the counts say which bin holds each
wanted rank; look again only into those bins, with more bits, until the keys left in them are few;
collect these, sort them, and pick::

    count      0000 ....|....|..x.|....|....|x...|....   16 to 20 leading bits, all keys
    refine             |..:..:x.:..|       |.x:..:..|     8 bits more, keys in marked bins only
    collect                 [a b c d]     [e f]           sort, take the wanted ones

Each pass computes every key once (7 ns a row, and as much again to count it) in tasks over row ranges that
run anywhere; the counts of one task stay below 16 MB, however many leaves there are.  So every
bucket holds exactly the rows it should, memory is bounded exactly and not on average, and a leaf
is a whole number of output objects.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actshuffle.arraytypes import I64, U64
from actshuffle.ordering.keys import Keys
from actshuffle.ordering.partition import boundaries_at, key_order

_FIRST_BITS, _MORE_BITS = 16, 8
_COLLECT = 1 << 17  # collect when no more keys than this are left in marked bins: 11 MB to sort
_COLLECT_EACH = 16  # or no more than this per boundary; each boundary has at least one
_MOST_COUNTS = 1 << 21  # counts in one answer: 16 MB, and as much again while they are added up
_SLICE = 1 << 18  # keys computed at a time
COUNT_ROWS = 1 << 27  # rows of one count task: at least two seconds of work
COUNT_TASKS = 4096  # beyond this many, tasks grow instead: the scheduler hands them out one by one, in every pass


class Query(NamedTuple):
    """The question that one pass puts to every row range.

    Bins are the leading ``bits`` of hi; those of interest are ``marked``, ascending.  Inside each,
    ``more`` further bits are counted; 0 asks for the keys themselves.
    """

    bits: int
    marked: U64
    more: int


def answer(keys: Keys, start: int, stop: int, query: Query) -> NDArray[Any]:
    """Answer a query for one row range: counts int64 ``(len(marked) << more,)``, or, if ``more`` is 0,
    the keys in marked bins as uint64 ``(m, 2)``: hi, row."""
    if query.more:
        counts = np.zeros(len(query.marked) << query.more, np.int64)
        for _, hi in _slices(keys, start, stop):
            at, which = _inside(hi, query)
            digit = (hi[at] >> _shift(query.bits + query.more)).view(np.int64) & ((1 << query.more) - 1)
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
    bits, more = 0, _first(len(ranks))
    bin_of, rank_in_bin = np.zeros(len(ranks), np.uint64), ranks.copy()
    enough = _enough(len(ranks))
    remaining = enough + 1
    while remaining > enough and bits < 64:
        marked = np.unique(bin_of)
        counts = functools.reduce(np.add, ask(Query(bits, marked, more)))
        ends = np.cumsum(counts)
        first_digit = np.searchsorted(marked, bin_of) << more
        position = ends[first_digit] - counts[first_digit] + rank_in_bin
        digit = np.searchsorted(ends, position, side="right")
        rank_in_bin = position - (ends - counts)[digit]
        bin_of = (bin_of << np.uint64(more)) | (digit & ((1 << more) - 1)).astype(np.uint64)
        remaining = int(counts[np.unique(digit)].sum())
        bits += more
        more = _more(bits, len(np.unique(bin_of)))
    found = np.concatenate(list(ask(Query(bits, np.unique(bin_of), 0))))
    hi, rows = found[:, 0].copy(), found[:, 1].copy()
    by_key = key_order(keys, hi, rows)
    first = np.searchsorted(hi[by_key] >> _shift(bits), bin_of)
    return boundaries_at(keys, rows[by_key[first + rank_in_bin]])


def range_rows(rows: int) -> int:
    """Rows of one range, which is one task."""
    return max(COUNT_ROWS, -(-rows // COUNT_TASKS))


def answers(rows: int, leaves: int) -> list[int]:
    """The expected size in bytes of one row range's answer, for each pass of `find` over ``rows`` keys.

    >>> answers(10**6, 100)  # counts by 16 bits, then the keys in 99 bins
    [524288, 24151]
    """
    ranks = leaves - 1
    if ranks < 1:
        return []
    found, bits, more = [], 0, _first(ranks)
    marked, remaining = 1.0, math.inf
    while remaining > _enough(ranks) and bits < 64:
        found.append(int(8 * marked * 2**more))
        bits += more
        marked = -(2.0**bits) * math.expm1(-ranks / 2.0**bits)  # bins that hold a rank
        remaining, more = rows * marked / 2.0**bits, _more(bits, int(marked))
    return [*found, int(16 * remaining / max(1, -(-rows // range_rows(rows))))]


def _first(ranks: int) -> int:
    return min(max(_FIRST_BITS, ranks.bit_length() + 2), 20)


def _more(bits: int, marked: int) -> int:
    """Number of bits to count next, inside ``marked`` bins of ``bits`` leading bits each."""
    room = (_MOST_COUNTS // max(marked, 1)).bit_length() - 1
    return min(max(room, 1), _MORE_BITS, 64 - bits)


def _enough(ranks: int) -> int:
    """Most keys in marked bins that are collected; more are counted once again."""
    return max(_COLLECT, _COLLECT_EACH * ranks)


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
