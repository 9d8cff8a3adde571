"""The nearest rows by a rough product and exact ones, against all inner products in float64."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saetrain.compute.screen import TYPES, fastest_type
from saetrain.products import nearest
from saetrain.products.nearest import Nearest, margin
from saetrain.products.tiles import EMPTY, Table

TAKE = Nearest._take


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)


def drawn(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def crowded(n: int, d: int) -> Tensor:
    """Rows around few centres, so that many products are close; copies, opposites and zeros among them."""
    rows = unit(drawn(7, d, 1)[torch.arange(n) % 7] + 0.02 * drawn(n, d, 2))
    rows[5::11], rows[6::13], rows[8::17] = rows[2], -rows[3], 0.0
    return rows


def found(rows: Tensor, k: int, dtype: torch.dtype, cuts: tuple[int, ...] = (), columns: int = 64) -> Table:
    """The table of all rows, in panels between the cuts."""
    parts = []
    for lo, hi in zip((0, *cuts), (*cuts, len(rows)), strict=True):
        nearest = Nearest(rows[lo:hi], lo, k, dtype)
        for at in range(0, len(rows), columns):
            nearest.offer(rows[at : at + columns], at)
        parts.append(nearest.table)
    return Table(torch.cat([p.value for p in parts]), torch.cat([p.index for p in parts]))


def brute(kind: str, k: int) -> Table:
    """By plain numpy: larger first, then lower index."""
    products = all_products(kind)
    index = np.argsort(-products, axis=1, kind="stable")[:, :k]
    value = np.take_along_axis(products, index, 1)
    there = np.isfinite(value)
    return Table(torch.from_numpy(value), torch.from_numpy(np.where(there, index, EMPTY)))


@cache
def all_products(kind: str) -> Any:
    x = KINDS[kind]().numpy().astype(np.float64)
    products = np.array([[np.float32(np.dot(a, b)) for b in x] for a in x])
    np.fill_diagonal(products, -np.inf)
    return products


KINDS = {
    "random": lambda: unit(drawn(300, 24)),
    "crowded": lambda: crowded(300, 24),
    "alike": lambda: unit(drawn(1, 24)).expand(300, -1).contiguous(),
    "of one number": lambda: unit(drawn(300, 1)),
    "zeros": lambda: torch.zeros(300, 24),
    "one": lambda: unit(drawn(1, 24)),
}


@pytest.fixture(params=[(512, 1 << 15), (64, 50)], ids=str)
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in zip(("ROWS", "PAIRS"), request.param, strict=True):
        monkeypatch.setattr(nearest, name, size)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 5, 80, 400])
def test_the_nearest_are_those_of_all_products(kind: str, k: int, dtype: torch.dtype) -> None:
    rows = KINDS[kind]()
    mine, all_of_them = found(rows, k, dtype), brute(kind, k)
    width = all_of_them.index.shape[1]
    assert torch.equal(mine.index[:, :width], all_of_them.index)
    # numpy's dot adds in another order: both are float64 sums, which seldom round to another float32.
    torch.testing.assert_close(mine.value[:, :width], all_of_them.value, rtol=0, atol=1e-7)
    assert bool((mine.index[:, width:] == EMPTY).all())


@pytest.mark.parametrize("kind", ["random", "crowded", "alike"])
def test_any_cut_and_type_gives_the_same_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = KINDS[kind]()
    first = found(rows, 5, torch.float32)
    ways = (((), 300, 240, 32), ((1, 130), 7, 1000, 10**6), ((64, 128, 192), 64, 1 << 18, 1))
    for dtype, (cuts, columns, numbers, many) in itertools.product(TYPES, ways):
        monkeypatch.setattr(nearest, "NUMBERS", numbers)
        monkeypatch.setattr(nearest, "MANY", many)
        table = found(rows, 5, dtype, cuts, columns)
        assert torch.equal(table.index, first.index)
        assert torch.equal(table.value.view(torch.int32), first.value.view(torch.int32))


@pytest.mark.parametrize("d", [1, 1000, 9000, 16_384])
def test_a_sum_has_the_same_bits_alone_and_among_others(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """einsum cuts longer sums where its buffer ends, as the control shows."""
    a, b = drawn(8, d).double().numpy(), drawn(8, d, 1).double().numpy()

    def differs() -> bool:
        alone = [nearest.row_sums(a[i : i + 1], b[i : i + 1])[0] for i in range(8)]
        return alone != nearest.row_sums(a, b).tolist()

    assert not differs()
    monkeypatch.setattr(nearest, "SUMMED", d)
    assert differs() == (d > 8192)


@pytest.mark.parametrize("d", [1, 3, 24, 384, 2048])
def test_rough_products_are_within_the_margin(d: int) -> None:
    a, b = unit(drawn(256, d)), torch.cat([unit(drawn(500, d, 1)), crowded(500, d), unit(drawn(256, d))])
    exact = a.double() @ b.double().T
    for dtype in TYPES:
        off = float(((a.to(dtype) @ b.to(dtype).T).double() - exact).abs().max())
        assert off <= margin(d)
        if dtype == torch.bfloat16 and d > 1:
            assert off > margin(d) / 50, "nor is it so wide that all pairs are looked at"


def test_a_margin_too_narrow_misses_some(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = KINDS["crowded"]()
    monkeypatch.setattr(nearest, "MANY", 1)
    monkeypatch.setattr(nearest, "margin", lambda d: 0.0)
    with pytest.raises(ArithmeticError, match=r"bfloat16 is off by 0\.\d+, more than 0"):
        found(rows, 5, torch.bfloat16)
    monkeypatch.setattr(Nearest, "_take", _unchecked)
    assert not torch.equal(found(rows, 5, torch.bfloat16).index, brute("crowded", 5).index)


def _unchecked(self: Any, low: int, pairs: Any, rough: Tensor, others: Tensor, start: int) -> None:
    margin, self.margin = self.margin, 10.0
    TAKE(self, low, pairs, rough, others, start)
    self.margin = margin


@pytest.mark.parametrize("kind", ["random", "half zeros", "alike", "of one number"])
def test_few_inner_products_are_computed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, computed = unit(drawn(2000, 1 if kind == "of one number" else 64)), 0
    if kind == "half zeros":
        rows[::2] = 0
    if kind == "alike":
        rows[:] = rows[0]
    plain = nearest.inner

    def counted(a: Any, b: Any, row: Any, column: Any) -> Any:
        nonlocal computed
        computed += len(row)
        return plain(a, b, row, column)

    monkeypatch.setattr(nearest, "inner", counted)
    found(rows, 5, torch.bfloat16, columns=256)
    assert computed < 0.2 * 2000**2
    if kind in ("alike", "of one number"):
        few, computed = computed, 0
        monkeypatch.setattr(nearest, "MANY", 1)
        found(rows, 5, torch.bfloat16, columns=256)
        assert computed > 2 * few, "where all are looked at by rough products alone"


def test_the_type_is_one_of_those_there_are() -> None:
    assert fastest_type(24) in TYPES
