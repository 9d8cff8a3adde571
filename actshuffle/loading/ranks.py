"""Find the rank of a key in a shuffled store from a few of its rows.

Keys are uniform, so the row with key ``hi`` is near rank ``hi / 2^64 * n``, some ``sqrt(n) / 2`` rows off at
most times.  Each look reads a short window of ``source_row``, makes the keys of those rows, and tells how
far off it is, with an error that is the square root of the last one: three or four looks of 512 bytes
find one row among a billion::

    ranks   |------------------------------------------------------------|
    guess            [..]  off by 9,000 ->
                                 [..]  off by 60 ->
                                    [.x]

Without ``source_row`` only the keys themselves can tell, all of them, at about 7 ns a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actshuffle.arrays.names import SOURCE_ROW
from actshuffle.arraytypes import U64
from actshuffle.errors import RequestError
from actshuffle.loading.dataset import Dataset
from actshuffle.ordering import bounds
from actshuffle.ordering.keys import Keys

WINDOW = 64  # rows of one look
_SLICE = 1 << 18  # keys made at a time
_PATIENCE = 8  # looks before it turns to bisection


class Key(NamedTuple):
    """A full key; keys are ordered as these tuples are."""

    hi: int
    lo: int
    row: int


def key_of(keys: Keys, row: int) -> Key:
    """The full key of a source row."""
    at = np.array([row], np.uint64)
    return Key(int(keys.hi_at(at)[0]), int(keys.lo_at(at)[0]), row)


class Ranks:
    """The rows of a shuffled store, or of a view of one, as a sorted list of keys."""

    def __init__(self, data: Dataset) -> None:
        marker = data.root_marker
        if marker is None or not data.shuffled:
            raise RequestError(f"{data.path} is not shuffled: its rows have no keys")
        self.data = data
        self.keys = Keys(marker["seed"], *marker.get("key_bits", (64, 64)))
        self.population = int(marker.get("population", marker["rows"]))  # a sample is part of more
        self.first = int(marker.get("first_row", 0))
        self._offset = int(marker.get("first_rank", 0)) + data.start
        # Of a part by a rule, any of them; its keys are as even as all.
        self._keys = marker["rows"] if "split" in marker else self.population
        self.recorded = SOURCE_ROW in data.fields

    def key(self, rank: int) -> Key:
        """The key of one row."""
        return key_of(self.keys, int(self.source_rows(np.array([rank]))[0]))

    def source_rows(self, ranks: NDArray[np.int64]) -> U64:
        """The source rows at some ranks, in the order given."""
        if self.recorded:
            return self.data.take(SOURCE_ROW, ranks).astype(np.uint64, copy=False)
        wanted, back = np.unique(np.asarray(ranks, np.int64), return_inverse=True)
        found: U64 = bounds.find(self.keys, wanted + self._offset, self._ask)[:, 2]
        return found[back]

    def rank(self, key: Key) -> int:
        """The number of rows with a smaller key: the rank of a row with this key, present or not."""
        if not self.recorded:
            return self._counted(key)
        low, high = 0, self.data.rows  # rows before low are smaller, rows from high on are not
        per_row = 2.0**64 / max(1, self._keys)
        guess = int(key.hi / per_row) - self._offset
        looks = 0
        while low < high:
            if looks >= _PATIENCE:
                guess = (low + high) // 2
            start = min(max(guess - WINDOW // 2, low), max(low, high - WINDOW))
            stop = min(start + WINDOW, high)
            hi, smaller = self._look(start, stop, key)
            if 0 < smaller < stop - start:
                return start + smaller
            if smaller == 0:
                high = start
                guess = start - int((int(hi[0]) - key.hi) / per_row)
            else:
                low = stop
                guess = stop + int((key.hi - int(hi[-1])) / per_row)
            looks += 1
        return low

    def _look(self, start: int, stop: int, key: Key) -> tuple[U64, int]:
        """First key words of rows ``[start, stop)``, and the number of these rows with a smaller key."""
        rows = self.data.read(SOURCE_ROW, start, stop)
        hi = self.keys.hi_at(rows)
        return hi, self._smaller(hi, rows, key)

    def _smaller(self, hi: U64, rows: U64, key: Key) -> int:
        """The number of some rows with a smaller key than this one."""
        tied = rows[hi == np.uint64(key.hi)]
        count = int(np.count_nonzero(hi < np.uint64(key.hi)))
        if len(tied):
            lo, own = self.keys.lo_at(tied), np.uint64(key.lo)
            count += int(np.count_nonzero((lo < own) | ((lo == own) & (tied < np.uint64(key.row)))))
        return count

    def _counted(self, key: Key) -> int:
        smaller, end = 0, self.first + self.population
        for start in range(self.first, end, _SLICE):
            stop = min(start + _SLICE, end)
            smaller += self._smaller(self.keys.hi(start, stop), np.arange(start, stop, dtype=np.uint64), key)
        return min(max(smaller - self._offset, 0), self.data.rows)

    def _ask(self, query: bounds.Query) -> Iterator[NDArray[Any]]:
        yield bounds.answer(self.keys, self.first, self.first + self.population, query)


def first_where(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The first number in ``[low, high)`` for which ``holds`` is true, or ``high``; it is true from there on."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
