"""Helpers of the saetrain tests: small meshes, several ranks, planted data, and the plain dense formulas."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.sae.planted import Planted, matched
from saetrain.compute.mesh import RENDEZVOUS, Mesh
from saetrain.config import Config, resolve
from saetrain.model import WHOLE, Model
from saetrain.norms import Norm
from saetrain.variants.table import VARIANTS
from support.processes import preload
from support.stores import group

__all__ = ["Planted", "matched"]  # and what is defined here

ARCHS = tuple(VARIANTS)
# Ranks are forks of a process that has imported torch, which takes longer than most of what they do.
preload("torch", "saetrain.training.train", "pytest")


@contextmanager
def one_rank() -> Iterator[Mesh]:
    mesh = Mesh.start("cpu")
    try:
        yield mesh
    finally:
        mesh.close()


def run_ranks(world: int, work: Callable[..., None], *args: Any) -> None:
    """Run ``work(rank, *args)`` in `world` processes that can find each other."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(  # type: ignore[no-untyped-call]
            _child, (world, Path(folder, "meet"), work, args), nprocs=world, start_method="forkserver"
        )


def _child(rank: int, world: int, file: Path, work: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {RENDEZVOUS: str(file), "RANK": str(rank), "WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
    work(rank, *args)


def norm_of(rows: Tensor) -> Norm:
    mean = rows.double().mean(0)
    variance = float((rows.double() - mean).square().sum(1).mean())
    return Norm(mean, (rows.shape[1] / variance) ** 0.5)


def small(arch: str, **more: Any) -> Config:
    """A resolved configuration of 64 latents on 16 wide rows."""
    settings: dict[str, Any] = {
        "arch": arch,
        "d_sae": 64,
        "k": 4,
        "steps": 20,
        "batch_size": 32,
        "lr": 3e-3,
        "compute": "float64",
        "tile": 16,
        "widths": (8, 24, 64) if arch == "matryoshka" else (),
        "dead_tokens": 64,
        "holdout": 64,
        "sparsity": {"relu": 0.3, "jumprelu": 1.0, "gated": 0.3}.get(arch, -1.0),
        "preact_coef": 1e-3,
        "aux_k": 6,
    }
    return resolve(Config(**(settings | more)), 16, 2048)


def small_model(arch: str, mesh: Mesh, rows: Tensor, **more: Any) -> Model:
    model = VARIANTS[arch](small(arch, **more), norm_of(rows), mesh)
    model.initialise(model.norm(rows[:256]))
    return model


def whole_gradient(own: Tensor, model: Model, name: str) -> Tensor:
    """A copy of a gradient with the rows of all replicas."""
    full = torch.zeros_like(model.params[name])
    (full if name in WHOLE else full[model.mesh.own(model.latents)]).copy_(own)
    if name not in WHOLE:
        model.mesh.spread_own(full)
    return full


def small_results(folder: Path) -> Path:
    """A store "rows.zarr", a "run" of four steps on it, that run as SAELens has it, and its latents "described"."""
    from saetrain.cli import main

    rows, index = Planted.make(2048, 16, 24).rows.numpy(), np.arange(2048, dtype="<i4")
    group(folder / "rows.zarr", {"x": rows, "token": index % 50, "document": index // 64})
    store, run, described, saelens = (str(folder / n) for n in ("rows.zarr", "run", "described", "folder"))
    fast = ["--steps", "4", "--d-sae", "64", "--k", "4", "--batch-size", "64", "--device", "cpu", "--tile", "64"]
    for arguments in (
        ["fit", store, "--out", run, *fast, "--no-report", "--incomplete", "true", "--buffer-rows", "0"],
        ["export", run, saelens],
        ["features", run, store, described, "--incomplete"],
    ):
        assert main(arguments) == 0, arguments
    return folder


# --- the plain dense formulas, for autograd


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, t: Tensor, width: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(pre, t)
        ctx.width = width
        return pre * (pre > t.exp())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        pre, t = ctx.saved_tensors
        theta = t.exp()
        near = ((pre - theta).abs() < ctx.width / 2).to(pre)
        return grad * (pre > theta), (-(theta / ctx.width) * near * grad).sum(0), None


def chosen(pre: Tensor, k: int, whole_batch: bool) -> Tensor:
    """Mask of the k largest positive of each row, or of the k a row over the batch; ties to the first."""
    flat = pre.reshape(1, -1) if whole_batch else pre
    take = k * len(pre) if whole_batch else k
    order = torch.sort(flat, dim=1, stable=True, descending=True).indices[:, :take]
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True)
    return mask.view_as(pre) & (pre > 0)


def reference(
    p: dict[str, Tensor],
    c: Config,
    x: Tensor,
    dead: Tensor | None = None,
    ramp: float = 1.0,
    y: Tensor | None = None,
    parts: list[int] | None = None,
) -> dict[str, Tensor]:
    """Loss terms of a whole model on a whole batch; differentiable.

    `y` is what a transcoder rebuilds, `parts` are the widths of several arrays that are rebuilt.
    """
    centred = (c.is_sparse or c.arch == "gated") and y is None
    y = x if y is None else y
    d, tokens = y.shape[1], len(x)
    wanted = y - x @ p["W_skip"].T if c.skip else y  # of the latents alone
    pre = (x - p["b_dec"] if centred else x) @ p["W_enc"].T + p["b_enc"]
    if c.is_sparse:
        acts = pre * chosen(pre.detach(), c.k, c.arch != "topk")
        errors = [acts[:, :w] @ p["W_dec"][:w] + p["b_dec"] - wanted for w in c.widths]
        terms = {"reconstruction": sum(e.square().sum() for e in errors) / (len(errors) * d * tokens)}
        if dead is not None and dead.any():
            k = min(c.aux_k, int(dead.sum()))
            masked = pre.masked_fill(~dead, -1.0)
            aux = masked * chosen(masked.detach(), k, False)
            miss = aux @ p["W_dec"] + errors[-1].detach()
            scale = c.aux_coef * min(int(dead.sum()) / c.aux_k, 1.0)
            terms["aux"] = scale * miss.square().sum() / (d * tokens)
        return terms  # type: ignore[return-value]
    lam = c.sparsity * ramp
    if c.arch == "gated":  # as in the paper: the indicator has no gradient, and the second decoder is held constant
        z = (x - p["b_dec"] if centred else x) @ p["W_enc"].T
        acts = (z + p["b_enc"] > 0) * (z * p["r_mag"].exp() + p["b_mag"]).relu()
        error = acts @ p["W_dec"] + p["b_dec"] - wanted
        gate = (z + p["b_enc"]).relu()
        by_gate = gate @ p["W_dec"].detach() + p["b_dec"].detach() - wanted.detach()
        terms = {"reconstruction": error.square().sum(), "gate": by_gate.square().sum(), "sparsity": lam * gate.sum()}
        return {name: term / tokens for name, term in terms.items()}
    norms = sum(rows.norm(dim=1) for rows in torch.split(p["W_dec"], parts or [d], 1))
    if c.arch == "relu":
        acts = pre.relu()
        sparsity = lam * (acts * norms).sum()
        extra = {}
    else:
        acts = _Jump.apply(pre, p["log_threshold"], c.bandwidth)  # type: ignore[no-untyped-call]
        sparsity = lam * torch.tanh(c.tanh_scale * acts * norms).sum()
        short = (p["log_threshold"].exp() - pre).relu()
        extra = {"preact": c.preact_coef * (short * norms).sum() / tokens}
    error = acts @ p["W_dec"] + p["b_dec"] - wanted
    return {"reconstruction": error.square().sum() / tokens, "sparsity": sparsity / tokens, **extra}


# --- rows in memory


class MemoryCursor:
    """Batches of rows in memory, in a different order each epoch; the cursor is the number of steps."""

    def __init__(self, source: MemorySource, rows: int, config: Config, mesh: Mesh) -> None:
        self.source, self.rows, self.config, self.mesh = source, rows, config, mesh
        self.step, self.wait_seconds = 0, 0.0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        batch = self.config.batch_size
        each, order = self.rows // batch, None
        while True:
            epoch, at = divmod(self.step, each)
            if at == 0 or order is None:
                order = np.random.default_rng([self.config.seed, epoch]).permutation(self.rows)
            take = np.split(order[at * batch : (at + 1) * batch], self.mesh.world)[self.mesh.rank]
            self.step += 1
            self.source.seen.append(take)
            yield {"x": self.source.x[take], "document": self.source.documents[take]}

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class MemorySource:
    """A `saetrain.data.Source` of tensors."""

    field, document_field, name = "x", "document", "memory"

    def __init__(self, x: Tensor, documents: Tensor) -> None:
        self.x, self.documents, self.seen = x, documents, []  # type: ignore[var-annotated]
        self.rows, self.d_in = len(x), x.shape[1]

    def statistics(self) -> tuple[np.ndarray[Any, Any], float]:
        x = self.x.double()
        return x.mean(0).numpy(), float(x.var(0, unbiased=False).sum())

    def read(self, field: str, start: int, stop: int) -> Tensor:
        return {"x": self.x, "document": self.documents}[field][start:stop]

    def batches(self, rows: int, config: Config, mesh: Mesh) -> MemoryCursor:
        return MemoryCursor(self, rows, config, mesh)
