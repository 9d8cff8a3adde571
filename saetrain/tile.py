"""What a step computes of a tile of its tokens, and what it adds up over all of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from saetrain.compute.kernels import Codes, Decoder, Encoder


class Part:
    """The part of a step that one rank computes alone, added up over tiles of its tokens."""

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}
        self.residuals: list[Tensor] = []  # [tokens, d_out] of each tile: y^ - y
        self.fired: dict[str, Tensor] = {}  # "fired" [latents]: tokens on which each latent fired
        self.whole: dict[str, Tensor] = {}  # loss terms summed over my tokens; all ranks of the replica hold them
        self.mine: dict[str, Tensor] = {}  # loss terms summed over my tokens and my latents

    def add(self, to: dict[str, Tensor], name: str, value: Tensor) -> None:
        """Add `value`, which the caller gives away, to one of the above."""
        to[name] = to[name].add_(value) if name in to else value

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add left^T right to a gradient, without a second matrix of its size."""
        self.grads[name] = self.grads[name].addmm_(left.T, right) if name in self.grads else left.T @ right


class Shape(NamedTuple):
    """Sizes on one rank."""

    tokens: int  # of a step, of my replica
    tile: int  # tokens of an encoder product
    latents: int
    d_in: int
    d_out: int
    element: int  # bytes of a number
    ranks: int = 1  # that share the parameters
    narrow: bool = False  # sparse products gather rows and errors in bfloat16 (`kernels.gathered`)


class Tile(NamedTuple):
    """Tokens whose gradients are computed at once."""

    x: Tensor  # [tokens, d_in]: normalised
    y: Tensor  # [tokens, d_out]: what is rebuilt, normalised; x itself in autoencoders
    encoder: Encoder  # of all my latents
    decoder: Decoder  # likewise
    codes: Codes | None  # their active latents in training, where the variant chooses them for the whole batch
    tokens: int  # of the batch, over all replicas
    ramp: float  # factor of the sparsity term
