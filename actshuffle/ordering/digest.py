"""Conservation digests: a 128-bit sum, over rows, of a keyed hash of (source row, row bytes).

A sum does not depend on order, so the digest of a bucket can be added up where its rows are first
decoded, block by block, and again where they are last written, and the two must agree.  It is a sum
and not an XOR, because under XOR a row written twice vanishes.

The hash of a row is two multilinear forms over its words (Carter, Wegman: "Universal classes of
hash functions", JCSS 1979; Lemire, Kaser: "Strongly universal string hashing is fast", 2014),
each mixed with the row number by splitmix64's finaliser (Steele, Lea, Flood, OOPSLA 2014)::

    A = sum_j  words[j]         * w[j]     mod 2^64      w, v odd, from Philox, one set per field
    B = sum_j (words[j] >> 32)  * v[j]     mod 2^64
    digest = ( sum mix(A + row * G + a),  sum mix(B + row * G + b) )   mod 2^64

Why two forms over different halves: in `A`, a change confined to the top bits of several words (the
signs of two float64, say) can cancel; in `B` those bits sit 32 places lower.  For weights drawn at
random, any change within one row escapes both with probability at most 2^-33, and a typical one with
2^-90 or less.  It guards against accidents and bugs, not against someone who knows the seed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arraytypes import U8, U64
from actshuffle.ordering.keys import Stream

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Bytes of rows that are multiplied at a time, with a copy and in place, and rows that are mixed at a time.  Less would
# stay nearer to the processor, but each call of numpy gives up the interpreter's lock and takes it again: with slices
# of 512 KiB two threads waited for it for a quarter of their time.
_SLICE_BYTES, _PLACE_BYTES = 1 << 20, 4 << 20
_MIXED_ROWS = 1 << 14


@dataclass(frozen=True)
class RowHash:
    """The row hash of one field.  ``row_bytes`` is the width of its rows in bytes."""

    seed: int
    field: int
    row_bytes: int

    def hashes(self, rows: U8, source_row: U64) -> U64:
        """Hash of each row, uint64 ``(m, 2)``.

        ``rows`` is uint8 ``(m, row_bytes)``, C-contiguous, little-endian values; ``source_row`` is
        uint64 ``(m,)``.
        """
        words, forms = _words(rows), np.empty((2, len(rows)), np.uint64)  # one form after the other
        step = max(1, _SLICE_BYTES // self.row_bytes)
        high = np.empty((min(step, len(rows)), words.shape[1]), np.uint64)
        self._add_up(words, forms, high)
        return self._mixed(forms, source_row)

    def hashes_of_parts(self, parts: Iterable[tuple[int, U8]], source_row: U64) -> U64:
        """`hashes` of rows that come in parts, each with the number of its first row; their memory is overwritten."""
        forms = np.empty((2, len(source_row)), np.uint64)
        for first, rows in parts:
            self._add_up(_words(rows), forms[:, first : first + len(rows)], None)
        return self._mixed(forms, source_row)

    def _add_up(self, words: NDArray[Any], forms: U64, high: U64 | None) -> None:
        """Put the two sums of each row, not mixed yet, into ``forms``, uint64 ``(2, m)``.

        ``high`` is memory for the upper halves of words; without it they replace the words.
        """
        w, v, _, _ = _weights(self.seed, self.field, self.row_bytes)
        step = max(1, _PLACE_BYTES // self.row_bytes if high is None else len(high))
        for start in range(0, len(words), step):
            part, sums = words[start : start + step], forms[:, start : start + step]
            _dot(part, w, sums[0])
            _dot(_high(part, part if high is None else high), v, sums[1])

    def _mixed(self, forms: U64, source_row: U64) -> U64:
        """Hashes from the sums of each row, in their memory."""
        offsets = np.array(_weights(self.seed, self.field, self.row_bytes)[2:], np.uint64)[:, None]
        for start in range(0, forms.shape[1], _MIXED_ROWS):
            some = forms[:, start : start + _MIXED_ROWS]
            some += source_row[start : start + _MIXED_ROWS] * _GOLDEN
            some += offsets
            mix(some)
        return forms.T

    def total(self, rows: U8, source_row: U64) -> U64:
        """Digest of a set of rows, uint64 ``(2,)``."""
        return add_up(self.hashes(rows, source_row))

    def total_of_parts(self, parts: Iterable[tuple[int, U8]], source_row: U64) -> U64:
        """`total` of rows that come in parts, as in `hashes_of_parts`; their memory is overwritten."""
        return add_up(self.hashes_of_parts(parts, source_row))


def add_up(hashes: U64) -> U64:
    """Sum over rows, modulo 2^64 in each word."""
    total: U64 = np.add.reduce(hashes, axis=0, dtype=np.uint64)
    return total


def add_to_groups(sums: U64, hashes: U64, group: NDArray[np.uint16]) -> None:
    """Add each row's hash to the digest of its group; ``sums`` is uint64 ``(groups, 2)``."""
    at = group.astype(np.intp)
    for word in range(2):
        np.add.at(sums[:, word], at, hashes[:, word])


def to_hex(digest: U64) -> str:
    """The digest as 32 hexadecimal digits, for JSON."""
    return "".join(f"{int(x):016x}" for x in digest)


def from_hex(text: str) -> U64:
    return np.array([int(text[:16], 16), int(text[16:], 16)], np.uint64)


def _words(rows: U8) -> NDArray[Any]:
    """The rows as the widest words that divide them."""
    unit = _unit(rows.shape[1])
    if rows.__array_interface__["data"][0] % unit:  # as `rows.ctypes.data`, in a tenth of the time
        rows = rows.copy()  # only a buffer that is not ours can be unaligned
    return rows.view(f"<u{unit}")


def _high(words: NDArray[Any], into: U64) -> NDArray[Any]:
    """The words of the second form: the upper halves.  Words under 64 bits have no top bits to lose and stay whole."""
    if words.dtype.itemsize < 8:
        return words
    high: U64 = np.right_shift(words, np.uint64(32), out=into[: len(words)])
    return high


def _unit(row_bytes: int) -> int:
    return next(u for u in (8, 4, 2, 1) if row_bytes % u == 0)


def _dot(words: NDArray[Any], weights: U64, out: U64) -> None:
    np.einsum("ij,j->i", words, weights, out=out, dtype=np.uint64, casting="unsafe")


def mix(x: U64) -> U64:
    """Mix each number in place by splitmix64's finaliser, which is a bijection; returns ``x``."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


@lru_cache(maxsize=64)
def _weights(seed: int, field: int, row_bytes: int) -> tuple[U64, U64, np.uint64, np.uint64]:
    count = row_bytes // _unit(row_bytes)
    philox = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(Stream.ROW_HASH, field)))
    raw: U64 = philox.random_raw(2 * count + 2)
    odd = np.uint64(1)
    return raw[:count] | odd, raw[count : 2 * count] | odd, raw[-2], raw[-1]
