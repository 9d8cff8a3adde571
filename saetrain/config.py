"""Settings of a run.  The string under each field is its help on the command line.

A zero (or -1 for coefficients, or an empty text) means "choose": `resolve` replaces each such value by
arithmetic on the size of the data, so what a run wrote to its config.json has nothing left to choose.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import pairwise
from typing import Any, Literal, Self, get_args, get_type_hints

from saetrain.errors import ConfigError

Arch = Literal["topk", "batchtopk", "matryoshka", "relu", "jumprelu"]
Compute = Literal["auto", "float32", "bfloat16", "float64"]
SPARSE = ("topk", "batchtopk", "matryoshka")  # a fixed number of active latents, AuxK, unit decoder


@dataclass(frozen=True)
class Config:
    # --- model
    arch: Arch = "topk"
    """variant: topk, batchtopk, matryoshka, relu or jumprelu"""
    d_sae: int = 0
    """number of latents; 0 takes 16 times the width of the activations"""
    k: int = 32
    """active latents a token (topk), or on average (batchtopk, matryoshka)"""
    widths: tuple[int, ...] = ()
    """matryoshka: nested dictionary sizes; empty takes d_sae / 16, / 8, / 4, / 2, / 1"""
    sparsity: float = -1.0
    """relu: lambda of the L1 term; jumprelu: of the tanh term; -1 takes 5 and 10, less below 1,024 wide"""
    aux_coef: float = 1 / 32
    """weight of the AuxK loss of dead latents (topk, batchtopk, matryoshka)"""
    aux_k: int = 0
    """latents in the AuxK loss; 0 takes half the width of the activations"""
    dead_tokens: int = 0
    """a latent is dead after so many tokens without firing; 0 takes the lesser of 10 million and a tenth of
    the run, but at least 20 batches"""
    threshold_rate: float = 0.0
    """batchtopk, matryoshka: rate of the running mean of the activation threshold used at inference; 0 takes
    0.01, or 20 / steps if that is more"""
    bandwidth: float = 2.0
    """jumprelu: width of the straight-through kernel"""
    tanh_scale: float = 4.0
    """jumprelu: c of the tanh penalty"""
    preact_coef: float = 3e-6
    """jumprelu: weight of the pre-activation loss that revives latents"""
    # --- optimisation
    batch_size: int = 0
    """tokens a step over all ranks; 0 takes a power of two from 256 to 4096 that gives about 2,000 steps"""
    steps: int = 0
    """optimiser steps; 0 takes one pass, or up to 20 passes where one gives fewer than 2,000 steps"""
    lr: float = 0.0
    """Adam's learning rate; 0 takes 2e-4 sqrt(16,384 / d_sae), for fewer than 20,000 steps times
    sqrt(20,000 / steps), at most 0.016 (jumprelu: at most 5 times)"""
    lr_warmup: float = 0.02
    """part of the run in which the learning rate rises from 0"""
    lr_decay: float = 0.2
    """part of the run, at its end, in which the learning rate falls to 0"""
    sparsity_warmup: float = -1.0
    """part of the run in which the sparsity term rises; -1 takes 0.05 for relu, 1 for jumprelu"""
    beta1: float = 0.9
    """Adam's beta1"""
    beta2: float = 0.999
    """Adam's beta2"""
    eps: float = 6.25e-10
    """Adam's epsilon"""
    clip: float = 1.0
    """largest norm of the gradient over all parameters; 0 for no limit"""
    seed: int = 0
    """of the initial weights, and of the batch order of later epochs"""
    # --- data
    field: str = ""
    """array of the store to train on; empty takes the only floating-point array of two axes"""
    document_field: str = ""
    """array of document ids, for the document entropy of batches; empty takes `document` and its like if there"""
    holdout: int = 0
    """rows at the end of the store kept for evaluation; 0 takes the lesser of 5 % and 16,384"""
    incomplete: bool = False
    """true takes a store without its completion marker: an array or group of any origin"""
    buffer_rows: int = -1
    """stores that are not shuffled: rows of a shuffle buffer, 0 for the stored order; -1 refuses such stores"""
    # --- machine
    device: str = "auto"
    """cpu, cuda, or auto"""
    compute: Compute = "auto"
    """precision of the encoder product; auto takes bfloat16 on CUDA, float32 elsewhere.  Parameters, optimiser
    and sums stay float32 (float64 with float64)"""
    tensor_parallel: int = 0
    """ranks that share one copy of the parameters; 0 takes all of them"""
    tile: int = 0
    """tokens in one encoder product; 0 measures a few sizes once and keeps the fastest"""
    # --- bookkeeping
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    eval_every: int = 0
    """steps between evaluations on held-out rows; 0 takes a tenth of the run"""
    checkpoint_every: int = 0
    """steps between checkpoints; 0 takes a tenth of the run, and at most 1,000"""
    keep: int = 2
    """checkpoints kept"""

    def __post_init__(self) -> None:
        for name, allowed in (("arch", get_args(Arch)), ("compute", get_args(Compute))):
            if (given := getattr(self, name)) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {given!r}")
        for name in (
            "d_sae",
            "aux_k",
            "dead_tokens",
            "batch_size",
            "steps",
            "lr",
            "clip",
            "holdout",
            "tile",
            "aux_coef",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("k", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if list(self.widths) != sorted(set(self.widths)) or any(w < 1 for w in self.widths):
            raise ConfigError(f"widths must rise strictly from 1 or more, got {self.widths}")

    @property
    def is_sparse(self) -> bool:
        return self.arch in SPARSE

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Self:
        names = {f.name for f in fields(cls)}
        if unknown := set(found) - names:
            raise ConfigError(f"unknown settings {sorted(unknown)}: written by a newer version?")
        return cls(**{**found, "widths": tuple(found.get("widths", ()))})


def resolve(config: Config, d_in: int, rows: int) -> Config:
    """The same settings with every choice made, from the width and the number of rows alone."""
    c = config
    holdout = c.holdout or min(rows // 20, 16_384)
    train_rows = rows - holdout
    power = 1 << max(train_rows // 2000, 1).bit_length() - 1
    batch = c.batch_size or min(max(power, 256), 4096, max(train_rows, 1))
    one_pass = train_rows // batch
    if one_pass < 1:
        what = f"{rows:,} rows less {holdout:,} held out"
        raise ConfigError(f"{what} do not fill one batch of {batch:,}")
    steps = c.steps or max(one_pass, min(2000, 20 * one_pass))
    d_sae = c.d_sae or 16 * d_in
    widths: tuple[int, ...] = (d_sae,)
    if c.arch == "matryoshka":
        widths = c.widths or tuple(sorted({max(d_sae >> s, 1) for s in range(5)}))
        if widths[-1] > d_sae:
            raise ConfigError(f"widths {widths} go beyond d_sae {d_sae}")
        widths = widths if widths[-1] == d_sae else (*widths, d_sae)
    if c.is_sparse and c.k > d_sae:
        raise ConfigError(f"k {c.k} is more than d_sae {d_sae}")
    # Activations of a latent grow as sqrt(d_in) in normalised units; the papers' lambdas are for wide models.
    narrow = min(d_in / 1024, 1.0)
    lambdas = {"relu": 5.0 * narrow**0.5, "jumprelu": 10.0 * narrow}
    # Gao et al.'s rate is for long runs.  Shorter ones want more, as 1 / sqrt(steps): so says the theory of
    # rates that fall at the end (Defazio et al. 2023, arXiv 2310.07831), and so it was seen (docs/training.md).
    # jumprelu's thresholds, trained at the same rate, then rise until hardly a latent is active.
    hurry = min(max((20_000 / steps) ** 0.5, 1.0), 5.0 if c.arch == "jumprelu" else math.inf)
    return replace(
        c,
        d_sae=d_sae,
        widths=widths,
        holdout=holdout,
        batch_size=batch,
        steps=steps,
        sparsity=c.sparsity if c.sparsity >= 0 else lambdas.get(c.arch, 0.0),
        sparsity_warmup=c.sparsity_warmup if c.sparsity_warmup >= 0 else 1.0 if c.arch == "jumprelu" else 0.05,
        aux_k=c.aux_k or max(d_in // 2, 1),
        dead_tokens=c.dead_tokens or max(min(10_000_000, steps * batch // 10), 20 * batch),
        threshold_rate=c.threshold_rate or min(max(0.01, 20 / steps), 1.0),
        lr=c.lr or min(2e-4 * (2**14 / d_sae) ** 0.5 * hurry, 0.016),
        eval_every=c.eval_every or max(steps // 10, 1),
        checkpoint_every=c.checkpoint_every or min(max(steps // 10, 1), 1000),
    )


@cache
def field_help() -> dict[str, str]:
    """The string under each field of Config, by name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(Config))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for first, second in pairwise(tree.body):
        if isinstance(first, ast.AnnAssign) and isinstance(second, ast.Expr):
            text = ast.literal_eval(second.value)
            found[ast.unparse(first.target)] = " ".join(str(text).split())
    return found


def parse_field(name: str, text: str) -> Any:
    """A setting from its text on the command line."""
    kind = get_type_hints(Config)[name]
    try:
        if kind in (int, float):
            return int(float(text)) if kind is int and float(text).is_integer() else kind(text)
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if name == "widths":
            return tuple(int(part) for part in text.split(",") if part)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"--{name.replace('_', '-')}: {text!r} is no {kind.__name__}") from error
    return text
