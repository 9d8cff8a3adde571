"""What the weights alone say of a latent: the logits that it moves, and of a token the latents that promote it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saetrain.products.lens import BINS, REACH


class Moved(NamedTuple):
    """A token, and what one unit of activation adds to its logit, less the mean over the vocabulary."""

    id: int
    text: str | None
    value: float


class Logits(NamedTuple):
    """The logits of a latent's decoder row through the final norm's gain and the unembedding.

    `top` has the largest first, `bottom` the smallest; bin i of `counts` holds edges[i] <= logit < edges[i + 1], and
    the outer bins all that is beyond.
    """

    top: list[Moved]
    bottom: list[Moved]
    std: float
    edges: NDArray[np.float32]  # [bins + 1]
    counts: NDArray[np.int64]  # [bins]


class Promoter(NamedTuple):
    latent: int
    value: float


def logits_of(feature: Any) -> Logits | None:
    """The logits of a `saetrain.reading.latents.Feature`; None where the run had no model."""
    if not feature.features.has("logit"):
        return None
    ends = []
    for name in ("top", "bottom"):
        ids, values = feature.array(f"logit/{name}_id").tolist(), feature.array(f"logit/{name}").tolist()
        texts = feature.features.text(ids) or (None,) * len(ids)
        ends.append([Moved(*found) for found in zip(ids, texts, values, strict=True) if found[0] >= 0])
    std = float(feature.array("logit/std").item())
    edges = np.linspace(-REACH * std, REACH * std, BINS + 1, dtype=np.float32)
    return Logits(ends[0], ends[1], std, edges, feature.array("logit/histogram").astype(np.int64))


def promoters_of(features: Any, token: int) -> list[Promoter] | None:
    """The latents that raise a token's logit most, the largest first; None where the run had no model."""
    if not features.has("logit_index"):
        return None
    group = features.group("logit_index")
    ids, values = (group.read(name, token, token + 1)[0].tolist() for name in ("id", "value"))
    return [Promoter(*found) for found in zip(ids, values, strict=True) if found[0] >= 0]
