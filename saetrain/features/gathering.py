"""Gather the entries of a range of latents from the codes of all blocks.

::

    block 0     f0: r3 r7        f1: r2           f2: -
    block 1     f0: r9           f1: r8 r12       f2: r10
    entries     f0: r3 r7 r9     f1: r2 r8 r12    f2: r10

Runs of blocks arrive in row order, so an entry's place follows from counts alone, and nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from actshuffle import Dataset, open_dataset, priorities
from actshuffle.errors import ConservationError
from actshuffle.jobs import FolderJob
from actshuffle.units import counted
from saetrain.describing.entries import Context, Entries, key
from saetrain.features import codes
from saetrain.features.blueprint import Plan

I64 = NDArray[np.int64]
Held = tuple[int, codes.Run]  # the number of a block, and its run
BYTES = 96  # of memory an entry takes while its latents are described


def totals(job: FolderJob, plan: Plan, lo: int, hi: int) -> I64:
    """Entries of each of latents [lo, hi) over all blocks."""
    found = np.zeros(hi - lo, np.int64)
    for block in range(plan.blocks):
        for name, first, last in plan.code_objects(block):
            a, b = max(lo, first), min(hi, last)
            if a < b:
                found[a - lo : b - lo] += codes.read_counts(job, name, last - first, plan.granule, a - first, b - first)
    return found


def pieces(plan: Plan, counts: I64, lo: int, most: int, widest: int, each: int = 0) -> list[tuple[int, int]]:
    """Ranges of latents with at most `most` entries and `widest` latents; one latent may have more entries.

    Each latent counts as `each` entries more, where its own arrays take memory.  None crosses the edge of a shard.
    """
    ends = np.concatenate([[0], np.cumsum(counts + each)])
    edges = [edge - lo for edge in plan.shard_edges() if lo < edge < lo + len(counts)] + [len(counts)]
    found, start = [], 0
    for edge in edges:
        while start < edge:
            stop = int(np.searchsorted(ends, ends[start] + most, side="right")) - 1
            stop = min(max(stop, start + 1), start + widest, edge)
            found.append((lo + start, lo + stop))
            start = stop
    return found


def gather(job: FolderJob, context: Context, lo: int, hi: int, counts: I64) -> Entries:
    """The entries of latents [lo, hi), which have `counts` of them."""
    found = portions(job, context, lo, hi, counts, int(counts.sum()) + 1)
    plan = Plan.of(job)
    return next(found, None) or _join(plan, open_dataset(plan.store, incomplete=True), context, lo, [], hi - lo)


def portions(job: FolderJob, context: Context, lo: int, hi: int, counts: I64, most: int) -> Iterator[Entries]:
    """The same in portions of consecutive blocks, each with at most `most` entries, or of one block."""
    plan = Plan.of(job)
    data = open_dataset(plan.store, incomplete=True)
    for runs in runs_of(job, lo, hi, counts, most):
        yield _join(plan, data, context, lo, runs, hi - lo)


def runs_of(job: FolderJob, lo: int, hi: int, counts: I64, most: int) -> Iterator[list[Held]]:
    """The runs of latents [lo, hi), which have `counts` entries, with the numbers of their blocks, in portions."""
    plan, seen = Plan.of(job), np.zeros(hi - lo, np.int64)
    held: list[Held] = []
    for block in range(plan.blocks):
        name, first, last = next(o for o in plan.code_objects(block) if o[1] <= lo < o[2])
        run = codes.read(job, name, last - first, plan.granule, lo - first, hi - first, block=block, first=first)
        if held and sum(len(other.rows) for _, other in held) + len(run.rows) > most:
            yield held
            held = []
        seen += run.counts
        if (seen > counts).any():
            raise ConservationError(f"{name} holds more entries of latents {lo:,} to {hi - 1:,} than were counted")
        if len(run.rows):
            held.append((block, run))
    if held:
        yield held
    if (seen != counts).any():
        raise ConservationError(
            f"latents {lo:,} to {hi - 1:,} have {counted(int(counts.sum()), 'entry', 'entries')} by their "
            "counts, and fewer in the blocks"
        )


def keys_of(plan: Plan, runs: list[Held], latents: int) -> I64:
    """Latent and row of each entry as one number, ascending, as `Entries.keys`."""
    counts = _counts(runs, latents)
    row = np.empty(int(counts.sum()), np.int64)
    for block, run, to in _placed(runs, counts):
        row[to] = plan.block(block)[0] + run.rows.astype(np.int64)
    return key(np.repeat(np.arange(latents), counts), row)


def _counts(runs: list[Held], latents: int) -> I64:
    return sum((run.counts.astype(np.int64) for _, run in runs), np.zeros(latents, np.int64))


def _placed(runs: list[Held], counts: I64) -> Iterator[tuple[int, codes.Run, I64]]:
    """Runs of blocks in the order of rows, and where their entries belong; each is let go when it was used."""
    fill = np.cumsum(counts) - counts
    while runs:
        block, run = runs.pop(0)
        here = run.counts.astype(np.int64)
        to = np.repeat(fill - (np.cumsum(here) - here), here)
        to += np.arange(len(to))
        fill += here
        yield block, run, to


def _join(plan: Plan, data: Dataset, context: Context, lo: int, runs: list[Held], latents: int) -> Entries:
    """Entries of runs of blocks, which come in the order of rows."""
    counts = _counts(runs, latents)
    n = int(counts.sum())
    row, value = np.empty(n, np.int64), np.empty(n, np.float32)
    document, word = np.empty(n, np.int32), np.empty(n, np.uint64)
    token = np.empty(n, np.uint32) if plan.token is not None else None
    effect = np.empty(n, np.float32) if plan.gradient is not None else None
    for block, run, to in _placed(runs, counts):
        start, stop = plan.block(block)
        row[to] = start + run.rows.astype(np.int64)
        value[to] = run.values
        word[to] = priorities(plan.seed, start, stop)[run.rows]
        document[to] = documents_of(context.documents, start, stop)[run.rows]
        if effect is not None:
            effect[to] = run.effects
        if token is not None:
            tokens = data.read(str(plan.token), start, stop).astype(np.int64) - context.token_low
            token[to] = tokens.astype(np.uint32)[run.rows]
    return Entries(lo, counts, row, value, document, token, word, effect)


def documents_of(starts: I64, first: int, last: int) -> NDArray[np.int32]:
    """Numbers of the documents of rows [first, last)."""
    a = int(np.searchsorted(starts, first, side="right")) - 1
    b = int(np.searchsorted(starts, last, side="left"))
    edges = np.clip(starts[a : b + 1], first, last)
    return np.repeat(np.arange(a, b, dtype=np.int32), np.diff(edges))
