"""Objects of codes: the active entries of a block of rows and a range of latents, grouped by latent, rows ascending.

::

    offsets   <u8 [granules + 1]     entries before each granule; the last is their number n
    crc       <u4 [granules]         CRC-32 of the granule's counts, values, rows and effects
    counts    <u4 [latents]          entries of each latent
    values    <f4 [n]                activations
    rows      <u2 [n]                row in the block
    effects   <f4 [n]                activation times <decoder row, gradient>, where the store has gradients

A range of latents is four range reads.  Every read compares what it got with the checksum, so that damage is found
before it is counted, and is named: the object, the block, the latents.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actshuffle.errors import ConservationError
from actshuffle.jobs import FolderJob
from saetrain.features.blueprint import Plan

MOST_BLOCK_ROWS = 1 << 16  # what <u2 can number


@dataclass(frozen=True)
class Run:
    """Entries of a range of latents in one block."""

    counts: NDArray[np.uint32]  # [latents]
    rows: NDArray[np.uint16]  # [n], row in the block
    values: NDArray[np.float32]  # [n]
    effects: NDArray[np.float32] | None  # [n]

    @property
    def arrays(self) -> list[NDArray[Any]]:
        """The arrays of one number an entry, in the order of an object."""
        return [array for array in (self.values, self.rows, self.effects) if array is not None]

    def part(self, lo: int, hi: int) -> Run:
        """Latents [lo, hi) of mine, in arrays of their own: parts of all blocks are held together, wholes are not."""
        if (lo, hi) == (0, len(self.counts)):
            return self
        inside = slice(int(self.counts[:lo].sum()), int(self.counts[:hi].sum()))
        effects = None if self.effects is None else self.effects[inside].copy()
        return Run(self.counts[lo:hi].copy(), self.rows[inside].copy(), self.values[inside].copy(), effects)


def grouped(
    latent: NDArray[Any], row: NDArray[Any], value: NDArray[Any], effect: NDArray[Any] | None, latents: int
) -> Run:
    """A run from entries in any order of latents; entries of one latent keep their order."""
    order = by_latent(latent, latents)
    counts = np.bincount(latent, minlength=latents).astype("<u4")
    effects = None if effect is None else effect[order].astype("<f4")
    return Run(counts, row[order].astype("<u2"), value[order].astype("<f4"), effects)


def by_latent(latent: NDArray[Any], latents: int) -> NDArray[np.int64]:
    """The stable order of latents.  numpy sorts 16-bit keys by radix, ten times faster than wider ones."""
    low = latent.astype(np.uint16)
    order = np.argsort(low, kind="stable")
    if latents > 1 << 16:
        high = (latent >> 16).astype(np.uint16)
        order = order[np.argsort(high[order], kind="stable")]
    return order


def put(job: FolderJob, key: str, run: Run, granule: int) -> int:
    """Write a run; returns the bytes."""
    edges = _edges(len(run.counts), granule)
    offsets = np.concatenate([[0], np.cumsum(run.counts, dtype=np.uint64)])[edges].astype("<u8")
    crc = np.array(_checksums(run, edges, offsets), "<u4")
    parts = (offsets, crc, run.counts, *run.arrays)
    with job.objects.writer(key, sum(part.nbytes for part in parts)) as out:
        for part in parts:
            if part.nbytes:
                out.write(np.ascontiguousarray(part).view(np.uint8).data)
    return sum(part.nbytes for part in parts)


def read(job: FolderJob, key: str, latents: int, granule: int, lo: int, hi: int, *, block: int, first: int) -> Run:
    """Latents [lo, hi) of an object of `latents` latents.  Whole granules are read, since only these can be checked.

    `block` is the number of its block, and `first` its first latent in the dictionary, for messages.
    """
    edges = _edges(latents, granule)
    a, b = lo // granule, -(-hi // granule)
    wanted, lo, hi = (lo, hi), int(edges[a]), int(edges[b])
    offsets = _some(job, key, "<u8", a * 8, b - a + 1)
    crc = _some(job, key, "<u4", len(edges) * 8 + a * 4, b - a)
    at = len(edges) * 8 + (len(edges) - 1) * 4
    counts = _some(job, key, "<u4", at + lo * 4, hi - lo)
    total = int(_some(job, key, "<u8", (len(edges) - 1) * 8, 1)[0])
    sums = np.concatenate([[0], np.cumsum(counts, dtype=np.uint64)])[edges[a : b + 1] - lo]
    wrong = np.flatnonzero(sums != offsets - offsets[0])
    if len(wrong) or int(offsets[-1]) > total:
        n = max(int(wrong[0]) - 1, 0) if len(wrong) else 0
        raise _damage(key, block, first + int(edges[a + n]), first + int(edges[a + n + 1]), "its table")
    n, skip = int(offsets[-1] - offsets[0]), int(offsets[0])
    at += latents * 4
    values = _some(job, key, "<f4", at + skip * 4, n)
    rows = _some(job, key, "<u2", at + total * 4 + skip * 2, n)
    has_effects = Plan.of(job).gradient is not None
    run = Run(counts, rows, values, _some(job, key, "<f4", at + total * 6 + skip * 4, n) if has_effects else None)
    found = _checksums(run, edges[a : b + 1] - lo, offsets - offsets[0])
    for number, (due, got) in enumerate(zip(crc.tolist(), found, strict=True)):
        if due != got:
            raise _damage(key, block, first + int(edges[a + number]), first + int(edges[a + number + 1]), "checksum")
    return run.part(wanted[0] - lo, wanted[1] - lo)


def read_counts(job: FolderJob, key: str, latents: int, granule: int, lo: int, hi: int) -> NDArray[np.uint32]:
    """Entries of latents [lo, hi).  They are not checked: `read` does that, granule by granule."""
    edges = _edges(latents, granule)
    return _some(job, key, "<u4", len(edges) * 8 + (len(edges) - 1) * 4 + lo * 4, hi - lo)


def are_there(job: FolderJob, block: int) -> bool:
    """True if the codes of a block exist: until they are collated, no later step is done without them."""
    return all(job.objects.size(key) is not None for key, _, _ in Plan.of(job).code_objects(block))


def _edges(latents: int, granule: int) -> NDArray[np.int64]:
    return np.append(np.arange(0, latents, granule), latents)


def _checksums(run: Run, edges: NDArray[Any], offsets: NDArray[Any]) -> list[int]:
    found = []
    for a, b, start, stop in zip(edges[:-1], edges[1:], offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        crc = zlib.crc32(run.counts[a:b].data)
        for array in run.arrays:
            crc = zlib.crc32(array[start:stop].data, crc)
        found.append(crc)
    return found


def _some(job: FolderJob, key: str, dtype: str, at: int, count: int) -> NDArray[Any]:
    out = np.empty(count, dtype)
    if count:
        job.objects.read_rows(key, out.nbytes, [at], out.view(np.uint8).data, [0])
    return out


def _damage(key: str, block: int, lo: int, hi: int, what: str) -> ConservationError:
    return ConservationError(
        f"{key} is damaged: {what} of latents {lo:,} to {hi - 1:,} in block {block:,} of rows does not match what was "
        "written; delete that file and run again, which encodes the block anew"
    )
