"""The nearest rows by a rough product and exact ones, against all inner products in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from saetrain.products import nearest
from saetrain.products.nearest import Rows, Screen, add_nearest, fastest_screen, for_screen, screens
from saetrain.products.tiles import EMPTY, Table


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)


def drawn(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def crowded(n: int, d: int) -> Tensor:
    """Rows around few centres, so that many products are close; copies, opposites and zeros among them."""
    rows = unit(drawn(7, d, 1)[torch.arange(n) % 7] + 0.02 * drawn(n, d, 2))
    rows[5::11], rows[6::13], rows[8::17] = rows[2], -rows[3], 0.0
    return rows


def found(rows: Tensor, k: int, screen: Screen, cuts: tuple[int, ...] = (), columns: int = 64) -> Table:
    """The table of all rows, in panels between the cuts."""
    parts = []
    for lo, hi in zip((0, *cuts), (*cuts, len(rows)), strict=True):
        table = Table.empty(hi - lo, k)
        for at in range(0, len(rows), columns):
            both = [for_screen(part, screen) for part in (rows[lo:hi], rows[at : at + columns])]
            add_nearest(table, both[0], lo, both[1], at, screen)
        parts.append(table)
    return Table(torch.cat([p.value for p in parts]), torch.cat([p.index for p in parts]))


def brute(rows: Tensor, k: int) -> Table:
    """By plain numpy: larger first, then lower index."""
    x = rows.numpy().astype(np.float64)
    products = np.array([[np.float32(np.dot(a, b)) for b in x] for a in x])
    np.fill_diagonal(products, -np.inf)
    index = np.argsort(-products, axis=1, kind="stable")[:, :k]
    value = np.take_along_axis(products, index, 1)
    there = np.isfinite(value)
    return Table(torch.from_numpy(value), torch.from_numpy(np.where(there, index, EMPTY)))


KINDS = {"random": lambda: unit(drawn(300, 24)), "crowded": lambda: crowded(300, 24), "one": lambda: unit(drawn(1, 24))}


@pytest.mark.parametrize("screen", screens(24), ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 5, 80, 400])
def test_the_nearest_are_those_of_all_products(kind: str, k: int, screen: Screen) -> None:
    rows = KINDS[kind]()
    mine, all_of_them = found(rows, k, screen), brute(rows, k)
    width = all_of_them.index.shape[1]
    assert torch.equal(mine.index[:, :width], all_of_them.index)
    # numpy's dot adds in another order: both are float64 sums, which seldom round to another float32.
    torch.testing.assert_close(mine.value[:, :width], all_of_them.value, rtol=0, atol=1e-7)
    assert bool((mine.index[:, width:] == EMPTY).all())


@pytest.mark.parametrize("kind", ["random", "crowded"])
def test_any_cut_and_screen_gives_the_same_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = KINDS[kind]()
    first = found(rows, 5, screens(24)[0])
    for screen in screens(24):
        for cuts, columns in (((), 300), ((1, 130), 7), ((64, 128, 192), 64)):
            for numbers in (24, 1000):
                monkeypatch.setattr(nearest, "NUMBERS", numbers)
                table = found(rows, 5, screen, cuts, columns)
                assert torch.equal(table.index, first.index)
                assert torch.equal(table.value.view(torch.int32), first.value.view(torch.int32))


@pytest.mark.parametrize("d", [1, 3, 24, 384, 2048])
def test_rough_products_are_within_the_margin(d: int) -> None:
    a, b = unit(drawn(256, d)), torch.cat([unit(drawn(500, d, 1)), crowded(500, d), unit(drawn(256, d))])
    exact = a.double() @ b.double().T
    for dtype, margin in screens(d):
        off = float(((a.to(dtype) @ b.to(dtype).T).double() - exact).abs().max())
        assert off <= margin
        if dtype == torch.bfloat16 and d > 1:
            assert off > margin / 50, "nor is it so wide that all pairs are looked at"


def test_a_margin_too_narrow_misses_some(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = crowded(300, 24)
    narrow = Screen(torch.bfloat16, 0.0)
    with pytest.raises(ArithmeticError, match=r"bfloat16 is off by 0\.\d+, more than 0"):
        found(rows, 5, narrow)
    monkeypatch.setattr(nearest, "_check", lambda exact, rough, screen: None)
    assert not torch.equal(found(rows, 5, narrow).index, brute(rows, 5).index)


def test_few_pairs_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows of zeros too, whose products are all the same."""
    rows, looked = unit(drawn(2000, 64)), 0
    rows[::2] = 0
    plain = nearest._inner

    def counted(a: object, b: object, row: np.ndarray, column: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        nonlocal looked
        looked += len(row)
        return plain(a, b, row, column)  # type: ignore[arg-type]

    monkeypatch.setattr(nearest, "_inner", counted)
    found(rows, 5, screens(64)[1], columns=256)
    assert looked < 0.1 * 2000**2
    looked, none = 0, torch.zeros(2000, dtype=torch.bool)
    monkeypatch.setattr(nearest, "for_screen", lambda exact, screen: Rows(exact, exact.to(screen.dtype), none))
    for screen in screens(64)[1:]:
        whole, table = nearest.for_screen(rows, screen), Table.empty(2000, 5)
        for at in range(0, 2000, 256):
            add_nearest(table, whole, 0, nearest.for_screen(rows[at : at + 256], screen), at, screen)
    assert looked > 0.25 * 2000**2, "where zeros are not told apart"


def test_the_screen_is_one_of_those_there_are() -> None:
    assert fastest_screen(24) in screens(24)
