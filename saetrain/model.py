"""One rank's share of a sparse autoencoder: parameters, state, and everything that the variants have in common.

Inputs are normalised once, from the store's statistics: x = (raw - mean) * scale with scale such that the mean
squared norm of x is d_in (so lambda, learning rate and thresholds mean the same thing for every model).  Weights
are kept with one row for each latent, so that an active latent is one contiguous row of either matrix:

    pre = W_enc (x - [b_dec]) + b_enc          [b_dec] where the variant has `pre_bias`
    x^  = sum over active i  f_i W_dec[i]  + b_dec

A variant is a subclass in a file of `variants/` and a row in `variants.table`.  It says which latents are active,
how its parameters start, what its loss and gradients are, and how it is written down when finished.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from itertools import repeat
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saetrain.compute.kernels import Codes, Encoder, choose_tile
from saetrain.compute.mesh import Mesh
from saetrain.errors import ConfigError
from saetrain.settings import Settings

INIT_BLOCK = 1024  # latents whose initial rows come from one random stream
WHOLE = ("b_dec",)  # parameters that every rank holds whole; all others have one row for each latent


class Norm(NamedTuple):
    """x = (raw - mean) * scale."""

    mean: Tensor  # [d_in]
    scale: float

    def __call__(self, raw: Tensor) -> Tensor:
        return (raw.to(self.mean.dtype) - self.mean).mul_(self.scale)


def norm_from(mean: NDArray[Any], variance: float) -> Norm:
    """From the mean row and the variance summed over columns: normalised rows have mean squared norm d_in."""
    if not np.isfinite(variance) or variance <= 1e-12 * float(mean @ mean):
        raise ConfigError(f"the rows do not vary: total variance {variance:g}, squared mean {mean @ mean:g}")
    return Norm(torch.from_numpy(np.asarray(mean, np.float64)), (len(mean) / variance) ** 0.5)


class Part:
    """The part of a step that one rank computes alone, added up over tiles of its tokens."""

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}
        self.residuals: list[Tensor] = []  # [tokens, d_in] of each tile: x^ - x
        self.fired: dict[str, Tensor] = {}  # "fired" [latents]: tokens on which each latent fired
        self.whole: dict[str, Tensor] = {}  # loss terms summed over my tokens; all ranks of the replica hold them
        self.mine: dict[str, Tensor] = {}  # loss terms summed over my tokens and my latents

    def add(self, to: dict[str, Tensor], name: str, value: Tensor) -> None:
        """Add `value`, which the caller gives away, to one of the above."""
        to[name] = to[name].add_(value) if name in to else value

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add left^T right to a gradient, without a second matrix of its size."""
        self.grads[name] = self.grads[name].addmm_(left.T, right) if name in self.grads else left.T @ right


class Tile(NamedTuple):
    """Tokens whose gradients are computed at once."""

    x: Tensor  # [tokens, d_in]: normalised
    encoder: Encoder  # of all my latents
    codes: Codes | None  # their active latents in training, where the variant chooses them for the whole batch
    tokens: int  # of the batch, over all replicas
    ramp: float  # factor of the sparsity term


