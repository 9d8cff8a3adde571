"""The active entries of an encoder product on a CPU: a rough product of all says which inner products to compute.

::

    rough       x W^T + b         bfloat16 or float32, whichever is faster here: off by at most `margin`
    looked at                     entries that may be active or among the k largest of a row, however far each is off
    computed    <x_r, w_c> + b_c  in float32, one by one

A pre-activation is so a function of its row and its latent alone: it has the same bits whatever the rough product, and
wherever rows and latents are cut.

The margin, for factors x and w that bfloat16 rounds to x' and w': by Cauchy-Schwarz the product moves by at most
|x - x'| |w| + |x'| |w - w'|, where the largest norms of all w stand for each.  Sums of d terms in float32, of either
product, move by at most d 2^-24 |x| |w|, in any order (Higham, Accuracy and Stability of Numerical Algorithms, 2002,
section 3.1).  Rounding a bias or a result to bfloat16 moves it by at most 2^-8 of itself.  An entry that is looked at
and turns out to be further off is an error.

A bias far below what the largest row could make up for counts as just far enough, so that it widens no margin.  Where
the margin spans very many entries all the same, as for rows of a common large part, the rough product is in float32;
after some such tiles, from then on.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saetrain.compute.devices import full_precision
from saetrain.compute.kernels import candidates, kth_largest, maxima, true_places

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]

ROWS, COLUMNS = 512, 1024  # of the products that are timed
TYPES = (torch.bfloat16, torch.float32)
NARROW, FLOAT = 2.0**-8, 2.0**-24  # largest relative errors of rounding to bfloat16 and to float32
SAFE = (1e-15, 1e15)  # norms whose squares are sums of normal float32
FINITE = 1e38  # less than the largest number
SMALL = 1.2e-38  # more than the largest number that processors may take for 0
MANY = 16  # a product in float32 is worth its time where more than one entry in so many is looked at, beside k a row
PART = 256  # rows of weights whose norms are taken at a time
TINY = 1e-30  # more than what roundings below the normal numbers add up to
TRIES = 4  # tiles in which bfloat16 may tell too few entries apart before it is left
_COLUMN_BITS, _COLUMNS = np.uint64(32), np.uint64(0xFFFFFFFF)
_ONE = threading.Lock()  # filters of warnings are the process's
SLICE = 64  # rows of a tile that are looked at together where very many of their entries are


@cache
def fastest_type(d: int) -> torch.dtype:
    """The type of the fastest product of rows of width d on this machine; the same entries are found by all."""
    best = (float("inf"), TYPES[0])
    for dtype in TYPES:
        a, b = (torch.zeros(size, d, dtype=dtype) for size in (ROWS, COLUMNS))
        for _ in range(3):
            began = time.perf_counter()
            a @ b.T
            best = min(best, (time.perf_counter() - began, dtype), key=lambda one: one[0])
    return best[1]


class Entries(NamedTuple):
    """Entries of a tile, row by row, columns ascending; arrays [n]."""

    row: I64
    column: I64
    value: F32


NONE = Entries(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))


class Margin(NamedTuple):
    """The largest error of a rough value r of each row: fixed [rows] + share |r|."""

    fixed: Tensor
    share: float

    def reach(self, bound: Tensor) -> Tensor:
        """The least rough value of an entry that can be positive and among the k largest of its row.

        At least k rough values of each row reach `bound` [rows].
        """
        off = 1.01 * (self.fixed + self.share * (bound.abs() + 2 * self.fixed))
        least = torch.where(bound > 0, bound - 2 * off, -off)
        return _known(torch.maximum(least, torch.nextafter(-off, torch.full_like(off, torch.inf))), off)

    def floor(self) -> Tensor:
        """The bound [rows] that the rough value of every entry that can be positive exceeds."""
        return _known(-1.01 * (1 + 2 * self.share) * self.fixed, self.fixed)


class Narrow(NamedTuple):
    """A rough product in bfloat16, raised by `shift` so far that no entry that can be positive is negative."""

    bits: NDArray[np.int16]  # [rows, latents], of the numbers; those of positive ones have their order
    shift: float
    margin: Margin  # of the numbers less the shift


class Screen:
    """An encoder of `weight` [latents, d] and `bias` [latents], float32.

    With `threshold` [latents], `above` finds the entries that exceed it; without, `largest` finds the k largest
    positive ones of each row.  `room` is float32 memory [tile rows, latents] for the rough product.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, threshold: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        _quiet_sparse()
        self.weight, self.bias, self.threshold = weight, bias, threshold
        self._low = bias if threshold is None else bias - threshold  # an entry is active about where this sum reaches 0
        self.rough, self._tries = weight.to(dtype or fastest_type(weight.shape[1])), TRIES
        self._norms = torch.zeros(len(weight), dtype=torch.float64)
        self._off = 0.0  # largest norm of what rounding takes from a row of weights
        for lo in range(0, len(weight), PART):
            part = weight[lo : lo + PART]
            self._norms[lo : lo + PART] = _norms(part)
            self._off = max(self._off, float(_norms(part - self.rough[lo : lo + PART]).max()))
        self._norm = float(self._norms.max()) if len(weight) else 0.0

    def largest(self, x: Tensor, k: int, room: Tensor) -> Entries:
        """The k largest of each row of x [rows, d], if positive; of equal ones the lower columns."""
        k, tile = min(k, len(self.weight)), self._tile(x)
        if not k:
            return NONE
        if (narrow := self._narrow(x, tile, room)) is not None:
            bound = kth_largest(maxima(torch.from_numpy(narrow.bits), k), k).numpy()
            least = narrow.margin.reach(torch.from_numpy(_floats(bound) - narrow.shift))
            if (found := self._reaching(x, tile, narrow, least, 2 * k)) is not None:
                return best_of(*found, len(x), k)
        rough, margin = self._wide(x, tile, room)
        row, column, value = candidates(rough, k, margin.reach)
        if _are_many(len(row), rough):
            return _joined(self.largest(x[at : at + SLICE], k, room) for at in range(0, len(x), SLICE))
        return best_of(*self._exact(x, tile, margin, row.numpy(), column.numpy(), value.numpy()), len(x), k)

    def above(self, x: Tensor, room: Tensor) -> Entries:
        """The entries of x [rows, d] that exceed the threshold of their column."""
        assert self.threshold is not None
        if not len(self.weight):
            return NONE
        found, tile = None, self._tile(x)
        if (narrow := self._narrow(x, tile, room)) is not None:
            found = self._reaching(x, tile, narrow, narrow.margin.floor(), 0)
        if found is None:
            rough, margin = self._wide(x, tile, room)
            row, column = np.nonzero(~(rough <= margin.floor()[:, None]).numpy())
            if _are_many(len(row), rough):
                return _joined(self.above(x[at : at + SLICE], room) for at in range(0, len(x), SLICE))
            found = self._exact(x, tile, margin, row, column, rough.numpy()[row, column])
        active = np.flatnonzero(found.value > self.threshold.numpy()[found.column])
        return Entries(found.row[active], found.column[active], found.value[active])

    def _tile(self, x: Tensor) -> Tile:
        norm = _norms(x)
        # |<x, w>| <= |x| |w|, so less makes no entry negative that is not.  A latent without weights is its bias.
        least = -1.1 * self._norms * float(norm.max()) if len(x) else torch.zeros_like(self._norms)
        low = torch.maximum(self._low, least.clamp_min(-FINITE).float())
        sizes = low.abs() + torch.where(low > self._low, 0, self.bias.abs())
        low[(self._norms == 0) & (self._low <= 0)] = -torch.inf
        return Tile(norm, low, float(sizes.max()) if len(low) else 0.0)

    def _wide(self, x: Tensor, tile: Tile, room: Tensor) -> tuple[Tensor, Margin]:
        """The rough product in float32 [rows, latents]."""
        with full_precision():
            rough = torch.addmm(tile.low, x, self.weight.T, out=room[: len(x)])
        return rough, self._margin(x, tile, self.weight)

    def _narrow(self, x: Tensor, tile: Tile, room: Tensor) -> Narrow | None:
        """The rough product in bfloat16; None where it does not serve, or its numbers may be infinite."""
        weight = self.rough
        if weight.dtype == torch.float32 or not len(x):
            return None
        fixed, share = self._margin(x, tile, weight)
        shift = -1.05 * float(Margin(fixed, share).floor().min())
        if not self._norm * float(tile.norm.max()) + tile.most + shift < FINITE:
            return None
        rough = room.view(-1).view(weight.dtype)[: len(x) * len(weight)].view(len(x), len(weight))
        torch.addmm((tile.low + shift).to(weight.dtype), x.to(weight.dtype), weight.T, out=rough)
        return Narrow(rough.view(torch.int16).numpy(), shift, Margin(fixed + (share + NARROW) * shift, share))

    def _margin(self, x: Tensor, tile: Tile, weight: Tensor) -> Margin:
        norm, most, share = tile.norm, tile.most, 16 * FLOAT
        fixed = (3 * x.shape[1] + 16) * FLOAT * self._norm * norm + TINY * ((norm > 0) | (most > 0))
        if weight.dtype != torch.float32:
            off = _norms(x - x.to(weight.dtype))
            fixed += 1.001 * (self._norm * off + self._off * (norm + off)) + NARROW * most
            fixed += SMALL * x.shape[1] ** 0.5 * (self._norm + norm)
            share += 2.2 * NARROW  # a product may be rounded before its bias is added, and after
        fixed[~(self._norm * norm + most < FINITE)] = torch.inf  # sums may overflow on their way
        return Margin((fixed + share * most).float(), share)

    def _reaching(self, x: Tensor, tile: Tile, narrow: Narrow, least: Tensor, expected: int) -> Entries | None:
        """The entries whose rough values reach the least of their row, or None if these are too many."""
        # Cutting the bits off rounds towards 0, so no entry is lost; 0 itself is below every bound.
        bits = np.maximum((least.numpy() + np.float32(narrow.shift)).view(np.int32) >> 16, 1).astype(np.int16)
        place = true_places(torch.from_numpy(narrow.bits >= bits[:, None])).numpy()
        if (len(place) - expected * len(x)) * MANY > narrow.bits.size:
            self._tries -= 1
            if self._tries <= 0:
                self.rough = self.weight
            return None
        row, column = np.divmod(place, narrow.bits.shape[1])
        rough = _floats(narrow.bits.reshape(-1)[place]) - np.float32(narrow.shift)
        return self._exact(x, tile, narrow.margin, row, column, rough)

    def _exact(self, x: Tensor, tile: Tile, margin: Margin, row: I64, column: I64, rough: F32) -> Entries:
        products = inner(x, self.weight, row, column)
        with np.errstate(invalid="ignore"):  # of two infinities
            allowed = margin.fixed.numpy()[row] + margin.share * np.abs(rough)
            off = np.abs(products + tile.low.numpy()[column] - rough) - allowed
        if (off > 0).any():
            raise ArithmeticError(f"a rough product is off by {off.max():.2g} more than its margin")
        return Entries(row, column, products + self.bias.numpy()[column])


