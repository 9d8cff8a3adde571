"""The active entries of an encoder product on a CPU: a rough product of all says which inner products to compute.

::

    rough       x W^T + b         bfloat16 or float32, whichever is faster here: off by at most `margin`
    looked at                     entries that may be active or among the k largest of a row, however far each is off
    computed    <x_r, w_c> + b_c  in float32, one by one

A pre-activation is so a function of its row and its latent alone: it has the same bits whatever the rough product, and
wherever rows and latents are cut.

The margin, for factors x and w that bfloat16 rounds to x' and w': by Cauchy and Schwarz the product moves by at most
|x - x'| |w| + |x'| |w - w'|, where the largest norms of all w stand for each.  Sums of d terms in float32, of either
product, move by at most d 2^-24 |x| |w|, in any order (Higham, Accuracy and Stability of Numerical Algorithms, 2002,
section 3.1), and rounding the result to bfloat16 by a share of 2^-8 of itself, less its bias.  An entry that is looked
at and turns out to be further off is an error.

Where the margin spans very many entries, as for rows of a common large part, the rough product is in float32 from then
on.
"""

from __future__ import annotations

import time
import warnings
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saetrain.compute.kernels import candidates, kth_largest, maxima, true_places

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]

ROWS, COLUMNS = 512, 1024  # of a rough product
TYPES = (torch.bfloat16, torch.float32)
NARROW, FLOAT = 2.0**-8, 2.0**-24  # what rounding to bfloat16 and float32 takes from a number, as a share of it
SAFE = (1e-15, 1e15)  # norms whose squares are sums of normal float32
FINITE = 1e38  # less than the largest number
MANY = 16  # a product in float32 is worth its time where more than one entry in so many is looked at, beside k a row
PART = 256  # rows of weights whose norms are taken at a time
TINY = 1e-30  # more than numbers too small for normal float32 can add up to


@cache
def fastest_type(d: int) -> torch.dtype:
    """The type of the fastest product of rows of width d on this machine; all give the same result."""
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
        """What rough values of entries that can be positive exceed, [rows]."""
        return _known(-1.01 * (1 + 2 * self.share) * self.fixed, self.fixed)


class Narrow(NamedTuple):
    """A rough product in bfloat16, raised by `shift` so far that no entry that can be positive is negative."""

    bits: NDArray[np.int16]  # [rows, latents], of the numbers; those of positive ones have their order
    shift: float
    margin: Margin  # of the numbers less the shift


