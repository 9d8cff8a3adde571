"""A finished autoencoder in the units of the raw rows: the result of a run, and the content of other tools' files.

Normalisation is folded away.  With x = (raw - mean) * scale, dividing all activations by scale gives

    with `pre_bias`    pre = W_enc (raw - b) + b_enc / scale               b = mean + b_dec / scale
    without            pre = W_enc raw + b_enc / scale - W_enc mean
                       raw^ = sum f_i W_dec[i] + b;                        thresholds too are divided by scale

and where training leaves decoder norms free, they go into the encoder, so that every decoder row has norm 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from saetrain.config import Config
from saetrain.errors import ExchangeError
from saetrain.model import Model
from saetrain.tensors import Spec, write
from saetrain.training.checkpoint import Checkpoint, write_json
from saetrain.variants.table import VARIANTS

BLOCK = 1024  # latents read at a time
SAELENS_VERSION = "6.0.0"  # the layout of cfg.json that is written

Rows = TypeVar("Rows", Tensor, np.ndarray[Any, Any])


class SAE(nn.Module):
    """A finished autoencoder: rows [..., d_in] in the units of the store, activations [..., d_sae].

    `activation` is relu, topk (with `k`) or jumprelu (with `threshold` [d_sae]).  Rows may be tensors or numpy
    arrays; the answer is of the same kind.  The tensors are parameters that need no gradient: `requires_grad_()` makes
    them trainable.  `config` holds the settings of the run, or None for another tool's autoencoder.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    threshold: Tensor | None

    def __init__(
        self,
        activation: str,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        subtract_b_dec: bool,
        k: int = 0,
        threshold: Tensor | None = None,
        config: Config | None = None,
    ) -> None:
        """W_enc and W_dec are [d_sae, d_in]; with `subtract_b_dec`, b_dec is taken from the encoder's input."""
        super().__init__()
        self.activation, self.subtract_b_dec, self.k, self.config = activation, subtract_b_dec, k, config
        for name, tensor in (("W_enc", W_enc), ("b_enc", b_enc), ("W_dec", W_dec), ("b_dec", b_dec)):
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_buffer("threshold", threshold)

    @property
    def d_in(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    def encode(self, raw: Rows) -> Rows:
        """Activations [..., d_sae] of raw rows [..., d_in]."""
        if isinstance(raw, np.ndarray):
            return self.encode(self._tensor(raw)).numpy(force=True)
        self._check(raw, self.d_in, "rows")
        x = raw.to(self.W_enc.dtype) - (self.b_dec if self.subtract_b_dec else 0)
        pre = (x @ self.W_enc.T + self.b_enc).view(-1, self.d_sae)
        acts = VARIANTS[self.activation].activate(pre, self.k, self.threshold)
        return acts.view(*raw.shape[:-1], self.d_sae)

    def decode(self, acts: Rows) -> Rows:
        """Raw rows [..., d_in] rebuilt from activations [..., d_sae]."""
        if isinstance(acts, np.ndarray):
            return self.decode(self._tensor(acts)).numpy(force=True)
        self._check(acts, self.d_sae, "activations")
        return acts.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def forward(self, raw: Rows) -> Rows:
        """Rows [..., d_in] as the autoencoder rebuilds them."""
        return self.decode(self.encode(raw))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write cfg.json and sae_weights.safetensors into a new or empty folder: `load` and SAELens read them."""
        to, variant = Path(folder), VARIANTS[self.activation]
        if to.exists() and any(to.iterdir()):
            raise ExchangeError(f"{to} exists and is not empty")
        held = {name: tensor.detach().cpu() for name, tensor in self.named_parameters()}
        held["W_enc"] = held["W_enc"].T
        if variant.has_thresholds and self.threshold is not None:
            held["threshold"] = self.threshold.detach().cpu()
        specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()}
        to.mkdir(parents=True, exist_ok=True)
        write(to / "sae_weights.safetensors", specs, held.items(), {"format": "pt"})
        made = self.config.arch if self.config else self.activation
        cfg = saelens_settings(variant, self.d_in, self.d_sae, self.W_dec.dtype, made, self.k)
        write_json(to / "cfg.json", {**cfg, "apply_b_dec_to_input": self.subtract_b_dec})

    def extra_repr(self) -> str:
        return f"{self.activation}, d_in={self.d_in}, d_sae={self.d_sae}" + (f", k={self.k}" if self.k else "")

    def _tensor(self, rows: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self.W_dec.device)

    def _check(self, given: Tensor, width: int, what: str) -> None:
        if not given.dim() or given.shape[-1] != width:
            raise ValueError(f"{what} of shape {tuple(given.shape)}: the last axis of this autoencoder's is {width}")


@dataclass(frozen=True)
class Folded:
    """A checkpoint in raw units, a block of latents at a time."""

    checkpoint: Checkpoint

    @property
    def variant(self) -> type[Model]:
        return VARIANTS[self.checkpoint.config.arch]

    def b_dec(self) -> Tensor:
        mean = self.checkpoint.read("mean")
        return mean + self.checkpoint.read("b_dec") / float(self.checkpoint.state["scale"])

    def blocks(self) -> Iterator[dict[str, Tensor]]:
        """W_enc, b_enc, W_dec and any threshold, rows one block after the other."""
        mean, running = self.checkpoint.read("mean"), float(self.checkpoint.read("threshold"))
        for lo in range(0, self.checkpoint.config.d_sae, BLOCK):
            yield self._block(lo, mean, running)

    def rows(self, lo: int, hi: int) -> dict[str, Tensor]:
        """The same of latents [lo, hi) alone; each has the same bits in any range, since whole blocks are folded."""
        mean, running = self.checkpoint.read("mean"), float(self.checkpoint.read("threshold"))
        first = lo // BLOCK * BLOCK
        parts = [self._block(at, mean, running) for at in range(first, hi, BLOCK)]
        return {n: torch.cat([p[n] for p in parts])[lo - first : hi - first] for n in parts[0]}

    def _block(self, lo: int, mean: Tensor, running: float) -> dict[str, Tensor]:
        c, variant = self.checkpoint, self.variant
        hi = min(lo + BLOCK, c.config.d_sae)
        part = {n: c.read(n, lo, hi) for n in ("W_enc", "b_enc", "W_dec", *variant.extra)}
        part = variant.fold(part, running, c.state["scale"])
        if not variant.pre_bias:
            part["b_enc"] = part["b_enc"] - part["W_enc"] @ mean
        return part if variant.unit_rows else _with_unit_rows(part)

    def whole(self) -> SAE:
        parts = list(self.blocks())
        joined = {n: torch.cat([p[n] for p in parts]) for n in parts[0]}
        return SAE(
            self.variant.activation,
            joined["W_enc"],
            joined["b_enc"],
            joined["W_dec"],
            self.b_dec(),
            self.variant.pre_bias,
            self.checkpoint.config.k,
            joined.get("threshold"),
            self.checkpoint.config,
        )


def _with_unit_rows(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same autoencoder with decoder norms moved into the encoder and the thresholds."""
    norm = part["W_dec"].norm(dim=1).clamp_min(1e-12)
    scaled = {n: t * (norm[:, None] if t.dim() == 2 else norm) for n, t in part.items() if n != "W_dec"}
    return scaled | {"W_dec": part["W_dec"] / norm[:, None]}


def saelens_settings(
    variant: type[Model], d_in: int, d_sae: int, dtype: torch.dtype, arch: str, k: int
) -> dict[str, Any]:
    """The content of SAELens' cfg.json; `arch` names the variant that was trained."""
    return {
        "architecture": variant.saelens,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": variant.pre_bias,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "trained_with": "saetrain",
            "variant": arch,
        },
        **variant.saelens_settings(k),
    }
