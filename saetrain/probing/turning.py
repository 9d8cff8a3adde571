"""Features turned up or down inside a running model.

With f the activations of the hidden state x, a feature i that is turned has the new activation c, and

    x' = x + sum over turned i of (c_i - f_i) W_dec[i]

Codes come first and are clamped afterwards, so the other features keep their activations even where k of them compete.
Since the decoder is linear, x' is the dictionary's output with f_i := c_i, plus the error x - x^ that the dictionary
makes on x (Templeton et al. 2024, "Scaling Monosemanticity").  With c = f nothing changes, bit for bit.

    clamp     c = amount                 amount in units of activation
    add       c = f + amount
    scale     c = amount f
    ablate    c = 0

Strengths are easier to choose as a share of the layer's median norm (the edit of a row is then so many times as long as
a usual row) or of the feature's largest activation over some text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saetrain.errors import ConfigError
from saetrain.probing.corpus import Corpus, Scale
from saetrain.sae import SAE

METHODS = ("clamp", "add", "scale", "ablate")
UNITS = ("norm", "max", "activation")


@dataclass(frozen=True)
class Turn:
    """What is done to one feature; ``amount`` is an activation (clamp, add) or a factor (scale)."""

    feature: int
    method: str = "clamp"
    amount: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"a feature is turned by {', '.join(METHODS)}; got {self.method!r}")
        if not math.isfinite(self.amount):
            raise ConfigError(f"feature {self.feature} is turned by a finite amount, got {self.amount}")


class Steering:
    """An edit of the hidden state: the turns above, at every position from ``first`` on.

    Rows longer than ``limit`` (attention sinks) stay as they are; so does, by default, the first one.  ``moved`` is
    the mean over edited rows of |x' - x| / |x|, and ``moved_by`` that of each window over its first passes.
    """

    def __init__(self, sae: SAE, turns: Sequence[Turn], *, first: int = 1, limit: float = math.inf) -> None:
        latents = len(sae.W_dec)
        features = [turn.feature for turn in turns]
        for feature in features:
            if not 0 <= feature < latents:
                raise ConfigError(f"no feature {feature}: the dictionary has 0 to {latents - 1}")
        if len(set(features)) < len(features):
            raise ConfigError(f"a feature is turned twice: {features}")
        if not features:
            raise ConfigError("no feature to turn")
        self.sae, self.turns, self.first, self.limit = sae, tuple(turns), first, limit
        self._features = torch.tensor(features, device=sae.W_dec.device)
        self._rows = sae.W_dec[self._features]
        self._passes: list[tuple[Tensor, Tensor]] = []  # of each: sum of |x' - x| / |x|, and edited rows, by window

    def __call__(self, x: Tensor, start: int) -> Tensor:
        """x' [windows, tokens, d] of x, whose first token is at position ``start``."""
        acts = self.activations(x)
        delta = ((self.wanted(acts) - acts) @ self._rows).to(x.dtype)
        norms = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
        place = torch.arange(start, start + x.shape[1], device=x.device)[None, :, None]
        edited = (place >= self.first) & (norms <= self.limit)
        delta = torch.where(edited, delta, torch.zeros_like(delta))
        shares = torch.linalg.vector_norm(delta.float(), dim=-1, keepdim=True) / norms.clamp_min(1e-12)
        self._passes.append((shares.double().sum((1, 2)).cpu(), edited.double().sum((1, 2)).cpu()))
        return x + delta

    def activations(self, x: Tensor) -> Tensor:
        """Activations [windows, tokens, turned features] of x [windows, tokens, d]."""
        acts = self.sae.encode(x.reshape(-1, x.shape[-1]))[:, self._features]
        return acts.view(*x.shape[:-1], -1)

    def wanted(self, acts: Tensor) -> Tensor:
        """The new activations, of the same shape."""
        new = acts.clone()
        for at, turn in enumerate(self.turns):
            if turn.method == "clamp":
                new[..., at] = turn.amount
            elif turn.method == "add":
                new[..., at] += turn.amount
            else:
                new[..., at] *= turn.amount if turn.method == "scale" else 0.0
        return new

    @property
    def moved(self) -> float:
        return float(sum(m.sum() for m, _ in self._passes) / max(sum(n.sum() for _, n in self._passes), 1))

    def moved_by(self, passes: Sequence[int]) -> list[float]:
        """Of each window, over so many passes."""
        return [
            float(sum(m[at] for m, _ in self._passes[:end]) / max(sum(n[at] for _, n in self._passes[:end]), 1))
            for at, end in enumerate(passes)
        ]


@dataclass(frozen=True)
class Strength:
    """One activation of one feature, in three units; ``of_max`` and ``of_norm`` are None where they are unknown."""

    activation: float
    of_norm: float | None
    of_max: float | None


def strength(
    sae: SAE, feature: int, value: float, unit: str, *, median_norm: float | None = None, largest: float | None = None
) -> Strength:
    """The activation that ``value`` stands for.

    In units of "norm" the edit of a row is ``value`` times the layer's ``median_norm`` long; in units of "max" the
    activation is ``value`` times the feature's ``largest`` one.
    """
    if not 0 <= feature < len(sae.W_dec):
        raise ConfigError(f"no feature {feature}: the dictionary has 0 to {len(sae.W_dec) - 1}")
    length = float(sae.W_dec[feature].double().norm())
    if unit not in UNITS:
        raise ConfigError(f"units of strength are {', '.join(UNITS)}; got {unit!r}")
    if unit == "norm":
        if median_norm is None or not length:
            raise ConfigError("a share of the layer's median norm needs that norm, and a decoder row that is not zero")
        activation = value * median_norm / length
    elif unit == "max":
        if not largest:
            raise ConfigError(
                f"a share of feature {feature}'s largest activation needs one: it never fired on the text"
            )
        activation = value * largest
    else:
        activation = value
    return Strength(
        activation,
        None if not median_norm else activation * length / median_norm,
        None if not largest else activation / largest,
    )


@torch.no_grad()
def measure_largest(sae: SAE, corpus: Corpus, scale: Scale, features: Sequence[int], rows: int) -> dict[int, float]:
    """The largest activation of each feature on the first documents of the order, until there are so many rows."""
    found = torch.zeros(len(features), dtype=torch.float64)
    count = 0
    for document in corpus:
        for batch in document.batches:
            x = corpus.model.hidden(batch.tokens)[:, batch.lo : batch.hi].reshape(-1, corpus.model.width)
            x = x[scale.usual(x)[:, 0]]
            count += len(x)
            if len(x):
                acts = sae.encode(x)[:, list(features)].amax(0)
                found = torch.maximum(found, acts.double().cpu())
        if count >= rows:
            break
    return dict(zip(features, found.tolist(), strict=True))
