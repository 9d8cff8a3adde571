"""Which features did it: contributions of features at one layer to a scalar of the logits, to first order.

With x_t the hidden state at position t, g_t the gradient of the scalar m there, f_i(t) the activations and W_dec[i] the
decoder rows, x_t = sum_i f_i(t) W_dec[i] + b_dec + error_t gives

    <x_t, g_t>  =  sum over active i of f_i(t) <W_dec[i], g_t>  +  <b_dec, g_t>  +  <error_t, g_t>
                   contributions of features                      bias            error

exactly; first order is the claim that taking feature i away at t changes m by minus its contribution (gradient times
activation; Marks et al. 2024, arXiv 2403.19647).  `calibrate` compares that claim with true ablations.

Vectors stay where they are: a dictionary may be cut into shards, on one device or on several.  x and g go to each shard
and triples (feature, position, value) come back.  Where k latents of a row are active, every shard offers its k best
and the merge keeps the k best of all, ties to the lowest latent, as the whole dictionary does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from actshuffle.units import counted
from saetrain.compute.kernels import Codes, from_dense
from saetrain.errors import ConfigError
from saetrain.probing.causal import LanguageModel
from saetrain.sae import SAE
from saetrain.training.metrics import Interval, ratio_interval
from saetrain.variants.table import VARIANTS

Metric = Callable[[Tensor], Tensor]  # logits [tokens, vocabulary] of one window -> a scalar


class Shard(NamedTuple):
    """Latents [first, first + n) of a dictionary, as a dictionary of their own."""

    first: int
    part: SAE


class Entries(NamedTuple):
    """Active latents of some rows, by row and then by latent; all are [n]."""

    feature: Tensor
    row: Tensor
    activation: Tensor
    value: Tensor  # activation times <W_dec[feature], g[row]>


@dataclass(frozen=True)
class Attribution:
    """Contributions to one scalar; `entries` are of features, the others [tokens]."""

    scalar: float
    entries: Entries
    bias: Tensor
    error: Tensor
    total: Tensor  # <x_t, g_t>

    @property
    def gap(self) -> float:
        """The largest difference, over positions, between the parts and the whole, as a share of the largest whole."""
        parts = (self.bias + self.error).index_add(0, self.entries.row, self.entries.value)
        return float((parts - self.total).abs().max() / self.total.abs().max().clamp_min(1e-300))

    def by_feature(self) -> dict[int, float]:
        """The contribution of each active feature, summed over positions, largest in size first."""
        features, at = torch.unique(self.entries.feature, return_inverse=True)
        sums = torch.zeros(len(features), dtype=torch.float64).index_add_(
            0, at.cpu(), self.entries.value.double().cpu()
        )
        order = sums.abs().argsort(descending=True, stable=True)
        return {int(features[i]): float(sums[i]) for i in order}

    def to_json(self, most: int = 20) -> dict[str, Any]:
        order = self.entries.value.abs().argsort(descending=True, stable=True)[:most]
        return {
            "scalar": self.scalar,
            "total": float(self.total.sum()),
            "features": float(self.entries.value.sum()),
            "bias": float(self.bias.sum()),
            "error": float(self.error.sum()),
            "gap": self.gap,
            "active": len(self.entries.value),
            "top": [
                {
                    "feature": int(self.entries.feature[i]),
                    "position": int(self.entries.row[i]),
                    "activation": float(self.entries.activation[i]),
                    "contribution": float(self.entries.value[i]),
                }
                for i in order
            ],
            "by_feature": dict(list(self.by_feature().items())[:most]),
        }


# --- Scalars of the logits


def logit(token: int, against: int | None = None, position: int = -1) -> Metric:
    """The logit of a token at a position, or its difference to another's."""
    if against is None:
        return lambda logits: logits[position, token]
    return lambda logits: logits[position, token] - logits[position, against]


def log_probability(token: int, position: int = -1) -> Metric:
    return lambda logits: logits[position].log_softmax(-1)[token]


def loss(tokens: Sequence[int], lo: int = 0) -> Metric:
    """The summed cross entropy, in nats, of the tokens after place ``lo``, each predicted from the one before."""
    target = torch.tensor(list(tokens[lo + 1 :]))

    def summed(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[lo:-1], target.to(logits.device), reduction="sum")

    return summed


# --- One prompt


def attribute(
    sae: SAE | Sequence[Shard], model: LanguageModel, tokens: Sequence[int], metric: Metric, *, first: int = 1
) -> Attribution:
    """Contributions to ``metric`` for one window of tokens, at positions from ``first`` on (0 is an attention sink).

    A list of shards gives the same as the whole dictionary, to rounding.
    """
    shards = [Shard(0, sae)] if isinstance(sae, SAE) else list(sae)
    whole = shards[0].part
    model.check_width(whole.d_in)
    if not 0 <= first < len(tokens):
        raise ConfigError(f"positions from {first} on, of {counted(len(tokens), 'token')}: none is left")
    scalar, x, g = gradient(model, torch.tensor([list(tokens)]), [metric])
    x, g = (v[0].to(whole.W_dec.dtype).index_fill(0, torch.arange(first, device=v.device), 0) for v in (x, g))
    entries = active(shards, x, g)
    keep = entries.row >= first
    entries = Entries(*(v[keep] for v in entries))
    rebuilt = decode(shards, entries, len(x)) + whole.b_dec
    return Attribution(float(scalar[0]), entries, g @ whole.b_dec, ((x - rebuilt) * g).sum(1), (x * g).sum(1))