class Tile(NamedTuple):
    """The sizes of a tile from which its margins follow."""

    norm: Tensor  # [rows], float64
    low: Tensor  # [latents], what is added to the products
    most: float  # the largest |low| + |bias| of a latent; |low| alone where `low` was raised


def best_of(row: I64, column: I64, value: F32, rows: int, k: int) -> Entries:
    """Of entries row by row, columns ascending, the k largest of each row, if positive, in the same order.

    Of equal values the lower columns are taken.  Values and columns make up words that are all different, so the
    k-th largest word of a row parts those that are taken from the others, and nothing needs to be sorted.
    """
    positive = np.flatnonzero(value > 0)
    row, column, value = row[positive], column[positive], value[positive]
    counts = np.bincount(row, minlength=rows)
    width = int(counts.max(initial=0))
    if width <= k:
        return Entries(row, column, value)
    words = (value.view(np.uint32).astype(np.uint64) << _COLUMN_BITS) | (_COLUMNS - column.astype(np.uint64))
    table = np.zeros((rows, width), np.uint64)
    table[row, np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)] = words
    bound = np.partition(table, width - k, axis=1)[:, width - k]
    kept = np.flatnonzero(words >= np.repeat(bound, counts))
    return Entries(row[kept], column[kept], value[kept])


