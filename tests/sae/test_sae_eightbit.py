"""Adam's moments in 8 bits: the codebook and the quantiser against plain numpy, and what training makes of them.

tests/sae/test_sae_checkpoint.py resumes runs that have them, tests/sae/test_sae_memory.py measures their memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saetrain.compute import eightbit
from saetrain.compute.eightbit import codebook, dequantise, quantise
from saetrain.training import optim
from saetrain.training.losses import step
from saetrain.training.optim import Optimizer
from saetrain.training.train import fit
from support.sae import MemorySource, Planted, one_rank, small, small_model

WIDTHS = (1, 16, 256, 300, 1024)


@pytest.mark.parametrize("signed", [True, False])
def test_the_codebook_is_that_of_the_bits(signed: bool) -> None:
    """Each of the 256 bytes, read as the paper says: sign, zeros, a one, and the rest as a fraction."""
    found = []
    for byte in range(256):
        bits = f"{byte:08b}"
        sign, rest = (1 - 2 * int(bits[0]), bits[1:]) if signed else (1, bits)
        if "1" not in rest:
            found.append(0.0 if sign > 0 else 1.0)  # there is no negative zero
            continue
        zeros = rest.index("1")
        fraction = rest[zeros + 1 :]
        if zeros == 7:  # the unsigned codebook has no eighth decade
            found.append(1.0)
            continue
        part = (int(fraction or "0", 2) + 0.5) / 2 ** len(fraction)
        found.append(sign * (0.1 + 0.9 * part) * 10.0**-zeros)
    np.testing.assert_allclose(codebook(signed).numpy(), np.sort(found), rtol=1e-6)


def rows_of(width: int, signed: bool) -> Tensor:
    """Rows of numbers of many sizes; among them rows of zeros, of one number, and of the smallest there are."""
    dice = torch.Generator().manual_seed(width)
    x = torch.randn(64, width, generator=dice) * 10.0 ** torch.empty(64, width).uniform_(-8, 3, generator=dice)
    x[3], x[4, 1:], x[5, 0] = 0, 0, 1e-44
    x[6] = torch.randn(width, generator=dice)
    return x if signed else x.abs()


def check(x: Tensor, signed: bool) -> None:
    """Each number became the nearest of its block's values, or one as near; the largest is the scale."""
    codes, scales = quantise(x, signed)
    assert codes.dtype == torch.uint8
    assert codes.shape == x.shape
    book, again = codebook(signed).double().numpy(), dequantise(codes, scales, signed)
    for at in range(0, x.shape[1], 256):
        block, own = x[:, at : at + 256].double().numpy(), codes[:, at : at + 256].numpy()
        places = np.abs(block).argmax(1)[:, None]
        largest = np.take_along_axis(block, places, 1)
        np.testing.assert_array_equal(scales[:, at // 256].double().numpy(), largest[:, 0])
        ratio = block / np.where(largest, largest, 1)
        assert (np.take_along_axis(own, places, 1)[largest != 0] == 255).all()
        least = np.abs(ratio[:, :, None] - book).min(2)
        chosen = np.abs(ratio - book[own])
        raised = (not signed) & (block > 0) & (own == 1)  # rather than 0
        near = (chosen <= least + 1e-7) | raised
        assert near.all(), "not the nearest"
        assert signed or not (own[block > 0] == 0).any(), "0 for a number above 0"
        np.testing.assert_allclose(
            again[:, at : at + 256].double().numpy(), book[own] * largest, rtol=1e-6, atol=1e-44, err_msg="wrong scale"
        )


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_each_number_becomes_the_nearest(width: int, signed: bool) -> None:
    check(rows_of(width, signed), signed)


@pytest.mark.parametrize("what", ["codes", "bounds", "scales"])
def test_control_wrong_tables_and_scales_are_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, plain = eightbit._tables, quantise
    if what == "codes":
        monkeypatch.setattr(
            eightbit, "_tables", lambda *at: tables(*at)._replace(code=(tables(*at).code.int() - 1).clamp_min(0).byte())
        )
    elif what == "bounds":
        monkeypatch.setattr(eightbit, "_tables", lambda *at: tables(*at)._replace(bound=tables(*at).bound * 1.01))
    else:
        monkeypatch.setitem(
            globals(), "quantise", lambda x, signed: (plain(x, signed)[0], plain(x, signed)[1].roll(1, 1))
        )
    with pytest.raises(AssertionError):
        check(rows_of(1024, True), True)


@pytest.mark.parametrize("signed", [True, False])
def test_errors_are_within_half_a_step(signed: bool) -> None:
    """Half of 0.9 / 64 of the largest (unsigned: 0.9 / 128); of a number in the decade below it 7%, then 14%, ..."""
    x = rows_of(256, signed).double()[6:]
    error = (dequantise(*quantise(x, signed), signed) - x).abs()
    largest, half = x.abs().amax(1, keepdim=True), 0.9 / (64 if signed else 128) / 2
    assert (error <= largest * half * 1.001).all()
    for decade in range(4):
        those = x.abs() >= 10.0 ** -(decade + 1) * largest
        assert (error[those] <= 10 * half * 2**decade * 1.02 * x.abs()[those]).all()
    assert (error > largest * half * 0.9).any()


def test_bits_do_not_depend_on_how_rows_are_cut_and_a_decay_keeps_codes() -> None:
    x = rows_of(300, True)
    codes, scales = quantise(x, True)
    assert all(torch.equal(a, b[10:17]) for a, b in zip(quantise(x[10:17], True), (codes, scales), strict=True))
    assert [part.shape for part in quantise(x[:0], True)] == [(0, 300), (0, 2)]
    held = x[6:]  # latents that do not fire: all moments of a row fall by one factor
    for _ in range(50):
        held = dequantise(*quantise(held, True), True) * 0.9
    first = dequantise(*quantise(x[6:], True), True)
    torch.testing.assert_close(held, first * 0.9**50, rtol=1e-4, atol=0)


def test_a_step_is_nearly_that_of_full_moments() -> None:
    with one_rank() as mesh:
        rows = Planted.make(512, 16, 24).rows
        models = [small_model("relu", mesh, rows, moments=moments, compute="float32") for moments in ("full", "8bit")]
        full, coded = (Optimizer(model) for model in models)
        for number in range(5):
            grads = step(models[0], models[0].norm(rows[number * 64 :][:64])).grads
            coded.apply({name: grad.clone() for name, grad in grads.items()}, 1e-3)
            full.apply(grads, 1e-3)
    assert full.update_norms() == pytest.approx(coded.update_norms(), rel=0.02)
    for name in ("W_enc", "W_dec"):
        for plain, own, bound in zip(full.pairs[name].blocks(), coded.pairs[name].blocks(), (0.02, 0.02), strict=False):
            for a, b in zip(plain, own, strict=True):
                assert 1e-5 < float((a - b).norm() / a.norm()) < bound
    assert torch.equal(coded.pairs["b_enc"].held["adam_m"], full.pairs["b_enc"].held["adam_m"])


@pytest.fixture(scope="module")
def planted() -> Planted:
    return Planted.make(4096, 16, 24)


def trained(arch: str, planted: Planted, folder: Path, **more: Any) -> float:
    """Mean FVU of held-out rows at the end, over three seeds."""
    with one_rank() as mesh:
        settings = {"steps": 200, "batch_size": 64, "holdout": 512, "dead_tokens": 6400, "log_every": 200, **more}
        runs = {
            folder / f"{seed}": small(arch, compute="float32", seed=seed, order_seed=0, **settings) for seed in range(3)
        }
        found = fit(MemorySource(planted.rows, planted.documents), runs, mesh)
    return float(np.mean([line["eval_fvu"] for line in found.values()]))


@pytest.mark.parametrize("arch", ["topk", "relu"])
def test_training_ends_as_with_full_moments(
    arch: str, planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean FVU over three seeds within 5%; seen were 1.5% and less.  The control has no scales."""
    full = trained(arch, planted, tmp_path / "full")
    assert trained(arch, planted, tmp_path / "coded", moments="8bit") == pytest.approx(full, rel=0.05)
    if arch == "topk":
        plain = quantise
        monkeypatch.setattr(
            optim, "quantise", lambda x, signed: (plain(x, signed)[0], torch.ones_like(plain(x, signed)[1]))
        )
        assert trained(arch, planted, tmp_path / "broken", moments="8bit") != pytest.approx(full, rel=0.05)
