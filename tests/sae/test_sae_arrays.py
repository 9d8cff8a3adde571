"""Transcoders and crosscoders: gradients on 1 and 4 ranks, in the soak also on 2, against the dense formulas; folding,
files, features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from saetrain.compute.mesh import Mesh
from saetrain.model import WHOLE, Model
from saetrain.norms import Norm, side_by_side
from saetrain.training.losses import step
from saetrain.training.optim import Optimizer
from saetrain.variants.table import VARIANTS
from support.sae import ARCHS, norm_of, one_rank, reference, run_ranks, small, whole_gradient

ROWS, BATCH, STEPS = 256, 32, 3


class Kind(NamedTuple):
    """Widths of the arrays that go in and of those that are rebuilt; none where they are the same."""

    inputs: list[int]
    outputs: list[int]
    skip: bool = False


KINDS = {
    "crosscoder": Kind([9, 7], []),
    "transcoder": Kind([16], [12]),
    "skip": Kind([16], [12], skip=True),
    "layers": Kind([16], [7, 5]),  # one layer in, two out
}
LAYOUTS = {"one": (1, 1), "2 tp": (2, 2), "4 tp": (4, 4), "2 x 2": (4, 2)}


def arrays(widths: list[int], seed: int) -> list[Tensor]:
    """Rows of each array, of different lengths and far from zero; features are shared between arrays."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(ROWS, 20, generator=generator, dtype=torch.float64).pow(6)
    found = []
    for number, width in enumerate(widths):
        directions = torch.randn(20, width, generator=generator, dtype=torch.float64)
        found.append(features @ directions * 10.0**number + number)
    return found


def made(kind: str, arch: str, mesh: Mesh) -> tuple[Model, Tensor, Tensor]:
    """A model, and its normalised rows in and out."""
    shape = KINDS[kind]
    parts = [arrays(widths, seed) for seed, widths in enumerate((shape.inputs, shape.outputs))]
    norms = [side_by_side([norm_of(rows) for rows in side]) if side else None for side in parts]
    output = ",".join("uvw"[: len(shape.outputs)])
    config = small(arch, field=",".join("abc"[: len(shape.inputs)]), output=output, skip=shape.skip, dead_tokens=10**5)
    assert isinstance(norms[0], Norm)
    model = VARIANTS[arch](config, norms[0], mesh, norms[1])
    x = model.norm(torch.cat(parts[0], 1))
    y = model.out_norm(torch.cat(parts[1], 1)) if shape.outputs else x
    model.initialise(x, y if shape.outputs else None)
    generator = torch.Generator().manual_seed(1)
    for name, param in model.params.items():  # away from the symmetric start
        whole = (64, *param.shape[1:]) if name not in WHOLE else param.shape
        noise = 0.1 * torch.randn(whole, generator=generator, dtype=param.dtype)
        param += noise if name in WHOLE else noise[model.lo : model.hi]
    if model.unit_rows:
        model.params["W_dec"] /= model.row_norms()[:, None]
    return model, x, y


def session(rank: int, folder: Path, layout: str, tensor_parallel: int) -> None:
    """A few steps of every kind and variant; what each saw and found goes to a file of this rank."""
    mesh = Mesh.start("cpu", tensor_parallel)
    for kind in KINDS:
        for arch in ARCHS:
            model, x, y = made(kind, arch, mesh)
            dead = torch.arange(model.lo, model.hi) % 3 == 0
            optimizer, seen, share = Optimizer(model), [], BATCH // mesh.dp
            for number in range(STEPS):
                model.state["quiet"].masked_fill_(dead, 10**6)
                rows = slice(number * BATCH + mesh.dp_index * share, number * BATCH + (mesh.dp_index + 1) * share)
                before = {n: p.clone() for n, p in model.params.items()}
                out = step(model, x[rows], 0.7, y[rows])
                grads = {n: whole_gradient(g, model, n) for n, g in out.grads.items()}
                optimizer.apply(out.grads, 1e-2)
                seen.append({"params": before, "grads": grads, "losses": out.losses})
            torch.save(seen, folder / f"{layout}-{kind}-{arch}-{mesh.dp_index}-{mesh.tp_index}.pt")
    mesh.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder, done = tmp_path_factory.mktemp("arrays"), set()

    def of(layout: str) -> Path:
        if layout not in done:
            world, tensor_parallel = LAYOUTS[layout]
            if world == 1:
                session(0, folder, layout, 1)
            else:
                run_ranks(world, session, folder, layout, tensor_parallel)
            done.add(layout)
        return folder

    return of


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {n: parts[0][n] if n in WHOLE else torch.cat([part[n] for part in parts]) for n in parts[0]}


def compare(folder: Path, layout: str, kind: str, arch: str, *, shift: float = 0.0) -> None:
    """Losses and gradients of each step, over all ranks, against autograd on the dense formulas in float64.

    `shift` moves W_dec only in the reference.
    """
    ranks = [torch.load(path) for path in sorted(folder.glob(f"{layout}-{kind}-{arch}-0-*.pt"))]
    with one_rank() as mesh:
        model, x, y = made(kind, arch, mesh)
    assert x.dtype == torch.float64
    for number in range(STEPS):
        params = joined([seen[number]["params"] for seen in ranks])
        copies = {n: p.clone().requires_grad_() for n, p in params.items()}
        rows = slice(number * BATCH, (number + 1) * BATCH)
        target = y[rows] if KINDS[kind].outputs else None
        dead = torch.arange(64) % 3 == 0 if model.takes_k else None
        shifted = copies | {"W_dec": copies["W_dec"] + shift}
        terms = reference(shifted, model.config, x[rows], dead, 0.7, target, model.parts)
        sum(terms.values()).backward()  # type: ignore[union-attr]
        losses = ranks[0][number]["losses"]
        assert set(terms) == set(losses) - {"loss"}
        for name, value in terms.items():
            assert losses[name] == pytest.approx(float(value.detach()), rel=1e-9), name
        found = joined([seen[number]["grads"] for seen in ranks])
        assert set(found) == set(copies)
        for name, grad in found.items():
            torch.testing.assert_close(
                grad, copies[name].grad, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["one", "4 tp", "2 x 2", pytest.param("2 tp", marks=pytest.mark.soak)])
def test_every_layout_has_the_gradients_of_the_dense_formulas(
    layout: str, kind: str, arch: str, run: Callable[[str], Path]
) -> None:
    compare(run(layout), layout, kind, arch)


@pytest.mark.parametrize("kind", KINDS)
def test_control_a_wrong_reference_is_noticed(kind: str, run: Callable[[str], Path]) -> None:
    with pytest.raises(AssertionError):
        compare(run("one"), "one", kind, "topk", shift=1e-6)
