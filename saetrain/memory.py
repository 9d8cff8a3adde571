"""The memory that a step of training takes on each rank, by arithmetic, before anything is allocated.

::

    parameters    W_enc, W_dec, one number a latent for each bias; b_dec and W_skip are whole on every rank
    moments       twice that: Adam's two, of 1 / D of the latents on each of D replicas; a byte a number and a scale for
                  256 of them with --moments 8bit
    average       once more, where --ema keeps an average of the weights
    gradients     as large as the parameters
    rows          a batch as it is read, normalised, and the errors of its rows; on a GPU the next one as it is read
    step          what a tile of tokens needs (`Model.tile_bytes`), the optimiser's blocks of rows, or a message between
                  replicas, whichever is most

All but `rows` and the smallest terms are in proportion to the latents of a rank, n / T.  A checkpoint needs no more:
the first replica receives the others' moments in messages of that size.  Counted are tensors, as torch allocates them:
not the interpreter, the libraries (0.3 GB), the loader's buffers, or what an allocator keeps, or a thread of gloo's for
a moment longer than its message.  Tests hold the sum against torch's own count of allocated bytes, for every variant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from saetrain.compute.devices import gathers_narrow, precision
from saetrain.compute.eightbit import blocks_of
from saetrain.compute.kernels import ROWS, pays, tile_sizes
from saetrain.compute.mesh import MESSAGE, UNIT
from saetrain.config import Config
from saetrain.errors import ConfigError
from saetrain.tile import Shape
from saetrain.variants.table import VARIANTS

EIGHT_BIT = 7  # matrices of a block of rows while its moments are in full


@dataclass(frozen=True)
class Memory:
    """Bytes on each rank; `tile` is the tokens of a tile of the step."""

    tile: int
    parameters: int
    moments: int
    average: int
    gradients: int
    rows: int
    step: int

    @property
    def peak(self) -> int:
        return self.parameters + self.moments + self.average + self.gradients + self.rows + self.step

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak}


def together(members: Sequence[Memory]) -> int:
    """The peak of a sweep: each member keeps its parameters and moments, and one after the other makes a step."""
    kept = sum(m.parameters + m.moments + m.average for m in members)
    return kept + max(m.gradients + m.step for m in members) + max(m.rows for m in members)


def predict(config: Config, d_in: int, d_out: int = 0, *, tp: int = 1, dp: int = 1, raw: int = 4) -> Memory:
    """The memory of a step of settings that leave no choice open, on `dp` replicas of `tp` ranks each.

    `d_out` is the width of a transcoder's output, `raw` the bytes of a number in the store.  Where `tile` is to be
    measured, the largest that may be chosen counts.
    """
    variant, out = VARIANTS[config.arch], d_out or d_in
    if config.d_sae % tp:
        raise ConfigError(f"--d-sae {config.d_sae:,} is not a multiple of {tp}, the ranks that share the parameters")
    cuda, compute = config.device.startswith("cuda"), precision(config.compute, config.device)
    e = 8 if compute == "float64" else 4
    tokens, n = config.batch_size // dp, config.d_sae // tp
    tile = config.tile or max(tile_sizes(tokens, n, cuda))
    narrow = gathers_narrow(compute, config.device)
    shape = Shape(tokens, tile, n, d_in, out, e, tp, narrow)

    whole = out + (d_in * out if config.skip else 0)
    parameters = e * (n * (d_in + out + 1 + len(variant.extra)) + whole) + 16 * n  # with the counts of firing
    gradients = e * (n * (d_in + out + 1 + len(variant.extra)) + whole)
    used = variant.tile_tokens(config, shape)
    both = d_in + d_out  # columns that are read
    rows = tokens * (both * (raw + e) + out * e)
    if cuda:
        rows += tokens // tp * both * raw  # the next batch
    step = max(variant.tile_bytes(config, shape), tokens * out * e)  # errors of tiles are put together after the last
    if compute == "bfloat16":
        step += 2 * n * d_in  # the encoder in the type of the product
    if narrow and variant.gathers and pays(n, config.k * tokens / tp if variant.takes_k else math.inf):
        step += 2 * n * out  # and the decoder in that of gathered rows
    if dp > 1:
        step = max(step, e * min(n * max(d_in, out), MESSAGE) * (2 * dp + 1) // dp)  # a message of a sum over replicas
    blocks = 3 * e * min(ROWS, n) * max(d_in, out)
    own = min(-(-n // dp) + (UNIT if dp > 1 else 0), n)  # latents of which a replica has the moments
    moments = 2 * e * (own * (d_in + out + 1 + len(variant.extra)) + whole)
    if config.moments == "8bit":
        coded = [(own, d_in), (own, out), *([(out, d_in)] if config.skip else [])]
        moments -= sum(2 * rows * (wide * (e - 1) - blocks_of(wide) * e) for rows, wide in coded)
        blocks = EIGHT_BIT * e * min(ROWS, own) * max(d_in, out)
    average = gradients if config.ema else 0
    return Memory(used, parameters, moments, average, gradients, rows, max(step, blocks))
