"""Ways to train that `sae-quality` compares with the defaults: rates, forms of AuxK, resampling, initial encoders.

Those that saetrain has as settings are settings; the others are written here, as their sources have them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saetrain.compute.kernels import Codes
from saetrain.model import Model
from saetrain.training.optim import Optimizer
from saetrain.variants.topk import TopK


class NormalisedAux(TopK):
    """AuxK as in the code of Gao et al.: its error is divided by the variance of the residual that it rebuilds."""

    def _auxiliary(self, xc: Tensor, residual: Tensor, tokens: int) -> tuple[Codes, Tensor, Tensor] | None:
        found = super()._auxiliary(xc, residual, tokens)
        if found is None:
            return None
        codes, up, loss = found
        variance = (residual - residual.mean(0)).square().mean().clamp_min(1e-12)
        return codes, up / variance, loss / variance


class PlainEncoder(TopK):
    """The initial encoder is the decoder's transpose, without a factor."""

    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        super().initialise(sample, target)
        self.params["W_enc"].copy_(self.params["W_dec"])


class RandomEncoder(TopK):
    """The initial encoder is random, with rows as long as those of the default."""

    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        super().initialise(sample, target)
        rows, dice = self.params["W_enc"], torch.Generator().manual_seed(self.config.seed + 1)
        length = rows.norm(dim=1, keepdim=True)
        rows.copy_(torch.nn.functional.normalize(torch.randn(rows.shape, generator=dice), dim=1) * length)


def resample(model: Model, optimizer: Optimizer, x: Tensor, share: float) -> None:
    """Four times before the rate falls, begin dead latents anew from rows of the batch that are rebuilt badly.

    (Bricken et al. 2023, Towards Monosemanticity, "neuron resampling".)  `share` is that of the steps that are done.
    """
    steps = model.config.steps
    if round(share * steps) not in {round(steps * quarter) for quarter in (0.2, 0.35, 0.5, 0.65)}:
        return
    dead = (model.state["quiet"] >= model.config.dead_tokens).nonzero().view(-1)
    if not len(dead):
        return
    p, error = model.params, model.reconstruct(x)[0] - x
    dice = torch.Generator().manual_seed(round(share * steps))
    picked = torch.multinomial(error.square().sum(1).square(), len(dead), replacement=True, generator=dice)
    rows = torch.nn.functional.normalize(-error[picked], dim=1)
    alive = torch.ones(model.latents, dtype=torch.bool).index_fill(0, dead, False)
    p["W_dec"][dead], p["b_enc"][dead] = rows, 0.0
    p["W_enc"][dead] = rows * 0.2 * p["W_enc"][alive].norm(dim=1).mean()
    for name, moment in optimizer.kept().items():
        if name.endswith(("W_dec", "W_enc", "b_enc")):
            moment[dead] = 0.0
    model.state["quiet"][dead] = 0


class Form(NamedTuple):
    words: str
    settings: dict[str, Any]
    model: type[TopK] = TopK
    rate: float = 1.0  # times the default rate
    after: Callable[[Model, Optimizer, Tensor, float], None] | None = None


FORMS = {
    "default": Form("our default", {}),
    "half-rate": Form("half the rate", {}, rate=0.5),
    "double-rate": Form("twice the rate", {}, rate=2.0),
    "no-auxk": Form("without AuxK", {"aux_coef": 0.0}),
    "normalised-auxk": Form("AuxK over the residual's variance", {}, NormalisedAux),
    "resampling": Form("resampling without AuxK", {"aux_coef": 0.0}, after=resample),
    "resampling-auxk": Form("resampling and AuxK", {}, after=resample),
    "plain-encoder": Form("initial encoder not scaled", {}, PlainEncoder),
    "random-encoder": Form("initial encoder random", {}, RandomEncoder),
}
