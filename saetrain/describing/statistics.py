"""Statistics of each latent from its entries.

Sums are taken one entry after the other in the order of rows, in float64, so their bits do not depend on how the work
was cut.  Bins are cut by the bits of the float, so that a count depends on no rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saetrain.describing.entries import Context, Entries
from saetrain.describing.slots import BIN_SHIFT, HISTOGRAM_BINS, POSITION_BINS, QUANTILES, TOP_TOKENS, Arrays
from saetrain.describing.sorting import are_short, ordered, ranks, sort_each

Z = 1.959963984540054  # of a 95% interval
_HALF = np.uint64(31)  # bits of a positive float32


def moments(entries: Entries, before: Arrays | None = None) -> Arrays:
    """count, sums of powers, min, max and where the max is first.

    `before` holds the same of earlier rows of one latent, which these follow.
    """
    n, latent, starts = entries.latents, entries.latent, entries.starts
    value = entries.value.astype(np.float64)
    out: Arrays = {"stat/count": entries.counts}
    power = value
    for name in ("sum", "sum2", "sum3", "sum4"):
        if before is None:
            out[f"stat/{name}"] = np.bincount(latent, power, minlength=n)
        else:  # one entry after the other, as if there had been no cut
            out[f"stat/{name}"] = np.bincount(np.zeros(len(power) + n, int), np.append(before[f"stat/{name}"], power))
        if name != "sum4":
            power = power * value
    out["stat/min"], out["stat/max"] = (np.full(n, np.nan, np.float32) for _ in range(2))
    out["stat/max_row"] = np.full(n, -1, np.int64)
    alive = entries.counts > 0
    if alive.any():
        out["stat/min"][alive] = np.minimum.reduceat(entries.value, starts[:-1][alive])
        out["stat/max"][alive] = np.maximum.reduceat(entries.value, starts[:-1][alive])
        first = np.flatnonzero(entries.value == np.repeat(out["stat/max"], entries.counts))
        out["stat/max_row"][latent[first[::-1]]] = entries.row[first[::-1]]  # the first is written last
    if before is not None:
        out["stat/count"] = entries.counts + before["stat/count"]
        out["stat/min"] = np.fmin(out["stat/min"], before["stat/min"])
        earlier = before["stat/max"] >= out["stat/max"]
        for name in ("stat/max", "stat/max_row"):
            out[name] = np.where(earlier, before[name], out[name])
    return out


def documents(entries: Entries, context: Context) -> Arrays:
    """documents, density and its interval, from the runs of entries in one document."""
    begins = np.flatnonzero(new_document(entries))
    run = np.diff(np.append(begins, len(entries.row)))
    return densities(entries.latents, entries.latent[begins], run, entries.document[begins], context)


def densities(n: int, of: NDArray[Any], run: NDArray[Any], document: NDArray[Any], context: Context) -> Arrays:
    """From the active rows `run` of latents `of` in documents, in the order of both."""
    rows, sizes = context.rows, np.diff(context.documents)
    run, size = run.astype(np.float64), sizes[document].astype(np.float64)
    density = np.bincount(of, run, minlength=n) / rows
    squares, cross = np.bincount(of, run * run, minlength=n), np.bincount(of, run * size, minlength=n)
    everywhere = float((sizes.astype(np.float64) ** 2).sum())
    low, high = clustered_interval(density, squares, cross, everywhere, rows, len(sizes))
    found = np.bincount(of, minlength=n)
    return {"stat/documents": found, "stat/density": density, "stat/density_low": low, "stat/density_high": high}


def effects(entries: Entries, context: Context) -> Arrays:
    """The mean effect on the loss and its interval; nothing where the store has no gradients."""
    if entries.effect is None:
        return {}
    new = new_document(entries)
    begins = np.flatnonzero(new)
    sums = np.bincount(np.cumsum(new) - 1, entries.effect, minlength=len(begins))
    return mean_effects(entries.latents, entries.latent[begins], sums, entries.document[begins], context)


def mean_effects(n: int, of: NDArray[Any], sums: NDArray[Any], document: NDArray[Any], context: Context) -> Arrays:
    """From the summed effects of latents `of` in documents, in the order of both."""
    sizes = np.diff(context.documents).astype(np.float64)
    total, squares = np.bincount(of, sums, minlength=n), np.bincount(of, sums * sums, minlength=n)
    cross = np.bincount(of, sums * sizes[document], minlength=n)
    mean = total / context.rows
    half = clustered_half(mean, squares, cross, float((sizes * sizes).sum()), context.rows, len(sizes))
    return {"loss/effect": mean, "loss/low": mean - half, "loss/high": mean + half}


def clustered_half(
    mean: NDArray[Any], squares: NDArray[Any], cross: NDArray[Any], everywhere: float, rows: float, clusters: int
) -> NDArray[Any]:
    """Half the width of the 95% interval of means = sum e_d / sum n_d, with documents d as clusters.

    The variance is D / (D - 1) sum (e_d - mean n_d)^2 / rows^2, as in `clustered_interval`.  `squares` is sum e_d^2,
    `cross` is sum e_d n_d, `everywhere` sum n_d^2.  NaN where there are fewer than two documents.
    """
    spread = np.maximum(squares - 2 * mean * cross + mean * mean * everywhere, 0)
    half: NDArray[Any] = Z * np.sqrt(spread * clusters / (clusters - 1 if clusters > 1 else np.nan)) / rows
    return half


def clustered_interval(
    p: NDArray[Any], squares: NDArray[Any], cross: NDArray[Any], everywhere: Any, rows: Any, clusters: Any
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Wilson's 95% interval of shares p, with the number of rows that documents as clusters are worth.

    With c_d active rows among the n_d of document d, the variance of p = sum c_d / sum n_d is
    D / (D - 1) sum (c_d - p n_d)^2 / rows^2 (Cochran, Sampling Techniques, 1977, section 3.12), and
    n = p (1 - p) / variance, at most `rows`, and `clusters` where p is 0 or 1.  `squares` is sum c_d^2, `cross` is
    sum c_d n_d, `everywhere` sum n_d^2.  NaN where there are fewer than two documents.
    """
    spread = np.maximum(squares - 2 * p * cross + p * p * everywhere, 0)
    few = np.asarray(clusters) < 2
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = spread * clusters / np.where(few, np.nan, clusters - np.int64(1)) / np.square(rows, dtype=np.float64)
        worth = np.where((p > 0) & (p < 1), np.minimum(p * (1 - p) / variance, rows), clusters)
    centre = (p + Z * Z / (2 * worth)) / (1 + Z * Z / worth)
    half = Z / (1 + Z * Z / worth) * np.sqrt(p * (1 - p) / worth + Z * Z / (4 * worth * worth))
    low = np.where(p > 0, np.maximum(centre - half, 0), 0.0)
    high = np.where(p < 1, np.minimum(centre + half, 1), 1.0)
    return np.where(few, np.nan, low), np.where(few, np.nan, high)


