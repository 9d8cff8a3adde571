"""The product A B^T a tile at a time, and the largest entries of its rows and columns.

::

                        B^T     1024 columns at a time, streamed
                    +--------+--------+--------+
            256     |  pre   |        |        |      each tile is one matrix product of fixed shape; kept of it are:
    A       rows    +--------+--------+--------+         tables     the k largest of each row, of each column
                    |        |        |        |         counts     entries above thresholds, of each row and column
                    +--------+--------+--------+

The bits of a float32 matrix product may depend on its shape, since a library picks its kernel by shape.  Here every
product has the same shape and alignment, [256, d] x [d, 1024], with zeros where a matrix ends, and tiles lie at
multiples of 256 rows and 1024 columns.  So an entry has the same bits in whichever panel, task or process it is
computed.  Its error is at most d 2^-24 |a| |b|.

The order of entries is total: larger first, then lower index.  So tables merge exactly, and in any grouping.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saetrain.compute.devices import full_precision
from saetrain.compute.kernels import true_places

ROWS, COLUMNS = 256, 1024  # of a tile; COLUMNS is a multiple of ROWS
EMPTY = -1  # index of an entry that is not there


@dataclass
class Table:
    """The k largest entries of each of n rows: values [n, k], largest first, and their columns [n, k].

    Where fewer were offered, the value is -inf and the column is EMPTY.
    """

    value: Tensor  # float32
    index: Tensor  # int64

    @classmethod
    def empty(cls, rows: int, k: int, device: str | torch.device = "cpu") -> Table:
        value = torch.full((rows, k), -torch.inf, device=device)
        return cls(value, torch.full((rows, k), EMPTY, dtype=torch.int64, device=device))

    def offer(self, start: int, values: Tensor, index: Tensor) -> None:
        """Take what belongs into the table of `values` [m, n], for rows `start`, `start` + 1, ...

        `index` [n] or [m, n] names the columns.  In each row, an entry that equals one that is there already must
        have a higher column, and equal values of one offer must come in order of column.
        """
        held = self.value[start : start + len(values)]
        k = held.shape[1]
        # The last value of a full row is a bound; among equal values those that are there already win.  Few rows of a
        # late offer have a value beyond it, and their maxima are found in a seventh of the time of a comparison.
        reached = true_places((values.amax(1) <= held[:, -1]).logical_not_())  # a NaN is looked at too
        if not len(reached):
            return
        some = values if len(reached) == len(values) else values[reached]
        bound = held[reached, -1:]
        wanted = some > bound
        if values.shape[1] > k and bool(torch.isinf(bound).any()):
            # Nor can a value enter that k others of its offer exceed.
            wanted &= some >= some.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        flat = true_places(wanted)
        if not len(flat):
            return
        row, column = reached[torch.div(flat, wanted.shape[1], rounding_mode="floor")], flat % wanted.shape[1]
        self.merge(start, row, values[row, column], index[column] if index.dim() == 1 else index[row, column])

    def merge(self, start: int, row: Tensor, value: Tensor, index: Tensor) -> None:
        """Take entries [n] into the table, row by row, of rows `start` + `row`; each as `offer` asks for."""
        if not len(row):
            return
        held, k = self.value[start:], self.value.shape[1]
        touched, place, count = torch.unique_consecutive(row, return_inverse=True, return_counts=True)
        slot = k + torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[place]
        width = k + int(count.max())
        offered = value.new_full((len(touched), width), -torch.inf)
        names = index.new_full((len(touched), width), EMPTY)
        offered[:, :k], names[:, :k] = held[touched], self.index[start + touched]
        offered[place, slot], names[place, slot] = value, index
        best, at = torch.sort(offered, dim=1, stable=True, descending=True)
        self.value[start + touched] = best[:, :k]
        self.index[start + touched] = names.gather(1, at[:, :k])


@dataclass
class Kept:
    """What is kept of the rows of a product, or of its columns.

    `over` [n, thresholds] counts the entries whose size exceeds each threshold.  `bottom` holds negated values.
    """

    top: Table
    bottom: Table | None
    over: Tensor  # int64

    @classmethod
    def empty(cls, rows: int, k: int, bottom: bool, thresholds: int, device: str | torch.device = "cpu") -> Kept:
        over = torch.zeros(rows, thresholds, dtype=torch.int64, device=device)
        return cls(Table.empty(rows, k, device), Table.empty(rows, k, device) if bottom else None, over)

    def add(self, start: int, pre: Tensor, first: int, thresholds: Sequence[float], diagonal: Tensor | None) -> None:
        """Take a tile `pre` [m, n] of rows `start`, ... and columns `first`, ..., without the entries on `diagonal`."""
        index = torch.arange(first, first + pre.shape[1], device=pre.device)
        self.top.offer(start, _without(pre, diagonal, -torch.inf), index)
        if self.bottom is not None:
            self.bottom.offer(start, _without(-pre, diagonal, -torch.inf), index)
        if thresholds:
            size = _without(pre, diagonal, 0.0).abs()
            for number, threshold in enumerate(thresholds):
                self.over[start : start + len(pre), number] += (size > threshold).sum(1)


def _without(pre: Tensor, diagonal: Tensor | None, fill: float) -> Tensor:
    return pre if diagonal is None else pre.masked_fill(diagonal, fill)


def padded(rows: Tensor) -> Tensor:
    """Rows as a new float32 matrix whose height is a multiple of COLUMNS, with zeros at the end."""
    whole = rows.new_zeros(-(-len(rows) // COLUMNS) * COLUMNS, rows.shape[1], dtype=torch.float32)
    whole[: len(rows)] = rows
    return whole


def products(a: Tensor, b: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Tiles of A B^T for rows a [n, d], ROWS at a time, and b [m, d], at most COLUMNS: first row, and [rows, m]."""
    right = padded(b).T
    for low in range(0, len(a), ROWS):
        left = a[low : low + ROWS]
        held = len(left)
        if held < ROWS:
            left = torch.cat([left, left.new_zeros(ROWS - held, left.shape[1])])
        with full_precision():
            pre = left @ right
        yield low, pre[:held, : len(b)]


def add_tile(
    rows: Kept,
    a: Tensor,
    rows_start: int,
    columns: Kept | None,
    b: Tensor,
    columns_start: int,
    at: int,
    thresholds: Sequence[float],
    drop_same: bool,
) -> None:
    """Compute A B^T for the rows of a panel and at most COLUMNS columns, and keep what belongs into the tables.

    Parameters
    ----------
    rows : tables of the panel's rows; `a` [n, d] are these, and `rows_start` is the number of the first.
    columns : tables of a panel of columns, or None; `b` [m, d] are those from row `at` of the tables, and
        `columns_start` is the number of the first.
    thresholds : sizes above which entries are counted.
    drop_same : leave out entries whose row and column have the same number.
    """
    for low, pre in products(a, b):
        number, held = rows_start + low, len(pre)
        diagonal = None
        if drop_same and number < columns_start + len(b) and columns_start < number + held:
            mine = torch.arange(number, number + held, device=pre.device)
            diagonal = mine[:, None] == torch.arange(columns_start, columns_start + len(b), device=pre.device)
        rows.add(low, pre, columns_start, thresholds, diagonal)
        if columns is not None:
            columns.add(at, pre.T, number, thresholds, None if diagonal is None else diagonal.T)
