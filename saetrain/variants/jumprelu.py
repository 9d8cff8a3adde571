"""jumprelu: a latent is active above its own trained threshold exp(log_threshold).

A tanh term keeps active latents few; a term on pre-activations below the threshold revives dead ones.
(Rajamanoharan et al. 2024, arXiv 2407.14435; Anthropic, Circuits Updates, January 2025.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from saetrain.compute.kernels import sum_of_squares, unmasked
from saetrain.model import Model
from saetrain.tile import Part, Tile


class JumpReLU(Model):
    name = activation = saelens = "jumprelu"
    transcoder = "jumprelu_transcoder"
    extra: ClassVar[Mapping[str, float]] = {"log_threshold": 0.1}
    has_thresholds = True
    matrices = (3, 3)
    saelens_vectors = ("b_enc", "threshold")
    most_hurry = 5.0  # trained at a higher rate, thresholds rise until hardly a latent is active
    default_sparsity_warmup = 1.0

    @classmethod
    def default_sparsity(cls, d_in: int) -> float:
        """Anthropic's 10 is for wide models."""
        return 10.0 * min(d_in / 1024, 1.0)

    @classmethod
    def computes_densely(cls, active: float, d_sae: int) -> bool:
        return True

    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """Decoder rows U(-1/sqrt(d), 1/sqrt(d)), encoder d/n times them; each latent fires on 10,000 / n of `sample`.

        b_enc sees to that, with at most half of the rows.  (Anthropic, January 2025.)
        """
        c, p = self.config, self.params
        enc, dec = self.draw(uniform=True)
        p["W_dec"].copy_(dec / self.d_out**0.5)
        p["W_enc"].copy_(enc * (self.d_in**0.5 / c.d_sae))
        rate = min(10_000 / c.d_sae, 0.5)
        below = len(sample) - max(round(rate * len(sample)), 1)  # rows on which none fires
        for start in range(0, self.latents, 1024):  # bounds memory
            part = slice(start, start + 1024)
            pre = (sample @ p["W_enc"][part].T).sort(dim=0).values
            # Between two rows of the sample, so that rounding decides about none of them.
            quantile = (pre[max(below - 1, 0)] + pre[below]) / 2
            p["b_enc"][part] = p["log_threshold"][part].exp() - quantile

    def thresholds(self) -> Tensor:
        return torch.exp(self.params["log_threshold"])

    def add_tile(self, tile: Tile, part: Part) -> None:
        c, p, x = self.config, self.params, tile.x
        threshold, norms = self.thresholds(), self.row_norms()
        lam, lam_p = c.sparsity * tile.ramp / tile.tokens, c.preact_coef / tile.tokens

        # Three matrices [tokens, latents] in all: each is overwritten once it has served.  Masks and no products with
        # booleans, since these would copy a boolean in the other's type.
        pre = tile.encoder.product(x)
        off = pre <= threshold
        acts = pre.masked_fill(off, 0)
        residual = self.completed(self.mesh.sum(acts @ p["W_dec"], "tp", "reconstructions"), x).sub_(tile.y)
        up = residual * (2 / tile.tokens)
        part.product("W_dec", acts, up)

        slope = (acts * (norms * c.tanh_scale)).tanh_()
        part.add(part.mine, "sparsity", slope.sum() * (lam * tile.tokens))
        slope.square_().neg_().add_(1).mul_(lam * c.tanh_scale)  # d penalty / d (f |W_dec|)
        by_norm = acts.mul_(slope).sum(0)
        g = torch.mm(up, p["W_dec"].T, out=acts).addcmul_(slope, norms)

        short = torch.sub(threshold, pre, out=slope)
        far = (short >= c.bandwidth / 2).logical_or_(short <= -c.bandwidth / 2)
        log_threshold = pre.copy_(g).masked_fill_(far, 0).sum(0) * (-threshold / c.bandwidth)
        reached = torch.le(short, 0, out=far)
        missing = short.relu_().sum(0)
        part.add(part.mine, "preact", (missing @ norms) * (lam_p * tile.tokens))
        by_norm += lam_p * missing
        log_threshold += lam_p * norms * threshold * unmasked(reached, short)
        g.masked_fill_(off, 0).sub_(pre.copy_((lam_p * norms).expand_as(pre)).masked_fill_(reached, 0))

        part.product("W_enc", g, x)
        b_enc = g.sum(0)
        self.add_shared(part, tile, up, b_enc)
        part.add(part.grads, "b_enc", b_enc)
        part.add(part.grads, "log_threshold", log_threshold)
        self.add_row_gradient(part.grads["W_dec"], by_norm)
        part.add(part.fired, "fired", unmasked(off, pre))
        part.add(part.whole, "reconstruction", sum_of_squares(residual))
        part.residuals.append(residual)

    @classmethod
    def fold(cls, part: dict[str, Tensor], running: float, scale: float) -> dict[str, Tensor]:
        return super().fold(part, running, scale) | {"threshold": part["log_threshold"].exp() / scale}

    @classmethod
    def rescale(cls, part: dict[str, Tensor], factor: float | Tensor, shift: Tensor) -> dict[str, Tensor]:
        return {"log_threshold": part["log_threshold"] + torch.as_tensor(factor).log()}

    @classmethod
    def unfold(cls, threshold: Tensor | None) -> dict[str, Tensor]:
        assert threshold is not None
        return {"log_threshold": threshold.clamp_min(torch.finfo(torch.float32).tiny).log()}

    @classmethod
    def from_saelens(cls, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """SAELens' jumprelu is never negative, whatever its threshold."""
        return held | {"threshold": held["threshold"].clamp_min(0)}

    @staticmethod
    def activate(pre: Tensor, k: int, threshold: Tensor | None) -> Tensor:
        assert threshold is not None
        return pre * (pre > threshold)
