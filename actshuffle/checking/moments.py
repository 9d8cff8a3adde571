r"""Sums for statistics, over slices of rows that stay in the cache.

Per dimension j, about a centre c::

    S_j = sum (x_j - c_j)      Q_j = sum (x_j - c_j)^2       mean = c + S / n    M2 = Q - S^2 / n

Parts from different tasks are merged by the rule of Chan, Golub and LeVeque ("Updating formulae and a
pairwise algorithm for computing sample variances", 1979), in float64 and in the order of their rows, so
that the result does not depend on the division of the work.

Of float32 and wider all is done in float64, about the mean of the first slice.

Of 16-bit floats sums over one slice (1,024 rows at most) are in float32, where the values are exact, and
sums over slices in float64: means are then right to about 1e-6 of the mean size of the values, variances
to about 1e-5 relative.  A slice is taken in tiles that stay in the processor's cache with all that is made
of them::

    rows of 16 bits --4 passes--> float32 --> norms (a dot product a row)
                                   |  \--> S (ones times 16 rows, and so on)
                                   squared --> Q, likewise

The centre is 0, which saves a pass, unless a dimension is further from it than twice its own standard
deviation: then it moves to where the dimension is.  Nor is there a pass for NaN and Inf, which the norms
tell.  Slices with one of these, or with values whose squares leave float32, are done in float64.

Norms go to a histogram of their squares' leading bits: 2^-8 wide, so a quantile of the norm is the
norm of the row of that rank to 0.2 %.

Distinct integers are counted by the smallest hashes (Bar-Yossef and others: "Counting distinct
elements in a data stream", 2002): exact up to 1,023, then to about 3 % (one sd).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arraytypes import F64, I64, U64
from actshuffle.bfloat16 import widened
from actshuffle.loading.fieldinfo import FieldInfo
from actshuffle.ordering.digest import mix

# Most values of a tile, 2 MiB as float32; a fourth in float64.  Smaller ones take more calls, and were slower.
SLICE_VALUES = 1 << 19
SLICE_ROWS, TILE_WIDTH = 1024, 512
NARROW = 64  # shorter rows are summed in float64, since float32 gains nothing there
SKETCH = 1024
# Values hashed at a time; after the first slice, only those below the sketch's largest hash are sorted.
HASHED_VALUES = 1 << 15
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's step, without which 0 would be mixed to 0
_KEY_BITS = np.uint64(44)  # of a float64, so that 8 bits of its mantissa are left
_SHIFT, _MASK = np.int32(13), np.int32(0x8FFFE000 - (1 << 32))
_SCALE = np.float32(2.0**112)
_TINY = 1e-30  # sums of squares below this may have lost terms to underflow in float32
_FAR = 0.8  # of m Q: S^2 is more where the mean is over two standard deviations from the centre
STRIP_VALUES = 8192  # OpenBLAS shares products of 9,216 and more among threads


@dataclass(frozen=True, eq=False)
class FloatPart:
    """Sums of the finite rows of some range; rows with a NaN or an Inf are counted and left out."""

    count: int
    mean: F64
    m2: F64
    squares: float  # sum of squared norms
    bins: I64  # histogram keys of the squared norms, ascending
    counts: I64
    least: float = math.inf  # squared norms
    most: float = -math.inf
    left_out: int = 0
    nans: int = 0
    infs: int = 0
    first_nan: tuple[int, int] | None = None  # row and place in the row
    first_inf: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class IntPart:
    """Extremes and the sketch of the values of some range."""

    count: int
    least: int | None = None
    most: int | None = None
    hashes: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))


Part = FloatPart | IntPart


class FloatSums:
    """Takes rows of a field, a block at a time."""

    def __init__(self, info: FieldInfo) -> None:
        self._width = math.prod(info.row_shape)
        self._bfloat16, self._half = info.bfloat16, info.dtype == np.dtype("<f2")
        small = self._bfloat16 or self._half
        self._small = small and self._width >= NARROW  # sums over a slice in float32
        tiles = -(-self._width // TILE_WIDTH) if self._small else 1
        edges = [self._width * i // tiles for i in range(tiles + 1)]
        self._tiles = list(pairwise(edges))
        self._step = max(1, SLICE_VALUES // max(b - a for a, b in self._tiles))
        if self._small:  # a power of two: whole strips
            self._step = min(SLICE_ROWS, 1 << (self._step.bit_length() - 1))
        else:
            self._step = max(1, self._step // 4)
        values = self._step * max(b - a for a, b in self._tiles)
        self._work: NDArray[Any] = np.empty(values, np.int32 if self._small else np.float64)
        self._centre: NDArray[Any] = np.zeros(self._width, np.float32)
        self._sum, self._sum2 = np.zeros((2, self._width))
        self._count = 0
        self._norms: list[F64] = []
        self._bad = FloatPart(0, self._sum, self._sum2, 0.0, *_histogram(np.zeros(0)))

    def add(self, rows: NDArray[Any], first: int) -> None:
        """Rows ``first`` and on, of the field's dtype."""
        flat = rows.reshape(len(rows), self._width)
        with np.errstate(all="ignore"):
            for at in range(0, len(flat), self._step):
                part = flat[at : at + self._step]
                if not (self._small and self._add_small(part)):
                    self._add_wide(part, first + at)

    def _add_small(self, part: NDArray[Any], *, again: bool = False) -> bool:
        """Add a slice in float32; returns False, and adds nothing, if float32 does not hold the values."""
        norms = np.zeros(len(part), np.float32)
        sums, squares = np.empty((2, self._width))
        for a, b in self._tiles:
            values = self._to_float32(part[:, a:b])
            norms += np.vecdot(values, values)
            if self._centre[a:b].any():
                np.subtract(values, self._centre[a:b], out=values)
            sums[a:b] = _column_sums(values)
            np.multiply(values, values, out=values)
            squares[a:b] = _column_sums(values)
        if not self._held(part, norms, squares):
            return False
        far = sums * sums > _FAR * len(part) * squares
        if far.any() and not again:
            self._move(np.where(far, sums / len(part), 0.0))
            return self._add_small(part, again=True)
        self._take(sums, squares, norms.astype(np.float64))
        return True

    def _held(self, part: NDArray[Any], norms: NDArray[np.float32], squares: F64) -> bool:
        """True if float32 is enough: not for NaN and Inf, nor for squares of bfloat16 values out of its range."""
        if self._half:  # NaN and Inf come out of `_to_float32` as 2^16 and more
            bits = part.view(np.int16)
            return bool(norms.max() < 2.0**32 or ((bits & 0x7C00) != 0x7C00).all())
        if not max(norms.max(), squares.max()) < np.inf:
            return False
        low = np.flatnonzero(squares < _TINY)
        return not (len(low) and (widened(part[:, low]) - self._centre[low]).any())

    def _move(self, by: F64) -> None:
        """Move the centre, and the sums about it."""
        moved = (self._centre + by).astype(np.float32)
        step = moved.astype(np.float64) - self._centre
        self._sum2 += step * (self._count * step - 2 * self._sum)
        self._sum -= self._count * step
        self._centre = moved

    def _take(self, sums: F64, squares: F64, norms: F64) -> None:
        self._sum += sums
        self._sum2 += squares
        self._norms.append(norms)
        self._count += len(norms)

    def _to_float32(self, part: NDArray[Any]) -> NDArray[np.float32]:
        """The values as float32: exact, but for Inf and NaN of float16.  Eight times as fast as numpy's own cast."""
        work = self._work[: part.size].reshape(part.shape)
        values = work.view(np.float32)
        if self._bfloat16:
            np.copyto(work, part.view(np.int16))
            np.left_shift(work, np.int32(16), out=work)
        else:  # the exponent's bias goes from 15 to 127 by the factor; zeros and subnormals come out right
            np.copyto(work, part.view(np.int16))
            np.left_shift(work, _SHIFT, out=work)
            np.bitwise_and(work, _MASK, out=work)
            np.multiply(values, _SCALE, out=values)
        return values

    def _add_wide(self, part: NDArray[Any], first: int) -> None:
        if self._bfloat16:
            part = widened(part)
        if self._small:
            values = part.astype(np.float64)
        else:
            values = self._work[: part.size].reshape(part.shape)
            np.copyto(values, part)
        norms = np.vecdot(values, values)
        if not np.isfinite(norms).all():
            good = np.logical_and.reduce(np.isfinite(values), axis=1)
            self._note(values, good, first)
            values, norms = values[good], norms[good]
        if not len(values):
            return
        if not self._small and not self._count:
            self._centre = values.mean(axis=0)
        values -= self._centre
        self._take(values.sum(axis=0), np.einsum("ij,ij->j", values, values), norms)

    def _note(self, values: F64, good: NDArray[Any], first: int) -> None:
        bad = self._bad
        found: dict[str, Any] = {}
        for kind, hits in (("nan", np.isnan(values)), ("inf", np.isinf(values))):
            number = int(np.count_nonzero(hits))
            found[f"{kind}s"] = getattr(bad, f"{kind}s") + number
            if number and getattr(bad, f"first_{kind}") is None:
                row, place = divmod(int(hits.argmax()), self._width)
                found[f"first_{kind}"] = (first + row, place)
        left_out = bad.left_out + int(np.count_nonzero(~good))
        self._bad = replace(bad, left_out=left_out, **found)

    def part(self) -> FloatPart:
        """The sums of all rows so far."""
        norms = np.concatenate([np.zeros(0), *self._norms])
        if not self._count:
            return self._bad
        with np.errstate(all="ignore"):
            mean = self._sum / self._count
            m2 = np.maximum(self._sum2 - self._sum * mean, 0)
            bins, counts = _histogram(norms)
            found = replace(self._bad, count=self._count, mean=self._centre + mean, m2=m2, bins=bins, counts=counts)
            return replace(found, squares=float(norms.sum()), least=float(norms.min()), most=float(norms.max()))


