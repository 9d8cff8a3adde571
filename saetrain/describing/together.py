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
MOST_PAIRS = 1 << 19  # expanded at once, or those of one latent
TABLE = 4  # times as many possible pairs as there are: beyond, a table of them is slower than sorting


@dataclass(frozen=True)
class Sample:
    """Active latents of the rows of a sample, row by row, latents ascending within each."""

    latents: int  # of the dictionary
    counts: I64  # [rows]
    latent: NDArray[np.int32]  # [n]
    document: I64  # [rows], ascending

    @property
    def rows(self) -> int:
        return len(self.counts)


def together(sample: Sample, lo: int, hi: int) -> Arrays:
    """The arrays of latents [lo, hi)."""
    out: Arrays = {
        "together/id": np.full((hi - lo, TOGETHER), -1, np.int64),
        "together/count": np.zeros((hi - lo, TOGETHER), np.int64),
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
        entries = mine[ends[start] : ends[stop]]
        _fill(sample, active, lo, row[entries], sample.latent[entries].astype(np.int64), out)
        start = stop
    return out


def _fill(sample: Sample, active: I64, lo: int, row: I64, latent: I64, out: Arrays) -> None:
    """Fill in latents whose entries are these: all of theirs, latent by latent, rows ascending."""
    if not len(row):
        return
    lowest, size = int(latent[0]), (int(latent[-1]) - int(latent[0]) + 1) * sample.latents
    sizes, begins = sample.counts[row], np.cumsum(sample.counts) - sample.counts
    word: Any = np.int32 if max(size, len(sample.latent), int(sizes.sum())) < 2**31 else np.int64
    keys: NDArray[Any] = np.arange(int(sizes.sum()), dtype=word)
    keys += np.repeat((begins[row] - (np.cumsum(sizes) - sizes)).astype(word), sizes)
    keys = np.take(sample.latent, keys).astype(word)
    keys += np.repeat(((latent - lowest) * sample.latents).astype(word), sizes)  # a number of each pair
    pair, count = _counted(keys, size)
    f, g = np.divmod(pair.astype(np.int64), sample.latents)
    f += lowest
    pair, count, f, g = (found[f != g] for found in (pair, count, f, g))
    expected = active[f] * active[g] / sample.rows
    pmi = np.log2(count / expected)
    order = np.lexsort((g, -pmi * np.sqrt(count), f))
    order = order[pmi[order] > 0]
    order = order[ranks(f[order]) < TOGETHER]
    if not len(order):
        return
    at = f[order] - lo, ranks(f[order])
    share = count[order] / active[f[order]]
    place = _places(keys, pair[order], size)
    inside = np.flatnonzero(place >= 0)
    entry = np.searchsorted(np.cumsum(sizes), inside, side="right")
    low, high = _interval(sample, row, latent, entry, place[inside].astype(np.int64), f[order], share)
    found = {"id": g, "count": count, "expected": expected, "pmi": pmi}
    for name, values in {**{n: v[order] for n, v in found.items()}, "share": share, "low": low, "high": high}.items():
        out[f"together/{name}"][at] = values


def _counted(keys: NDArray[Any], size: int) -> tuple[I64, I64]:
    """The distinct keys, ascending, and their counts; by a table of all `size` possible ones unless most are absent."""
    if size > TABLE * len(keys):
        return np.unique(keys, return_counts=True)
    table = np.bincount(keys, minlength=size)
    found = np.flatnonzero(table)
    return found, table[found]


def _places(keys: NDArray[Any], wanted: I64, size: int) -> NDArray[Any]:
    """The place of each key among the distinct `wanted` ones, -1 if it is none of them."""
    if size > TABLE * len(keys):
        order = np.argsort(wanted)
        place = np.minimum(np.searchsorted(wanted[order], keys), len(wanted) - 1)
        return np.where(wanted[order][place] == keys, order[place], -1)
    table = np.full(size, -1, np.int32)
    table[wanted] = np.arange(len(wanted))
    return np.take(table, keys)


def _interval(
    sample: Sample, row: I64, latent: I64, entry: I64, pair: I64, f: I64, share: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Of the shares of some pairs, whose first latents are `f`: each `entry` (of row and latent) is one of a `pair`."""
    document = sample.document[row]
    new = np.append(True, (latent[1:] != latent[:-1]) | (document[1:] != document[:-1]))
    begins = np.flatnonzero(new)
    size = np.diff(np.append(begins, len(row))).astype(np.float64)  # of each (latent, document)
    both = pair * len(size) + (np.cumsum(new) - 1)[entry]
    held, times = np.unique(both, return_counts=True)
    pair, group = np.divmod(held, len(size))
    squares = np.bincount(pair, times.astype(np.float64) ** 2, minlength=len(f))
    cross = np.bincount(pair, times * size[group], minlength=len(f))
    of, lowest = latent[begins], int(latent[0])
    everywhere = np.bincount(of - lowest, size * size)[f - lowest]
    clusters = np.bincount(of - lowest)[f - lowest]
    rows = np.bincount(of - lowest, size)[f - lowest]
    return clustered_interval(share, squares, cross, everywhere, rows, clusters)
