"""batchtopk: the k B largest positive pre-activations of a batch of B tokens are active.

At inference a latent is active above one threshold: the running mean of the smallest value chosen in each batch.  The
finished autoencoder is therefore a jumprelu one.  (Bussmann, Leask, Nanda 2024, arXiv 2412.06410.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from saetrain.compute.kernels import Codes, Encoder
from saetrain.compute.selection import batch_topk
from saetrain.variants.family import TopKFamily

GUESS = 0.8  # part of the running threshold above which candidates are first looked for
START_ROWS = 256  # rows of the sample from which the first threshold comes


class BatchTopK(TopKFamily):
    name = "batchtopk"
    activation = saelens = "jumprelu"
    has_thresholds = True
    saelens_vectors = ("b_enc", "threshold")

    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """The threshold begins at that of a few rows: without one, the first step would list all positive values."""
        super().initialise(sample, target)
        self.settle(sample)

    def settle(self, sample: Tensor) -> None:
        rows = sample[:START_ROWS]
        total = self.config.k * len(rows) * self.mesh.dp  # every replica has the same rows
        _, cut = batch_topk(self.encoder(), self.centred(rows), total, self.mesh, 0.0)
        self.state["threshold"].fill_(cut)

    def choose(self, encoder: Encoder, xc: Tensor) -> Codes:
        c, running = self.config, self.state["threshold"]
        total = c.k * len(xc) * self.mesh.dp
        codes, cut = batch_topk(encoder, xc, total, self.mesh, GUESS * float(running))
        running += (cut.to(running.dtype) - running) * (c.threshold_rate if float(running) else 1.0)
        return codes

    def thresholds(self) -> float:
        return float(self.state["threshold"])

    @classmethod
    def fold(cls, part: dict[str, Tensor], running: float, scale: float) -> dict[str, Tensor]:
        folded = super().fold(part, running, scale)
        return folded | {"threshold": torch.full_like(folded["b_enc"], running / scale)}
