"""The rows of largest inner product with each row, exactly: a rough product says which pairs to look at.

::

    rough     A B^T        bfloat16 or float32, whichever is faster here      off by at most `margin`
    looked at              pairs whose rough product reaches the bound of their row, less the margin
    exact                  their inner products in float64, rounded to float32; the k largest of each row stay

For rows of norm 1 or 0, where sum |a_i b_i| <= 1, and u = 2^-8 (bfloat16 has 8 bits): rounding the factors moves a
product by less than 2 u, sums in float32 by at most 2 d 2^-24, and rounding the result, below 2, by at most u.  So the
margin is 3 u + (2 d + 300) 2^-24, where the 300 covers norms that are rounded.  A pair that is looked at and turns out
to be further off is an error.

Where very many pairs reach their bounds, since rows are copies of each other, a product in float64 takes the place of
the rough one, and tells those apart that equal the bound: they come later, and cannot enter.

The exact value of a pair is a function of its two rows alone, and the same for (i, j) as for (j, i).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saetrain.products.tiles import Table

ROWS, COLUMNS = 512, 1024  # of a rough product
MANY = 32  # a product in float64 is worth its time where more than one pair in so many is looked at
PAIRS = 1 << 15  # whose inner products are computed at a time, or fewer:
NUMBERS = 1 << 18  # of their rows
SUMMED = 4096  # numbers of a row that are added up at once; einsum would cut longer sums where its buffer ends

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]  # rows and columns of a tile, in order


def margin(d: int) -> float:
    """The largest error of a rough product of rows of width d."""
    return 3 * 2.0**-8 + (2 * d + 300) * 2.0**-24


def tile_bytes(d: int) -> int:
    """Bytes that an offer takes beside the rows and their table."""
    return COLUMNS * 14 * d + ROWS * (COLUMNS * 16 + 8 * d) + 24 * NUMBERS + 120 * PAIRS


class Nearest:
    """The k largest inner products of rows [n, d] of norm 1 or 0, float32, with other rows, and the numbers of those.

    `first` numbers the first of the rows; none is compared with itself.  `table` has the result.
    """

    def __init__(self, rows: Tensor, first: int, k: int, dtype: torch.dtype) -> None:
        self.rows, self.first, self.dtype, self.margin = rows, first, dtype, margin(rows.shape[1])
        self.table = Table.empty(len(rows), k)
        self._rough, self._zero = rows.to(dtype), (rows == 0).all(1)
        # Memory that is used again: fresh pages would cost nearly as much as the product.
        self._product = torch.empty(ROWS, COLUMNS, dtype=dtype)
        self._wide = torch.empty(ROWS, COLUMNS)
        self._reach = np.empty((ROWS, COLUMNS), bool)

    def offer(self, others: Tensor, start: int) -> None:
        """Take rows [m, d], at most COLUMNS of them, into account; they come in ascending order from call to call."""
        rough = others.to(self.dtype)
        for low in range(0, len(self.rows), ROWS):
            mine = slice(low, low + ROWS)
            held = self.table.value[mine]
            product = self._product.view(-1)[: len(held) * len(others)].view(len(held), -1)
            wide = self._wide.view(-1)[: product.numel()].view(product.shape)
            wide.copy_(torch.mm(self._rough[mine], rough.T, out=product))
            own = np.arange(len(held)) + (self.first + low - start)  # the column of each row itself
            row, column = self._reached(wide, own, held, mine)
            if len(row) * MANY > wide.numel():
                row, column = self._reached_exactly(self.rows[mine].double() @ others.double().T, own, held)
            for at in range(0, len(row), PAIRS):
                # Parts may cut a row, whose entries are still offered in ascending order.
                part = slice(at, at + PAIRS)
                self._take(low, (row[part], column[part]), wide, others, start)

    def _reached(self, rough: Tensor, own: NDArray[np.int64], held: Tensor, mine: slice) -> Pairs:
        """The pairs that may belong among the k largest of a row by rough products, which lose those with itself."""
        _without(rough, own)
        last = held[:, -1]
        least = last - self.margin
        if rough.shape[1] > held.shape[1] and bool(torch.isinf(last).any()):
            # Nor can one enter that k others of its offer exceed, however far each is off.
            least = torch.maximum(least, _kth(rough, held.shape[1]) - 2 * self.margin)
        least = least.masked_fill(self._zero[mine] & (last == 0), torch.inf)  # products of zeros are all the same
        return _places(rough.numpy(), least.clamp_min(-2.0).numpy(), self._reach)

    def _reached_exactly(self, exact: Tensor, own: NDArray[np.int64], held: Tensor) -> Pairs:
        """The same by products in float64: of a full row, those that float32 rounds to more than its last."""
        _without(exact, own)
        last, off = held[:, -1], (exact.shape[1] + 50) * 2.0**-52
        above = torch.nextafter(last, torch.full_like(last, torch.inf))
        least = ((last.double() + above.double()) / 2 - off).masked_fill(torch.isinf(last), -2.0)
        if exact.shape[1] > held.shape[1]:
            room = torch.isinf(last)
            kth = _kth(exact, held.shape[1]) - 2 * off - 2.0**-23  # others may round to the same float32
            least = torch.where(room, torch.maximum(least, kth), least)
        return _places(exact.numpy(), least.numpy(), self._reach)

    def _take(self, low: int, pairs: Pairs, rough: Tensor, others: Tensor, start: int) -> None:
        row, column = pairs
        exact = inner(self.rows.numpy(), others.numpy(), row + low, column)
        off = float(np.abs(exact - rough.numpy()[row, column]).max(initial=0.0))
        if not off <= self.margin:
            raise ArithmeticError(f"a product in {self.dtype} is off by {off:.2g}, more than {self.margin:.2g}")
        wanted = np.flatnonzero(exact > self.table.value[:, -1].numpy()[row + low])
        self.table.merge(low, *(torch.from_numpy(x[wanted]) for x in (row, exact, column + start)))


def inner(
    a: NDArray[np.float32], b: NDArray[np.float32], row: NDArray[np.int64], column: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Inner products of rows `row` of a with rows `column` of b: sums in float64, rounded to float32."""
    found, step = np.empty(len(row), np.float32), max(NUMBERS // a.shape[1], 1)
    for at in range(0, len(row), step):
        part = slice(at, at + step)
        found[part] = row_sums(a[row[part]].astype(np.float64), b[column[part]].astype(np.float64))
    return found


def row_sums(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inner products of the rows of two matrices; each has the same bits alone and among others."""
    parts = range(0, left.shape[1], SUMMED)
    total: NDArray[np.float64] = sum(
        (np.einsum("ij,ij->i", left[:, p : p + SUMMED], right[:, p : p + SUMMED]) for p in parts), np.zeros(len(left))
    )
    return total


def _without(product: Tensor, own: NDArray[np.int64]) -> None:
    """Put -inf in the place of the products of rows with themselves."""
    rows = np.flatnonzero((own >= 0) & (own < product.shape[1]))
    product[rows, own[rows]] = -torch.inf


def _kth(product: Tensor, k: int) -> Tensor:
    return product.topk(k, dim=1, sorted=False).values.amin(1)


def _places(product: NDArray[np.float64], least: NDArray[np.float64], memory: NDArray[np.bool_]) -> Pairs:
    """Rows and columns of the products that reach the least of their row, which is finite or above all of them."""
    mask = memory.reshape(-1)[: product.size].reshape(product.shape)
    flat = np.flatnonzero(np.greater_equal(product, least[:, None], out=mask))
    row = flat // product.shape[1]
    return row, flat - row * product.shape[1]