class Model(ABC):
    """Base of the variants.  The attributes and methods that a variant may set or override come first."""

    name: ClassVar[str]
    pre_bias: ClassVar[bool] = False  # b_dec is subtracted from the input
    unit_rows: ClassVar[bool] = False  # decoder rows are kept at norm 1 in training, not only when finished
    takes_k: ClassVar[bool] = False  # k latents per token are active, exactly or on average
    extra: ClassVar[Mapping[str, float]] = {}  # further parameters, one number per latent, and their first values
    # Choices where a setting leaves them open; see `config.resolve`.
    most_hurry: ClassVar[float] = math.inf  # bound of the learning rate's factor in short runs
    default_sparsity_warmup: ClassVar[float] = 0.05
    # The finished autoencoder, in our files and in those of other tools.
    activation: ClassVar[str]  # name of the variant whose `activate` it uses
    has_thresholds: ClassVar[bool] = False  # `fold` gives them
    saelens: ClassVar[str]  # SAELens' name of the architecture
    saelens_vectors: ClassVar[tuple[str, ...]] = ("b_enc",)  # its tensors that have one number for each latent
    sparsify: ClassVar[bool] = False  # sparsify can hold it

    @abstractmethod
    def initialise(self, sample: Tensor) -> None:
        """Fill the parameters, given normalised rows [rows, d_in].  They do not depend on the number of ranks."""

    @abstractmethod
    def add_tile(self, tile: Tile, part: Part) -> None:
        """Add loss and gradients on some of this replica's tokens to `part`; training/losses.py has the formulas."""

    def choose(self, encoder: Encoder, xc: Tensor) -> Codes | None:
        """My latents that are active in training, for centred tokens [tokens, d_in]; None where tiles find their own.

        All ranks call this with the tokens of the whole batch.
        """
        return None

    def tile_tokens(self, tokens: int) -> int:
        """Tokens of a tile of the step."""
        return self.tile or tokens

    def thresholds(self) -> Tensor | float | None:
        """The number that a pre-activation must exceed at inference, for all latents or [latents]; None for none."""
        return None

    def codes(self, x: Tensor) -> Codes:
        """My latents that are active at inference, for normalised tokens [tokens, d_in]."""
        floor = self.thresholds()
        return self.encoder().above(self.centred(x), 0.0 if floor is None else floor)

    @classmethod
    def nested_widths(cls, given: tuple[int, ...], d_sae: int) -> tuple[int, ...]:
        """Sizes of the nested dictionaries; the last is d_sae."""
        return (d_sae,)

    @classmethod
    def default_sparsity(cls, d_in: int) -> float:
        return 0.0

    @classmethod
    def computes_densely(cls, active: float, d_sae: int) -> bool:
        """True if a step with so many active latents per token multiplies all latents, active or not."""
        return False

    @classmethod
    def fold(cls, part: dict[str, Tensor], running: float, scale: float) -> dict[str, Tensor]:
        """W_enc, b_enc, W_dec and any threshold of a block of latents, for activations divided by `scale`.

        `part` holds rows of the parameters, `running` the running mean of the batch threshold.
        """
        return {"W_enc": part["W_enc"], "b_enc": part["b_enc"] / scale, "W_dec": part["W_dec"]}

    @classmethod
    def unfold(cls, threshold: Tensor | None) -> dict[str, Tensor]:
        """The parameters in `extra`, from the thresholds [latents] of a finished autoencoder."""
        return {}

    @staticmethod
    def activate(pre: Tensor, k: int, threshold: Tensor | None) -> Tensor:
        """Activations of a finished autoencoder whose `activation` is this variant, from pre [rows, latents]."""
        raise NotImplementedError

    @classmethod
    def to_saelens(cls, part: dict[str, Tensor]) -> dict[str, Tensor]:
        """W_enc, W_dec and `saelens_vectors` of a block of latents, from the answer of `fold`."""
        return part

    @classmethod
    def from_saelens(cls, held: dict[str, Tensor]) -> dict[str, Tensor]:
        """W_enc, b_enc, W_dec and any threshold of a finished autoencoder, from SAELens' tensors, rows by latent."""
        return held

    @classmethod
    def saelens_settings(cls, k: int) -> dict[str, Any]:
        """Entries of SAELens' cfg.json beyond those that every architecture has."""
        return {}

    # --- the same for all variants

    def __init__(self, config: Settings, norm: Norm, mesh: Mesh) -> None:
        """`config` as `resolve` returns it.  `initialise` or `checkpoint.load` fills the parameters."""
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
            **{name: make(n) + first for name, first in self.extra.items()},
        }
        self.state = {  # not trained
            "quiet": count(n),  # tokens since the latent last fired
            "fired": count(n),  # tokens of the current window on which it fired
            "window": count(1),  # tokens in that window
            "threshold": torch.zeros(1, device=device, dtype=torch.float64),
        }

    @property
    def latents(self) -> int:
        """Latents of this rank."""
        return self.hi - self.lo

    def draw(self, *, uniform: bool) -> Tensor:
        """Random rows [latents, d_in] of my latents, U(-1, 1) or N(0, 1); each depends on (seed, latent) alone."""
        blocks = range(self.lo // INIT_BLOCK, -(-self.hi // INIT_BLOCK))
        rows = np.concatenate([_random_rows(self.config.seed, block, self.d_in, uniform) for block in blocks])
        mine = rows[self.lo % INIT_BLOCK :][: self.latents]
        return torch.from_numpy(mine).to(self.mesh.device, self.dtype)

    def measure_tile(self, tokens: int) -> None:
        """Settle the tile size of the encoder product; all ranks use the same."""
        if not self.tile:
            p = self.params
            tile = choose_tile(p["W_enc"], p["b_enc"], self.compute, self.config.k, tokens)
            found = torch.tensor([tile], device=self.mesh.device)
            self.tile = int(self.mesh.gather(found, "world")[0])

    def gradients(self, x: Tensor, ramp: float) -> Part:
        """Loss and gradients on this replica's normalised tokens [tokens, d_in]; `ramp` scales the sparsity term.

        Tokens go through the whole step a tile at a time, so that nothing of the size [tokens, latents] exists.
        """
        encoder, each, part = self.encoder(), self.tile_tokens(len(x)), Part()
        codes = self.choose(encoder, self.centred(x))
        chosen = codes.split(each) if codes is not None else repeat(None)
        for rows, own in zip(torch.split(x, each), chosen, strict=False):
            self.add_tile(Tile(rows, encoder, own, len(x) * self.mesh.dp, ramp), part)
        return part

    def encoder(self, which: Tensor | None = None) -> Encoder:
        """The encoder product, of all my latents or of those in `which`."""
        weight, bias = self.params["W_enc"], self.params["b_enc"]
        if which is not None:
            weight, bias = weight[which], bias[which]
        return Encoder(weight, bias, self.compute, self.tile or 256)

    def centred(self, x: Tensor) -> Tensor:
        """The input of the encoder product."""
        return x - self.params["b_dec"] if self.pre_bias else x

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x^ [tokens, d_in] of normalised tokens and their numbers of active latents [tokens], over all my replica."""
        return self.decoded(self.codes(x))

    def decoded(self, codes: Codes) -> tuple[Tensor, Tensor]:
        """The same from `codes` of these tokens."""
        out = self.mesh.sum(codes.decode(self.params["W_dec"]), "tp", "reconstructions")
        return out + self.params["b_dec"], self.mesh.sum(codes.offsets.diff(), "tp")


def _random_rows(seed: int, block: int, d_in: int, uniform: bool) -> NDArray[Any]:
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(block,))))
    if uniform:
        return rng.uniform(-1, 1, (INIT_BLOCK, d_in)).astype(np.float32)
    return rng.standard_normal((INIT_BLOCK, d_in), np.float32)