def _are_many(count: int, rough: Tensor) -> bool:
    """True if a tile is looked at in slices, since what is kept of its entries would take much memory."""
    return len(rough) > SLICE and count > rough.numel() // 8


def _joined(slices: Iterable[Entries]) -> Entries:
    """Entries of slices of SLICE rows each."""
    parts = [found._replace(row=found.row + number * SLICE) for number, found in enumerate(slices)]
    row, column, value = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Entries(row, column, value)


def _known(least: Tensor, margin: Tensor) -> Tensor:
    """The bound, or NaN where the margin is infinite: no value is less than NaN, so every entry is looked at."""
    return torch.where(torch.isfinite(margin), least, torch.nan)


def _floats(bits: NDArray[np.int16]) -> F32:
    """The numbers of bfloat16 with these bits."""
    return (bits.astype(np.int32) << 16).view(np.float32)


def _norms(rows: Tensor) -> Tensor:
    """Not less than the norms of rows, [rows]; in float64 where squares of float32 may become 0 or infinite."""
    found: Tensor = 1.001 * torch.linalg.vector_norm(rows, dim=1).double()
    odd = ~((found > SAFE[0]) & (found < SAFE[1]))
    if bool(odd.any()):
        found[odd] = torch.linalg.vector_norm(rows[odd].double(), dim=1)
    return found


def inner(x: Tensor, weight: Tensor, row: I64, column: I64) -> F32:
    """[n]: inner products of rows `row` (ascending) of x with rows `column` of the weight, each on its own."""
    if not len(row):
        return np.empty(0, np.float32)
    starts = np.append(0, np.cumsum(np.bincount(row, minlength=len(x))))
    pattern = torch.sparse_csr_tensor(
        torch.from_numpy(starts),
        torch.from_numpy(column),
        torch.zeros(len(column)),
        (len(x), len(weight)),
        check_invariants=False,
    )
    found: F32 = torch.sparse.sampled_addmm(pattern, x, weight.T, beta=0.0).values().numpy()
    return found


def _quiet_sparse() -> None:
    """Swallow the warning, which torch gives once, that sparse tensors in CSR are in beta."""
    with _ONE:
        _swallow()


@cache
def _swallow() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], torch.zeros(0), (1, 1), check_invariants=False)
