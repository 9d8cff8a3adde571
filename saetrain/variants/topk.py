"""topk: the k largest positive pre-activations of each token are active (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saetrain.compute.kernels import Codes, Encoder, exact_topk
from saetrain.compute.selection import topk
from saetrain.variants.family import TopKFamily


class TopK(TopKFamily):
    name = activation = saelens = "topk"
    sparsify = True

    def choose(self, encoder: Encoder, xc: Tensor) -> Codes:
        return topk(encoder, xc, self.config.k, self.mesh)

    def codes(self, x: Tensor) -> Codes:
        return self.choose(self.encoder(), self.centred(x))

    @staticmethod
    def activate(pre: Tensor, k: int, threshold: Tensor | None) -> Tensor:
        value, latent = exact_topk(pre, k)
        return torch.zeros_like(pre).scatter_(1, latent, value.relu())

    @classmethod
    def saelens_settings(cls, k: int) -> dict[str, Any]:
        return {"k": k, "rescale_acts_by_decoder_norm": False}
