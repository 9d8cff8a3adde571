"""relu: every positive pre-activation is active, and an L1 term weighted by decoder norms keeps them few.

(Anthropic, Circuits Updates, April 2024.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from saetrain.compute.kernels import from_dense, sum_of_squares
from saetrain.model import Model, Part

DENSE_ABOVE = 1 / 50  # share of active latents above which dense products are faster than sparse ones


class ReLU(Model):
    name = activation = "relu"
    saelens = "standard"

    @classmethod
    def default_sparsity(cls, d_in: int) -> float:
        """The paper's 5 is for wide models: activations of a latent grow as sqrt(d_in) in normalised units."""
        narrow = min(d_in / 1024, 1.0)
        return float(5.0 * narrow**0.5)

    @classmethod
    def computes_densely(cls, active: float, d_sae: int) -> bool:
        return active > d_sae * DENSE_ABOVE

    def initialise(self, sample: Tensor) -> None:
        """Decoder rows of norm 0.1, and the encoder equal to them (Anthropic, April 2024)."""
        p, w = self.params, self.draw(uniform=False)
        p["W_dec"].copy_(w / w.norm(dim=1, keepdim=True) * 0.1)
        p["W_enc"].copy_(p["W_dec"])

    def gradients(self, x: Tensor, ramp: float) -> Part:
        c, mesh, p = self.config, self.mesh, self.params
        tokens = len(x) * mesh.dp
        pre = torch.cat([tile() for tile in self.encoder().tiles(x)])
        active = pre > 0
        acts = pre * active
        norms = p["W_dec"].norm(dim=1).clamp_min(1e-12)
        lam = c.sparsity * ramp / tokens
        thin = float(active.count_nonzero()) < DENSE_ABOVE * active.numel()
        codes = from_dense(acts) if thin else None
        out = codes.decode(p["W_dec"]) if codes else acts @ p["W_dec"]
        residual = mesh.sum(out, "tp", "reconstructions") + p["b_dec"] - x
        up = residual * (2 / tokens)
        if codes is not None:
            fired, g = codes.count(), codes.dots(up, p["W_dec"]) + lam * norms[codes.latent]
            mass = codes.sum_by_latent(codes.value)  # sum over tokens of f_i
            grads = {
                "W_enc": codes.scatter(x, codes.bag, g),
                "b_enc": codes.sum_by_latent(g),
                "W_dec": codes.scatter(up, codes.bag, codes.value) + (lam * mass / norms)[:, None] * p["W_dec"],
            }
        else:
            fired, mass = active.sum(0), acts.sum(0)
            g = (up @ p["W_dec"].T + lam * norms) * active
            grads = {"W_dec": acts.T @ up, "W_enc": g.T @ x, "b_enc": g.sum(0)}
            grads["W_dec"] += (lam * mass / norms)[:, None] * p["W_dec"]
        grads["b_dec"] = up.sum(0)
        mine = {"sparsity": (mass @ norms) * lam * tokens}
        return Part(grads, residual, fired, {"reconstruction": sum_of_squares(residual)}, mine)

    @staticmethod
    def activate(pre: Tensor, k: int, threshold: Tensor | None) -> Tensor:
        return pre.relu()
