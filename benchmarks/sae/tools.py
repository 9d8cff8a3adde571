"""The trainers that are compared: each one's own model, optimiser and inference, fed the same batches.

Nothing is tuned against a tool: its trainer's defaults, the same number of steps, TopK with the same k and width.
Only `ours` imports saetrain, so that the others run in environments that lack its requirements.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.sae.planted import matched

if TYPE_CHECKING:
    from saetrain.compute.mesh import Mesh


@dataclass
class Task:
    """The training task, the same for all tools."""

    rows: Tensor  # [n, d] to train on, in this order, once
    d_sae: int
    k: int
    steps: int
    batch: int
    seed: int = 0
    form: str = "default"  # a name in `benchmarks.sae.forms.FORMS`, for saetrain

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
    import saetrain
    from benchmarks.sae.forms import FORMS
    from saetrain.config import Config, resolve
    from saetrain.norms import norm_from
    from saetrain.training import checkpoint
    from saetrain.training.losses import step
    from saetrain.training.optim import Optimizer, ramps

    form = FORMS[task.form]
    asked = {"d_sae": task.d_sae, "k": task.k, "steps": task.steps, "batch_size": task.batch, "seed": task.seed}
    config = resolve(Config(**asked, lr=lr or 0.0, holdout=1, **form.settings), task.d_in, len(task.rows))
    mean = task.rows.double().mean(0)
    variance = float(sum((p.double() - mean).square().sum() for p in task.rows.split(65_536)))
    norm = norm_from(mean.numpy(), variance / len(task.rows))
    model = form.model(config, norm, mesh)
    model.initialise(model.norm(task.rows[:8192]))
    model.measure_tile(task.batch)
    optimizer, at = Optimizer(model), 0

    def go(rows: Tensor) -> None:
        nonlocal at
        rate, ramp = ramps(model.config, min(at, task.steps - 1))
        x = model.norm(rows)
        optimizer.apply(step(model, x, ramp).grads, rate * form.rate)
        at += 1
        if form.after is not None:
            form.after(model, optimizer, x, at / task.steps)

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

    torch.manual_seed(task.seed)
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

    torch.manual_seed(task.seed)
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
        seed=task.seed,
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
            versions[tool.package] = version_of(tool)
        except Exception as error:  # other people's imports fail in many ways
            versions[tool.package] = f"left out: {type(error).__name__}: {error}"
    return found, versions


def version_of(tool: Tool) -> str:
    if tool.module != "saetrain":
        return version(tool.package)
    import actshuffle

    return actshuffle.__version__  # it may be run without being installed


def measured(trained: Trained, test: Tensor, truth: Tensor | None) -> dict[str, float]:
    with torch.no_grad():
        parts = [trained.use(rows) for rows in test.split(2048)]
    out, active = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]) != 0
    error = (out - test).double().square().sum()
    total = (test - test.mean(0)).double().square().sum()
    line = {
        "fvu": float(error / total),
        "l0": float(active.sum(1).double().mean()),
        "never_fired": float((~active.any(0)).double().mean()),
    }
    if truth is not None:
        line["mean_max_cosine"] = float(matched(trained.decoder, truth).mean())
    return line
