"""A finished autoencoder, in the units of the raw rows: what a run comes down to, and what other tools hold.

Normalisation is folded away.  With x = (raw - mean) * scale, dividing all activations by scale gives

    topk family     pre = W_enc (raw - b) + b_enc / scale               b = mean + b_dec / scale
    relu, jumprelu  pre = W_enc raw + b_enc / scale - W_enc mean
                    raw^ = sum f_i W_dec[i] + b;                        thresholds too are divided by scale

and relu's and jumprelu's decoder norms go into the encoder, so that every decoder row has norm 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saetrain.compute.kernels import exact_topk
from saetrain.training.checkpoint import Checkpoint, find

BLOCK = 1024  # latents read at a time


@dataclass
class SAE:
    """`activation` is relu, topk (with `k`) or jumprelu (with `threshold`, one number a latent)."""

    activation: str
    W_enc: Tensor  # [latents, d]
    b_enc: Tensor
    W_dec: Tensor  # [latents, d]
    b_dec: Tensor
    subtract_b_dec: bool  # from the input, before the encoder
    k: int = 0
    threshold: Tensor | None = None

    def encode(self, raw: Tensor) -> Tensor:
        """[rows, latents]: activations."""
        x = raw.to(self.W_enc.dtype) - (self.b_dec if self.subtract_b_dec else 0)
        pre = x @ self.W_enc.T + self.b_enc
        if self.activation == "jumprelu":
            assert self.threshold is not None
            return pre * (pre > self.threshold)
        if self.activation == "topk":
            value, latent = exact_topk(pre, self.k)
            return torch.zeros_like(pre).scatter_(1, latent, value.relu())
        return pre.relu()

    def decode(self, acts: Tensor) -> Tensor:
        return acts @ self.W_dec + self.b_dec

    def __call__(self, raw: Tensor) -> Tensor:
        return self.decode(self.encode(raw))


@dataclass(frozen=True)
class Folded:
    """A checkpoint in raw units, a block of latents at a time."""

    checkpoint: Checkpoint

    @property
    def activation(self) -> str:
        arch = self.checkpoint.config.arch
        return {"batchtopk": "jumprelu", "matryoshka": "jumprelu"}.get(arch, arch)

    @property
    def subtract_b_dec(self) -> bool:
        return self.checkpoint.config.is_sparse

    def b_dec(self) -> Tensor:
        mean = self.checkpoint.read("mean")
        return mean + self.checkpoint.read("b_dec") / float(self.checkpoint.state["scale"])

    def blocks(self) -> Iterator[dict[str, Tensor]]:
        """W_enc, b_enc, W_dec and threshold (if any), rows one block after the other."""
        c, scale = self.checkpoint, self.checkpoint.state["scale"]
        mean, config = c.read("mean"), c.config
        for lo in range(0, config.d_sae, BLOCK):
            hi = min(lo + BLOCK, config.d_sae)
            part = {n: c.read(n, lo, hi) for n in ("W_enc", "b_enc", "W_dec")}
            part["b_enc"] = part["b_enc"] / scale
            if config.arch == "jumprelu":
                part["threshold"] = c.read("log_threshold", lo, hi).exp() / scale
            elif self.activation == "jumprelu":
                part["threshold"] = torch.full_like(part["b_enc"], float(c.read("threshold")) / scale)
            if not config.is_sparse:
                norm = part["W_dec"].norm(dim=1).clamp_min(1e-12)
                part["b_enc"] = part["b_enc"] - part["W_enc"] @ mean
                for name in part:
                    shape = norm[:, None] if part[name].dim() == 2 else norm
                    part[name] = part[name] / shape if name == "W_dec" else part[name] * shape
            yield part

    def whole(self) -> SAE:
        parts = list(self.blocks())
        joined = {n: torch.cat([p[n] for p in parts]) for n in parts[0]}
        return SAE(
            self.activation,
            joined["W_enc"],
            joined["b_enc"],
            joined["W_dec"],
            self.b_dec(),
            self.subtract_b_dec,
            self.checkpoint.config.k,
            joined.get("threshold"),
        )


def load(path: str | Path) -> SAE:
    """The autoencoder of a run or checkpoint, or of a folder that SAELens or sparsify wrote."""
    from saetrain.exchange import read_foreign

    path = Path(path)
    return read_foreign(path) if (path / "cfg.json").exists() else Folded(find(path)).whole()
