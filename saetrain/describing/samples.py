"""Which rows stand for a latent: the largest, uniform samples of its intervals, and rows on which it is quiet.

::

    top          the largest activations, at most one of a window of a document; of equal ones the first row
    interval i   activations in the i-th of equal widths of (0, max]: a uniform sample
    part i       activations in the i-th of equal counts, by value: a uniform sample
    random       any activations: a uniform sample
    quiet        rows of the pool on which the latent is not active: a uniform sample

A uniform sample is the entries of smallest priority, without replacement.  It depends on the seed, the latent and the
rows alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saetrain.describing.entries import Context, Entries, key, mixed
from saetrain.describing.slots import NO_ROW, Arrays
from saetrain.describing.sorting import ordered, ranks

I64 = NDArray[np.int64]
CROWD = 4  # activations that are looked at for each example that is wanted
FIRST_LOOK = 32  # rows of the pool that are tried first for a quiet one


class Chosen(NamedTuple):
    """Examples of all latents: `entry` is the number of their entry, -1 for none (an empty slot, or a quiet row)."""

    row: I64  # [latents, slots]
    entry: I64


def choose(entries: Entries, context: Context, maximum: NDArray[np.float32], edges: NDArray[np.float32]) -> Chosen:
    """The examples of latents with these maxima [latents] and inner edges of equal counts [latents, intervals - 1]."""
    slots = context.slots
    entry = np.full((entries.latents, slots.total), -1, np.int64)
    at = 0
    entry[:, : slots.top] = top(entries, context, slots.top)
    at += slots.top
    for interval in (by_width(entries, slots.intervals, maximum), by_count(entries, edges)):
        size = slots.intervals * slots.each
        groups = entries.latent * slots.intervals + interval
        found = smallest(groups, entries.priority, entries.latents * slots.intervals, slots.each)
        entry[:, at : at + size] = found.reshape(entries.latents, size)
        at += size
    entry[:, at : at + slots.random] = smallest(entries.latent, entries.priority, entries.latents, slots.random)
    at += slots.random
    padded = np.append(entries.row, NO_ROW)  # entry -1 is the last
    row = padded[entry]
    row[:, at : at + slots.quiet] = quiet(entries, context, slots.quiet)
    return Chosen(row, entry)


def top(entries: Entries, context: Context, count: int) -> I64:
    """Entries of the largest activations, one of each window, int64 [latents, count]; -1 where there are fewer.

    A few times `count` of a latent's largest activations lie in `count` windows, unless it is active in bursts.  They
    hold the largest of these windows, and those of all other windows are smaller.
    """
    found = np.full((entries.latents, count), -1, np.int64)
    if not len(entries.row) or not count:
        return found
    wanted = CROWD * count
    many = entries.counts > wanted
    bound = np.zeros(entries.latents, np.uint32)
    bound[many] = entries.ordered_bits[entries.starts[1:][many] - wanted]
    entry, begins = _windows(entries, context, bound)
    held = np.bincount(entries.latent[entry[begins]], minlength=entries.latents)
    if (crowded := many & (held < count)).any():
        bound[crowded] = 0
        entry, begins = _windows(entries, context, bound)
    # The largest of a window, and of equal ones the first.
    bits = entries.bits[entry]
    largest = np.maximum.reduceat(bits, begins)
    window = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(entry))))
    is_largest = np.flatnonzero(bits == largest[window])
    entry = entry[is_largest[ranks(window[is_largest]) == 0]]
    latent = entries.latent[entry]
    order = ordered(latent, np.uint64(0x7FFFFFFF) - largest, entry)
    return placed(entry[order], latent[order], entries.latents, count)


def _windows(entries: Entries, context: Context, bound: NDArray[np.uint32]) -> tuple[I64, I64]:
    """Entries that reach their latent's bound, and which of them begin a window of a document."""
    entry = np.flatnonzero(entries.value.view(np.uint32) >= np.repeat(bound, entries.counts))
    latent, document = entries.latent[entry], entries.document[entry]
    window = (entries.row[entry] - context.documents[document]) // context.window
    new = np.ones(len(entry), bool)
    new[1:] = (latent[1:] != latent[:-1]) | (document[1:] != document[:-1]) | (window[1:] != window[:-1])
    return entry, np.flatnonzero(new)


def by_width(entries: Entries, intervals: int, maximum: NDArray[np.float32]) -> I64:
    """The interval of each entry among equal widths of (0, max], from 0; its upper edge belongs to it."""
    share = entries.value.astype(np.float64) * intervals / np.repeat(maximum.astype(np.float64), entries.counts)
    return np.clip(np.ceil(share).astype(np.int64) - 1, 0, intervals - 1)


def by_count(entries: Entries, edges: NDArray[np.float32]) -> I64:
    """The part of each entry among equal counts, from 0: how many of the inner edges are smaller."""
    part = np.zeros(len(entries.row), np.int64)
    for number in range(edges.shape[1]):
        part += entries.value > np.repeat(edges[:, number], entries.counts)
    return part


