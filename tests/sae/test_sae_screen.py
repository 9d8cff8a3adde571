"""Entries of an encoder product by a rough product and exact ones, against all pre-activations in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saetrain.compute import screen
from saetrain.compute.screen import TYPES, Entries, Screen, fastest_type, inner

ROWS, WIDTH, LATENTS = 60, 24, 192


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, weights, biases, thresholds."""
    x, w = drawn(ROWS, WIDTH), drawn(LATENTS, WIDTH, seed=1)
    bias, threshold = 0.5 * drawn(LATENTS, seed=2), 0.5 * drawn(LATENTS, seed=3).abs()
    if kind == "alike":  # more equal entries than k, and rows of which nothing is positive
        w = w[torch.arange(LATENTS) % 3].contiguous()
        bias = bias[torch.arange(LATENTS) % 3].contiguous()
    if kind == "zeros":
        x[::2], w[::3], bias, threshold = 0.0, 0.0, torch.zeros(LATENTS), torch.zeros(LATENTS)
    if kind == "of a large part in common":
        part = drawn(1, WIDTH, seed=4)
        x += 300 * part
        w -= (w @ part.T) * part / part.square().sum()  # it hardly moves the products, and their margins a lot
    if kind == "of many sizes":
        x *= 10.0 ** torch.linspace(-25, 8, ROWS)[:, None]
        w *= 10.0 ** torch.linspace(-3, 2, LATENTS)[:, None]
        bias *= 1e-9
        threshold *= 1e-9
    if kind == "far below":
        bias -= 100.0
    if kind == "masked":  # by biases and thresholds, or without weights
        bias[::5], threshold[1::5], w[2::3] = -1e9, 1e9, 0.0
        bias[2::6] = 0.0
    if kind == "of thresholds below 0":
        threshold = bias - 0.3 * drawn(LATENTS, seed=5)
        bias[7], threshold[7] = -1e9, -1e9
    if kind == "subnormal":
        x[:, 0], w[:, 0] = 5e-39, 1e10
        x[:, 1:] = 0.0
        x[::2], bias, threshold = 0.0, torch.full((LATENTS,), 4e-41), torch.zeros(LATENTS)
        bias[::3] = -1e-29
    if kind == "of sums that overflow":
        x, w = 1e19 * drawn(ROWS, WIDTH), 3e19 * drawn(LATENTS, WIDTH, seed=1).sign()
    return x, w, bias, threshold


KINDS = ("drawn", "alike", "zeros", "of a large part in common", "of many sizes", "far below")
KINDS += ("masked", "of thresholds below 0", "subnormal", "of sums that overflow")


def room(rows: int = ROWS) -> Tensor:
    return torch.empty(rows, LATENTS)


def every(x: Tensor, w: Tensor, bias: Tensor) -> np.ndarray[Any, Any]:
    """All pre-activations, one by one."""
    row, column = (grid.reshape(-1) for grid in np.indices((len(x), len(w))))
    return (inner(x, w, row, column) + bias.numpy()[column]).reshape(len(x), -1)


def plain_largest(pre: np.ndarray[Any, Any], k: int) -> list[tuple[int, int, float]]:
    found = []
    for row, values in enumerate(pre):
        best = sorted(np.lexsort((np.arange(len(values)), -values))[:k].tolist())
        found += [(row, column, float(values[column])) for column in best if values[column] > 0]
    return found


def listed(entries: Any) -> list[tuple[int, int, float]]:
    return list(zip(*(array.tolist() for array in entries), strict=True))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("k", [1, 5, 40, LATENTS, 500])
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_are_those_of_a_plain_sort(kind: str, k: int, dtype: torch.dtype) -> None:
    x, w, bias, _ = case(kind)
    found = Screen(w, bias, dtype=dtype).largest(x, k, room(ROWS + 7))
    assert listed(found) == plain_largest(every(x, w, bias), k)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_entries_above_their_thresholds_are_all_of_them(kind: str, dtype: torch.dtype) -> None:
    x, w, bias, threshold = case(kind)
    pre = every(x, w, bias)
    row, column = np.nonzero(pre > threshold.numpy())
    found = Screen(w, bias, threshold, dtype=dtype).above(x, room())
    assert listed(found) == listed((row, column, pre[row, column]))


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_values_are_those_of_float64_to_the_rounding_of_float32(kind: str) -> None:
    x, w, bias, _ = case(kind)
    sums = x.double() @ w.double().T
    sizes = x.double().norm(dim=1)[:, None] * w.double().norm(dim=1) + bias.abs() + 1e-30
    assert ((torch.from_numpy(every(x, w, bias)) - (sums + bias)).abs() <= (WIDTH + 2) * 2.0**-24 * sizes).all()


def test_an_entry_has_the_same_bits_alone_and_among_others() -> None:
    x, w, bias, _ = case("drawn")
    pre = every(x, w, bias)
    for rows, lo, hi in ((slice(0, 60), 0, 192), (slice(7, 8), 30, 31), (slice(20, 41), 64, 150)):
        part = every(x[rows], w[lo:hi].contiguous(), bias[lo:hi])
        assert np.array_equal(part, pre[rows, lo:hi])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert np.array_equal(every(x, w, bias), pre)
    finally:
        torch.set_num_threads(before)


