"""saetrain beside SAELens, sparsify and dictionary_learning: quality and speed on the same rows.

    pip install sae-lens eai-sparsify dictionary-learning      # with torch pinned to what you have
    python benchmarks/sae_peers.py shuffled.zarr --d-sae 2048 --k 32 --steps 500 --batch 512 --out peers.json

Quality: TopK at one width, k, number of steps and batch size; every tool gets the same batches in the same order,
trains as its own trainer does, and is measured by its own inference code on the same held-out rows: FVU, L0, share
of latents that fired on none of them.  Learning rates: each tool's default, and a grid that is the same for all.

Speed: one training step (forward, backward, update) of each on the same batch, in turn, several rounds; the median,
and the ratio to saetrain.  Tools that are not installed are left out.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import saetrain
from saetrain.config import Config, resolve
from saetrain.data import Store, norm_of
from saetrain.losses import step
from saetrain.mesh import Mesh
from saetrain.model import Model
from saetrain.optim import Optimizer, ramps

warnings.filterwarnings("ignore")


@dataclass
class Task:
    store: Path
    d_in: int
    d_sae: int
    k: int
    steps: int
    batch: int
    train: Tensor  # rows in the order all tools get them
    test: Tensor
    mean: Tensor

    def batches(self) -> list[Tensor]:
        return list(self.train[: self.steps * self.batch].split(self.batch))


@dataclass
class Run:
    """A tool in training: one step on a batch, and what it makes of rows in the end."""

    step: Callable[[Tensor], None]
    finish: Callable[
        [], Callable[[Tensor], tuple[Tensor, Tensor]]
    ]  # () -> rows -> (reconstruction, activations)


def ours(task: Task, lr: float | None, mesh: Mesh) -> Run:
    source = Store(task.store, Config())
    config = Config(
        d_sae=task.d_sae,
        k=task.k,
        steps=task.steps,
        batch_size=task.batch,
        lr=lr or 0.0,
        holdout=len(task.test),
    )
    model = Model(resolve(config, task.d_in, source.rows), norm_of(source), mesh)
    model.initialise(model.norm(task.train[:8192]))
    model.measure_tile(task.batch)
    optimizer, at = Optimizer(model), 0

    def go(rows: Tensor) -> None:
        nonlocal at
        rate, ramp = ramps(model.config, min(at, task.steps - 1))
        optimizer.apply(step(model, model.norm(rows), ramp).grads, rate)
        at += 1

    def finish() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        from saetrain import checkpoint

        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder), model, optimizer, 1, {})
            sae = saetrain.load(folder)
        return lambda rows: (sae(rows), sae.encode(rows))

    return Run(go, finish)


def saelens(task: Task, lr: float | None, mesh: Mesh, **settings: Any) -> Run:
    """SAELens' SAETrainer, stepped as its fit() does."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=task.d_in, d_sae=task.d_sae, k=task.k, **settings)
    )
    sae.b_dec.data = task.train[: task.batch].mean(0)
    rate = lr or SAETrainerConfig.lr
    config = SAETrainerConfig(
        total_training_samples=task.steps * task.batch, train_batch_size_samples=task.batch,
        lr=rate, lr_end=rate / 10, lr_decay_steps=task.steps // 5,
    )  # fmt: skip
    trainer = SAETrainer(config, sae, iter(task.batches()))

    def go(rows: Tensor) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(rows)
        trainer.n_training_steps += 1

    def finish() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        from sae_lens import SAE

        with tempfile.TemporaryDirectory() as folder:
            sae.save_inference_model(folder)
            done = SAE.load_from_disk(folder)
        return lambda rows: (done(rows), done.encode(rows))

    return Run(go, finish)


def sparsify(task: Task, lr: float | None, mesh: Mesh, *, optimizer: str = "signum") -> Run:
    """sparsify's SparseCoder in the loop of its Trainer (trainer.py: which itself wants a language model)."""
    from sparsify import SparseCoder, SparseCoderConfig

    torch.manual_seed(0)
    sae = SparseCoder(task.d_in, SparseCoderConfig(num_latents=task.d_sae, k=task.k))
    sae.b_dec.data = task.train[: task.batch].mean(0)
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

    def finish() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        if optimizer == "signum":
            adam.eval()
        sae.set_decoder_norm_to_unit_norm()

        def use(rows: Tensor) -> tuple[Tensor, Tensor]:
            top, index, pre = sae.encode(rows)
            return sae.decode(top, index), torch.zeros_like(pre).scatter_(1, index, top)

        return use

    return Run(go, finish)


