"""The topk family: all that topk, batchtopk and matryoshka share.

k latents per token are active, exactly or on average; b_dec is subtracted from the input; decoder rows have norm 1;
dead latents learn through the AuxK loss.  The formulas are those of `saetrain.training.losses`, with G nested
dictionaries; G is 1 except for matryoshka.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from saetrain.compute.kernels import Codes, Encoder, gathered, sum_of_squares
from saetrain.compute.selection import topk
from saetrain.model import INIT_BLOCK, Model
from saetrain.settings import Settings
from saetrain.tile import Part, Shape, Tile

TILE_ELEMENTS = 2**28  # numbers beside the parameters that a tile of the step may have
ENTRY = 18  # numbers that an active latent of a token takes, with its places in both orders
OFFER = 2  # numbers that a rank's offer for the place of an active latent takes


class TopKFamily(Model):
    pre_bias = True
    unit_rows = True
    takes_k = True
    gathers = True

    @abstractmethod
    def choose(self, encoder: Encoder, xc: Tensor) -> Codes: ...

    def segmented(self, codes: Codes) -> Codes:
        """The same codes with (segment, token) pairs as bags, one segment for each nested dictionary."""
        return codes

    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """Unit rows; the encoder is such a multiple of them that k latents of each token rebuild `sample` best.

        (Gao et al., appendix A.1.)
        """
        self.set_unit_rows()
        self.scale_encoder(topk(self.encoder(), sample[:INIT_BLOCK], self.config.k, self.mesh), sample, target)

    @classmethod
    def tile_tokens(cls, config: Settings, shape: Shape) -> int:
        return min(max(TILE_ELEMENTS // cls._numbers(config, shape), 1), shape.tokens)

    @classmethod
    def tile_bytes(cls, config: Settings, shape: Shape) -> int:
        tokens = cls.tile_tokens(config, shape)
        found = tokens * cls._numbers(config, shape) * 4
        if tokens < shape.tokens:  # a gradient is made before it is added
            found += shape.latents * max(shape.d_in, shape.d_out) * shape.element
        return found

    @classmethod
    def _numbers(cls, config: Settings, shape: Shape) -> int:
        """Numbers that a token of a tile has at most, in float32 or of that size."""
        groups, ranks, aux_k = len(config.widths), shape.ranks, config.aux_k if config.aux_coef else 0
        wide = (5 if groups == 1 else 4 * groups) * shape.d_out + shape.d_in
        if shape.narrow:  # the rows that are gathered, once more in half the bytes
            wide += ((groups + (aux_k > 0)) * shape.d_out + shape.d_in) // 2
        entries = ENTRY * (config.k + aux_k) // ranks
        if ranks > 1:  # a message; and before it all ranks' offers, sorted
            entries = max(entries + shape.d_out, (OFFER * ranks + 3) * aux_k)
        return wide * shape.element // 4 + entries

    def add_tile(self, tile: Tile, part: Part) -> None:
        c, mesh, x = self.config, self.mesh, tile.x
        groups, codes = len(c.widths), tile.codes
        assert codes is not None
        xc = self.centred(x)
        part.add(part.fired, "fired", codes.count())
        codes = self.segmented(codes)

        # In place where possible: on the CPU a fresh page costs more than the sums made in it.
        errors = mesh.sum(codes.decode(tile.decoder.rows), "tp", "reconstructions").view(groups, *tile.y.shape)
        if groups > 1:
            errors = errors.cumsum(0)
        self.completed(errors, x).sub_(tile.y)
        part.add(part.whole, "reconstruction", sum_of_squares(errors) / (groups * self.d_out))
        up = errors * (2 / (groups * self.d_out * tile.tokens))
        if groups > 1:  # segment s receives the sum over the nested dictionaries that hold it
            up = up.flip(0).cumsum(0).flip(0)
        residual, whole_up = errors[-1].clone() if groups > 1 else errors[0], up[0]
        part.residuals.append(residual)

        up = up.view(-1, self.d_out)
        auxiliary = self._auxiliary(xc, residual, tile) if c.aux_coef else None
        if auxiliary is not None:
            aux_codes, aux_up, loss = auxiliary
            part.add(part.whole, "aux", loss)
            codes, up = codes.then(aux_codes), torch.cat([up, aux_up])

        g = codes.dots(up, tile.decoder.rows)
        b_enc = codes.sum_by_latent(g)
        part.add(part.grads, "W_enc", codes.scatter(gathered(xc, self.compute), codes.bag % len(x), g))
        part.add(part.grads, "W_dec", codes.scatter(gathered(up, self.compute), codes.bag, codes.value))
        self.add_shared(part, tile, whole_up, b_enc)
        part.add(part.grads, "b_enc", b_enc)

    def _auxiliary(self, xc: Tensor, residual: Tensor, tile: Tile) -> tuple[Codes, Tensor, Tensor] | None:
        """Codes of the dead latents that rebuild the residual, the gradient that reaches them, and the loss."""
        c, mesh = self.config, self.mesh
        dead = (self.state["quiet"] >= c.dead_tokens).nonzero().view(-1)
        total = int(mesh.sum(torch.full((1,), len(dead), device=dead.device), "tp"))
        if not total:
            return None
        found = topk(self.encoder(dead), xc, min(c.aux_k, total), mesh)
        latent = dead[found.latent] if len(dead) else found.latent
        codes = Codes(latent, found.value, found.bag, found.bags, self.latents)
        rebuilt = mesh.sum(codes.decode(tile.decoder.rows), "tp", "reconstructions")
        error = rebuilt + residual  # residual is x^ - x, so the target is its negative
        weight = c.aux_coef * min(total / c.aux_k, 1.0) / self.d_out
        return codes, error * (2 * weight / tile.tokens), sum_of_squares(error) * weight
