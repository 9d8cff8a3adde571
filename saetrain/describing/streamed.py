"""A latent with more entries than fit into memory: described portion by portion of its rows, to the same bits.

::

    look 1    moments, documents, positions; activations counted by their upper 15 bits
    look 2    activations counted by their lower 16 bits where a quantile lies, which makes them exact; tokens
    look 3    examples of each portion; those of the whole are among them
    look 4    the entries around the examples

Counts and samples merge exactly: the smallest priorities of a whole are among the smallest of its portions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saetrain.describing import samples, statistics
from saetrain.describing.entries import Context, Entries
from saetrain.describing.slots import BIN_SHIFT, HISTOGRAM_BINS, POSITION_BINS, QUANTILES, Arrays

UPPER, LOWER = 1 << 15, 1 << 16  # values of the parts of a positive float32's bits
Look = Callable[[], Iterator[Entries]]


def describe_streamed(look: Look, context: Context, counts: Any, out: Arrays) -> None:
    """Fill the rows of all arrays that are about one latent with `counts` [1] entries; `look` yields its portions."""
    found, upper = _first_look(look, context)
    maximum = found["stat/max"]
    places = statistics.places(counts, context.slots.intervals)[0]
    ordered, tokens = _second_look(look, context, upper, places, maximum)
    found |= tokens | {"shape/quantile": ordered[:, : len(QUANTILES)], "shape/histogram": _histogram(upper, maximum)}
    for name, values in found.items():
        out[name][...] = values
    edges = ordered[:, len(QUANTILES) :]
    pool = np.sort(context.pool)

    def examples(entries: Entries) -> NDArray[np.bool_]:
        kept = np.isin(entries.row, pool)
        chosen = samples.choose(entries, context, maximum, edges).entry
        kept[chosen[chosen >= 0]] = True
        return kept

    rows = samples.choose(_some(look, examples), context, maximum, edges).row
    wanted = np.sort(rows[rows >= 0])

    def around(entries: Entries) -> NDArray[np.bool_]:
        low, high = entries.row - context.after, entries.row + context.before
        return np.searchsorted(wanted, low) < np.searchsorted(wanted, high, side="right")

    near = _some(look, around)
    place = np.minimum(np.searchsorted(near.row, rows), len(near.row) - 1)
    entry = np.where((rows >= 0) & (near.row[place] == rows), place, -1)
    samples.contexts(near, context, samples.Chosen(rows, entry), out)


def _first_look(look: Look, context: Context) -> tuple[Arrays, NDArray[np.int64]]:
    found: Arrays | None = None
    upper, positions = np.zeros(UPPER, np.int64), np.zeros((1, POSITION_BINS), np.int64)
    documents, runs, sums = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    for entries in look():
        found = statistics.moments(entries, found)
        upper = upper + np.bincount(entries.value.view(np.uint32) >> 16, minlength=UPPER)
        positions = positions + statistics.positions(entries, context)
        here, which, count = np.unique(entries.document, return_inverse=True, return_counts=True)
        if goes_on := bool(len(documents) and documents[-1] == here[0]):
            runs[-1] += count[0]
        documents, runs = np.append(documents, here[goes_on:]), np.append(runs, count[goes_on:])
        if entries.effect is not None:  # added one after the other, as if there had been no cut
            carried = sums[-1:] if goes_on else np.zeros(1)
            added = np.bincount(np.append(0, which), np.append(carried, entries.effect))
            sums = np.append(sums[: len(sums) - goes_on], added)
    assert found is not None  # it has entries
    of = np.zeros(len(runs), np.int64)
    found |= statistics.densities(1, of, runs, documents, context)
    if len(sums):
        found |= statistics.mean_effects(1, of, sums, documents, context)
    return found | {"shape/position": positions}, upper


def _second_look(
    look: Look, context: Context, upper: NDArray[np.int64], places: NDArray[np.int64], maximum: NDArray[np.float32]
) -> tuple[NDArray[np.float32], Arrays]:
    """The activations at some places of their order, float32 [1, places]; and the top tokens."""
    ends = np.cumsum(upper)
    bins = np.searchsorted(ends, places, side="right")
    lower = {int(b): np.zeros(LOWER, np.int64) for b in bins}
    vocabulary = 1 << context.token_bits if context.has_tokens else 0
    held, total = np.zeros(vocabulary, np.int64), np.zeros(vocabulary, np.int64)
    for entries in look():
        bits = entries.value.view(np.uint32)
        for b, count in lower.items():
            count += np.bincount(bits[bits >> 16 == b] & 0xFFFF, minlength=LOWER)
        if entries.token is not None:
            ids, back = np.unique(entries.token, return_inverse=True)
            held[ids] += np.bincount(back)
            np.add.at(total, entries.token, statistics.fixed(entries.value, np.repeat(maximum, entries.counts)))
    inner = places - (ends - upper)[bins]
    low = [int(np.searchsorted(np.cumsum(lower[int(b)]), i, side="right")) for b, i in zip(bins, inner, strict=True)]
    values = ((bins.astype(np.uint32) << 16) | np.array(low, np.uint32)).view(np.float32)
    token = np.flatnonzero(held)
    tokens = statistics.top_tokens(1, np.zeros(len(token), int), token, held[token], total[token], context, maximum)
    return values[None], tokens


def _histogram(upper: NDArray[np.int64], maximum: NDArray[np.float32]) -> NDArray[np.int64]:
    """The bins of `statistics.shape`, from counts by the upper bits."""
    absolute = upper.reshape(-1, 1 << (BIN_SHIFT - 16)).sum(axis=1)
    place = np.arange(len(absolute)) - int(maximum.view(np.uint32)[0] >> BIN_SHIFT) + HISTOGRAM_BINS - 1
    inside = place < HISTOGRAM_BINS
    return np.bincount(np.maximum(place[inside], 0), absolute[inside], HISTOGRAM_BINS).astype(np.int64)[None]


def _some(look: Look, choice: Callable[[Entries], NDArray[np.bool_]]) -> Entries:
    """The entries that a mask chooses from each portion."""
    parts = []
    for entries in look():
        kept = choice(entries)
        token = None if entries.token is None else entries.token[kept]
        parts.append(
            replace(
                entries,
                counts=np.array([kept.sum()]),
                row=entries.row[kept],
                value=entries.value[kept],
                document=entries.document[kept],
                token=token,
                word=entries.word[kept],
            )
        )
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in ("row", "value", "document", "word")
    }
    return replace(parts[0], counts=np.array([len(joined["row"])]), token=None, **joined)