def dictionary_learning(task: Task, lr: float | None, mesh: Mesh) -> Run:
    from dictionary_learning.trainers.top_k import TopKTrainer

    more = {"lr": lr} if lr else {}
    trainer = TopKTrainer(
        steps=task.steps, activation_dim=task.d_in, dict_size=task.d_sae, k=task.k, layer=0, lm_name="none", seed=0,
        device="cpu", warmup_steps=max(task.steps // 50, 1), decay_start=int(task.steps * 0.8), **more,
    )  # fmt: skip
    scale = task.d_in**0.5 / float((task.train[:8192]).square().sum(1).mean().sqrt())
    at = 0

    def go(rows: Tensor) -> None:
        nonlocal at
        trainer.update(at, rows * scale)
        at += 1

    def finish() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def use(rows: Tensor) -> tuple[Tensor, Tensor]:
            acts = trainer.ae.encode(rows * scale)
            return trainer.ae.decode(acts) / scale, acts

        return use

    return Run(go, finish)


TOOLS: dict[str, tuple[str, Callable[..., Run], dict[str, Any]]] = {
    "saetrain": ("saetrain", ours, {}),
    "SAELens": ("sae_lens", saelens, {}),
    "sparsify, signum (its default)": ("sparsify", sparsify, {}),
    "sparsify, adam": ("sparsify", sparsify, {"optimizer": "adam"}),
    "dictionary_learning": ("dictionary_learning", dictionary_learning, {}),
}


def quality(
    task: Task, make: Callable[..., Run], settings: dict[str, Any], lr: float | None, mesh: Mesh
) -> dict[str, float]:
    run = make(task, lr, mesh, **settings)
    started = time.perf_counter()
    for rows in task.batches():
        run.step(rows)
    seconds = time.perf_counter() - started
    use = run.finish()
    with torch.no_grad():
        parts = [use(rows) for rows in task.test.split(2048)]
    out, acts = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    error = (out - task.test).double().square().sum()
    total = (task.test - task.test.mean(0)).double().square().sum()
    return {
        "fvu": float(error / total), "l0": float((acts != 0).sum(1).double().mean()),
        "never_fired": float(((acts != 0).sum(0) == 0).double().mean()), "seconds": seconds,
    }  # fmt: skip


def speed(
    task: Task, tools: dict[str, Any], rounds: int, mesh: Mesh
) -> dict[str, dict[str, float]]:
    runs = {name: make(task, None, mesh, **settings) for name, (_, make, settings) in tools.items()}
    rows = task.batches()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run.step(rows[turn % len(rows)])
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - started)
    best, median = (
        {n: min(t) for n, t in times.items()},
        {n: statistics.median(t) for n, t in times.items()},
    )
    return {
        n: {
            "tokens_per_s_median": task.batch / median[n], "tokens_per_s_best": task.batch / best[n],
            "time_over_saetrain_best": best[n] / best["saetrain"],
            "time_over_saetrain_median": median[n] / median["saetrain"],
        }
        for n in runs
    }  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("store", type=Path)
    options.add_argument("--d-sae", type=int, default=2048)
    options.add_argument("--k", type=int, default=32)
    options.add_argument("--steps", type=int, default=500)
    options.add_argument("--batch", type=int, default=512)
    options.add_argument("--lrs", default="1e-3,2e-3", help="besides each tool's default")
    options.add_argument(
        "--rounds", type=int, default=10, help="of the speed comparison; 0 leaves it out"
    )
    options.add_argument("--speed-batch", type=int, default=2048)
    options.add_argument("--quality", type=int, default=1, help="0 leaves it out")
    options.add_argument("--out", type=Path)
    args = options.parse_args()
    source, mesh = Store(args.store, Config()), Mesh.start("cpu")
    held = min(source.rows // 20, 16_384)
    if args.steps * args.batch > source.rows - held:
        options.error(
            f"{args.steps} x {args.batch} rows of {source.rows - held}: one pass only, so that all see the same"
        )
    rows = source.read(source.field, 0, source.rows).float()
    task = Task(
        args.store,
        source.d_in,
        args.d_sae,
        args.k,
        args.steps,
        args.batch,
        rows[:-held],
        rows[-held:],
        rows.mean(0),
    )
    tools = {}
    for name, (package, make, settings) in TOOLS.items():
        try:
            importlib.import_module(package)
            tools[name] = (package, make, settings)
        except ImportError as error:
            print(f"{name}: left out ({error})")
    packages = {"saetrain": "actshuffle", "sae_lens": "sae-lens", "sparsify": "eai-sparsify"}
    versions = {
        p: importlib.metadata.version(packages.get(p, p))
        for p in {t[0] for t in tools.values()}
        if p != "saetrain"
    }
    found: dict[str, Any] = {
        "settings": {k: str(v) for k, v in vars(args).items()}, "versions": versions, "torch": torch.__version__,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads",
        "quality": {}, "speed": {},
    }  # fmt: skip
    if args.rounds:
        small = Task(
            **{
                **vars(task),
                "batch": args.speed_batch,
                "steps": max(len(task.train) // args.speed_batch, 1),
            }
        )
        found["speed"] = speed(small, tools, args.rounds, mesh)
        for name, values in found["speed"].items():
            print(f"{name:32} " + "  ".join(f"{k} {v:,.2f}" for k, v in values.items()), flush=True)
    if args.quality:
        for name, (_, make, settings) in tools.items():
            for lr in (None, *map(float, args.lrs.split(","))):
                values = quality(task, make, settings, lr, mesh)
                found["quality"].setdefault(name, {})[str(lr or "default")] = values
                print(
                    f"{name:32} lr {lr or 'default':>8}  "
                    + "  ".join(f"{k} {v:.4f}" for k, v in values.items()),
                    flush=True,
                )
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))
    mesh.close()


if __name__ == "__main__":
    main()
