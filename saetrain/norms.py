"""Normalisation of rows: arrays are centred and scaled, so that rows have their width as mean squared norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saetrain.errors import ConfigError


class Norm(NamedTuple):
    """x = (raw - mean) * scale, for one array or for several side by side."""

    mean: Tensor  # [d_in]
    scale: float | Tensor  # [d_in] for several
    widths: tuple[int, ...] = ()  # of several

    def __call__(self, raw: Tensor) -> Tensor:
        return (raw.to(self.mean.dtype) - self.mean).mul_(self.scale)

    def to(self, device: torch.device, dtype: torch.dtype) -> Norm:
        scale = self.scale.to(device, dtype) if isinstance(self.scale, Tensor) else self.scale
        return Norm(self.mean.to(device, dtype), scale, self.widths)

    @property
    def parts(self) -> tuple[int, ...]:
        """The width of each array."""
        return self.widths or (len(self.mean),)

    @property
    def scales(self) -> list[float]:
        """The factor of each array."""
        if not isinstance(self.scale, Tensor):
            return [self.scale]
        return [float(part[0]) for part in torch.split(self.scale, list(self.parts))]


def side_by_side(norms: Sequence[Norm]) -> Norm:
    """The norm of several arrays side by side."""
    if len(norms) == 1:
        return norms[0]
    widths = tuple(len(norm.mean) for norm in norms)
    return Norm(torch.cat([norm.mean for norm in norms]), spread([float(n.scale) for n in norms], widths), widths)


def spread(values: Sequence[float], widths: Sequence[int]) -> Tensor:
    """[columns]: each value in all columns of its array."""
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(widths))


def norm_from(mean: NDArray[Any], variance: float) -> Norm:
    """From the mean row and the variance summed over columns: normalised rows have mean squared norm d_in."""
    if not np.isfinite(variance) or variance <= 1e-12 * float(mean @ mean):
        raise ConfigError(f"the rows do not vary: total variance {variance:g}, squared mean {mean @ mean:g}")
    return Norm(torch.from_numpy(np.asarray(mean, np.float64)), (len(mean) / variance) ** 0.5)