def gradient(model: LanguageModel, tokens: Tensor, metrics: Sequence[Metric]) -> tuple[Tensor, Tensor, Tensor]:
    """Scalars [windows], hidden states and gradients [windows, tokens, d]; ``metrics`` has one for each window."""
    held: list[Tensor] = []

    def leaf(x: Tensor, _: int) -> Tensor:
        held.append(x.detach().requires_grad_())
        return held[0]

    with torch.enable_grad():
        logits = model.run(tokens, leaf).logits
        scalars = torch.stack([metric(of) for metric, of in zip(metrics, logits, strict=True)])
        (g,) = torch.autograd.grad(scalars.sum(), held)
    return scalars.detach(), held[0].detach(), g


def cut(sae: SAE, count: int) -> list[Shard]:
    """The dictionary as ``count`` shards of adjacent latents; tensors are views."""
    if not 1 <= count <= sae.d_sae:
        raise ConfigError(f"{counted(count, 'shard')} of {counted(sae.d_sae, 'latent')}: 1 to {sae.d_sae} are possible")
    edges = [sae.d_sae * i // count for i in range(count + 1)]
    shards = []
    for lo, hi in pairwise(edges):
        threshold = None if sae.threshold is None else sae.threshold[lo:hi]
        enc, bias, dec = sae.W_enc[lo:hi], sae.b_enc[lo:hi], sae.W_dec[lo:hi]
        shards.append(Shard(lo, SAE(sae.activation, enc, bias, dec, sae.b_dec, sae.subtract_b_dec, sae.k, threshold)))
    return shards


@torch.no_grad()
def active(shards: Sequence[Shard], x: Tensor, g: Tensor) -> Entries:
    """The active latents of rows x [rows, d] with their contributions under g [rows, d], on x's device."""
    found = [_offered(shard, x, g) for shard in shards]
    entries = Entries(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    order = torch.sort(entries.row, stable=True).indices  # shards lie in order of latents, and so do ties
    entries = Entries(*(v[order] for v in entries))
    whole = shards[0].part
    if not VARIANTS[whole.activation].takes_k or len(shards) == 1:
        return entries
    best = torch.sort(entries.activation, descending=True, stable=True).indices
    best = best[torch.sort(entries.row[best], stable=True).indices]
    counts = torch.bincount(entries.row, minlength=len(x))
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    kept = best[torch.arange(len(best), device=best.device) - starts < whole.k].sort().values
    return Entries(*(v[kept] for v in entries))


def _offered(shard: Shard, x: Tensor, g: Tensor) -> Entries:
    part = shard.part
    codes = from_dense(part.encode(x.to(part.W_dec.device)))
    dots = codes.dots(g.to(part.W_dec), part.W_dec)
    return Entries(*(v.to(x.device) for v in (codes.latent + shard.first, codes.bag, codes.value, codes.value * dots)))


@torch.no_grad()
def decode(shards: Sequence[Shard], entries: Entries, rows: int) -> Tensor:
    """sum over entries of a row of activation times W_dec [rows, d], without b_dec, on the entries' device."""
    out = torch.zeros(rows, shards[0].part.d_in, dtype=entries.activation.dtype, device=entries.row.device)
    for first, part in shards:
        mine = (entries.feature >= first) & (entries.feature < first + part.d_sae)
        latent, value, row = (v[mine].to(part.W_dec.device) for v in (entries.feature, entries.activation, entries.row))
        out += Codes(latent - first, value, row, rows, part.d_sae).decode(part.W_dec).to(out)
    return out


# --- Is first order true?


@dataclass(frozen=True)
class Calibration:
    """True effects of ablating features, against those that their contributions predict; both are [pairs]."""

    predicted: Tensor
    true: Tensor

    @property
    def slope(self) -> Interval:
        """Of the line through the origin, true = slope predicted, with its 95 % interval over pairs."""
        return ratio_interval(self.true * self.predicted, self.predicted.square())

    @property
    def r2(self) -> float:
        """The squared correlation; NaN where one side does not vary, as with one pair."""
        if len(self.true) < 2:
            return math.nan
        both = torch.stack([self.predicted, self.true]).double()
        return float(torch.corrcoef(both)[0, 1].square())

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON, which has no NaN: None stands for it."""
        slope = {name: _known(value) for name, value in self.slope._asdict().items()}
        return {"pairs": len(self.true), "slope": slope, "r2": _known(self.r2)}


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


@torch.no_grad()
def calibrate(
    sae: SAE,
    model: LanguageModel,
    tokens: Sequence[int],
    metric: Metric,
    *,
    features: int = 50,
    seed: int = 0,
    first: int = 1,
) -> Calibration:
    """Take each of a uniform sample of the active features away at all positions, and run the model again.

    The effect of a feature is m(x) - m(x without it), which its contribution predicts.
    """
    found = attribute(sae, model, tokens, metric, first=first)
    effects = found.by_feature()
    if len(effects) < 2:
        raise ConfigError(f"{counted(len(effects), 'feature')} are active: a line needs two or more")
    dice = np.random.default_rng([seed, 3])
    chosen = dice.choice(sorted(effects), min(features, len(effects)), replace=False)
    window = torch.tensor([list(tokens)])
    true = []
    for feature in chosen:
        mine = found.entries.feature == int(feature)
        delta = found.entries.activation[mine, None] * sae.W_dec[int(feature)]
        edit = partial(_without, rows=found.entries.row[mine], delta=delta)
        true.append(found.scalar - float(metric(model.run(window, edit).logits[0])))
    predicted = [effects[int(feature)] for feature in chosen]
    return Calibration(torch.tensor(predicted, dtype=torch.float64), torch.tensor(true, dtype=torch.float64))


def _without(x: Tensor, _: int, *, rows: Tensor, delta: Tensor) -> Tensor:
    new = x.clone()
    new[0, rows] -= delta.to(x)
    return new