def new_document(entries: Entries) -> NDArray[np.bool_]:
    """True for each entry that is the first of its latent in its document."""
    new = np.ones(len(entries.row), bool)
    new[1:] = entries.document[1:] != entries.document[:-1]
    new[entries.starts[:-1][entries.counts > 0]] = True
    return new


def shape(entries: Entries, context: Context, maximum: NDArray[np.float32]) -> Arrays:
    """Histogram, and counts by position in the document."""
    n, latent = entries.latents, entries.latent
    top = (np.nan_to_num(maximum).view(np.uint32) >> BIN_SHIFT).astype(np.int64)
    bins = (entries.value.view(np.uint32) >> BIN_SHIFT).astype(np.int64)
    bins += np.repeat(np.arange(n) * HISTOGRAM_BINS - top + HISTOGRAM_BINS - 1, entries.counts)
    np.maximum(bins, latent * HISTOGRAM_BINS, out=bins)
    return {
        "shape/histogram": np.bincount(bins, minlength=n * HISTOGRAM_BINS).reshape(n, -1),
        "shape/position": positions(entries, context),
    }


def positions(entries: Entries, context: Context) -> NDArray[np.int64]:
    """Entries of each latent by octave of 1 + position, int64 [latents, bins]."""
    place = entries.row - context.documents[entries.document] + 1
    octave = np.minimum(np.frexp(place.astype(np.float64))[1] - 1, POSITION_BINS - 1)
    size = entries.latents * POSITION_BINS
    return np.bincount(entries.latent * POSITION_BINS + octave, minlength=size).reshape(-1, POSITION_BINS)


