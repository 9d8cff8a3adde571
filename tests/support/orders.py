"""Shufflers that are known to be broken, and an honest one, as output orders.

Each function gives ``source_row``: an int64 array of shape (n,) in which entry r is the source row
at output row r. They are small models of designs in use, not of any one library's code.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Order = npt.NDArray[np.int64]


def honest(n: int, seed: int) -> Order:
    """A uniform permutation, by numpy's Fisher-Yates."""
    return np.random.default_rng(seed).permutation(n)


def block_local(n: int, seed: int, *, block: int) -> Order:
    """Permutes the rows inside each block, and leaves the blocks in order."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(rows) for rows in _blocks(n, block)])


def buffer(n: int, seed: int, *, size: int) -> Order:
    """A shuffle buffer, as in tf.data: emits a random row of the next `size` unread rows."""
    rng = np.random.default_rng(seed)
    slots = list(range(size))
    order = np.empty(n, np.int64)
    picks = rng.integers(size, size=n)
    for r in range(n - size):
        order[r], slots[picks[r]] = slots[picks[r]], r + size
    order[n - size :] = rng.permutation(slots)
    return order


def equal_slice(n: int, seed: int, *, block: int, parts: int, one_seed: bool = False) -> Order:
    """Permutes each block, deals it in equal slices to `parts` outputs, and permutes each output.

    Every output gets the same number of rows of every block, which chance would not do. With
    `one_seed`, blocks and outputs are all permuted by generators of the same seed besides.
    """
    rng = np.random.default_rng(seed)

    def permuted(rows: Order) -> Order:
        return (np.random.default_rng(seed) if one_seed else rng).permutation(rows)

    slices = [np.array_split(permuted(rows), parts) for rows in _blocks(n, block)]
    return np.concatenate([permuted(np.concatenate(part)) for part in zip(*slices, strict=True)])


def reused_seed_blocks(n: int, seed: int, *, block: int, parts: int) -> Order:
    """Draws each block's bucket labels from one seed again; the buckets are permuted honestly."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.random.default_rng(seed).integers(parts, size=len(b)) for b in _blocks(n, block)])
    return _by_bucket(labels, parts, lambda: rng)


def reused_seed_buckets(n: int, seed: int, *, parts: int) -> Order:
    """Draws honest bucket labels, then permutes every bucket by a generator of the same seed."""
    labels = np.random.default_rng([seed, 1]).integers(parts, size=n)
    return _by_bucket(labels, parts, lambda: np.random.default_rng(seed))


def _blocks(n: int, block: int) -> list[Order]:
    return [np.arange(start, min(start + block, n)) for start in range(0, n, block)]


def _by_bucket(labels: Order, parts: int, rng: Callable[[], np.random.Generator]) -> Order:
    return np.concatenate([rng().permutation(np.flatnonzero(labels == j)) for j in range(parts)])
