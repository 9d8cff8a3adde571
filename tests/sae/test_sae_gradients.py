"""The written-out gradients against autograd on the plain dense formulas, and the kernels against dense algebra."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from saetrain.compute import kernels
from saetrain.compute.kernels import Codes, Encoder, exact_topk
from saetrain.compute.mesh import Mesh
from saetrain.tile import Shape
from saetrain.training.losses import step
from saetrain.variants.table import VARIANTS
from support.sae import ARCHS, Planted, one_rank, reference, small, small_model


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with one_rank() as made:
        yield made


def compare(arch: str, mesh: Mesh, *, dead: bool, shift: float = 0.0, **more: object) -> None:
    """One step's losses and gradients against autograd.  `shift` moves W_dec only in the reference."""
    data = Planted.make(512, 16, 24)
    model = small_model(arch, mesh, data.rows, **more)
    generator = torch.Generator().manual_seed(1)
    for name, param in model.params.items():  # away from the symmetric start
        param += 0.1 * torch.randn(param.shape, generator=generator, dtype=param.dtype)
        if name == "W_dec":
            param /= param.norm(dim=1, keepdim=True)
    x = model.norm(data.rows[:32])
    mask = torch.zeros(64, dtype=torch.bool)
    if dead:
        mask[40:60] = True
        model.state["quiet"][mask] = 10**9
    copies = {n: p.clone().requires_grad_() for n, p in model.params.items()}
    out = step(model, x, ramp=0.7)
    shifted = copies | {"W_dec": copies["W_dec"] + shift}
    terms = reference(shifted, model.config, x, mask if dead else None, ramp=0.7)
    sum(terms.values()).backward()
    assert set(terms) == set(out.losses) - {"loss"}
    for name, value in terms.items():
        assert out.losses[name] == pytest.approx(float(value.detach()), rel=1e-10), name
    assert set(out.grads) == set(copies)
    for name, grad in out.grads.items():
        torch.testing.assert_close(grad, copies[name].grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_equal_autograd(arch: str, dead: bool, mesh: Mesh) -> None:
    compare(arch, mesh, dead=dead)


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if VARIANTS[arch].takes_k])
def test_gradients_over_several_tiles(arch: str, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense variants have tiles of 16 of the 32 tokens in all these tests."""
    monkeypatch.setattr("saetrain.variants.family.TILE_ELEMENTS", 5_500)
    found = VARIANTS[arch].tile_tokens(small(arch), Shape(32, 16, 64, 16, 16, 8))
    assert 4 <= found < 32
    assert 32 % found  # the last tile is shorter
    compare(arch, mesh, dead=True)


def test_gradients_of_relu_where_few_are_active(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saetrain.variants.relu.DENSE_ABOVE", 1.1)  # the sparse path, whatever the density
    compare("relu", mesh, dead=False)


def test_a_wrong_reference_is_noticed(mesh: Mesh) -> None:
    with pytest.raises(AssertionError):
        compare("topk", mesh, dead=False, shift=1e-6)


def test_encoder_tiles_do_not_change_the_result() -> None:
    x, w, b = torch.randn(50, 16), torch.randn(64, 16), torch.randn(64)
    whole = Encoder(w, b, torch.float32, 50).topk(x, 5)
    for tile in (1, 7, 49, 64):
        value, index = Encoder(w, b, torch.float32, tile).topk(x, 5)
        assert torch.equal(index, whole[1])
        torch.testing.assert_close(value, whole[0])


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("columns", [40, 256, 4096])
def test_topk_takes_the_lowest_columns_of_equal_values(levels: int, columns: int) -> None:
    rows = torch.randint(-levels, levels, (200, columns), generator=torch.Generator().manual_seed(levels)).float()
    for k in (1, 3, 32, 40):
        value, column = exact_topk(rows, k)
        expected = torch.sort(rows, dim=1, stable=True, descending=True)
        positive = expected.values[:, :k] > 0
        assert torch.equal(value, expected.values[:, :k])
        assert torch.equal(column[positive], expected.indices[:, :k][positive])


def test_topk_of_bad_rows() -> None:
    rows = torch.randn(4, 256)
    rows[1], rows[2, 77] = torch.nan, torch.nan
    value, _ = exact_topk(rows, 5)
    assert value.isnan().sum(1).tolist() == [0, 5, 1, 0]  # it is seen in the loss
    assert [part.shape for part in exact_topk(rows[:, :0], 5)] == [(4, 0), (4, 0)]


def random_codes(generator: torch.Generator, bags: int = 30, latents: int = 20, density: float = 0.2) -> Codes:
    dense = torch.rand(bags, latents, generator=generator, dtype=torch.float64)
    return kernels.from_dense(dense * (dense > 1 - density))


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_sparse_products_equal_dense_ones(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = random_codes(generator, density=density)
    dense = torch.zeros(30, 20, dtype=torch.float64)
    dense[codes.bag, codes.latent] = codes.value
    table, up = torch.randn(20, 8, dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64)
    torch.testing.assert_close(codes.decode(table), dense @ table)
    torch.testing.assert_close(codes.dots(up, table), (up @ table.T)[codes.bag, codes.latent])
    torch.testing.assert_close(codes.scatter(up, codes.bag, codes.value), dense.T @ up)
    torch.testing.assert_close(codes.sum_by_latent(codes.value), dense.sum(0))
    assert torch.equal(codes.count(), (dense > 0).sum(0))
