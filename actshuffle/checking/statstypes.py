"""The statistics of one field of a store: see `actshuffle.stats`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.arraytypes import F64
from actshuffle.checking.moments import bin_edges

HEAVY = 10.0  # times the median norm
OUTLIER = 6.0  # times the median root mean square over the dimensions
QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
NUMBERS = ("mean_squared_norm", "norm_min", "norm_max")


@dataclass(frozen=True, eq=False)
class FloatStats:
    """Of a floating field.  Rows with a NaN or an Inf are left out of all but the counts of these.

    ``mean`` and ``variance`` (of the population) have the shape of a row.  ``norms`` is a histogram:
    keys of `actshuffle.checking.moments.bin_edges` and counts.  Positions are (row, place in the flat row).
    """

    dtype: str
    count: int
    mean: F64
    variance: F64
    mean_squared_norm: float
    norm_min: float
    norm_max: float
    norms: NDArray[np.int64]
    left_out: int
    nans: int
    infs: int
    first_nan: tuple[int, int] | None
    first_inf: tuple[int, int] | None

    def norm_quantile(self, q: float) -> float:
        """The norm of the row of that rank, to 0.2 %."""
        if not self.count:
            return math.nan
        low, high = bin_edges(self.norms[:, 0])
        at = int(np.searchsorted(np.cumsum(self.norms[:, 1]), q * (self.count - 1), side="right"))
        middle = math.sqrt((float(low[at]) + float(high[at])) / 2)
        return min(max(middle, self.norm_min), self.norm_max)

    @property
    def rms(self) -> F64:
        """Root mean square of each place."""
        with np.errstate(all="ignore"):  # squares of the largest float64 have none
            found: F64 = np.sqrt(self.variance + self.mean**2)
        return found

    @property
    def outliers(self) -> dict[int, float]:
        """Places whose root mean square is over 6 times the median one, and how many times; largest first."""
        rms = self.rms.reshape(-1)
        median = float(np.median(rms)) if self.count else 0.0
        if not median > 0:
            return {}
        times = rms / median
        return {int(i): float(times[i]) for i in np.argsort(-times, kind="stable") if times[i] > OUTLIER}

    @property
    def heavy(self) -> tuple[int, float]:
        """Rows whose norm is over 10 times the median norm, and their share of the squared norm, 0 to 1.

        Both are exact but for rows within 0.2 % of the bound, and the share to 0.4 %.
        """
        low, high = bin_edges(self.norms[:, 0])
        with np.errstate(all="ignore"):  # squares of the largest float64 have no number
            counts, middle = self.norms[:, 1], np.minimum((low + high) / 2, self.norm_max**2)
            total = float(counts @ middle) if self.count else 0.0
        if not 0 < total < math.inf:
            return 0, 0.0
        over = low >= (HEAVY * self.norm_quantile(0.5)) ** 2
        return int(counts[over].sum()), float(counts[over] @ middle[over]) / total

    @property
    def constant(self) -> int:
        """Places that never change."""
        return int(np.count_nonzero(self.variance == 0)) if self.count else 0

    def as_dict(self) -> dict[str, Any]:
        """All but the arrays, as plain values."""
        return {
            "kind": "float",
            "dtype": self.dtype,
            "count": self.count,
            "left_out": self.left_out,
            **{k: plain(getattr(self, k)) for k in NUMBERS},
            "norm_quantiles": {str(q): plain(self.norm_quantile(q)) for q in QUANTILES},
            "total_variance": plain(float(self.variance.sum())),
            "outliers": {str(i): times for i, times in self.outliers.items()},
            "constant": self.constant,
            "heavy": {"rows": self.heavy[0], "share": plain(self.heavy[1])},
            "nans": self.nans,
            "infs": self.infs,
            "first_nan": self.first_nan,
            "first_inf": self.first_inf,
        }


@dataclass(frozen=True)
class IntStats:
    """Of an integer or boolean field.  ``distinct`` is an estimate unless ``exact``."""

    dtype: str
    count: int
    min: int | None
    max: int | None
    distinct: int
    exact: bool

    def as_dict(self) -> dict[str, Any]:
        return {"kind": "int", **vars(self)}


def plain(value: float) -> float | None:
    """A number that JSON has."""
    return value if math.isfinite(value) else None
