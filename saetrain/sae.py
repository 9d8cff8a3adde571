"""A finished autoencoder in the units of the raw rows: the result of a run, and the content of other tools' files.

Normalisation is folded away.  With x = (raw - mean) * scale, dividing all activations by scale gives

    with `pre_bias`    pre = W_enc (raw - b) + b_enc / scale               b = mean + b_dec / scale
    without            pre = W_enc raw + b_enc / scale - W_enc mean
                       raw^ = sum f_i W_dec[i] + b;                        thresholds too are divided by scale

and where training leaves decoder norms free, they go into the encoder, so that every decoder row has norm 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saetrain.model import Model
from saetrain.training.checkpoint import Checkpoint
from saetrain.variants.table import VARIANTS

BLOCK = 1024  # latents read at a time


@dataclass
class SAE:
    """`activation` is relu, topk (with `k`) or jumprelu (with `threshold`, one number per latent)."""

    activation: str
    W_enc: Tensor  # [latents, d]
    b_enc: Tensor
    W_dec: Tensor  # [latents, d]
    b_dec: Tensor
    subtract_b_dec: bool  # from the input, before the encoder
    k: int = 0
    threshold: Tensor | None = None

    def encode(self, raw: Tensor) -> Tensor:
        """Activations [rows, latents] of raw rows [rows, d]."""
        x = raw.to(self.W_enc.dtype) - (self.b_dec if self.subtract_b_dec else 0)
        pre = x @ self.W_enc.T + self.b_enc
        return VARIANTS[self.activation].activate(pre, self.k, self.threshold)

    def decode(self, acts: Tensor) -> Tensor:
        """Raw rows [rows, d] rebuilt from activations [rows, latents]."""
        return acts @ self.W_dec + self.b_dec

    def __call__(self, raw: Tensor) -> Tensor:
        return self.decode(self.encode(raw))

    def to(self, target: torch.device | torch.dtype) -> SAE:
        """The same on another device, or in another precision."""
        moved: dict[str, Any] = {name: value.to(target) for name, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **moved)


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
        c, variant, scale = self.checkpoint, self.variant, self.checkpoint.state["scale"]
        mean, running, latents = c.read("mean"), float(c.read("threshold")), c.config.d_sae
        for lo in range(0, latents, BLOCK):
            hi = min(lo + BLOCK, latents)
            part = {n: c.read(n, lo, hi) for n in ("W_enc", "b_enc", "W_dec", *variant.extra)}
            part = variant.fold(part, running, scale)
            if not variant.pre_bias:
                part["b_enc"] = part["b_enc"] - part["W_enc"] @ mean
            yield part if variant.unit_rows else _with_unit_rows(part)

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
        )


def _with_unit_rows(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same autoencoder with decoder norms moved into the encoder and the thresholds."""
    norm = part["W_dec"].norm(dim=1).clamp_min(1e-12)
    scaled = {n: t * (norm[:, None] if t.dim() == 2 else norm) for n, t in part.items() if n != "W_dec"}
    return scaled | {"W_dec": part["W_dec"] / norm[:, None]}
