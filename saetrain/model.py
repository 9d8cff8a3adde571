"""One rank's share of a sparse autoencoder: parameters, state, and everything that the variants have in common.

Inputs are normalised once, from the store's statistics: x = (raw - mean) * scale with scale such that the mean
squared norm of x is d_in (so lambda, learning rate and thresholds mean the same thing for every model).  Weights
are kept with one row for each latent, so that an active latent is one contiguous row of either matrix:

    pre = W_enc (x - [b_dec]) + b_enc          [b_dec] where the variant has `pre_bias`
    x^  = sum over active i  f_i W_dec[i]  + b_dec

A transcoder rebuilds other arrays than its input: y in place of x in the second line, d_out numbers wide, normalised
by their own statistics.  It subtracts no b_dec, which is of the output, and may add W_skip x.  Several arrays, as in a
crosscoder, lie side by side in x, in y, and in the rows of both matrices; each has its own scale, and the norm of a
decoder row is then the sum of its norms in the arrays.  An autoencoder is the case of one array, y = x.

A variant is a subclass in a file of `variants/` and a row in `variants.table`.  It says which latents are active,
how its parameters start, what its loss and gradients are, and how it is written down when finished.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from itertools import repeat
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saetrain.compute.devices import gathers_narrow, matrix_products, precision
from saetrain.compute.kernels import Codes, Decoder, Encoder, choose_tile, row_dots
from saetrain.compute.mesh import Mesh
from saetrain.norms import Norm
from saetrain.settings import Settings
from saetrain.tile import Part, Shape, Tile

INIT_BLOCK = 1024  # latents whose initial rows come from one random stream
WHOLE = ("b_dec", "W_skip")  # parameters that every rank holds whole; all others have one row for each latent


class Model(ABC):
    """Base of the variants.  The attributes and methods that a variant may set or override come first."""

    name: ClassVar[str]
    pre_bias: ClassVar[bool] = False  # b_dec is subtracted from the input
    unit_rows: ClassVar[bool] = False  # decoder rows are kept at norm 1 in training, not only when finished
    takes_k: ClassVar[bool] = False  # k latents per token are active, exactly or on average
    gathers: ClassVar[bool] = False  # a step may gather decoder rows, rows and errors by active latents
    extra: ClassVar[Mapping[str, float]] = {}  # further parameters, one number per latent, and their first values
    # Choices where a setting leaves them open; see `config.resolve`.
    most_hurry: ClassVar[float] = math.inf  # bound of the learning rate's factor in short runs
    default_sparsity_warmup: ClassVar[float] = 0.05
    # The finished autoencoder, in our files and in those of other tools.
    activation: ClassVar[str]  # name of the variant whose `activate` it uses
    has_thresholds: ClassVar[bool] = False  # `fold` gives them
    saelens: ClassVar[str]  # SAELens' name of the architecture
    saelens_vectors: ClassVar[tuple[str, ...]] = ("b_enc",)  # its tensors that have one number for each latent
    transcoder: ClassVar[str] = ""  # and of a transcoder that computes so, if it has any
    sparsify: ClassVar[bool] = False  # sparsify can hold it

    @abstractmethod
    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """Fill the parameters, given normalised rows [rows, d_in], and [rows, d_out] of a transcoder.

        They do not depend on the number of ranks.
        """

    @abstractmethod
    def add_tile(self, tile: Tile, part: Part) -> None:
        """Add loss and gradients on some of this replica's tokens to `part`; training/losses.py has the formulas."""

    def choose(self, encoder: Encoder, xc: Tensor) -> Codes | None:
        """My latents that are active in training, for centred tokens [tokens, d_in]; None where tiles find their own.

        All ranks call this with the tokens of the whole batch.
        """
        return None

    matrices: ClassVar[tuple[int, int]] = (1, 1)  # [tokens, latents] that `add_tile` has at once: numbers, booleans

    @classmethod
    def tile_tokens(cls, config: Settings, shape: Shape) -> int:
        """Tokens of a tile of the step."""
        return min(shape.tile, shape.tokens)

    @classmethod
    def tile_bytes(cls, config: Settings, shape: Shape) -> int:
        """Bytes beside parameters, gradients, moments and rows that a step needs at most (`saetrain.memory`)."""
        numbers, booleans = cls.matrices
        tokens = cls.tile_tokens(config, shape)
        whole = tokens * shape.latents * (numbers * shape.element + booleans)
        if shape.narrow and cls.gathers:
            whole += 2 * tokens * (shape.d_in + shape.d_out)
        return whole + tokens * (2 * shape.d_out + cls.pre_bias * shape.d_in) * shape.element

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

    @classmethod
    def rescale(cls, part: dict[str, Tensor], factor: float | Tensor, shift: Tensor) -> dict[str, Tensor]:
        """The parameters in `extra` of latents whose W_enc x is now `factor` times what it was, and `shift` more.

        Then b_enc is `factor` times what it was, less `shift` (`saetrain.training.start`).
        """
        return {}

    def settle(self, sample: Tensor) -> None:
        """Measure the threshold of the parameters that are there on normalised rows; most variants have none."""
        self.state["threshold"].zero_()

    # --- the same for all variants

    def __init__(self, config: Settings, norm: Norm, mesh: Mesh, out: Norm | None = None) -> None:
        """`config` as `resolve` returns it; `out` is the norm of a transcoder's output.

        `initialise` or `checkpoint.load` fills the parameters.
        """
        self.config, self.mesh = config, mesh
        self.precision = precision(config.compute, mesh.device.type)
        self.dtype = torch.float64 if self.precision == "float64" else torch.float32
        self.compute = torch.bfloat16 if self.precision == "bfloat16" else self.dtype  # type of the encoder product
        self.norm = norm.to(mesh.device, self.dtype)
        self.transcodes = out is not None
        self.out_norm = out.to(mesh.device, self.dtype) if out is not None else self.norm
        self.d_in, self.d_out = len(self.norm.mean), len(self.out_norm.mean)
        self.parts = list(self.out_norm.parts)
        self.lo, self.hi = mesh.share(config.d_sae, "d_sae")
        self.tile = config.tile
        n, device = self.hi - self.lo, mesh.device
        make = partial(torch.zeros, device=device, dtype=self.dtype)
        count = partial(torch.zeros, device=device, dtype=torch.int64)
        self.params = {
            "W_enc": make((n, self.d_in)),
            "b_enc": make(n),
            "W_dec": make((n, self.d_out)),
            "b_dec": make(self.d_out),
            **({"W_skip": make((self.d_out, self.d_in))} if config.skip else {}),
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

    def draw(self, *, uniform: bool) -> tuple[Tensor, Tensor]:
        """Random rows of my latents, U(-1, 1) or N(0, 1); each depends on (seed, latent) alone.

        [latents, d_in] for the encoder and [latents, d_out] for the decoder: the same unless this is a transcoder.
        """
        enc = self._draw(self.d_in, (), uniform)
        return enc, self._draw(self.d_out, (1,), uniform) if self.transcodes else enc

    def _draw(self, width: int, key: tuple[int, ...], uniform: bool) -> Tensor:
        blocks = range(self.lo // INIT_BLOCK, -(-self.hi // INIT_BLOCK))
        rows = np.concatenate([_random_rows((self.config.seed, (b, *key)), width, uniform) for b in blocks])
        mine = rows[self.lo % INIT_BLOCK :][: self.latents]
        return torch.from_numpy(mine).to(self.mesh.device, self.dtype)

    def set_unit_rows(self) -> None:
        """Random rows: those of the decoder of norm 1, and the encoder's the same, or as long where they are others."""
        enc, dec = self.draw(uniform=False)
        self.params["W_dec"].copy_(dec / self.row_norms(dec)[:, None])
        self.params["W_enc"].copy_(enc / enc.norm(dim=1, keepdim=True) if self.transcodes else self.params["W_dec"])

    def scale_encoder(self, codes: Codes, sample: Tensor, target: Tensor | None) -> None:
        """Multiply the encoder by the number with which `codes`, of the first rows of `sample`, rebuild these best.

        Random decoder rows of a transcoder rebuild nothing: there each latent that is active on the sample begins with
        the mean of `target`, weighted by its values.
        """
        p, rows = self.params, (sample if target is None else target)[: codes.bags]
        if target is not None:
            found = codes.scatter(rows, codes.bag, codes.value)
            norms = self.row_norms(found)
            p["W_dec"].copy_(torch.where((norms > 1e-9)[:, None], found / norms[:, None], p["W_dec"]))
        out = self.mesh.sum(codes.decode(p["W_dec"]), "tp", "reconstructions")
        p["W_enc"] *= float((out * rows).sum() / out.square().sum().clamp_min(1e-12))

    # --- the norm of decoder rows: the sum of their norms in the arrays

    def row_norms(self, rows: Tensor | None = None) -> Tensor:
        """[latents], of the decoder's rows or of others as wide."""
        parts = torch.split(self.params["W_dec"] if rows is None else rows, self.parts, 1)
        return torch.stack([part.norm(dim=1) for part in parts]).sum(0).clamp_min(1e-12)

    def add_row_gradient(self, grad: Tensor, weight: Tensor) -> None:
        """Add the gradient of sum_i weight_i |W_dec[i]| to that of W_dec."""
        both = zip(*(torch.split(t, self.parts, 1) for t in (grad, self.params["W_dec"])), strict=True)
        for part, rows in both:
            part.addcmul_(rows, (weight / rows.norm(dim=1).clamp_min(1e-12))[:, None])

    def project(self, grad: Tensor, own: slice) -> None:
        """Take from the gradient of W_dec, of the rows `own`, the component that would change the norms of rows."""
        both = [*zip(*(torch.split(t, self.parts, 1) for t in (grad, self.params["W_dec"][own])), strict=True)]
        norms = [rows.norm(dim=1).clamp_min(1e-12) for _, rows in both]
        along = torch.stack([row_dots(*pair) / norm for pair, norm in zip(both, norms, strict=True)]).mean(0)
        for (part, rows), norm in zip(both, norms, strict=True):
            part.addcmul_(rows, (along / norm)[:, None], value=-1)

    def measure_tile(self, tokens: int) -> None:
        """Settle the tile size of the encoder product; all ranks use the same."""
        if not self.tile:
            p = self.params
            with self.products():
                tile = choose_tile(p["W_enc"], p["b_enc"], self.compute, self.config.k, tokens)
            found = torch.full((1,), tile, device=self.mesh.device)
            self.tile = int(self.mesh.gather(found, "world")[0])

    def gradients(self, x: Tensor, y: Tensor, ramp: float) -> Part:
        """Loss and gradients on this replica's normalised tokens; `ramp` scales the sparsity term.

        x [tokens, d_in] goes in, and y [tokens, d_out], which may be x, is rebuilt.

        Tokens go through the whole step a tile at a time, so that nothing of the size [tokens, latents] exists.
        """
        narrow = gathers_narrow(self.precision, self.mesh.device.type)
        sizes = self.latents, self.d_in, self.d_out, x.element_size(), self.mesh.tp
        each = self.tile_tokens(self.config, Shape(len(x), self.tile or len(x), *sizes, narrow))
        encoder, part = self.encoder(), Part()
        codes = self.choose(encoder, self.centred(x))
        chosen = codes.split(each) if codes is not None else repeat(None)
        entries = len(codes.latent) if codes is not None else math.inf  # of a relu, known for each tile alone
        decoder = Decoder(self.params["W_dec"], self.compute, entries)
        for rows, target, own in zip(torch.split(x, each), torch.split(y, each), chosen, strict=False):
            self.add_tile(Tile(rows, target, encoder, decoder, own, len(x) * self.mesh.dp, ramp), part)
        return part

    def products(self) -> AbstractContextManager[None]:
        """Within, matrix products of float32 are as exact as `compute` says."""
        return matrix_products(self.precision, self.mesh.device)

    def encoder(self, which: Tensor | None = None) -> Encoder:
        """The encoder product, of all my latents or of those in `which`."""
        weight, bias = self.params["W_enc"], self.params["b_enc"]
        if which is not None:
            weight, bias = weight[which], bias[which]
        return Encoder(weight, bias, self.compute, self.tile or 256)

    def centred(self, x: Tensor) -> Tensor:
        """The input of the encoder product."""
        return x - self.params["b_dec"] if self.subtracts else x

    @property
    def subtracts(self) -> bool:
        """True if b_dec is taken from the input."""
        return self.pre_bias and not self.transcodes

    def completed(self, out: Tensor, x: Tensor) -> Tensor:
        """Add to [.., tokens, d_out] what does not come from latents; `out` is overwritten."""
        out += self.params["b_dec"]
        if "W_skip" in self.params:
            out += x @ self.params["W_skip"].T
        return out

    def add_shared(self, part: Part, tile: Tile, up: Tensor, pre: Tensor) -> None:
        """Add the gradients of b_dec and W_skip.

        `up` [tokens, d_out] is that of y^, `pre` [latents] the sum over tokens of that of pre-activations.
        """
        b_dec = up.sum(0)
        if self.subtracts:
            b_dec -= self.mesh.sum(pre @ self.params["W_enc"], "tp")
        part.add(part.grads, "b_dec", b_dec)
        if "W_skip" in self.params:
            part.product("W_skip", up, tile.x)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y^ [tokens, d_out] of normalised tokens and their numbers of active latents [tokens], over all my replica."""
        return self.decoded(self.codes(x), x)

    def decoded(self, codes: Codes, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same from `codes` of these tokens."""
        out = self.mesh.sum(codes.decode(self.params["W_dec"]), "tp", "reconstructions")
        return self.completed(out, x), self.mesh.sum(codes.offsets.diff(), "tp")


def _random_rows(seed: tuple[int, tuple[int, ...]], width: int, uniform: bool) -> NDArray[Any]:
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed[0], spawn_key=seed[1])))
    if uniform:
        return rng.uniform(-1, 1, (INIT_BLOCK, width)).astype(np.float32)
    return rng.standard_normal((INIT_BLOCK, width), np.float32)
