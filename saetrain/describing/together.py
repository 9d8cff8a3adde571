"""Which latents are active together, on a uniform sample of rows.

For latents f and g active on n_f and n_g of the n rows of the sample, and on c rows both:

    expected    n_f n_g / n             what chance alone would give
    pmi         log2(c / expected)      pointwise mutual information
    share       c / n_f                 of f's rows, those with g; its interval takes documents as clusters

Kept are the g of largest pmi sqrt(c), which asks for a strong tie and for evidence of it; of equal ones the lower g.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saetrain.describing.slots import Arrays
from saetrain.describing.statistics import clustered_interval, ranks

I64 = NDArray[np.int64]
TOGETHER = 16  # latents kept of each
MOST_PAIRS = 1 << 21  # expanded at once, or those of one latent


@dataclass(frozen=True)
class Sample:
    """Active latents of the rows of a sample, row by row, latents ascending within each."""

    latents: int  # of the dictionary
    counts: I64  # [rows]
    latent: I64  # [n]
    document: I64  # [rows], ascending

    @property
    def rows(self) -> int:
        return len(self.counts)


def together(sample: Sample, lo: int, hi: int) -> Arrays:
    """The arrays of latents [lo, hi)."""
    out: Arrays = {
        "together/id": np.full((hi - lo, TOGETHER), -1, np.int64),
        **{f"together/{name}": np.zeros((hi - lo, TOGETHER), np.int64) for name in ("count",)},
        **{
            f"together/{name}": np.full((hi - lo, TOGETHER), np.nan)
            for name in ("expected", "pmi", "share", "low", "high")
        },
    }
    active = np.bincount(sample.latent, minlength=sample.latents)
    row = np.repeat(np.arange(sample.rows), sample.counts)
    mine = np.flatnonzero((sample.latent >= lo) & (sample.latent < hi))
    mine = mine[np.argsort(sample.latent[mine], kind="stable")]
    pairs = np.concatenate([[0], np.cumsum(sample.counts[row[mine]])])
    ends = np.concatenate([[0], np.cumsum(active[lo:hi])])  # entries before each latent
    start = 0
    while start < hi - lo:
        stop = int(np.searchsorted(pairs[ends], pairs[ends[start]] + MOST_PAIRS, side="right")) - 1
        stop = min(max(stop, start + 1), hi - lo)
        _fill(
            sample, active, lo, row[mine[ends[start] : ends[stop]]], sample.latent[mine[ends[start] : ends[stop]]], out
        )
        start = stop
    return out


def _fill(sample: Sample, active: I64, lo: int, row: I64, latent: I64, out: Arrays) -> None:
    """Fill in latents whose entries are these: all of theirs, latent by latent, rows ascending."""
    if not len(row):
        return
    sizes, begins = sample.counts[row], np.cumsum(sample.counts) - sample.counts
    entry = np.repeat(np.arange(len(row)), sizes)
    other = sample.latent[np.arange(len(entry)) + np.repeat(begins[row] - (np.cumsum(sizes) - sizes), sizes)]
    one = latent[entry]
    keep = one != other
    entry, keys = entry[keep], one[keep] * sample.latents + other[keep]
    pair, count = np.unique(keys, return_counts=True)
    f, g = np.divmod(pair, sample.latents)
    expected = active[f] * active[g] / sample.rows
    pmi = np.log2(count / expected)
    order = np.lexsort((g, -pmi * np.sqrt(count), f))
    order = order[pmi[order] > 0]
    order = order[ranks(f[order]) < TOGETHER]
    if not len(order):
        return
    at = f[order] - lo, ranks(f[order])
    share = count[order] / active[f[order]]
    low, high = _interval(sample, row, latent, entry, keys, pair[order], share)
    found = {"id": g, "count": count, "expected": expected, "pmi": pmi}
    for name, values in {**{n: v[order] for n, v in found.items()}, "share": share, "low": low, "high": high}.items():
        out[f"together/{name}"][at] = values


def _interval(
    sample: Sample, row: I64, latent: I64, entry: I64, keys: I64, pairs: I64, share: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Of the shares of some pairs, given all pairs `keys` of the entries."""
    document = sample.document[row]
    new = np.append(True, (latent[1:] != latent[:-1]) | (document[1:] != document[:-1]))
    begins = np.flatnonzero(new)
    size = np.diff(np.append(begins, len(row))).astype(np.float64)  # of each (latent, document)
    cluster = np.cumsum(new) - 1
    order = np.argsort(pairs, kind="stable")
    place = np.minimum(np.searchsorted(pairs[order], keys), len(pairs) - 1)
    inside = pairs[order][place] == keys
    where, group = order[place[inside]], cluster[entry[inside]]
    both = where * len(size) + group
    held, times = np.unique(both, return_counts=True)
    pair, group = np.divmod(held, len(size))
    squares = np.bincount(pair, times.astype(np.float64) ** 2, minlength=len(pairs))
    cross = np.bincount(pair, times * size[group], minlength=len(pairs))
    of, lowest = latent[begins], int(latent[0])
    f = pairs // sample.latents - lowest
    everywhere = np.bincount(of - lowest, size * size)[f]
    clusters = np.bincount(of - lowest)[f]
    rows = np.bincount(of - lowest, size)[f]
    return clustered_interval(share, squares, cross, everywhere, rows, clusters)
