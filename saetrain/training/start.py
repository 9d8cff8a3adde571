"""Weights to start from: those of a run, a checkpoint or another tool's autoencoder, for the rows of another store.

What they compute of raw rows stays the same.  A row x that was normalised by other statistics is now x' = r x + c, with

    r = scale' / scale      c = (mean - mean') scale'

of the input, and likewise of the output.  Activations become s times as large, s being the first output's r, where

    W_enc' = W_enc s / r      W_dec' = W_dec r_out / s      b_dec' = r_out b_dec + c_out - W_skip' c
    W_skip' = W_skip r_out / r      b_enc' = s b_enc - shift      shift = W_enc' c, or 0 where b_dec is subtracted

and `Model.rescale` does the same for what a variant has beside them.  The optimiser, counts of firing and the order of
the rows begin anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from saetrain.config import Config
from saetrain.errors import ConfigError
from saetrain.model import Model
from saetrain.norms import Norm
from saetrain.variants.table import VARIANTS

NORM_ERROR = 1e-5  # of decoder rows that count as rows of norm 1


class Weights(Protocol):
    """An autoencoder as it was trained; a checkpoint is one."""

    @property
    def config(self) -> Config: ...
    def weight(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A parameter, or rows of it if it has one for each latent."""
        ...

    def threshold(self) -> float:
        """The running mean of the batch threshold."""
        ...

    def norms(self) -> tuple[Norm, Norm | None]:
        """Of the input, and of a transcoder's output."""
        ...


Opened = Callable[[Path], Weights]


def with_inherited(settings: Mapping[str, Any], opened: Opened) -> dict[str, Any]:
    """The settings, with those of the model that `init_from` names where they do not say otherwise."""
    if not (name := settings.get("init_from")):
        return dict(settings)
    theirs = opened(Path(name)).config
    found = {"arch": theirs.arch, "d_sae": theirs.d_sae, "skip": theirs.skip, **settings}
    if VARIANTS.get(found["arch"]) is VARIANTS[theirs.arch]:
        found = {"k": theirs.k, "widths": theirs.widths, **found}
    return found


@dataclass(frozen=True)
class Start:
    """Weights, and the name under which they were given."""

    name: str
    weights: Weights

    def fill(self, model: Model, sample: Tensor) -> None:
        """Give the model these weights; `sample` [rows, d_in] settles what they do not say."""
        norm, out = self.weights.norms()
        self._check(model, norm, out)
        put = _Moved(model, norm, out or norm)
        old = {n: self.weights.weight(n, model.lo, model.hi).to(model.mesh.device).double() for n in model.params}
        for name, tensor in put.moved(old).items():
            model.params[name].copy_(tensor)
        model.state["threshold"].fill_(self.weights.threshold() * put.s)
        if not self.weights.threshold():
            model.settle(sample)

    def _check(self, model: Model, norm: Norm, out: Norm | None) -> None:
        """Refuse weights of another shape or kind."""
        theirs, ours = self.weights.config, model.config
        kin = VARIANTS[theirs.arch].takes_k and VARIANTS[ours.arch].takes_k
        pairs = {
            "arch": ("kin", "kin") if kin else (theirs.arch, ours.arch),
            "d_sae": (theirs.d_sae, ours.d_sae),
            "skip": (theirs.skip, ours.skip),
            "widths of the input": (norm.parts, model.norm.parts),
            "widths of the output": ((out or norm).parts, model.out_norm.parts),
            "transcoder": (out is not None, model.transcodes),
        }
        if different := [f"{name} {_told(a)} / {_told(b)}" for name, (a, b) in pairs.items() if a != b]:
            raise ConfigError(f"the weights of {self.name} do not fit this run: {'; '.join(different)}")


def _told(value: object) -> str:
    return ", ".join(f"{n:,}" for n in value) if isinstance(value, tuple) else str(value)


class _Moved:
    """The map of parameters from one normalisation to that of a model."""

    def __init__(self, model: Model, norm: Norm, out: Norm) -> None:
        self.model = model
        self.r, self.c = _between(norm, model.norm)
        self.r_out, self.c_out = _between(out, model.out_norm)
        self.s = model.out_norm.scales[0] / out.scales[0]

    def moved(self, old: dict[str, Tensor]) -> dict[str, Tensor]:
        model, s = self.model, self.s
        new = {"W_enc": old["W_enc"] * (s / self.r), "W_dec": old["W_dec"] * (self.r_out / s)}
        shift = torch.zeros_like(old["b_enc"]) if model.subtracts else new["W_enc"] @ self.c
        new["b_enc"] = s * old["b_enc"] - shift
        new["b_dec"] = self.r_out * old["b_dec"] + self.c_out
        if "W_skip" in old:
            new["W_skip"] = self.r_out[:, None] * old["W_skip"] / self.r
            new["b_dec"] -= new["W_skip"] @ self.c
        new |= model.rescale(old, s, shift)
        norms = model.row_norms(new["W_dec"])
        if model.unit_rows and bool(((norms - 1).abs() > NORM_ERROR).any()):
            none = torch.zeros_like(shift)
            new |= model.rescale(new, norms, none) | {"b_enc": new["b_enc"] * norms}
            new |= {"W_enc": new["W_enc"] * norms[:, None], "W_dec": new["W_dec"] / norms[:, None]}
        return new


def _between(old: Norm, new: Norm) -> tuple[Tensor, Tensor]:
    """r and c, [columns]."""
    device = new.mean.device
    before, after = (torch.as_tensor(n.scale, dtype=torch.float64, device=device) for n in (old, new))
    c = (old.mean.to(device).double() - new.mean.double()) * after
    return (after / before).expand_as(c), c