def _column_sums(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums over rows: of strips of rows by BLAS, then over strips.

    A strip is too small for BLAS to share it among threads, whose number would then show in the last bit.
    """
    rows, width = values.shape
    strip = 1 << (max(1, STRIP_VALUES // width).bit_length() - 1)
    whole = rows // strip * strip
    strips = np.matmul(np.ones(strip, np.float32), values[:whole].reshape(-1, strip, width))
    found: NDArray[np.float32] = np.add.reduce(strips, axis=0)
    return found if whole == rows else found + np.add.reduce(values[whole:], axis=0)


def _histogram(norms: F64) -> tuple[I64, I64]:
    # Below 2^19, so that they can be counted.
    keys = (norms.view(np.uint64) >> _KEY_BITS).astype(np.int64)
    if not len(keys):
        return keys, keys
    first = keys.min()
    counts = np.bincount(keys - first)
    bins = np.flatnonzero(counts)
    return bins + first, counts[bins].astype(np.int64)


def bin_edges(bins: I64) -> tuple[F64, F64]:
    """Lower and upper squared norm of histogram bins."""
    keys = bins.astype(np.uint64)
    return (keys << _KEY_BITS).view(np.float64), ((keys + np.uint64(1)) << _KEY_BITS).view(np.float64)


class IntSums:
    """Takes rows of an integer or boolean field."""

    def __init__(self, info: FieldInfo) -> None:
        self._part = IntPart(0)

    def add(self, rows: NDArray[Any], first: int) -> None:
        flat, part = rows.reshape(-1), self._part
        for values in (flat[i : i + HASHED_VALUES] for i in range(0, len(flat), HASHED_VALUES)):
            hashes = _smallest(mix(values.astype(np.int64).view(np.uint64) + _GOLDEN), part.hashes)
            part = _merge_ints(part, IntPart(0, int(values.min()), int(values.max()), hashes))
        self._part = replace(part, count=part.count + len(rows))

    def part(self) -> IntPart:
        return self._part


def _smallest(hashes: U64, held: U64) -> U64:
    """The smallest distinct hashes of both; hashes above the largest held are dropped first."""
    if len(held) == SKETCH:
        hashes = hashes[hashes < held[-1]]
    return np.unique(np.concatenate([held, hashes]))[:SKETCH]


def distinct(part: IntPart) -> tuple[int, bool]:
    """The number of distinct values, and True if it is exact."""
    if len(part.hashes) < SKETCH:
        return len(part.hashes), True
    return round((SKETCH - 1) / (int(part.hashes[-1]) / 2.0**64)), False


def merge(a: Part, b: Part) -> Part:
    """The sums over two ranges; ``a`` is the earlier one."""
    if isinstance(a, IntPart):
        assert isinstance(b, IntPart)
        return _merge_ints(a, b)
    assert isinstance(b, FloatPart)
    bins, where = np.unique(np.concatenate([a.bins, b.bins]), return_inverse=True)
    counts = np.zeros(len(bins), np.int64)
    np.add.at(counts, where, np.concatenate([a.counts, b.counts]))
    count = a.count + b.count
    with np.errstate(all="ignore"):
        delta = b.mean - a.mean
        share = b.count / max(1, count)
        mean = a.mean + delta * share if a.count else b.mean
        m2 = a.m2 + b.m2 + (delta * delta * a.count * share if a.count and b.count else 0.0)
    return FloatPart(
        count=count,
        mean=mean,
        m2=m2,
        squares=a.squares + b.squares,
        bins=bins,
        counts=counts,
        least=min(a.least, b.least),
        most=max(a.most, b.most),
        left_out=a.left_out + b.left_out,
        nans=a.nans + b.nans,
        infs=a.infs + b.infs,
        first_nan=a.first_nan or b.first_nan,
        first_inf=a.first_inf or b.first_inf,
    )


def _merge_ints(a: IntPart, b: IntPart) -> IntPart:
    low = [x for x in (a.least, b.least) if x is not None]
    high = [x for x in (a.most, b.most) if x is not None]
    return IntPart(a.count + b.count, min(low, default=None), max(high, default=None), _smallest(b.hashes, a.hashes))
