"""The mean effect of every feature on the loss, to first order, over a text.

With g_t the gradient of a window's summed loss at position t, the effect of feature i on a document is the sum over its
positions of f_i(t) <W_dec[i], g_t>: what the loss would fall by, to first order, if the feature were taken away.
Divided by tokens, with documents as clusters, it is a ratio estimate like any other here; its interval needs three sums
for each feature, so memory does not grow with the text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saetrain.describing.statistics import clustered_half
from saetrain.errors import DataError
from saetrain.probing.attribution import Shard, active, gradient, loss
from saetrain.probing.causal import LanguageModel
from saetrain.probing.corpus import Corpus, Scale, measure_scale
from saetrain.sae import SAE


@dataclass(frozen=True)
class Effects:
    """For each latent the mean effect on the loss, in nats a token, and its 95 % half-width; both are [latents]."""

    mean: Tensor
    half: Tensor
    documents: int
    tokens: int

    def top(self, count: int) -> list[dict[str, float]]:
        """The largest effects in size, with their intervals."""
        order = self.mean.abs().argsort(descending=True, stable=True)[:count]
        return [
            {
                "feature": int(i),
                "value": float(self.mean[i]),
                "low": float(self.mean[i] - self.half[i]),
                "high": float(self.mean[i] + self.half[i]),
            }
            for i in order
        ]


def loss_effects(
    sae: SAE,
    model: LanguageModel,
    corpus: Corpus,
    *,
    most: int = 0,
    drop_norm: float = 10.0,
    scale: Scale | None = None,
) -> Effects:
    """The effects of all features over the first ``most`` documents of the order (0: all).

    Heavy rows, prefix and special tokens contribute nothing.
    """
    model.check_width(sae.d_in)
    scale = scale or measure_scale(corpus, drop_norm)
    top, square, cross = (torch.zeros(sae.d_sae, dtype=torch.float64) for _ in range(3))
    tokens = tokens_square = 0.0
    documents = 0
    for document in corpus:
        if most and documents == most:
            break
        effect, count = torch.zeros(sae.d_sae, dtype=torch.float64), 0
        for batch in document.batches:
            metrics = [loss(window[: batch.hi], batch.lo) for window in batch.tokens.tolist()]
            kept = batch.tokens[:, : batch.hi]
            _, x, g = gradient(model, kept, metrics)
            usual = scale.usual(x)[..., 0]
            usual[:, : batch.lo] = False
            entries = active([Shard(0, sae)], x[usual].to(sae.W_dec.dtype), g[usual].to(sae.W_dec.dtype))
            effect.index_add_(0, entries.feature.cpu(), entries.value.double().cpu())
            count += kept.shape[0] * (batch.hi - batch.lo - 1)
        documents += 1
        top, square, cross = top + effect, square + effect.square(), cross + effect * count
        tokens, tokens_square = tokens + count, tokens_square + count * count
    if documents < 2:
        raise DataError(f"{documents} usable documents in the text: an interval needs two or more")
    mean = top / tokens
    sums = (mean.numpy(), square.numpy(), cross.numpy())
    half = clustered_half(*sums, tokens_square, tokens, documents)
    return Effects(mean, torch.from_numpy(half), documents, math.floor(tokens))
