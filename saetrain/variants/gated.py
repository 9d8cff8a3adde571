"""gated: one half of the encoder decides which latents are active, the other how strongly.

::

    gate_i  = W_enc[i] (x - b_dec) + b_enc[i]                      latent i is active if gate_i > 0, and then has
    f_i     = exp(r_mag[i]) W_enc[i] (x - b_dec) + b_mag[i]        this value, if it is positive

The L1 term is on the gate alone, so that it does not shrink the values; a second reconstruction, from relu(gate)
through a decoder held constant, tells the gate which latents are needed.  Since both halves share W_enc, f_i is also
active above a threshold of its own, b_mag - exp(r_mag) b_enc: the finished autoencoder is a jumprelu one.
(Rajamanoharan et al. 2024, arXiv 2404.16014, sections 3.2 and 3.3, appendix E.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from saetrain.compute.kernels import Codes, sum_of_squares, unmasked
from saetrain.model import INIT_BLOCK, Model
from saetrain.tile import Part, Tile
from saetrain.variants.relu import ReLU


class Gated(Model):
    name = saelens = "gated"
    activation = "jumprelu"
    pre_bias = True
    unit_rows = True
    extra: ClassVar[Mapping[str, float]] = {"r_mag": 0.0, "b_mag": 0.0}
    has_thresholds = True
    matrices = (3, 2)
    saelens_vectors = ("b_gate", "b_mag", "r_mag")

    @classmethod
    def default_sparsity(cls, d_in: int) -> float:
        """Twice that of relu: the values do not shrink, and planted dictionaries want more."""
        return 2 * ReLU.default_sparsity(d_in)

    @classmethod
    def computes_densely(cls, active: float, d_sae: int) -> bool:
        return True

    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """Unit rows, and such a multiple of them as encoder that both halves rebuild `sample` best."""
        self.set_unit_rows()
        self.scale_encoder(self.codes(sample[:INIT_BLOCK]), sample, target)

    def thresholds(self) -> Tensor:
        p = self.params
        return (p["b_mag"] - p["r_mag"].exp() * p["b_enc"]).clamp_min(0)

    def codes(self, x: Tensor) -> Codes:
        p, factor = self.params, self.params["r_mag"].exp()
        # f > 0 where gate > b_enc - b_mag / factor.
        found = self.encoder().above(self.centred(x), (p["b_enc"] - p["b_mag"] / factor).clamp_min(0))
        i = found.latent
        return replace(found, value=(found.value - p["b_enc"][i]) * factor[i] + p["b_mag"][i])

    def add_tile(self, tile: Tile, part: Part) -> None:
        p, xc = self.params, self.centred(tile.x)
        factor, lam = p["r_mag"].exp(), self.config.sparsity * tile.ramp / tile.tokens

        # Three matrices [tokens, latents] in all: each is overwritten once it has served.
        gate = tile.encoder.product(xc)
        acts = (gate - p["b_enc"]).mul_(factor).add_(p["b_mag"])
        shut = gate <= 0
        off = (acts <= 0).logical_or_(shut)
        acts.masked_fill_(off, 0)
        gate.relu_()
        outs = self.mesh.sum(torch.stack([acts @ p["W_dec"], gate @ p["W_dec"]]), "tp", "reconstructions")
        residual, by_gate = self.completed(outs, tile.x).sub_(tile.y)
        up, gate_up = residual * (2 / tile.tokens), by_gate * (2 / tile.tokens)
        part.product("W_dec", acts, up)

        g = torch.mm(up, p["W_dec"].T, out=acts).masked_fill_(off, 0)
        b_mag = g.sum(0)
        # Where g is not 0, relu(gate) is gate, which is the product and b_enc.
        part.add(part.grads, "r_mag", ((g * gate).sum(0) - p["b_enc"] * b_mag) * factor)
        part.add(part.grads, "b_mag", b_mag)
        part.add(part.mine, "sparsity", gate.sum() * (lam * tile.tokens))
        gate_g = torch.mm(gate_up, p["W_dec"].T, out=gate).add_(lam).masked_fill_(shut, 0)
        part.add(part.grads, "b_enc", gate_g.sum(0))
        gate_g.addcmul_(g, factor)
        part.product("W_enc", gate_g, xc)
        self.add_shared(part, tile, up, gate_g.sum(0))

        part.add(part.fired, "fired", unmasked(off, acts))
        part.add(part.whole, "reconstruction", sum_of_squares(residual))
        part.add(part.whole, "gate", sum_of_squares(by_gate))
        part.residuals.append(residual.clone())  # or both would stay

    @classmethod
    def fold(cls, part: dict[str, Tensor], running: float, scale: float) -> dict[str, Tensor]:
        factor = part["r_mag"].exp()
        threshold = (part["b_mag"] - factor * part["b_enc"]).clamp_min(0)
        return {
            "W_enc": part["W_enc"] * factor[:, None],
            "b_enc": part["b_mag"] / scale,
            "W_dec": part["W_dec"],
            "threshold": threshold / scale,
        }

    @classmethod
    def rescale(cls, part: dict[str, Tensor], factor: float | Tensor, shift: Tensor) -> dict[str, Tensor]:
        r_mag = part["r_mag"]
        return {"r_mag": r_mag, "b_mag": part["b_mag"] * factor - r_mag.exp() * shift}

    @classmethod
    def to_saelens(cls, part: dict[str, Tensor]) -> dict[str, Tensor]:
        """The factor is in W_enc already."""
        b_mag = part["b_enc"]
        halves = {"b_gate": b_mag - part["threshold"], "b_mag": b_mag, "r_mag": torch.zeros_like(b_mag)}
        return {"W_enc": part["W_enc"], "W_dec": part["W_dec"], **halves}

    @classmethod
    def from_saelens(cls, held: dict[str, Tensor]) -> dict[str, Tensor]:
        return cls.fold({**held, "b_enc": held["b_gate"]}, 0.0, 1.0)