class Screen:
    """An encoder of `weight` [latents, d] and `bias` [latents], float32.

    With `threshold` [latents], `above` finds the entries that exceed it; without, `largest` finds the k largest
    positive ones of each row and few others.  `room` is float32 memory [tile rows, latents] for the rough product.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, threshold: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        self.weight, self.bias, self.threshold = weight, bias, threshold
        self._low = bias if threshold is None else bias - threshold  # an entry is active about where this sum reaches 0
        self._most = float(self._low.abs().max()) + float(bias.abs().max()) if len(bias) else 0.0
        self.rough = weight.to(dtype or fastest_type(weight.shape[1]))
        self._norm = self._off = 0.0  # largest norms of a row of weights, and of what rounding takes from it
        for lo in range(0, len(weight), PART):
            part = weight[lo : lo + PART]
            self._norm = max(self._norm, float(_norms(part).max()))
            self._off = max(self._off, float(_norms(part - self.rough[lo : lo + PART]).max()))

    def largest(self, x: Tensor, k: int, room: Tensor) -> Entries:
        """Entries among which are the k largest of each row of x [rows, d], if positive."""
        k = min(k, len(self.weight))
        if (narrow := self._narrow(x, room)) is not None:
            bound = kth_largest(maxima(torch.from_numpy(narrow.bits), k), k).numpy()
            least = narrow.margin.reach(torch.from_numpy(_floats(bound) - narrow.shift))
            if (found := self._reaching(x, narrow, least, 2 * k)) is not None:
                return found
        rough, margin = self._wide(x, room)
        row, column, value = candidates(rough, k, margin.reach)
        return self._exact(x, margin, row.numpy(), column.numpy(), value.numpy())

    def above(self, x: Tensor, room: Tensor) -> Entries:
        """The entries of x [rows, d] that exceed the threshold of their column."""
        assert self.threshold is not None
        found = None
        if (narrow := self._narrow(x, room)) is not None:
            found = self._reaching(x, narrow, narrow.margin.floor(), 0)
        if found is None:
            rough, margin = self._wide(x, room)
            row, column = np.nonzero(~(rough <= margin.floor()[:, None]).numpy())
            found = self._exact(x, margin, row, column, rough.numpy()[row, column])
        active = np.flatnonzero(found.value > self.threshold.numpy()[found.column])
        return Entries(found.row[active], found.column[active], found.value[active])

    def _wide(self, x: Tensor, room: Tensor) -> tuple[Tensor, Margin]:
        """The rough product in float32 [rows, latents]."""
        rough = torch.addmm(self._low, x, self.weight.T, out=room[: len(x)])
        return rough, self._margin(x, _norms(x), self.weight)

    def _narrow(self, x: Tensor, room: Tensor) -> Narrow | None:
        """The rough product in bfloat16; None where it does not serve, or its numbers may be infinite."""
        weight, norm = self.rough, _norms(x)
        if weight.dtype == torch.float32 or not len(x):
            return None
        fixed, share = self._margin(x, norm, weight)
        shift = -1.05 * float(Margin(fixed, share).floor().min())
        if not self._norm * float(norm.max()) + self._most + shift < FINITE:
            return None
        rough = room.view(-1).view(weight.dtype)[: len(x) * len(weight)].view(len(x), len(weight))
        torch.addmm((self._low + shift).to(weight.dtype), x.to(weight.dtype), weight.T, out=rough)
        return Narrow(rough.view(torch.int16).numpy(), shift, Margin(fixed + (share + NARROW) * shift, share))

    def _margin(self, x: Tensor, norm: Tensor, weight: Tensor) -> Margin:
        fixed, share = (3 * x.shape[1] + 16) * FLOAT * self._norm * norm + TINY * (norm > 0), 16 * FLOAT
        if weight.dtype != torch.float32:
            off = _norms(x - x.to(weight.dtype))
            fixed += 1.001 * (self._norm * off + self._off * (norm + off)) + NARROW * self._most
            share += 2.2 * NARROW  # a product may be rounded before its bias is added, and after
        return Margin((fixed + share * self._most).float(), share)

    def _reaching(self, x: Tensor, narrow: Narrow, least: Tensor, expected: int) -> Entries | None:
        """The entries whose rough values reach the least of their row, or None if these are too many."""
        # The bits are those of the next number towards 0, which more may reach; numbers of 0 cannot.
        bits = np.maximum((least.numpy() + np.float32(narrow.shift)).view(np.int32) >> 16, 1).astype(np.int16)
        place = true_places(torch.from_numpy(narrow.bits >= bits[:, None])).numpy()
        if (len(place) - expected * len(x)) * MANY > narrow.bits.size:
            self.rough = self.weight  # bfloat16 tells too few apart
            return None
        row, column = np.divmod(place, narrow.bits.shape[1])
        return self._exact(x, narrow.margin, row, column, _floats(narrow.bits.reshape(-1)[place]) - narrow.shift)

    def _exact(self, x: Tensor, margin: Margin, row: I64, column: I64, rough: F32) -> Entries:
        products = inner(x, self.weight, row, column)
        with np.errstate(invalid="ignore"):  # of two infinities
            allowed = margin.fixed.numpy()[row] + margin.share * np.abs(rough)
            off = np.abs(products + self._low.numpy()[column] - rough) - allowed
        if (off > 0).any():
            raise ArithmeticError(f"a rough product is off by {off.max():.2g} more than its margin")
        return Entries(row, column, products + self.bias.numpy()[column])


def _known(least: Tensor, margin: Tensor) -> Tensor:
    """A NaN, which no value is less than, where the margin knows no end."""
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
    _announce_sparse()
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


@cache
def _announce_sparse() -> None:
    """Have torch say once, to nobody, that its sparse tensors are young."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], torch.zeros(0), (1, 1), check_invariants=False)
