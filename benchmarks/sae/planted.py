"""Rows whose true features are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class Planted:
    """Rows that are sparse sums of known directions: Zipf frequencies, features shared within a document."""

    rows: Tensor  # float32 [rows, d], in random order
    documents: Tensor  # int64 [rows]
    dictionary: Tensor  # float32 [features, d], unit rows
    active: float  # features a row

    @classmethod
    def make(
        cls, rows: int, d: int, features: int, active: float = 4.0, seed: int = 0, doc: int = 32, noise: float = 0.01
    ) -> Planted:
        rng = np.random.default_rng(seed)
        directions = rng.standard_normal((features, d))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        zipf = 1 / np.arange(1, features + 1)
        rate = np.minimum(zipf * active / zipf.sum(), 0.5)
        documents = np.arange(rows) // doc
        # In a document some features are four times as frequent as elsewhere, the others rarer.
        topics = rng.random((documents[-1] + 1, features)) < 0.2
        lift = np.where(topics, 4.0, 0.25)[documents]
        on = rng.random((rows, features)) < rate * lift
        acts = on * rng.uniform(1.0, 2.0, (rows, features))
        x = acts @ directions + noise * rng.standard_normal((rows, d)) + rng.standard_normal(d) * 0.3
        order = rng.permutation(rows)
        return cls(
            torch.from_numpy(x[order]).float(),
            torch.from_numpy(documents[order]),
            torch.from_numpy(directions).float(),
            float(on.sum(1).mean()),
        )


def matched(found: Tensor, planted: Tensor) -> Tensor:
    """For each planted direction, the largest cosine with a found one."""
    unit = found.float() / found.float().norm(dim=1, keepdim=True)
    return (planted @ unit.T).amax(1)