def smallest(groups: I64, priority: NDArray[np.uint64], count: int, m: int) -> I64:
    """Entries of the m smallest priorities of each of `count` groups, int64 [groups, m]; -1 where there are fewer.

    A group of n entries has about m below m / n of the range; a bound somewhat above that leaves few to sort.  Where
    it left too few, all entries of the group are looked at.
    """
    sizes = np.bincount(groups, minlength=count)
    share = (m + 6 * m**0.5 + 8) / np.maximum(sizes, 1)
    bound = np.where(share < 1, share * 2.0**64, 0).astype(np.uint64)
    bound = np.where(share < 1, bound, np.uint64(2**64 - 1))
    entry = np.flatnonzero(priority <= bound[groups])
    short = np.bincount(groups[entry], minlength=count) < np.minimum(sizes, m)
    if short.any():
        entry = np.flatnonzero((priority <= bound[groups]) | short[groups])
    of = groups[entry]
    order = ordered(of, priority[entry])  # of equal priorities the first row
    return placed(entry[order], of[order], count, m)


def placed(items: I64, groups: I64, count: int, m: int) -> I64:
    """The first m items of each group, which come one group after the other; -1 where there are fewer."""
    found = np.full((count, m), -1, np.int64)
    place = ranks(groups)
    inside = place < m
    found[groups[inside], place[inside]] = items[inside]
    return found


def quiet(entries: Entries, context: Context, count: int) -> I64:
    """Rows of the pool on which each latent is not active, int64 [latents, count].

    The pool is a uniform sample of the rows in random order.  Each latent begins at a place of its own, and takes the
    first quiet rows from there, around the end of the pool.
    """
    pool, found = context.pool, np.full((entries.latents, count), NO_ROW, np.int64)
    begin = (mixed(np.arange(entries.first, entries.first + entries.latents)) % np.uint64(len(pool))).astype(np.int64)
    left, look = np.arange(entries.latents), min(max(FIRST_LOOK, 2 * count), len(pool))
    keys = entries.keys
    while len(left):
        tried = pool[(begin[left, None] + np.arange(look)) % len(pool)]
        wanted = key(left[:, None], tried)
        place = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
        silent = keys[place] != wanted if len(keys) else np.ones(wanted.shape, bool)
        enough = (silent.sum(axis=1) >= count) | (look == len(pool))
        of, at = np.nonzero(silent & enough[:, None])
        found[left] = np.where(enough[:, None], placed(tried[of, at], of, len(left), count), found[left])
        left, look = left[~enough], min(8 * look, len(pool))
    return found


def contexts(entries: Entries, context: Context, chosen: Chosen, arrays: Arrays) -> None:
    """Write into `arrays` the examples, and the latent's own activations on the rows around each of them.

    Of the rows from `before` before to `after` after an example, in its document, the largest activations are kept, in
    the order of rows; of equal ones the first.
    """
    offsets, values = arrays["context/offset"], arrays["context/value"]
    arrays["example/row"][...] = chosen.row
    arrays["example/value"][...] = np.append(entries.value, np.float32(0))[chosen.entry]
    latent, slot = np.nonzero(chosen.row != NO_ROW)
    if not len(latent) or not len(entries.row):
        return
    row = chosen.row[latent, slot]
    document = np.searchsorted(context.documents, row, side="right") - 1
    low = np.maximum(row - context.before, context.documents[document])
    high = np.minimum(row + context.after + 1, context.documents[document + 1])
    keys = entries.keys
    first = np.searchsorted(keys, key(latent, low))
    size = np.searchsorted(keys, key(latent, high)) - first
    for part in _parts(size, 1 << 20):
        _fill(entries, offsets, values, latent[part], slot[part], row[part], first[part], size[part])


def _parts(sizes: I64, most: int) -> list[slice]:
    """Consecutive parts of about `most` in sum."""
    ends = np.searchsorted(np.cumsum(sizes), np.arange(most, int(sizes.sum()) + most, most), side="right")
    edges = np.unique(np.concatenate([[0], ends, [len(sizes)]]))
    return [slice(a, b) for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]


def _fill(
    entries: Entries,
    offsets: NDArray[Any],
    values: NDArray[Any],
    latent: I64,
    slot: I64,
    row: I64,
    first: I64,
    size: I64,
) -> None:
    example = np.repeat(np.arange(len(size)), size)
    place = ranks(example)
    entry = place + np.repeat(first, size)
    order = ordered(example, np.uint64(0x7FFFFFFF) - entries.bits[entry], place)
    kept = np.sort(order[ranks(example[order]) < offsets.shape[-1]])
    example, entry = example[kept], entry[kept]
    at = latent[example], slot[example], ranks(example)
    offsets[at] = entries.row[entry] - row[example]
    values[at] = entries.value[entry]
