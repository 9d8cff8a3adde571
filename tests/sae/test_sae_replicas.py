"""Replicas that share Adam's moments train, to the bit, as replicas that each have all of them.

The oracle is on the same ranks: the whole gradients, summed over replicas, and moments of all rows.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.adam import adam

from saetrain.compute import mesh as mesh_module
from saetrain.compute.kernels import sum_of_squares
from saetrain.compute.mesh import Mesh
from saetrain.config import Config, resolve
from saetrain.errors import CheckpointError
from saetrain.model import WHOLE, Model
from saetrain.training import checkpoint
from saetrain.training.losses import step
from saetrain.training.optim import Coded, Optimizer
from saetrain.variants.table import VARIANTS
from support.sae import Planted, norm_of, run_ranks

WIDTH, BATCH, STEPS = 17, 32, 8  # a row is no whole number of vectors
KINDS = [
    ("topk", 128, "full"),
    ("topk", 80, "full"),
    ("jumprelu", 80, "full"),
    ("relu", 2, "full"),
    ("relu", 80, "8bit"),
]
LAYOUTS = [(2, 1), (4, 1), (4, 2)]


def made(mesh: Mesh, arch: str, latents: int, moments: str, rows: Tensor) -> Model:
    settings: dict[str, Any] = {"arch": arch, "d_sae": latents * mesh.tp, "k": 2, "steps": 20, "batch_size": BATCH}
    settings |= {"compute": "float32", "tile": 16, "moments": moments, "clip": 0.01, "holdout": 64, "dead_tokens": 32}
    model = VARIANTS[arch](resolve(Config(**settings), WIDTH, 2048), norm_of(rows), mesh)
    model.initialise(model.norm(rows[:256]))
    return model


class Oracle:
    """Adam with the moments of all rows on every replica."""

    def __init__(self, model: Model) -> None:
        self.model, self.coded = model, model.config.moments == "8bit"
        self.params = {name: param.clone() for name, param in model.params.items()}
        self.moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in self.params.items()}
        self.codes = {n: Coded(p) for n, p in self.params.items() if self.coded and p.dim() == 2}
        self.steps = 0

    def apply(self, grads: dict[str, Tensor], norm: float) -> None:
        """`norm` is that of all gradients, of which only the rounding depends on how they are shared."""
        c = self.model.config
        for name, param in self.params.items():
            grad = grads[name]
            if norm > c.clip:
                grad.mul_(c.clip / norm)
            blocks = self.codes[name].updated() if name in self.codes else [(slice(None), *self.moments[name])]
            for rows, m, v in blocks:
                count = torch.tensor(float(self.steps))
                rates = {"beta1": c.beta1, "beta2": c.beta2, "lr": 1e-2, "weight_decay": 0.0, "eps": c.eps}
                adam(
                    [param[rows]],
                    [grad[rows]],
                    [m],
                    [v],
                    [],
                    [count],
                    fused=True,
                    amsgrad=False,
                    maximize=False,
                    **rates,
                )  # type: ignore[arg-type]
        self.steps += 1
        if self.model.unit_rows:
            self.params["W_dec"] /= self.model.row_norms(self.params["W_dec"])[:, None]

    def kept(self) -> dict[str, Tensor]:
        pairs = {n: dict(zip(("adam_m", "adam_v"), pair, strict=True)) for n, pair in self.moments.items()}
        pairs |= {name: coded.held for name, coded in self.codes.items()}
        return {f"{kind}.{name}": held for name, pair in pairs.items() for kind, held in pair.items()}


def differences(mesh: Mesh, arch: str, latents: int, moments: str) -> list[str]:
    """Names of the tensors whose bits differ from the oracle's, after a few steps or in a checkpoint."""
    rows = Planted.make(2048, WIDTH, 24).rows
    model = made(mesh, arch, latents, moments, rows)
    optimizer, oracle, found = Optimizer(model), Oracle(model), []
    share, plain = BATCH // mesh.dp, mesh.sum_own
    for number in range(STEPS):
        x = model.norm(rows[number * BATCH + mesh.dp_index * share :][:share])
        sums: list[Tensor] = []

        def kept(grad: Tensor, purpose: str, sums: list[Tensor] = sums) -> Tensor:
            sums.append(mesh.sum(grad.clone(), "dp"))
            return plain(grad, purpose)

        mesh.sum_own = kept  # type: ignore[method-assign]
        grads = step(model, x).grads
        mesh.sum_own = plain  # type: ignore[method-assign]
        summed = iter(sums)
        full = {name: grad.clone() if name in WHOLE else next(summed) for name, grad in grads.items()}
        for name, grad in grads.items():
            if name not in WHOLE and not torch.equal(grad, full[name][mesh.own(len(full[name]))]):
                found.append(f"gradient of {name}")
        if model.unit_rows:
            model.project(full["W_dec"], slice(None))
        squares = {
            name: mesh.sum(sum_of_squares(g)[None], "tp") if name not in WHOLE else g.square().sum()
            for name, g in full.items()
        }
        norms = optimizer.apply(grads, 1e-2)
        if norms["all"] != pytest.approx(float(sum(squares.values())) ** 0.5, rel=1e-5):
            found.append("norm")
        assert norms["all"] > model.config.clip
        oracle.apply(full, norms["all"])
        found += [
            f"{name} in step {number}" for name, p in model.params.items() if not torch.equal(p, oracle.params[name])
        ]
    due = oracle.kept()
    for key, held in optimizer.kept().items():
        part = due[key] if key.rpartition(".")[2] in WHOLE else due[key][mesh.own(model.latents)]
        if not torch.equal(held, part):
            found.append(key)
    return found


