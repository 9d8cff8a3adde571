"""The rows of largest inner product with each row, exactly: a rough product says which pairs to look at.

::

    rough     A B^T        bfloat16 or float32, whichever is faster here      off by at most `margin`
    looked at              pairs whose rough product reaches the bound of their row, less the margin
    exact                  their inner products in float64, rounded to float32; the k largest of each row stay

For rows of norm 1 or 0 and width d, with u = 2^-8 (bfloat16 has 8 bits), rounding the factors puts
sum |a_i b_i| <= 1 off by at most 2 u + u^2, sums in float32 by at most 2 d 2^-24, and rounding the product by u.  So
the margin is 3 u + (2 d + 300) 2^-24 for bfloat16 and (2 d + 300) 2^-24 for float32, where the 300 covers u^2 and norms
that are rounded.  A product of a pair that is looked at and turns out to be further off is an error.
The exact value of a pair is a function of its two rows alone, and the same for (i, j) as for (j, i).
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saetrain.products.tiles import Table

ROWS, COLUMNS = 1024, 1024  # of a rough product
NUMBERS = 1 << 20  # of rows whose inner products are computed at a time


class Screen(NamedTuple):
    """The type of rough products, and how far they may be off."""

    dtype: torch.dtype
    margin: float


class Rows(NamedTuple):
    """Rows of norm 1 or 0: float32 [n, d], the same in the type of a screen, and which are zeros [n]."""

    exact: Tensor
    rough: Tensor
    zero: Tensor


def screens(d: int) -> tuple[Screen, ...]:
    """What there is to choose from, for rows of width d."""
    sums = (2 * d + 300) * 2.0**-24
    return Screen(torch.float32, sums), Screen(torch.bfloat16, 3 * 2.0**-8 + sums)


def fastest_screen(d: int) -> Screen:
    """The one whose product is faster on this machine; both give the same result."""
    best = (float("inf"), -1)
    for number, (dtype, _) in enumerate(found := screens(d)):
        a, b = (torch.zeros(size, d, dtype=dtype) for size in (ROWS // 4, COLUMNS))
        for _ in range(3):
            began = time.perf_counter()
            a @ b.T
            best = min(best, (time.perf_counter() - began, number))
    return found[best[1]]


def for_screen(exact: Tensor, screen: Screen) -> Rows:
    return Rows(exact, exact.to(screen.dtype), (exact == 0).all(1))


def add_nearest(table: Table, a: Rows, a_start: int, b: Rows, b_start: int, screen: Screen) -> None:
    """Take the inner products of rows `a`, whose table it is, with rows `b` into the table.

    `a_start` and `b_start` number the first row of each; a row is not compared with itself.  Rows `b` come in
    ascending order from call to call.
    """
    for low in range(0, len(a.exact), ROWS):
        mine = slice(low, low + ROWS)
        rough = (a.rough[mine] @ b.rough.T).float()
        own = torch.arange(len(rough)) + (a_start + low - b_start)  # the column of each row itself
        inside = (own >= 0) & (own < rough.shape[1])
        rough[inside, own[inside]] = -torch.inf
        row, column = _candidates(rough, table.value[mine], a.zero[mine], screen.margin)
        if not len(row):
            continue
        exact = _inner(a.exact[mine].numpy(), b.exact.numpy(), row, column)
        _check(exact, rough.numpy()[row, column], screen)
        wanted = np.flatnonzero((exact > table.value[mine, -1].numpy()[row]) & (column != own.numpy()[row]))
        table.merge(low, *(torch.from_numpy(x[wanted]) for x in (row, exact, column + b_start)))


def _candidates(
    rough: Tensor, held: Tensor, zero: Tensor, margin: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns, in order, of the products that may belong among the k largest of a row, `held` [rows, k]."""
    k, last = held.shape[1], held[:, -1]
    least = last - margin
    if rough.shape[1] > k and bool(torch.isinf(last).any()):
        # Nor can a product enter that k others of its offer exceed, however far each is off.
        least = torch.maximum(least, rough.topk(k, dim=1, sorted=False).values.amin(1) - 2 * margin)
    least = least.masked_fill(zero & (last == 0), torch.inf)  # all products of a row of zeros are the same
    flat = np.flatnonzero(rough.numpy() >= least[:, None].numpy())
    row = flat // rough.shape[1]
    return row, flat - row * rough.shape[1]


def _check(exact: NDArray[np.float32], rough: NDArray[np.float32], screen: Screen) -> None:
    """The pairs of a row with itself have a rough product of -inf, and are none."""
    off = float(np.abs(exact - rough)[np.isfinite(rough)].max(initial=0.0))
    if off > screen.margin:
        raise ArithmeticError(f"a product in {screen.dtype} is off by {off:.2g}, more than {screen.margin:.2g}")


def _inner(
    a: NDArray[np.float32], b: NDArray[np.float32], row: NDArray[np.int64], column: NDArray[np.int64]
) -> NDArray[np.float32]:
    found = np.empty(len(row), np.float32)
    step = max(NUMBERS // a.shape[1], 1)
    for at in range(0, len(row), step):
        part = slice(at, at + step)
        # Converted before: within einsum, the sums of a row would be cut where its buffer ends.
        found[part] = np.einsum("ij,ij->i", a[row[part]].astype(np.float64), b[column[part]].astype(np.float64))
    return found
