"""The permutation: one 128-bit key per row, and the order of the keys is the shuffle.

Row ``i`` has two 64-bit words, taken from two Philox4x64-10 streams of the seed::

    hi(seed, i) = word i of Philox(SeedSequence(seed, spawn_key=(0,))).random_raw
    lo(seed, i) = word i of Philox(SeedSequence(seed, spawn_key=(1,))).random_raw
    order       = numpy.lexsort((lo, hi))          # ties on both words keep source order
    dst[r]      = src[order[r]]

Philox is counter based (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3",
SC 2011), so any worker computes the key of any row without the keys before it.  `lo` only matters
where two `hi` are equal, about n^2 / 2^65 pairs, and is computed for those rows alone.

>>> order(8, seed=0)
array([1, 4, 5, 6, 2, 0, 3, 7])
>>> Keys(0).hi(1, 2) == order_words(0, 0, 1, 2)
array([ True])
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arraytypes import I64, U64
from actshuffle.errors import RequestError
from actshuffle.units import whole


class Stream(IntEnum):
    """Spawn keys under a seed: every use of random words has a stream that no other use reads."""

    HI = 0
    LO = 1
    ROW_HASH = 2
    UNITS = 3
    WINDOW = 4
    PRIORITY = 5
    LOT = 6


@dataclass(frozen=True)
class Keys:
    """The keys of all rows under one seed.

    ``hi_bits`` and ``lo_bits`` keep only the leading bits of each word.  They are 64 in every real
    run; tests lower them to force ties, which 64 bits would show once in 2^32 rows.
    """

    seed: int
    hi_bits: int = 64
    lo_bits: int = 64

    def hi(self, start: int, stop: int) -> U64:
        """First key words of rows ``[start, stop)``, uint64."""
        return _leading(order_words(self.seed, Stream.HI, start, stop), self.hi_bits)

    def hi_at(self, rows: NDArray[np.integer[Any]]) -> U64:
        """First key words of any rows, in the order given, uint64."""
        return _leading(words_at(self.seed, Stream.HI, rows), self.hi_bits)

    def lo_at(self, rows: NDArray[np.integer[Any]]) -> U64:
        """Second key words of any rows, in the order given, uint64."""
        return _leading(words_at(self.seed, Stream.LO, rows), self.lo_bits)

    def order(self, n: int) -> I64:
        """The oracle: the source row of each output row, int64.  Needs about 40 n bytes."""
        lo = _leading(order_words(self.seed, Stream.LO, 0, n), self.lo_bits)
        return np.lexsort((lo, self.hi(0, n)))


def order(n: int, seed: int) -> I64:
    """The definition, ``dst[r] = src[order(n, seed)[r]]``, in memory; everything else is checked against it."""
    return Keys(whole("seed", seed)).order(whole("n", n))


def priorities(seed: int, start: int, stop: int) -> U64:
    """The sampling priorities of rows ``[start, stop)`` under a seed: independent uniform words, uint64.

    The m rows of smallest priority among any rows, chosen without a look at priorities, are an exactly uniform
    sample of them without replacement.  The smallest m of a union are among the smallest m of its parts, so such
    samples merge over tasks; a larger m begins with the smaller sample.  The words belong to the number of a row and
    to the seed alone, and no shuffle uses them.

    >>> int(priorities(0, 5, 6)[0]) == int(priorities(0, 0, 8)[5])
    True
    """
    whole("seed", seed)
    if not 0 <= start <= stop:
        raise RequestError(f"rows {start:,} to {stop:,} are no range of rows")
    return order_words(seed, Stream.PRIORITY, start, stop)


def order_words(seed: int, stream: int, start: int, stop: int) -> U64:
    """Words ``[start, stop)`` of one stream, by jumping to the start (about 5 ns a word)."""
    philox = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(stream,)))
    skip = start % 4  # a counter step makes four words
    philox.advance(start // 4)
    words: U64 = philox.random_raw(stop - start + skip)
    return words[skip:]


def words_at(seed: int, stream: int, rows: NDArray[np.integer[Any]]) -> U64:
    """Words at any positions of one stream: Philox4x64-10 itself, vectorised over the counters.

    An independent second implementation of `order_words`, for scattered rows (ties, verify, tracing).
    It works in slices that stay in cache; about 0.2 us a word.
    """
    keys = _round_keys(seed, stream)
    index: U64 = np.ascontiguousarray(rows, dtype=np.uint64)
    out = np.empty(index.shape, np.uint64)
    for at in range(0, len(index), _SLICE):
        out[at : at + _SLICE] = _philox(keys, index[at : at + _SLICE])
    return out


_SLICE = 1 << 13
_M0, _M1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_W0, _W1 = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


@lru_cache(maxsize=8)
def _round_keys(seed: int, stream: int) -> tuple[tuple[np.uint64, np.uint64], ...]:
    state = np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(2, np.uint64)
    k0, k1, mod = int(state[0]), int(state[1]), 1 << 64
    return tuple((np.uint64((k0 + r * _W0) % mod), np.uint64((k1 + r * _W1) % mod)) for r in range(10))


def _philox(keys: tuple[tuple[np.uint64, np.uint64], ...], index: U64) -> U64:
    # numpy steps the counter before it draws, so words 0..3 come from counter 1.
    c0 = (index >> np.uint64(2)) + np.uint64(1)
    c1, c2, c3 = np.zeros((3, len(index)), np.uint64)
    for k0, k1 in keys:
        hi0, lo0 = _mulhilo(_M0, c0)
        hi1, lo1 = _mulhilo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
    lane = (index & np.uint64(3)).astype(np.uint8)
    return np.choose(lane, (c0, c1, c2, c3))


def _mulhilo(m: np.uint64, x: U64) -> tuple[U64, U64]:
    """High and low words of the 128-bit product, from 32-bit halves (wrapping multiply)."""
    m_hi, m_lo = m >> _32, m & _LOW
    x_hi, x_lo = x >> _32, x & _LOW
    low = m_lo * x_lo
    mid = m_hi * x_lo + (low >> _32)
    mid2 = m_lo * x_hi + (mid & _LOW)
    return m_hi * x_hi + (mid >> _32) + (mid2 >> _32), m * x


def _leading(words: U64, bits: int) -> U64:
    return words if bits == 64 else words & np.uint64(((1 << bits) - 1) << (64 - bits))