def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of inner products of each call."""
    found: list[int] = []

    def counted(x: Tensor, weight: Tensor, row: Any, column: Any) -> Any:
        found.append(len(row))
        return inner(x, weight, row, column)

    monkeypatch.setattr(screen, "inner", counted)
    return found


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_few_entries_are_looked_at(monkeypatch: pytest.MonkeyPatch, masked: bool, dtype: torch.dtype) -> None:
    x, w = drawn(ROWS, 64), drawn(4096, 64, seed=1)
    x, w, bias = x / x.norm(dim=1, keepdim=True), w / w.norm(dim=1, keepdim=True), torch.zeros(4096)
    threshold = torch.full((4096,), 0.3)
    if masked:
        bias[:9], threshold[9:18], w[20:2000] = -1e9, 1e9, 0.0
    found = looked_at(monkeypatch)
    few = 2 if dtype == torch.bfloat16 else 1.3
    Screen(w, bias, dtype=dtype).largest(x, 32, torch.empty(ROWS, 4096))
    assert 32 <= found.pop() / ROWS < few * (48 if masked else 32)
    active = len(Screen(w, bias, threshold, dtype=dtype).above(x, torch.empty(ROWS, 4096)).row)
    assert 100 < active <= found.pop() < few * active


def test_rows_that_bfloat16_does_not_tell_apart_are_looked_at_in_float32() -> None:
    x, w, bias, threshold = case("of a large part in common")
    for held in (None, threshold):
        found = Screen(w, bias, held, dtype=torch.bfloat16)
        for tile in range(screen.TRIES):
            assert found.rough.dtype == torch.bfloat16, tile
            found.largest(x, 3, room()) if held is None else found.above(x, room())
        assert found.rough is found.weight
    kept = Screen(drawn(4096, 64), torch.zeros(4096), dtype=torch.bfloat16)
    for _ in range(screen.TRIES):
        kept.largest(drawn(ROWS, 64), 3, torch.empty(ROWS, 4096))
    assert kept.rough.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_slices_of_a_tile_give_the_same_entries(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    x, w, bias, threshold = case(kind)
    due = Screen(w, bias).largest(x, 5, room()), Screen(w, bias, threshold).above(x, room())
    monkeypatch.setattr(screen, "SLICE", 7)
    monkeypatch.setattr(screen, "MANY", 10**9)
    monkeypatch.setattr(screen, "_are_many", lambda count, rough: len(rough) > 7)
    found = Screen(w, bias).largest(x, 5, room()), Screen(w, bias, threshold).above(x, room())
    assert list(map(listed, found)) == list(map(listed, due))


@pytest.mark.parametrize("latents", [1, 31, 130])
def test_any_number_of_latents(latents: int) -> None:
    x, w, bias, threshold = case("drawn")
    w, bias, threshold, pre = w[:latents], bias[:latents], threshold[:latents], every(x, w[:latents], bias[:latents])
    for dtype in TYPES:
        found = Screen(w, bias, dtype=dtype).largest(x, 5, torch.empty(ROWS, latents))
        assert listed(found) == plain_largest(pre, 5)
        row, column = np.nonzero(pre > threshold.numpy())
        above = Screen(w, bias, threshold, dtype=dtype).above(x, torch.empty(ROWS, latents))
        assert listed(above) == listed((row, column, pre[row, column]))


def test_products_are_in_float32_whatever_the_caller_allows() -> None:
    x, w, bias, _ = case("drawn")
    due = plain_largest(every(x, w, bias), 40)
    torch.set_float32_matmul_precision("medium")
    try:
        assert listed(Screen(w, bias, dtype=torch.float32).largest(x, 40, room())) == due
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_that_are_not_finite_hide_no_entry(dtype: torch.dtype) -> None:
    x, w, bias, threshold = case("drawn")
    x[3], x[4, 0], w[5], w[6, 0] = 3e38, 0.0, 3e38, torch.inf
    pre = every(x, w, bias)
    assert np.isinf(pre).any()
    assert np.isnan(pre).any()
    found = Screen(w, bias, dtype=dtype).largest(x, 5, room())
    assert listed(found) == plain_largest(np.nan_to_num(pre, nan=-np.inf, posinf=np.inf, neginf=-np.inf), 5)
    above = Screen(w, bias, threshold, dtype=dtype).above(x, room())
    row, column = np.nonzero(pre > threshold.numpy())
    assert listed(above) == listed((row, column, pre[row, column]))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_margin_that_is_too_small_is_noticed(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    x, w, bias, _ = case("drawn")
    margin = Screen._margin
    small = 1e-3
    monkeypatch.setattr(Screen, "_margin", lambda *a: screen.Margin(*(small * part for part in margin(*a))))
    with pytest.raises(ArithmeticError, match="off by"):
        Screen(w, bias, dtype=dtype).largest(x, 40, room())


@pytest.mark.parametrize("dtype", TYPES)
def test_no_latents_and_no_rows(dtype: torch.dtype) -> None:
    x, w, bias, threshold = case("drawn")
    for rows, latents in ((0, LATENTS), (ROWS, 0), (0, 0)):
        held = w[:latents], bias[:latents]
        assert len(Screen(*held, threshold[:latents], dtype=dtype).above(x[:rows], room()).row) == 0
        assert len(Screen(*held, dtype=dtype).largest(x[:rows], 3, room()).row) == 0
    assert isinstance(Screen(w, bias, dtype=dtype).largest(x, 3, room()), Entries)


def test_the_type_is_one_of_those_there_are() -> None:
    assert fastest_type(24) in TYPES
