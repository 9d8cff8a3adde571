"""relu: every positive pre-activation is active, and an L1 term weighted by decoder norms keeps them few.

(Anthropic, Circuits Updates, April 2024.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from saetrain.compute.kernels import from_dense, gathered, sum_of_squares, unmasked
from saetrain.model import Model
from saetrain.tile import Part, Tile

DENSE_ABOVE = 1 / 50  # share of active latents above which dense products are faster than sparse ones


class ReLU(Model):
    name = activation = "relu"
    saelens = "standard"
    transcoder = "transcoder"
    gathers = True

    @classmethod
    def default_sparsity(cls, d_in: int) -> float:
        """The paper's 5 is for wide models: activations of a latent grow as sqrt(d_in) in normalised units."""
        narrow = min(d_in / 1024, 1.0)
        return float(5.0 * narrow**0.5)

    @classmethod
    def computes_densely(cls, active: float, d_sae: int) -> bool:
        return active > d_sae * DENSE_ABOVE

    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """Decoder rows of norm 0.1, and the encoder equal to them (Anthropic, April 2024)."""
        for name, rows in zip(("W_enc", "W_dec"), self.draw(uniform=False), strict=True):
            self.params[name].copy_(rows / rows.norm(dim=1, keepdim=True) * 0.1)

    def add_tile(self, tile: Tile, part: Part) -> None:
        p, x = self.params, tile.x
        norms = self.row_norms()
        lam = self.config.sparsity * tile.ramp / tile.tokens

        # One matrix [tokens, latents]; masks, since a product with a boolean would copy it in the other's type.
        acts = tile.encoder.product(x).relu_()
        off = acts <= 0
        thin = off.numel() - int(off.count_nonzero()) < DENSE_ABOVE * off.numel()
        codes = from_dense(acts) if thin else None
        out = codes.decode(tile.decoder.rows) if codes else acts @ p["W_dec"]
        residual = self.completed(self.mesh.sum(out, "tp", "reconstructions"), x).sub_(tile.y)
        up = residual * (2 / tile.tokens)
        if codes is not None:
            fired, g = codes.count(), codes.dots(up, tile.decoder.rows) + lam * norms[codes.latent]
            mass = codes.sum_by_latent(codes.value)  # sum over tokens of f_i
            part.add(part.grads, "W_enc", codes.scatter(gathered(x, self.compute), codes.bag, g))
            b_enc = codes.sum_by_latent(g)
            part.add(part.grads, "W_dec", codes.scatter(gathered(up, self.compute), codes.bag, codes.value))
        else:
            mass = acts.sum(0)
            part.product("W_dec", acts, up)
            g = torch.mm(up, p["W_dec"].T, out=acts).add_(lam * norms).masked_fill_(off, 0)
            part.product("W_enc", g, x)
            b_enc = g.sum(0)
            fired = unmasked(off, g)
        self.add_row_gradient(part.grads["W_dec"], lam * mass)
        self.add_shared(part, tile, up, b_enc)
        part.add(part.grads, "b_enc", b_enc)
        part.add(part.fired, "fired", fired)
        part.add(part.mine, "sparsity", (mass @ norms) * (lam * tile.tokens))
        part.add(part.whole, "reconstruction", sum_of_squares(residual))
        part.residuals.append(residual)

    @staticmethod
    def activate(pre: Tensor, k: int, threshold: Tensor | None) -> Tensor:
        return pre.relu()
