"""The trainers that are compared: each one's own model, optimiser and inference, fed the same batches.

Nothing is tuned against a tool: its trainer's defaults, the same number of steps, TopK with the same k and width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import actshuffle
import saetrain
from saetrain.compute.mesh import Mesh
from saetrain.config import Config, resolve
from saetrain.norms import norm_from
from saetrain.training import checkpoint
from saetrain.training.losses import step
from saetrain.training.optim import Optimizer, ramps
from saetrain.variants.table import VARIANTS


@dataclass
class Task:
    """The training task, the same for all tools."""

    rows: Tensor  # [n, d] to train on, in this order, once
    d_sae: int
    k: int
    steps: int
    batch: int

    @property
    def d_in(self) -> int:
        return self.rows.shape[1]

    def batches(self) -> list[Tensor]:
        return list(self.rows[: self.steps * self.batch].split(self.batch))


class Trained(NamedTuple):
    use: Callable[[Tensor], tuple[Tensor, Tensor]]  # rows -> (reconstructions, activations)
    decoder: Tensor  # [latents, d]


@dataclass
class Run:
    """A tool in training: ``step`` trains on one batch, ``finish`` returns the trained SAE."""

    step: Callable[[Tensor], None]
    finish: Callable[[], Trained]


def ours(task: Task, lr: float | None, mesh: Mesh) -> Run:
    config = Config(d_sae=task.d_sae, k=task.k, steps=task.steps, batch_size=task.batch, lr=lr or 0.0, holdout=1)
    mean = task.rows.double().mean(0)
    variance = float(sum((p.double() - mean).square().sum() for p in task.rows.split(65_536)))
    norm = norm_from(mean.numpy(), variance / len(task.rows))
    model = VARIANTS[config.arch](resolve(config, task.d_in, len(task.rows)), norm, mesh)
    model.initialise(model.norm(task.rows[:8192]))
    model.measure_tile(task.batch)
    optimizer, at = Optimizer(model), 0

    def go(rows: Tensor) -> None:
        nonlocal at
        rate, ramp = ramps(model.config, min(at, task.steps - 1))
        optimizer.apply(step(model, model.norm(rows), ramp).grads, rate)
        at += 1

    def finish() -> Trained:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder), model, optimizer, 1, {})
            sae = saetrain.load(folder)
        return Trained(lambda rows: (sae(rows), sae.encode(rows)), sae.W_dec)

    return Run(go, finish)


def saelens(task: Task, lr: float | None, mesh: Mesh) -> Run:
    """SAELens' SAETrainer, stepped as its fit() does."""
    from sae_lens import SAE
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=task.d_in, d_sae=task.d_sae, k=task.k))
    sae.b_dec.data = task.rows[: task.batch].mean(0)
    rate = lr or SAETrainerConfig.lr
    config = SAETrainerConfig(
        total_training_samples=task.steps * task.batch,
        train_batch_size_samples=task.batch,
        lr=rate,
        lr_end=rate / 10,
        lr_decay_steps=task.steps // 5,
    )
    trainer = SAETrainer(config, sae, iter(task.batches()))

    def go(rows: Tensor) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(rows)
        trainer.n_training_steps += 1

    def finish() -> Trained:
        with tempfile.TemporaryDirectory() as folder:
            sae.save_inference_model(folder)
            done = SAE.load_from_disk(folder)
        return Trained(lambda rows: (done(rows), done.encode(rows)), done.W_dec.detach())

    return Run(go, finish)


def sparsify(task: Task, lr: float | None, mesh: Mesh, *, optimizer: str = "signum") -> Run:
    """sparsify's SparseCoder in the loop of its Trainer (trainer.py), which itself needs a language model."""
    from sparsify import SparseCoder, SparseCoderConfig

    torch.manual_seed(0)
    sae = SparseCoder(task.d_in, SparseCoderConfig(num_latents=task.d_sae, k=task.k))
    sae.b_dec.data = task.rows[: task.batch].mean(0)
    width = (task.d_sae / 2**14) ** 0.5
    schedule = None
    if optimizer == "adam":
        from transformers import get_linear_schedule_with_warmup

        adam: Any = torch.optim.Adam(sae.parameters(), lr=lr or 2e-4 / width)
        schedule = get_linear_schedule_with_warmup(adam, max(task.steps // 50, 1), task.steps)
    else:
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        adam = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=lr or 5e-3 / width), momentum=0.95)
        adam.train()

    def go(rows: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        sae(rows).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        if schedule is not None:
            schedule.step()

    def finish() -> Trained:
        if optimizer == "signum":
            adam.eval()
        sae.set_decoder_norm_to_unit_norm()

        def use(rows: Tensor) -> tuple[Tensor, Tensor]:
            top, index, pre = sae.encode(rows)
            return sae.decode(top, index), torch.zeros_like(pre).scatter_(1, index, top)

        return Trained(use, sae.W_dec.detach())

    return Run(go, finish)


def sparsify_adam(task: Task, lr: float | None, mesh: Mesh) -> Run:
    return sparsify(task, lr, mesh, optimizer="adam")


def dictionary_learning(task: Task, lr: float | None, mesh: Mesh) -> Run:
    from dictionary_learning.trainers.top_k import TopKTrainer

    more = {"lr": lr} if lr else {}
    trainer = TopKTrainer(
        steps=task.steps,
        activation_dim=task.d_in,
        dict_size=task.d_sae,
        k=task.k,
        layer=0,
        lm_name="none",
        seed=0,
        device="cpu",
        warmup_steps=max(task.steps // 50, 1),
        decay_start=int(task.steps * 0.8),
        **more,
    )
    # Its trainSAE(normalize_activations=True) scales to mean squared norm 1; so does this.
    scale = 1 / float(task.rows[:8192].square().sum(1).mean().sqrt())
    at = 0

    def go(rows: Tensor) -> None:
        nonlocal at
        trainer.update(at, rows * scale)
        at += 1

    def finish() -> Trained:
        def use(rows: Tensor) -> tuple[Tensor, Tensor]:
            acts = trainer.ae.encode(rows * scale)
            return trainer.ae.decode(acts) / scale, acts

        return Trained(use, trainer.ae.decoder.weight.detach().T)

    return Run(go, finish)


class Tool(NamedTuple):
    module: str
    package: str  # on PyPI
    make: Callable[[Task, float | None, Mesh], Run]


TOOLS = {
    "saetrain": Tool("saetrain", "actshuffle", ours),
    "SAELens": Tool("sae_lens", "sae-lens", saelens),
    "sparsify (signum, its default)": Tool("sparsify", "eai-sparsify", sparsify),
    "sparsify (adam)": Tool("sparsify", "eai-sparsify", sparsify_adam),
    "dictionary_learning": Tool("dictionary_learning", "dictionary-learning", dictionary_learning),
}


def installed(only: list[str] | None) -> tuple[dict[str, Tool], dict[str, str]]:
    """The tools (or those in `only`) that can be imported here, and the version of each, or the reason it cannot."""
    found, versions = {}, {}
    for name, tool in TOOLS.items():
        if only and tool.module not in only:
            continue
        try:
            import_module(tool.module)
            found[name] = tool
            ours = tool.module == "saetrain"  # may be run without being installed
            versions[tool.package] = actshuffle.__version__ if ours else version(tool.package)
        except Exception as error:  # other people's imports fail in many ways
            versions[tool.package] = f"left out: {type(error).__name__}: {error}"
    return found, versions
