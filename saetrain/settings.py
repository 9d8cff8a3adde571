"""The settings of a run.  The string under each field is its help on the command line.

A zero (or -1 for coefficients, or an empty text) means "choose": `config.resolve` replaces each such value by
arithmetic on the size of the data, so that a run's config.json leaves nothing to choose.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from saetrain.errors import ConfigError

Arch = str  # a name in `variants.table.VARIANTS`
Compute = Literal["auto", "float32", "tf32", "bfloat16", "float64"]
Moments = Literal["full", "8bit"]


def split_names(text: str) -> list[str]:
    """The arrays in a text A,B."""
    return text.split(",") if text else []


@dataclass(frozen=True)
class Domain:
    """The values that a setting may have; `words` describes them in a refusal."""

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Settings:
    """Every setting, with its default.  `config.Config` adds the checks that need the table of variants."""

    # --- model
    arch: Arch = "topk"
    """SAE variant to train: {variants}"""
    d_sae: int = 0
    """Number of latents; 0 chooses 16 times the width of the activations"""
    k: int = 32
    """Active latents per token (topk), or their mean per token (batchtopk, matryoshka)"""
    widths: tuple[int, ...] = ()
    """Nested dictionary sizes (matryoshka); empty chooses d_sae / 16, / 8, / 4, / 2, / 1"""
    sparsity: float = -1.0
    """Lambda of the L1 term (relu, gated) or of the tanh term (jumprelu); -1 chooses 5, 10 and 10, less below 1,024
    wide"""
    aux_coef: float = 1 / 32
    """Weight of the AuxK loss of dead latents (topk, batchtopk, matryoshka)"""
    aux_k: int = 0
    """Latents in the AuxK loss; 0 chooses half the width of the activations"""
    dead_tokens: int = 0
    """Tokens without firing after which a latent counts as dead; 0 chooses the lesser of 10 million and a tenth
    of the run, but at least 20 batches"""
    threshold_rate: float = 0.0
    """Rate of the running mean of the activation threshold used at inference (batchtopk, matryoshka); 0 chooses
    0.01, or 20 / steps if that is more"""
    bandwidth: float = 2.0
    """Width of the straight-through kernel (jumprelu)"""
    tanh_scale: float = 4.0
    """Factor c inside the tanh penalty (jumprelu)"""
    preact_coef: float = 3e-6
    """Weight of the pre-activation loss that revives latents (jumprelu)"""
    # --- optimisation
    batch_size: int = 0
    """Tokens per step over all ranks; 0 chooses a power of two from 256 to 4096 that gives about 2,000 steps"""
    steps: int = 0
    """Optimiser steps; 0 chooses one pass, or up to 20 passes where one gives fewer than 2,000 steps"""
    lr: float = 0.0
    """Learning rate of Adam; 0 chooses 2e-4 sqrt(16,384 / d_sae), for fewer than 20,000 steps times
    sqrt(20,000 / steps), at most 0.016 (jumprelu: at most 5 times)"""
    lr_warmup: float = 0.02
    """Fraction of the run in which the learning rate rises from 0"""
    lr_decay: float = 0.2
    """Fraction of the run, at its end, in which the learning rate falls to 0"""
    sparsity_warmup: float = -1.0
    """Fraction of the run in which the sparsity term rises from 0; -1 chooses 1 for jumprelu, else 0.05"""
    beta1: float = 0.9
    """Adam's beta1"""
    beta2: float = 0.999
    """Adam's beta2"""
    eps: float = 6.25e-10
    """Adam's epsilon"""
    clip: float = 1.0
    """Largest norm of the gradient over all parameters; 0 sets no limit"""
    seed: int = 0
    """Seed of the initial weights, and of the batch order of later epochs unless --order-seed has its own"""
    # --- data
    field: str = ""
    """Array of the store to train on; empty chooses the only floating-point array of two axes, or of more, whose rows
    are then flattened.  Several, as A,B, make a crosscoder: shared latents with a decoder for each array"""
    document_field: str = ""
    """Array of document ids, for the document entropy of batches; empty chooses `document` or a similar name, if
    the store has one"""
    holdout: int = 0
    """Rows at the end of the store to keep for evaluation; 0 chooses the lesser of 5 % and 16,384, or
    none where another store is evaluated on"""
    incomplete: bool = False
    """Whether to accept (true) a store without its completion marker: an array or group of any origin"""
    buffer_rows: int = -1
    """Rows of a shuffle buffer for a store that is not shuffled; 0 takes the stored order, -1 refuses such a store"""
    # --- machine
    device: str = "auto"
    """Device to train on: cpu, cuda, or auto"""
    compute: Compute = "auto"
    """Precision of matrix products; auto chooses bfloat16 on CUDA, float32 elsewhere.  bfloat16 is that of the encoder
    product, and of the rows that sparse products gather on CUDA (with Triton); a step's other products are in TF32
    there, as all are with tf32.  Parameters, optimiser and sums stay float32 (float64 with float64)"""
    tensor_parallel: int = 0
    """Ranks that share one copy of the parameters; 0 chooses all of them"""
    tile: int = 0
    """Tokens per encoder product, and per tile of the step where all latents take part (relu, jumprelu, gated); 0 times
    a few sizes once and keeps the fastest"""
    # --- bookkeeping
    log_every: int = 10
    """Steps between lines of metrics.jsonl"""
    eval_every: int = 0
    """Steps between evaluations on held-out rows; 0 chooses a tenth of the run"""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 chooses a tenth of the run, and at most 1,000"""
    keep: int = 2
    """Checkpoints to keep"""
    # --- transcoders
    output: str = ""
    """Arrays to rebuild from those of --field, as A or A,B: a transcoder; empty rebuilds the same arrays"""
    skip: bool = False
    """Whether a linear map of the input is added to the output (true) of a transcoder"""
    # --- trackers
    log: str = "auto"
    """Trackers that get the numbers of metrics.jsonl too: tensorboard, wandb, both as A,B, or none; auto is tensorboard
    where it is installed"""
    # --- averages and first weights
    ema: float = 0.0
    """Decay of a moving average of the weights, such as 0.999, which is then evaluated and exported as the model; 0
    keeps none"""
    init_from: str = ""
    """Run, checkpoint, or folder of SAELens or sparsify whose weights to start from (finetuning); empty starts from
    random ones"""
    # --- sweeps
    order_seed: int = -1
    """Seed of the batch order of later epochs; -1 takes that of --seed, and in a sweep over seeds the first of them"""
    # --- memory
    moments: Moments = "full"
    """Precision of Adam's moments: full, as that of the parameters, or 8bit, which takes a quarter of the memory"""

    def __post_init__(self) -> None:
        for name, domain in DOMAINS.items():
            if not domain.holds(value := getattr(self, name)):
                raise ConfigError(f"--{name.replace('_', '-')} must be {domain.words}, got {value!r}")
        for name in ("field", "output"):
            names = split_names(getattr(self, name))
            if "" in names or len(set(names)) < len(names):
                raise ConfigError(f"{name} must name different arrays, as A or A,B, got {getattr(self, name)!r}")
        if self.skip and (not self.output or self.output == self.field):
            raise ConfigError("skip adds a map from the input to the output: it needs an output that is not the input")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Self:
        names = {f.name for f in fields(cls)}
        if unknown := set(found) - names:
            raise ConfigError(f"unknown settings {sorted(unknown)}: did a newer version write them?")
        order = {"order_seed": found["seed"]} if "seed" in found else {}  # a run of an earlier version has no other
        return cls(**{**order, **found, "widths": tuple(found.get("widths", ()))})


