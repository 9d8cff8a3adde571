"""One rank's share of a sparse autoencoder: parameters, state, and what it computes at inference.

Inputs are normalised once, from the store's statistics: x = (raw - mean) * scale with scale such that the mean
squared norm of x is d_in (so lambda, learning rate and thresholds mean the same thing for every model).  Weights
are kept with one row for each latent, so that an active latent is one contiguous row of either matrix:

    pre = W_enc (x - [b_dec]) + b_enc          [b_dec] for topk, batchtopk and matryoshka
    x^  = sum over active i  f_i W_dec[i]  + b_dec

============  =======================================================  ========================================
variant       active latents                                           paper
============  =======================================================  ========================================
relu          pre > 0                                                  Anthropic, Circuits Updates, April 2024
topk          the k largest positive of each token                     Gao et al. 2024, arXiv 2406.04093
batchtopk     the k B largest positive of the batch; at inference      Bussmann et al. 2024, arXiv 2412.06410
              pre > threshold, the running mean of the smallest chosen
matryoshka    as batchtopk, with nested reconstructions                Bussmann et al. 2025, arXiv 2503.17547
jumprelu      pre > exp(log_threshold)                                 Rajamanoharan et al. 2024, arXiv
                                                                       2407.14435; Anthropic, January 2025
============  =======================================================  ========================================
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saetrain.compute.kernels import Codes, Encoder, choose_tile
from saetrain.compute.mesh import Mesh
from saetrain.compute.selection import topk
from saetrain.config import Config
from saetrain.errors import ConfigError

INIT_BLOCK = 1024  # latents whose initial rows come from one random stream
# Split by latent; others are whole everywhere.
SHARDED = ("W_enc", "b_enc", "W_dec", "log_threshold")


class Norm(NamedTuple):
    """x = (raw - mean) * scale."""

    mean: Tensor
    scale: float

    def __call__(self, raw: Tensor) -> Tensor:
        return (raw.to(self.mean.dtype) - self.mean).mul_(self.scale)


def norm_from(mean: NDArray[Any], variance: float) -> Norm:
    """From the mean row and the variance summed over columns: normalised rows have mean squared norm d_in."""
    if not np.isfinite(variance) or variance <= 1e-12 * float(mean @ mean):
        raise ConfigError(f"the rows do not vary: total variance {variance:g}, squared mean {mean @ mean:g}")
    return Norm(torch.from_numpy(np.asarray(mean, np.float64)), (len(mean) / variance) ** 0.5)


class Model:
    def __init__(self, config: Config, norm: Norm, mesh: Mesh) -> None:
        """`config` as `resolve` returns it.  Parameters are made by `initialise` or by `checkpoint.load`."""
        self.config, self.mesh = config, mesh
        compute = config.compute
        if compute == "auto":
            compute = "bfloat16" if mesh.device.type == "cuda" else "float32"
        self.dtype = torch.float64 if compute == "float64" else torch.float32
        self.compute: torch.dtype = getattr(torch, compute)
        self.norm = Norm(norm.mean.to(mesh.device, self.dtype), norm.scale)
        self.d_in = len(norm.mean)
        self.lo, self.hi = mesh.share(config.d_sae, "d_sae")
        self.tile = config.tile
        n, device = self.hi - self.lo, mesh.device
        make = partial(torch.zeros, device=device, dtype=self.dtype)
        count = partial(torch.zeros, device=device, dtype=torch.int64)
        self.params = {
            "W_enc": make((n, self.d_in)),
            "b_enc": make(n),
            "W_dec": make((n, self.d_in)),
            "b_dec": make(self.d_in),
        }
        if config.arch == "jumprelu":
            self.params["log_threshold"] = make(n) + 0.1
        self.state = {  # not trained
            "quiet": count(n),  # tokens since the latent last fired
            "fired": count(n),  # tokens of the current window on which it fired
            "window": count(1),  # tokens in that window
            "threshold": torch.zeros(1, device=device, dtype=torch.float64),
        }

    @property
    def latents(self) -> int:
        return self.hi - self.lo

    @property
    def pre_bias(self) -> bool:
        return self.config.is_sparse

    def initialise(self, sample: Tensor) -> None:
        """Random decoder rows, encoder tied to their transpose.  Rows depend on (seed, latent) alone, not on ranks.

        topk family   unit rows, encoder such a multiple of them that k latents of each token rebuild
                      `sample` best                              (Gao et al., appendix A.1)
        relu          rows of norm 0.1, encoder equal to them                          (Anthropic, April 2024)
        jumprelu      U(-1/sqrt(d), 1/sqrt(d)), encoder d/n times them, b_enc such that each latent fires on
                      10,000 / n of `sample`, at most on half                          (Anthropic, January 2025)
        """
        c, p = self.config, self.params
        drawn = np.concatenate(
            [
                _random_rows(c.seed, block, self.d_in, c.arch == "jumprelu")
                for block in range(self.lo // INIT_BLOCK, -(-self.hi // INIT_BLOCK))
            ]
        )[self.lo % INIT_BLOCK :][: self.latents]
        w = torch.from_numpy(drawn).to(self.mesh.device, self.dtype)
        if c.arch == "jumprelu":
            p["W_dec"].copy_(w / self.d_in**0.5)
            p["W_enc"].copy_(p["W_dec"] * (self.d_in / c.d_sae))
            rate = min(10_000 / c.d_sae, 0.5)
            below = len(sample) - max(round(rate * len(sample)), 1)  # rows on which none fires
            for start in range(0, self.latents, 1024):  # bounds memory
                part = slice(start, start + 1024)
                pre = (sample @ p["W_enc"][part].T).sort(dim=0).values
                # Between two rows of the sample, so that rounding decides about none of them.
                quantile = (pre[max(below - 1, 0)] + pre[below]) / 2
                p["b_enc"][part] = p["log_threshold"][part].exp() - quantile
        else:
            p["W_dec"].copy_(w / w.norm(dim=1, keepdim=True) * (0.1 if c.arch == "relu" else 1.0))
            p["W_enc"].copy_(p["W_dec"])
        if c.is_sparse:
            rows = sample[:INIT_BLOCK]
            out = topk(self.encoder(), rows, c.k, self.mesh).decode(p["W_dec"])
            out = self.mesh.sum(out, "tp", "reconstructions")
            p["W_enc"] *= float((out * rows).sum() / out.square().sum().clamp_min(1e-12))

    def measure_tile(self, tokens: int) -> None:
        """Settle the tile size of the encoder product; all ranks use the same."""
        if not self.tile:
            p = self.params
            tile = choose_tile(p["W_enc"], p["b_enc"], self.compute, self.config.k, tokens)
            found = torch.tensor([tile], device=self.mesh.device)
            self.tile = int(self.mesh.gather(found, "world")[0])

    def encoder(self, which: Tensor | None = None) -> Encoder:
        """The encoder product, of all my latents or of those in `which`."""
        weight, bias = self.params["W_enc"], self.params["b_enc"]
        if which is not None:
            weight, bias = weight[which], bias[which]
        return Encoder(weight, bias, self.compute, self.tile or 256)

    def centred(self, x: Tensor) -> Tensor:
        return x - self.params["b_dec"] if self.pre_bias else x

    def thresholds(self) -> Tensor | float:
        """What a pre-activation must exceed at inference (topk has no such number: 0)."""
        if self.config.arch == "jumprelu":
            return torch.exp(self.params["log_threshold"])
        batch = self.config.arch in ("batchtopk", "matryoshka")
        return float(self.state["threshold"]) if batch else 0.0

    def codes(self, x: Tensor) -> Codes:
        """My latents that are active at inference, for normalised tokens."""
        encoder = self.encoder()
        if self.config.arch == "topk":
            return topk(encoder, self.centred(x), self.config.k, self.mesh)
        return encoder.above(self.centred(x), self.thresholds())

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x^ of normalised tokens, and the number of active latents of each; over all ranks of a replica."""
        codes = self.codes(x)
        out = self.mesh.sum(codes.decode(self.params["W_dec"]), "tp", "reconstructions")
        return out + self.params["b_dec"], self.mesh.sum(codes.offsets.diff(), "tp")


def _random_rows(seed: int, block: int, d_in: int, uniform: bool) -> NDArray[Any]:
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(block,))))
    if uniform:
        return rng.uniform(-1, 1, (INIT_BLOCK, d_in)).astype(np.float32)
    return rng.standard_normal((INIT_BLOCK, d_in), np.float32)