def places(counts: NDArray[np.int64], intervals: int) -> NDArray[np.int64]:
    """Which of count ordered activations are the quantiles, and the inner edges of equal counts, from 0.

    int64 [latents, quantiles + intervals - 1]: the ceil(q count)-th smallest.
    """
    q = np.concatenate([QUANTILES, np.arange(1, intervals) / intervals])
    return np.maximum(np.ceil(q * counts[:, None]).astype(np.int64) - 1, 0)


def order_statistics(entries: Entries, intervals: int) -> NDArray[np.float32]:
    """The activations at `places`; NaN for dead latents."""
    place = places(entries.counts, intervals) + entries.starts[:-1, None]
    found = np.full(place.shape, np.nan, np.float32)
    alive = entries.counts > 0
    found[alive] = entries.ordered_bits.view(np.float32)[place[alive]]
    return found


def tokens(entries: Entries, context: Context, maximum: NDArray[np.float32]) -> Arrays:
    """The tokens on which each latent is most often active, and what it does there.

    Sorted words of (latent, token, activation) put equal tokens together; `widest` keeps latents few enough for that.
    """
    latent = token = held = total = np.zeros(0, np.int64)
    if entries.token is not None and len(entries.row):
        bits = np.uint64(context.token_bits)
        keys = ((entries.latent.astype(np.uint64) << bits) | entries.token) << _HALF
        keys |= entries.bits
        if are_short(entries.starts):
            keys.sort()
        else:
            sort_each(keys, entries.starts)
        values = (keys & np.uint64(0x7FFFFFFF)).astype(np.uint32).view(np.float32)
        whole = fixed(values, np.repeat(maximum, entries.counts))
        keys >>= _HALF
        begins = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        pair = keys[begins]
        held = np.diff(np.append(begins, len(keys)))
        latent = (pair >> bits).astype(np.int64)
        token = (pair & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
        total = np.add.reduceat(whole, begins)
    return top_tokens(entries.latents, latent, token, held, total, context, maximum)


FIXED = 2.0**31  # units of a latent's largest activation


def fixed(values: NDArray[np.float32], maximum: NDArray[np.float32]) -> NDArray[np.int64]:
    """Activations in whole units of max / 2^31: their sums are the same in any order."""
    return np.rint(values.astype(np.float64) / maximum.astype(np.float64) * FIXED).astype(np.int64)


def top_tokens(
    n: int,
    latent: NDArray[np.int64],
    token: NDArray[np.int64],
    held: NDArray[np.int64],
    total: NDArray[np.int64],
    context: Context,
    maximum: NDArray[np.float32],
) -> Arrays:
    """The most frequent of (latent, token) pairs with `held` rows and activations of `total` units.

    Of equal ones the lower token comes first.
    """
    ids = np.full((n, TOP_TOKENS), -1, np.int64)
    counts = np.zeros((n, TOP_TOKENS), np.int64)
    means = np.full((n, TOP_TOKENS), np.nan, np.float32)
    order = ordered(latent, held.max(initial=0) - held, token)
    place = ranks(latent[order])
    order, place = order[place < TOP_TOKENS], place[place < TOP_TOKENS]
    at = latent[order], place
    ids[at] = token[order] + context.token_low
    counts[at] = held[order]
    means[at] = total[order] / held[order] * (maximum.astype(np.float64)[latent[order]] / FIXED)
    return {"token/id": ids, "token/count": counts, "token/mean": means}


def widest(context: Context) -> int:
    """The most latents whose (latent, token, activation) fit into one word."""
    return 1 << max(33 - context.token_bits, 1)
