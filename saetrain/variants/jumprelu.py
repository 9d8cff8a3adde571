"""jumprelu: a latent is active above its own trained threshold exp(log_threshold).

A tanh term keeps active latents few; a term on pre-activations below the threshold revives dead ones.
(Rajamanoharan et al. 2024, arXiv 2407.14435; Anthropic, Circuits Updates, January 2025.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from saetrain.compute.kernels import sum_of_squares
from saetrain.model import Model, Part


class JumpReLU(Model):
    name = activation = saelens = "jumprelu"
    extra: ClassVar[Mapping[str, float]] = {"log_threshold": 0.1}
    has_thresholds = True
    most_hurry = 5.0  # trained at a higher rate, thresholds rise until hardly a latent is active
    default_sparsity_warmup = 1.0

    @classmethod
    def default_sparsity(cls, d_in: int) -> float:
        """Anthropic's 10 is for wide models."""
        return 10.0 * min(d_in / 1024, 1.0)

    @classmethod
    def computes_densely(cls, active: float, d_sae: int) -> bool:
        return True

    def initialise(self, sample: Tensor) -> None:
        """Decoder rows U(-1/sqrt(d), 1/sqrt(d)), encoder d/n times them; each latent fires on 10,000 / n of `sample`.

        b_enc sees to that, with at most half of the rows.  (Anthropic, January 2025.)
        """
        c, p = self.config, self.params
        p["W_dec"].copy_(self.draw(uniform=True) / self.d_in**0.5)
        p["W_enc"].copy_(p["W_dec"] * (self.d_in / c.d_sae))
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

    def gradients(self, x: Tensor, ramp: float) -> Part:
        c, mesh, p = self.config, self.mesh, self.params
        tokens = len(x) * mesh.dp
        pre = torch.cat([tile() for tile in self.encoder().tiles(x)])
        threshold = self.thresholds()
        active = pre > threshold
        acts = pre * active
        norms = p["W_dec"].norm(dim=1).clamp_min(1e-12)
        residual = mesh.sum(acts @ p["W_dec"], "tp", "reconstructions") + p["b_dec"] - x
        up = residual * (2 / tokens)

        lam, lam_p = c.sparsity * ramp / tokens, c.preact_coef / tokens
        squashed = torch.tanh(acts * norms * c.tanh_scale)
        slope = (1 - squashed.square()) * (lam * c.tanh_scale)  # d penalty / d (f |W_dec|)
        short = (threshold - pre).relu()
        mine = {"sparsity": squashed.sum() * lam * tokens, "preact": (short.sum(0) @ norms) * lam_p * tokens}

        g = up @ p["W_dec"].T
        g += slope * norms
        near = (pre - threshold).abs() < c.bandwidth / 2
        log_threshold = -(threshold / c.bandwidth) * (g * near).sum(0)
        log_threshold += lam_p * norms * threshold * (short > 0).sum(0)
        by_norm = (slope * acts).sum(0) + lam_p * short.sum(0)
        g = g * active - (lam_p * norms) * (short > 0)
        grads = {
            "W_dec": acts.T @ up,
            "log_threshold": log_threshold,
            "W_enc": g.T @ x,
            "b_enc": g.sum(0),
            "b_dec": up.sum(0),
        }
        grads["W_dec"] += (by_norm / norms)[:, None] * p["W_dec"]
        return Part(grads, residual, active.sum(0), {"reconstruction": sum_of_squares(residual)}, mine)

    @classmethod
    def fold(cls, part: dict[str, Tensor], running: float, scale: float) -> dict[str, Tensor]:
        return super().fold(part, running, scale) | {"threshold": part["log_threshold"].exp() / scale}

    @classmethod
    def unfold(cls, threshold: Tensor | None) -> dict[str, Tensor]:
        assert threshold is not None
        return {"log_threshold": threshold.clamp_min(torch.finfo(torch.float32).tiny).log()}

    @staticmethod
    def activate(pre: Tensor, k: int, threshold: Tensor | None) -> Tensor:
        assert threshold is not None
        return pre * (pre > threshold)