def session(rank: int, folder: Path, tp: int) -> None:
    """All the work of one layout, in one set of processes."""
    mesh = Mesh.start("cpu", tp)
    found = {kind: differences(mesh, *kind) for kind in KINDS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_module, "MESSAGE", 3 * WIDTH)  # messages of a row or so
        found["short messages", 0, ""] = differences(mesh, *KINDS[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "spread_own", lambda x, purpose: None)
        found["control: rows that are not sent", 0, ""] = [] if differences(mesh, *KINDS[1]) else ["not noticed"]
    torch.save(found, folder / f"{rank}.pt")
    failing(mesh, folder)
    mesh.close()


@pytest.mark.parametrize(("world", "tp"), LAYOUTS)
def test_shared_moments_have_the_bits_of_whole_ones(world: int, tp: int, tmp_path: Path) -> None:
    run_ranks(world, session, tmp_path, tp)
    for rank in range(world):
        for kind, found in torch.load(tmp_path / f"{rank}.pt").items():
            assert not found, (rank, kind)


def failing(mesh: Mesh, folder: Path) -> None:
    """A save whose file cannot be written ends on all ranks with an error, and on none with a wait."""
    model = made(mesh, "topk", 80, "full", Planted.make(2048, WIDTH, 24).rows)
    optimizer, plain = Optimizer(model), checkpoint.write

    def full_disk(path: Path, specs: Any, blocks: Any, metadata: Any) -> str:
        next(blocks)
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write", full_disk)
        with pytest.raises(CheckpointError, match=r"No space left|another rank failed"):
            checkpoint.save(folder / "run", model, optimizer, 1, {})
    assert checkpoint.write is plain
    assert not checkpoint.published(folder / "run")
    checkpoint.save(folder / "run", model, optimizer, 1, {})
    assert checkpoint.published(folder / "run")


def test_rows_are_shared_in_whole_units() -> None:
    for rows in (1, 16, 80, 1000, 4096):
        for dp in (1, 2, 3, 4, 7):
            mesh = Mesh.__new__(Mesh)
            mesh.dp = dp
            bounds = mesh.bounds(rows)
            assert (bounds[0], bounds[-1]) == (0, rows)
            assert bounds == sorted(bounds)
            assert not [b for b in bounds[:-1] if b % 16]
            assert max(b - a for a, b in pairwise(bounds)) <= rows / dp + 16
