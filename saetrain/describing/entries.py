"""All activations of a range of latents, together in row order: what every statistic is computed from.

::

    entries     f0: r3 r7 r9     f1: r2 r8 r12    f2: r10        starts = 0, 3, 6, 7
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saetrain.describing.slots import Slots
from saetrain.describing.sorting import are_short, sort_each

I64 = NDArray[np.int64]
ROW_BITS = 40
_HALF = np.uint64(31)  # bits of a positive float32
_GOLDEN, _M1, _M2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class Context:
    """What all latents share."""

    rows: int
    documents: I64  # first row of each, and the number of rows
    pool: I64  # rows in random order, among which quiet ones are looked for
    token_low: int
    token_high: int
    has_tokens: bool
    slots: Slots
    window: int  # rows of a document that give one top example
    before: int  # rows of a context before its example
    after: int

    @property
    def token_bits(self) -> int:
        return max(int(self.token_high - self.token_low).bit_length(), 1)


@dataclass(frozen=True)
class Entries:
    """Entries of latents [first, first + len(counts)), latent by latent, rows ascending within each."""

    first: int
    counts: I64  # [latents]
    row: I64  # [n]
    value: NDArray[np.float32]  # [n], positive
    document: NDArray[np.int32]  # [n], number of the document
    token: NDArray[np.uint32] | None  # [n], less the lowest token
    word: NDArray[np.uint64]  # [n], priority of the row
    effect: NDArray[np.float32] | None = None  # [n], on the loss, where the store has gradients

    @property
    def latents(self) -> int:
        return len(self.counts)

    @cached_property
    def starts(self) -> I64:
        """First entry of each latent, and their number: int64 [latents + 1]."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    @cached_property
    def latent(self) -> NDArray[np.int64]:
        """Latent of each entry, from 0."""
        return np.repeat(np.arange(self.latents), self.counts)

    @cached_property
    def keys(self) -> I64:
        """Latent and row of each entry as one number, ascending; `key` makes such numbers."""
        return key(self.latent, self.row)

    @cached_property
    def bits(self) -> NDArray[np.uint64]:
        """Bits of the activations, which are in the order of the positive numbers they stand for."""
        return self.value.view(np.uint32).astype(np.uint64)

    @cached_property
    def ordered_bits(self) -> NDArray[np.uint32]:
        """The same, ascending within each latent."""
        if are_short(self.starts):
            keys = np.sort((self.latent.astype(np.uint64) << _HALF) | self.bits)
            return (keys & np.uint64(0x7FFFFFFF)).astype(np.uint32)
        found = self.value.view(np.uint32).copy()
        sort_each(found, self.starts)
        return found

    @cached_property
    def priority(self) -> NDArray[np.uint64]:
        """Priority of (latent, row): uniform, and unrelated from one latent to another.

        The row's word is changed by a word of the latent, and mixed: each step is a bijection, so it stays uniform.
        """
        return finalized(self.word ^ np.repeat(mixed(np.arange(self.first, self.first + self.latents)), self.counts))


def key(latent: NDArray[Any], row: NDArray[Any]) -> I64:
    """A latent, counted from the first, and a row as one number, in the order of both."""
    found: I64 = (latent << ROW_BITS) + row
    return found


def mixed(latents: NDArray[Any]) -> NDArray[np.uint64]:
    """A well mixed word of each latent: SplitMix64 (Steele, Lea, Flood 2014)."""
    return finalized((latents.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def finalized(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64, a bijection of 64-bit words."""
    z = (z ^ (z >> np.uint64(30))) * _M1
    z = (z ^ (z >> np.uint64(27))) * _M2
    return z ^ (z >> np.uint64(31))
