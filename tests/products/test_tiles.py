"""Tables of the largest entries: any grouping of offers, ties to the lower column."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saetrain.products.energy import gram, kept_energy
from saetrain.products.matrices import open_side
from saetrain.products.tiles import COLUMNS, EMPTY, ROWS, Kept, Table, add_tile


@pytest.mark.parametrize("seed", range(6))
def test_any_grouping_of_offers_gives_the_same_table(seed):
    dice = np.random.default_rng(seed)
    rows, columns, k = 7, 90, int(dice.integers(1, 30))
    values = dice.integers(-4, 5, (rows, columns)).astype(np.float32)
    table, at = Table.empty(rows + 2, k), 0
    while at < columns:
        stop = min(at + int(dice.integers(1, 40)), columns)
        table.offer(1, torch.from_numpy(values[:, at:stop]), torch.arange(at, stop))
        at = stop
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    assert np.array_equal(table.index[1:-1], order)
    assert np.array_equal(table.value[1:-1], np.take_along_axis(values, order, 1))
    assert torch.equal(table.index[[0, -1]], torch.full((2, k), EMPTY))  # rows that nothing was offered
    parts = [Table.empty(rows, k) for _ in range(3)]
    for number, part in enumerate(parts):
        mine = torch.arange(number * 30, (number + 1) * 30)
        part.offer(0, torch.from_numpy(values[:, number * 30 : (number + 1) * 30]), mine)
    joined = Table.empty(rows, k)
    for part in parts:
        joined.offer(0, part.value, part.index)
    assert torch.equal(joined.index, table.index[1:-1])


def test_control_offers_out_of_order_break_ties_otherwise():
    table = Table.empty(1, 2)
    for column in (5, 3):
        table.offer(0, torch.ones(1, 1), torch.tensor([column]))
    assert table.index.tolist() == [[5, 3]]


def test_a_tile_has_the_same_bits_in_every_panel():
    dice = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, 33, generator=dice) for n in (3 * ROWS + 40, 2 * COLUMNS + 9))
    found = []
    for low, high in ((0, len(a)), (ROWS, 2 * ROWS), (2 * ROWS, len(a))):
        rows = Kept.empty(high - low, len(b), False, 0)
        for at in range(0, len(b), COLUMNS):
            add_tile(rows, a[low:high], low, None, b[at : at + COLUMNS], at, 0, (), False)
        found.append(rows.top)
    for part, low in zip(found[1:], (ROWS, 2 * ROWS), strict=True):
        assert torch.equal(part.value, found[0].value[low : low + len(part.value)])
        assert torch.equal(part.index, found[0].index[low : low + len(part.index)])
    plain = (a.double() @ b.double().T).sort(dim=1, descending=True).values
    assert torch.allclose(found[0].value.double(), plain, atol=1e-4)


def test_energy_counts_an_entry_once():
    w = torch.tensor([[3.0, -2.0, 1.0], [0.0, 0.0, 0.0]])
    kept = Kept.empty(2, 2, True, 0)
    kept.add(0, w, 0, (), None)
    assert kept_energy(kept.top, kept.bottom).tolist() == [14.0, 0.0]
    assert kept_energy(kept.top, None).tolist() == [10.0, 0.0]


def test_gram_equals_the_plain_sums():
    dice = np.random.default_rng(3)
    a, b = dice.standard_normal((50, 12)).astype("f4"), dice.standard_normal((2500, 12)).astype("f4")
    found = gram((torch.from_numpy(b[at : at + COLUMNS]) for at in range(0, 2500, COLUMNS)), 12)
    w = a.astype(np.float64) @ b.astype(np.float64).T
    energy, total = found.whole(torch.from_numpy(a))
    assert np.allclose(energy, np.square(w).sum(1), rtol=1e-12)
    assert np.allclose(total, w.sum(1), rtol=1e-10, atol=1e-10)


def test_a_side_follows_its_file(tmp_path):
    """A worker that lives on reads the file that the job names, and not one that it opened before."""
    for value in (1.0, 2.0):
        np.save(tmp_path / "new.npy", np.full((3, 2), value, np.float32))
        (tmp_path / "new.npy").rename(tmp_path / "a.npy")
        assert open_side(tmp_path / "a.npy").tile(0).tolist() == [[value, value]] * 3
