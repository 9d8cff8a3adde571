"""The order in which the rows of a store are read, epoch by epoch.

*Positions* count the rows of an epoch from 0; the *order* says which row of the store is at each.

::

    stored rows     |  unit 0  |  unit 1  |  unit 2  |  unit 3  | u 4|
    epoch 0         |  unit 0  |  unit 1  |  unit 2  |  unit 3  | u 4|
    epoch e > 0     nit 3  |  unit 1  | u 4|  unit 0  |  unit 2  | u       units permuted, then rotated

*Plain* order.  Epoch 0 is the stored order.  Later ones permute units of neighbouring rows and start
at a random place in the first.  The permutation does not look at what the rows are, so over a store
that is exactly uniformly shuffled every single epoch is exactly uniform too.  But the epochs of one
store are not independent of each other: rows that share a unit stay neighbours in all of them.

*Buffered* order, for stores that are not shuffled.  All epochs permute units; then runs of
``buffer_rows`` positions, the windows, are shuffled each in itself.  A row can get anywhere, but rows
of one unit land in one window, or in two, so this is no uniform shuffle; `Loader.mixing` measures how
far from it.

Both are pure functions of (seed, epoch) and the store, so any position can be found without the ones
before it.  Words come from Philox as in `actshuffle.ordering.keys`, under `Stream.UNITS` and `Stream.WINDOW`.

>>> Order(rows=10, unit=3, seed=0).rows_at(0, 2, 5)
array([2, 3, 4])
>>> sorted(Order(rows=10, unit=3, seed=0).rows_at(7, 0, 10)) == list(range(10))
True
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from actshuffle.arraytypes import I64, U64
from actshuffle.ordering.keys import Stream

Range = tuple[int, int]
# Units are smaller than objects, so that there are many.  Every unit takes a separate read, so plain order has fewer
# of them: at 1 GB they have 16 MB, two reads for a block of the loader.
MOST_UNITS, MOST_UNITS_BUFFERED = 64, 256


def unit_rows(rows: int, object_rows: int, piece_rows: int, *, buffered: bool) -> int:
    """Rows per unit: one decodable piece, or, where objects can be read in parts, as few rows as keep an epoch below
    `MOST_UNITS` units."""
    most = MOST_UNITS_BUFFERED if buffered else MOST_UNITS
    return max(1, piece_rows, min(object_rows, max(64, -(-rows // most))))


@dataclass(frozen=True)
class Order:
    """The order of every epoch.  ``buffer_rows`` 0 is plain order."""

    rows: int
    unit: int
    seed: int
    buffer_rows: int = 0

    @property
    def windows(self) -> int:
        """Windows of an epoch; their sizes differ by one row at most."""
        return -(-self.rows // self.buffer_rows) if self.buffer_rows else 0

    def window(self, number: int) -> Range:
        """Positions of a window."""
        return _share(0, self.rows, number, self.windows)

    def window_of(self, position: int) -> int:
        number = position * self.windows // self.rows  # or one off, by rounding
        while self.window(number)[0] > position:
            number -= 1
        while self.window(number)[1] <= position:
            number += 1
        return number

    def within(self, epoch: int, number: int) -> I64:
        """The permutation of a window: place in it, by position in it."""
        a, b = self.window(number)
        return _permutation(self.seed, (Stream.WINDOW, epoch, number), b - a)

    def ranges(self, epoch: int, start: int, stop: int) -> list[Range]:
        """Store rows at positions ``[start, stop)``, as ranges one after the other, before windows."""
        if start >= stop:
            return []
        if epoch == 0 and not self.buffer_rows:
            return [(start, stop)]
        units, edges, turn = _epoch(self, epoch)
        found: list[Range] = []
        for a, b in _wrapped(start + turn, stop + turn, self.rows):
            first = int(np.searchsorted(edges, a, side="right")) - 1
            last = int(np.searchsorted(edges, b, side="left"))
            ends = pairwise(edges[first : last + 1].tolist())
            for unit, (begin, end) in zip(units[first:last].tolist(), ends, strict=True):
                row = unit * self.unit - begin
                found.append((row + max(a, begin), row + min(b, end)))
        return joined(found)

    def rows_at(self, epoch: int, start: int, stop: int) -> I64:
        """Store rows at positions ``[start, stop)``, int64."""
        if not self.buffer_rows or start >= stop:
            return expand(self.ranges(epoch, start, stop))
        parts = []
        for number in range(self.window_of(start), self.window_of(stop - 1) + 1):
            a, b = self.window(number)
            inner = self.within(epoch, number)[max(start, a) - a : min(stop, b) - a]
            parts.append(expand(self.ranges(epoch, a, b))[inner])
        return np.concatenate(parts)


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Ranges one after the other, those that continue each other as one."""
    found: list[Range] = []
    for start, stop in ranges:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return found


def expand(ranges: list[Range]) -> I64:
    """The rows of ranges, int64."""
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(a, b) for a, b in ranges)])


@dataclass(frozen=True)
class Step:
    """One global batch: positions ``[start, stop)`` of an epoch."""

    epoch: int
    start: int
    stop: int

    def of_rank(self, rank: int, world_size: int) -> Range:
        """A rank's part: ranks take neighbouring parts, equal but for one row."""
        return _share(self.start, self.stop, rank, world_size)


def steps(rows: int, batch: int, drop_last: bool, epoch: int, row: int, until: int) -> Iterator[Step]:
    """Global batches from a cursor (epoch, row) on, up to epoch ``until``; none spans two epochs."""
    while epoch < until:
        while row < rows and (row + batch <= rows or not drop_last):
            yield Step(epoch, row, min(row + batch, rows))
            row += batch
        epoch, row = epoch + 1, 0


def _share(start: int, stop: int, number: int, of: int) -> Range:
    size = stop - start
    return start + size * number // of, start + size * (number + 1) // of


def _wrapped(a: int, b: int, n: int) -> list[Range]:
    """``[a, b)`` on a circle of n, for ``a <= b <= a + n`` and ``b < 2 n``."""
    if a >= n:
        return [(a - n, b - n)]
    return [(a, b)] if b <= n else [(a, n), (0, b - n)]


@lru_cache(maxsize=4)
def _epoch(order: Order, epoch: int) -> tuple[I64, I64, int]:
    """Units in their order, the positions where each begins (before the turn) and the end, the turn."""
    number = -(-order.rows // order.unit)
    units = _permutation(order.seed, (Stream.UNITS, epoch), number)
    sizes = np.full(number, order.unit)
    sizes[units == number - 1] = order.rows - (number - 1) * order.unit
    edges = np.concatenate([[0], np.cumsum(sizes)])
    turn = int(_words(order.seed, (Stream.UNITS, epoch, 0), 1)[0]) % order.rows
    return units, edges, turn


def _permutation(seed: int, key: tuple[int, ...], n: int) -> I64:
    # The order of random words, since numpy does not promise that its own permutations stay as they are.
    return np.argsort(_words(seed, key, n), kind="stable")


def _words(seed: int, key: tuple[int, ...], n: int) -> U64:
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(n)
