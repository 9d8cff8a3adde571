"""Read rows one by one from wherever they lie on the disk, many at a time, and measure how many it gives.

A disk that gets one request at a time is idle between them; an NVMe drive serves hundreds of thousands a second, if
many are under way.  So `READERS` threads ask side by side, each past the page cache, which would cost more time than
the read itself and keep pages that nobody asks for again.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from actshuffle.arraytypes import U64
from actshuffle.storage.objects import Objects

READERS = 32  # requests on their way at the same time, for each task
EACH = 32  # rows of one object that a reader has to itself, so that all have about as many
TRIED_BYTES = 16 << 20  # of rows in a lot of a trial at most, unless they are fewer than the readers

Lot = tuple[str, list[int], list[int]]  # an object, offsets of rows in it, and the goal of each


def read_apart(objects: Objects, width: int, lots: Iterable[Lot], out: memoryview) -> None:
    """Read rows of ``width`` bytes to their goals in ``out``, by many requests at a time.

    Objects opened as ``direct`` bypass the page cache.
    """
    small = [*_small(lots)]

    def read(reader: int) -> None:
        for key, offsets, goals in small[reader::READERS]:
            objects.read_rows(key, width, offsets, out, goals)

    with ThreadPoolExecutor(READERS, thread_name_prefix="actshuffle-rows") as pool:
        for _ in pool.map(read, range(min(READERS, len(small)))):
            pass


def _small(lots: Iterable[Lot]) -> Iterator[Lot]:
    for key, offsets, goals in lots:
        for at in range(0, len(offsets), EACH):
            yield key, offsets[at : at + EACH], goals[at : at + EACH]


def tried_rows(row_bytes: int) -> int:
    """Rows that a trial reads at a time at most."""
    return max(READERS, TRIED_BYTES // row_bytes)


def rows_per_second(read: Callable[[U64], object], rows: int, row_bytes: int, seconds: float) -> float:
    """The number of rows, each from a random place among ``rows``, that ``read`` brings in a second, by trying.

    It tries for about ``seconds`` with larger and larger lots, and counts the last: files are opened for the first
    ones, and in small ones much of the time goes into starting threads.
    """
    lot, most = READERS, tried_rows(row_bytes)
    dice = np.random.default_rng(secrets.randbits(64))
    read(dice.integers(rows, size=READERS, dtype=np.uint64))
    end = time.monotonic() + seconds
    while True:
        start = time.monotonic()
        read(dice.integers(rows, size=lot, dtype=np.uint64))
        if (now := time.monotonic()) >= end:
            return lot / (now - start)
        lot = min(2 * lot, most)
