"""The topk family: all that topk, batchtopk and matryoshka share.

k latents per token are active, exactly or on average; b_dec is subtracted from the input; decoder rows have norm 1;
dead latents learn through the AuxK loss.  The formulas are those of `saetrain.training.losses`, with G nested
dictionaries; G is 1 except for matryoshka.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from saetrain.compute.kernels import Codes, Encoder, sum_of_squares
from saetrain.compute.selection import topk
from saetrain.model import INIT_BLOCK, Model, Part, Tile

TILE_ELEMENTS = 2**28  # numbers beside the parameters that a tile of the step may have
ENTRY = 14  # numbers that an active latent of a token takes, with its places in both orders


class TopKFamily(Model):
    pre_bias = True
    unit_rows = True
    takes_k = True

    @abstractmethod
    def choose(self, encoder: Encoder, xc: Tensor) -> Codes: ...

    def segmented(self, codes: Codes) -> Codes:
        """The same codes with (segment, token) pairs as bags, one segment for each nested dictionary."""
        return codes

    def initialise(self, sample: Tensor) -> None:
        """Unit decoder rows; the encoder is such a multiple of them that k latents of each token rebuild `sample` best.

        (Gao et al., appendix A.1.)
        """
        p, w = self.params, self.draw(uniform=False)
        p["W_dec"].copy_(w / w.norm(dim=1, keepdim=True))
        p["W_enc"].copy_(p["W_dec"])
        rows = sample[:INIT_BLOCK]
        out = topk(self.encoder(), rows, self.config.k, self.mesh).decode(p["W_dec"])
        out = self.mesh.sum(out, "tp", "reconstructions")
        p["W_enc"] *= float((out * rows).sum() / out.square().sum().clamp_min(1e-12))

    def tile_tokens(self, tokens: int) -> int:
        c = self.config
        rows, entries = 3 * len(c.widths) + 4, c.k + (c.aux_k if c.aux_coef else 0)
        return min(max(TILE_ELEMENTS // (rows * self.d_in + ENTRY * entries), 1), tokens)

    def add_tile(self, tile: Tile, part: Part) -> None:
        c, mesh, p, x = self.config, self.mesh, self.params, tile.x
        groups, codes = len(c.widths), tile.codes
        assert codes is not None
        xc = self.centred(x)
        part.add(part.fired, "fired", codes.count())
        codes = self.segmented(codes)

        # In place where possible: on the CPU a fresh page costs more than the sums made in it.
        errors = mesh.sum(codes.decode(p["W_dec"]), "tp", "reconstructions").view(groups, *x.shape)
        if groups > 1:
            errors = errors.cumsum(0)
        errors += p["b_dec"]
        errors -= x
        part.add(part.whole, "reconstruction", sum_of_squares(errors) / (groups * self.d_in))
        up = errors * (2 / (groups * self.d_in * tile.tokens))
        if groups > 1:  # segment s receives the sum over the nested dictionaries that hold it
            up = up.flip(0).cumsum(0).flip(0)
        residual, b_dec = errors[-1], up[0].sum(0)
        part.residuals.append(residual)

        up = up.view(-1, self.d_in)
        auxiliary = self._auxiliary(xc, residual, tile.tokens) if c.aux_coef else None
        if auxiliary is not None:
            aux_codes, aux_up, loss = auxiliary
            part.add(part.whole, "aux", loss)
            codes, up = codes.then(aux_codes), torch.cat([up, aux_up])

        g = codes.dots(up, p["W_dec"])
        b_enc = codes.sum_by_latent(g)
        part.add(part.grads, "W_enc", codes.scatter(xc, codes.bag % len(x), g))
        part.add(part.grads, "W_dec", codes.scatter(up, codes.bag, codes.value))
        part.add(part.grads, "b_dec", b_dec - mesh.sum(b_enc @ p["W_enc"], "tp"))
        part.add(part.grads, "b_enc", b_enc)

    def _auxiliary(self, xc: Tensor, residual: Tensor, tokens: int) -> tuple[Codes, Tensor, Tensor] | None:
        """Codes of the dead latents that rebuild the residual, the gradient that reaches them, and the loss."""
        c, mesh = self.config, self.mesh
        dead = (self.state["quiet"] >= c.dead_tokens).nonzero().view(-1)
        total = int(mesh.sum(torch.tensor([len(dead)], device=dead.device), "tp"))
        if not total:
            return None
        found = topk(self.encoder(dead), xc, min(c.aux_k, total), mesh)
        latent = dead[found.latent] if len(dead) else found.latent
        codes = Codes(latent, found.value, found.bag, found.bags, self.latents)
        rebuilt = mesh.sum(codes.decode(self.params["W_dec"]), "tp", "reconstructions")
        error = rebuilt + residual  # residual is x^ - x, so the target is its negative
        weight = c.aux_coef * min(total / c.aux_k, 1.0) / self.d_in
        return codes, error * (2 * weight / tokens), sum_of_squares(error) * weight
