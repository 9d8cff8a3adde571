"""relu: every positive pre-activation is active, and an L1 term weighted by decoder norms keeps them few.

(Anthropic, Circuits Updates, April 2024.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from saetrain.compute.kernels import from_dense, sum_of_squares
from saetrain.model import Model, Part, Tile

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

    def add_tile(self, tile: Tile, part: Part) -> None:
        p, x = self.params, tile.x
        norms = p["W_dec"].norm(dim=1).clamp_min(1e-12)
        lam = self.config.sparsity * tile.ramp / tile.tokens

        acts = tile.encoder.product(x).relu_()
        active = acts > 0
        thin = float(active.count_nonzero()) < DENSE_ABOVE * active.numel()
        codes = from_dense(acts) if thin else None
        out = codes.decode(p["W_dec"]) if codes else acts @ p["W_dec"]
        residual = self.mesh.sum(out, "tp", "reconstructions").add_(p["b_dec"]).sub_(x)
        up = residual * (2 / tile.tokens)
        if codes is not None:
            fired, g = codes.count(), codes.dots(up, p["W_dec"]) + lam * norms[codes.latent]
            mass = codes.sum_by_latent(codes.value)  # sum over tokens of f_i
            part.add(part.grads, "W_enc", codes.scatter(x, codes.bag, g))
            part.add(part.grads, "b_enc", codes.sum_by_latent(g))
            part.add(part.grads, "W_dec", codes.scatter(up, codes.bag, codes.value))
        else:
            fired, mass = active.sum(0), acts.sum(0)
            part.product("W_dec", acts, up)
            g = torch.mm(up, p["W_dec"].T, out=acts).add_(lam * norms).mul_(active)
            part.product("W_enc", g, x)
            part.add(part.grads, "b_enc", g.sum(0))
        part.grads["W_dec"].addcmul_(p["W_dec"], (lam * mass / norms)[:, None])
        part.add(part.grads, "b_dec", up.sum(0))
        part.add(part.fired, "fired", fired)
        part.add(part.mine, "sparsity", (mass @ norms) * (lam * tile.tokens))
        part.add(part.whole, "reconstruction", sum_of_squares(residual))
        part.residuals.append(residual)

    @staticmethod
    def activate(pre: Tensor, k: int, threshold: Tensor | None) -> Tensor:
        return pre.relu()
