"""Which latents are active together, on a uniform sample of rows.

For latents f and g active on n_f and n_g of the n rows of the sample, and on c rows both:

    expected    n_f n_g / n             what chance alone would give
    pmi         log2(c / expected)      pointwise mutual information
    share       c / n_f                 of f's rows, those with g; its interval takes documents as clusters

Kept are the g of largest pmi sqrt(c), which asks for a strong tie and for evidence of it; of equal ones the lower g.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saetrain.describing.slots import Arrays
from saetrain.describing.sorting import ranks
from saetrain.describing.statistics import clustered_interval

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
    active, lines = np.bincount(sample.latent, minlength=sample.latents), _lines(sample)
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
        _fill(sample, active, lines, lo, row[entries], sample.latent[entries].astype(np.int64), out)
        start = stop
    return out


class Lines(NamedTuple):
    """The active latents of each row as lines of one width, which numpy copies as wholes; the last is filled up."""

    latent: NDArray[np.int32]  # [lines, width]; `Sample.latents` for none
    first: I64  # [rows], first line of each row
    held: I64  # [rows], lines of each row


def _lines(sample: Sample) -> Lines:
    width = max(round(len(sample.latent) / max(sample.rows, 1)), 1)
    count = -(-sample.counts // width)
    first = np.cumsum(count) - count
    latent = np.full((int(count.sum()), width), sample.latents, np.int32)
    skipped = first * width - (np.cumsum(sample.counts) - sample.counts)  # places that are left free before each row
    latent.reshape(-1)[np.arange(len(sample.latent)) + np.repeat(skipped, sample.counts)] = sample.latent
    return Lines(latent, first, count)


def _fill(sample: Sample, active: I64, lines: Lines, lo: int, row: I64, latent: I64, out: Arrays) -> None:
    """Fill in latents whose entries are these: all of theirs, latent by latent, rows ascending."""
    if not len(row):
        return
    lowest, across = int(latent[0]), sample.latents + 1
    size = (int(latent[-1]) - lowest + 1) * across
    of, line = np.arange(len(row)), lines.first[row]  # entry of each line, and its number
    if len(lines.latent) > sample.rows:
        held = lines.held[row]
        of = np.repeat(of, held)
        line = line[of] + np.arange(len(of)) - np.repeat(np.cumsum(held) - held, held)
    keys: NDArray[Any] = lines.latent[line]  # becomes the number of each pair
    if size >= 2**31:
        keys = keys.astype(np.int64)
    keys += ((latent - lowest) * across).astype(keys.dtype)[of, None]
    pair, count = _counted(keys.reshape(-1), size)
    f, g = np.divmod(pair, across)
    f += lowest
    chance = active[f] * np.append(active, 0)[g] / sample.rows
    kept = (count > chance) & (f != g) & (g < sample.latents)  # others have no positive pmi
    pair, count, f, g, expected = (found[kept] for found in (pair, count, f, g, chance))
    pmi = np.log2(count / expected)
    order = _largest(f - lowest, pmi, pmi * np.sqrt(count))
    if not len(order):
        return
    pair, count, f, g, expected, pmi = (found[order] for found in (pair, count, f, g, expected, pmi))
    share = count / active[f]
    inside, place = _places(keys.reshape(-1), pair, size)
    low, high = _interval(sample, row, latent, of[inside // keys.shape[1]], place, f, share)
    found = {"id": g, "count": count, "expected": expected, "pmi": pmi, "share": share, "low": low, "high": high}
    for name, values in found.items():
        out[f"together/{name}"][f - lo, ranks(f)] = values


def _largest(f: I64, pmi: NDArray[Any], score: NDArray[Any]) -> I64:
    """The pairs of positive pmi and largest score of each latent f, in that order; pairs come in order of (f, g)."""
    positive = np.flatnonzero(pmi > 0)
    f, score = f[positive], score[positive]
    # Only scores that reach the last kept one, rounded as it is, need to be ordered.
    rounded = score.astype(np.float32).view(np.uint32)
    keys = np.sort((f.astype(np.uint64) << np.uint64(32)) | (np.uint64(0xFFFFFFFF) - rounded))
    held = np.bincount(f)
    last = keys[np.maximum(np.cumsum(held) - held + np.minimum(held, TOGETHER) - 1, 0)] if len(f) else keys
    reach = np.flatnonzero(rounded >= np.uint64(0xFFFFFFFF) - (last[f] & np.uint64(0xFFFFFFFF)))
    order = reach[np.lexsort((-score[reach], f[reach]))]  # stable: of equal ones the lower g
    return positive[order[ranks(f[order]) < TOGETHER]]


def _counted(keys: NDArray[Any], size: int) -> tuple[I64, I64]:
    """The distinct keys, ascending, and their counts; by a table of all `size` possible ones unless most are absent."""
    if size > TABLE * len(keys):
        found, count = np.unique(keys, return_counts=True)
        return found.astype(np.int64), count
    table = np.bincount(keys, minlength=size)
    found = np.flatnonzero(table)
    return found, table[found]


def _places(keys: NDArray[Any], wanted: I64, size: int) -> tuple[I64, I64]:
    """Which of the keys are among the distinct `wanted` ones, and the place of each there."""
    order = np.argsort(wanted)
    if size > TABLE * len(keys):
        at = np.minimum(np.searchsorted(wanted[order], keys), len(wanted) - 1)
        inside = np.flatnonzero(wanted[order][at] == keys)
    else:
        table = np.zeros(size, bool)
        table[wanted] = True
        inside = np.flatnonzero(np.take(table, keys))
    return inside, order[np.searchsorted(wanted[order], keys[inside])]


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
