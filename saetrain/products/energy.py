"""How much of a row of A B^T the kept entries hold: the exact energy and sum of whole rows, which are never computed.

With w = A B^T, the energy and the sum of row i follow from the Gram matrix and the sum of the rows of B:

    sum_j w_ij^2 = a_i (B^T B) a_i^T             sum_j w_ij = a_i . sum_j b_j

All is float64, of float32 rows.  The Gram matrix is summed a tile of COLUMNS rows at a time inside chunks of
GRAM_ROWS rows, and chunk by chunk, by one thread, so its bits depend on B alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from saetrain.compute.devices import one_thread
from saetrain.products.tiles import COLUMNS, EMPTY, Table, padded

GRAM_ROWS = 1 << 18  # rows of a chunk


class Gram(NamedTuple):
    """Of some rows b: `matrix` [d, d] is B^T B, `total` [d] is the sum of the rows; float64."""

    matrix: Tensor
    total: Tensor

    def plus(self, other: Gram) -> Gram:
        return Gram(self.matrix + other.matrix, self.total + other.total)

    def whole(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """The energy and the sum of each row of A B^T, float64 [n], for a tile of rows a [n, d]."""
        wide = padded(a).double()
        with one_thread():
            energy = torch.linalg.vecdot(wide @ self.matrix, wide)[: len(a)]
        return energy.clamp_min(0), (wide * self.total).sum(1)[: len(a)]


def gram(tiles: Iterable[Tensor], width: int, device: str | torch.device = "cpu") -> Gram:
    """The Gram matrix of a chunk, from its tiles of at most COLUMNS rows in order."""
    matrix = torch.zeros(width, width, dtype=torch.float64, device=device)
    total = torch.zeros(width, dtype=torch.float64, device=device)
    for tile in tiles:
        wide = padded(tile).double()
        with one_thread():
            matrix += wide.T @ wide
        total += wide.sum(0)
    return Gram(matrix, total)


def kept_energy(top: Table, bottom: Table | None) -> Tensor:
    """The energy of the entries in the tables, each entry once; float64 [n]."""
    held = _squares(top.value)
    energy = held.sum(1)
    if bottom is not None:
        low = _squares(bottom.value)
        # With k above half the columns an entry is among the largest and the smallest.
        twice = torch.stack([(top.index == bottom.index[:, i : i + 1]).any(1) for i in range(low.shape[1])], 1)
        energy = energy + low.masked_fill(twice & (bottom.index != EMPTY), 0.0).sum(1)
    return energy


def _squares(value: Tensor) -> Tensor:
    return value.masked_fill(torch.isinf(value), 0.0).double().square()


def tiles_of(start: int, stop: int) -> Iterable[tuple[int, int]]:
    """Ranges [from, to) of tiles of COLUMNS rows."""
    return ((at, min(at + COLUMNS, stop)) for at in range(start, stop, COLUMNS))