# --- Domains


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= MOST


def _real(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _trackers(value: Any) -> bool:
    names = split_names(value) if type(value) is str else []
    return value in ("auto", "none") or (0 < len(names) == len({*names} & {"tensorboard", "wandb"}))


def _rises(widths: Any) -> bool:
    whole = isinstance(widths, tuple) and all(_whole(width, 1) for width in widths)
    return whole and list(widths) == sorted(set(widths))


MOST = 2**63 - 1  # integers are counted in 64 bits
POSITIVE_COUNT = Domain(f"an integer from 1 to {MOST:,}", lambda value: _whole(value, 1))
COUNT_OR_NONE = Domain(f"an integer from 0 to {MOST:,}", lambda value: _whole(value, 0))
_POSITIVE = Domain("a finite number above 0", lambda value: _real(value) and value > 0)
NOT_NEGATIVE = Domain("a finite number of 0 or more", lambda value: _real(value) and value >= 0)
_SHARE = Domain("a number from 0 to 1", lambda value: _real(value) and 0 <= value <= 1)
_DECAY = Domain("a number from 0 to below 1", lambda value: _real(value) and 0 <= value < 1)
_TEXT = Domain("a text", lambda value: type(value) is str)
DOMAINS = {  # of every setting but `arch`, which has a table elsewhere
    "d_sae": COUNT_OR_NONE,
    "k": POSITIVE_COUNT,
    "widths": Domain("integers that rise strictly from 1 or more", _rises),
    "sparsity": Domain("a finite number of 0 or more, or -1", lambda v: _real(v) and (v >= 0 or v == -1)),
    "aux_coef": NOT_NEGATIVE,
    "aux_k": COUNT_OR_NONE,
    "dead_tokens": COUNT_OR_NONE,
    "threshold_rate": _SHARE,
    "bandwidth": _POSITIVE,
    "tanh_scale": _POSITIVE,
    "preact_coef": NOT_NEGATIVE,
    "batch_size": COUNT_OR_NONE,
    "steps": COUNT_OR_NONE,
    "lr": NOT_NEGATIVE,
    "lr_warmup": _SHARE,
    "lr_decay": _SHARE,
    "sparsity_warmup": Domain("a number from 0 to 1, or -1", lambda v: _real(v) and (0 <= v <= 1 or v == -1)),
    "beta1": _DECAY,
    "beta2": _DECAY,
    "eps": _POSITIVE,
    "clip": NOT_NEGATIVE,
    "seed": COUNT_OR_NONE,
    "field": _TEXT,
    "output": _TEXT,
    "skip": Domain("true or false", lambda value: type(value) is bool),
    "document_field": _TEXT,
    "holdout": COUNT_OR_NONE,
    "incomplete": Domain("true or false", lambda value: type(value) is bool),
    "log": Domain("tensorboard, wandb, both as A,B, auto or none", _trackers),
    "ema": _DECAY,
    "init_from": _TEXT,
    "order_seed": Domain(f"an integer from -1 to {MOST:,}", lambda value: _whole(value, -1)),
    "buffer_rows": Domain(f"an integer from -1 to {MOST:,}", lambda value: _whole(value, -1)),
    "device": Domain(
        "cpu, cuda, cuda:N or auto",
        lambda value: type(value) is str and re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", value) is not None,
    ),
    "compute": Domain(f"one of {', '.join(get_args(Compute))}", lambda value: value in get_args(Compute)),
    "moments": Domain(f"one of {', '.join(get_args(Moments))}", lambda value: value in get_args(Moments)),
    "tensor_parallel": COUNT_OR_NONE,
    "tile": COUNT_OR_NONE,
    "log_every": POSITIVE_COUNT,
    "eval_every": COUNT_OR_NONE,
    "checkpoint_every": COUNT_OR_NONE,
    "keep": POSITIVE_COUNT,
}
