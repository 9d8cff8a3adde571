"""Blocks of batches, read ahead by threads into reused memory.

A *block* is a few batches of one rank, one after the other in memory, so that every batch is a view.
Its memory is lent to the arrays that are made of it and comes back when the last of them is gone,
whoever held it and however long.  Nothing is overwritten that anybody can still see; a consumer that
keeps batches costs memory, never correctness.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from actshuffle.arraytypes import U8
from actshuffle.loading.columns import Layout
from actshuffle.loading.epochs import Order, Range, Step, joined
from actshuffle.storage.buffers import pages

T = TypeVar("T")
Read = Callable[[], None]
PIECE_BYTES = 8 << 20  # of a window, read by one thread at a time


class Loan(NamedTuple):
    """Memory, and the object that its views are made of (the same, or a pinned tensor)."""

    memory: U8
    owner: Any


class Pool:
    """Memory, lent as arrays.  The block that came back last goes out first, since it is in the cache."""

    def __init__(self, keep: int) -> None:
        self._free: deque[U8] = deque(maxlen=keep)  # thread-safe; the coldest drop out

    def lend(self, nbytes: int) -> Loan:
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(0, np.uint8)
        if len(memory) < nbytes:
            memory = pages(max(nbytes, 1))
        lent = np.asarray(_Lease(self._free, memory, nbytes))
        return Loan(lent, lent)


class _Lease:
    """Base of all views of one block; it is freed with the last of them."""

    def __init__(self, home: deque[U8], memory: U8, nbytes: int) -> None:
        self._home, self._memory = home, memory
        self.__array_interface__ = memory[:nbytes].__array_interface__

    def __del__(self) -> None:
        self._home.append(self._memory)


@dataclass(frozen=True)
class BatchBlock:
    """Some steps, and this rank's part of each as positions in its epoch; ``rows`` in all."""

    steps: tuple[Step, ...]
    parts: tuple[Range, ...]
    rows: int


def blocks(steps: Iterable[Step], rank: int, world_size: int, most_rows: int) -> Iterator[BatchBlock]:
    """Steps in blocks of one epoch and ``most_rows`` rows of this rank at most, but a step at least."""
    held: list[Step] = []
    parts: list[Range] = []
    rows = 0
    for step in steps:
        part = step.of_rank(rank, world_size)
        full = rows + part[1] - part[0] > most_rows
        if held and (full or step.epoch != held[0].epoch):
            yield BatchBlock(tuple(held), tuple(parts), rows)
            held, parts, rows = [], [], 0
        held.append(step)
        parts.append(part)
        rows += part[1] - part[0]
    if held:
        yield BatchBlock(tuple(held), tuple(parts), rows)


class Reading:
    """Fills blocks in plain order: from the files to the block, and nothing between.

    ``once``: past the page cache, which does not hold all of it until the next epoch.
    """

    def __init__(self, layout: Layout, order: Order, lend: Callable[[int], Loan], *, once: bool) -> None:
        self._layout, self._order, self._lend, self._once = layout, order, lend, once

    def plan(self, block: BatchBlock) -> tuple[BatchBlock, Loan, list[Read]]:
        """Prepare a block; called in order, as blocks go to threads, to which only reading is left.

        Python runs slowly there, since the rows that are read displace the interpreter from the cache.
        """
        loan = self._lend(self._layout.nbytes(block.rows))
        epoch = block.steps[0].epoch
        spans = joined(block.parts)  # of all ranks one, else one a step
        found = (rows for a, b in spans for rows in self._order.ranges(epoch, a, b))
        reads = _reads(self._layout, joined(found), loan.memory, block.rows, 0, once=self._once)
        return block, loan, reads

    def fill(self, planned: tuple[BatchBlock, Loan, list[Read]]) -> tuple[BatchBlock, Loan]:
        block, loan, reads = planned
        for read in reads:
            read()
        return block, loan

    def reached(self, block: BatchBlock) -> None:
        """The consumer has come to this block."""

    def close(self) -> None: ...


class Buffering:
    """Fills blocks in buffered order: windows are read whole, and rows gathered out of them.

    While the consumer is in one window the next is read, so two are in memory.
    """

    def __init__(self, layout: Layout, order: Order, lend: Callable[[int], Loan], threads: int) -> None:
        self._layout, self._order, self._lend = layout, order, lend
        self._windows: dict[Range, _Window] = {}  # by epoch and number
        self._pool, self._memory = ThreadPoolExecutor(threads, "actshuffle-window"), Pool(2)

    def window(self, epoch: int, number: int) -> _Window:
        if (epoch, number) not in self._windows:
            self._windows[epoch, number] = _Window(self._layout, self._order, epoch, number, self._pool, self._memory)
        return self._windows[epoch, number]

    def plan(self, block: BatchBlock) -> tuple[BatchBlock, list[_Window]]:
        """Called in order, as blocks are handed out to threads."""
        parts = zip(block.steps, block.parts, strict=True)
        return block, [self.window(step.epoch, number) for step, part in parts for number in self._numbers(*part)]

    def fill(self, planned: tuple[BatchBlock, list[_Window]]) -> tuple[BatchBlock, Loan]:
        block, windows = planned
        loan, at, queue = self._lend(self._layout.nbytes(block.rows)), 0, deque(windows)
        for a, b in block.parts:
            for number in self._numbers(a, b):
                window = queue.popleft()
                low, high = self._order.window(number)
                a_here, b_here = max(a, low), min(b, high)
                window.gather(a_here - low, b_here - low, loan.memory, block.rows, at)
                at += b_here - a_here
        return block, loan

    def reached(self, block: BatchBlock) -> None:
        """Release the windows before the consumer, and begin to read the next one."""
        a, _ = block.parts[0]
        if self._order.rows == 0 or a >= self._order.rows:
            return
        here = (block.steps[0].epoch, self._order.window_of(a))
        for key in [key for key in self._windows if key < here]:
            del self._windows[key]
        if here[1] + 1 < self._order.windows:
            self.window(here[0], here[1] + 1)

    def close(self) -> None:
        self._windows.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _numbers(self, a: int, b: int) -> range:
        if a >= b:
            return range(0)
        return range(self._order.window_of(a), self._order.window_of(b - 1) + 1)


class _Window:
    """One window's rows, in the order they are stored in, and the shuffle of their places."""

    def __init__(
        self, layout: Layout, order: Order, epoch: int, number: int, pool: ThreadPoolExecutor, memory: Pool
    ) -> None:
        low, high = order.window(number)
        self._layout, self._rows = layout, high - low
        self._memory = memory.lend(layout.nbytes(self._rows)).memory
        self._places = pool.submit(order.within, epoch, number)
        step = max(1, PIECE_BYTES // layout.row_bytes)
        self._read = [
            pool.submit(self._piece, order.ranges(epoch, a, min(a + step, high)), a - low)
            for a in range(low, high, step)
        ]

    def _piece(self, ranges: list[Range], at: int) -> None:
        for read in _reads(self._layout, ranges, self._memory, self._rows, at):
            read()

    def gather(self, start: int, stop: int, memory: U8, rows: int, at: int) -> None:
        """The shuffled rows ``[start, stop)`` of the window, to row ``at`` of a block of ``rows``."""
        for future in self._read:
            future.result()
        places, here = self._places.result()[start:stop], self._layout.offsets(self._rows)
        spans = self._layout.spans(rows, at, at + len(places))
        for (column, first, last), offset in zip(spans, here, strict=False):
            width = column.info.row_bytes
            source = self._memory[offset : offset + self._rows * width].reshape(self._rows, width)
            goal = memory[first:last].reshape(len(places), width)
            np.take(source, places, axis=0, out=goal, mode="clip")


def _reads(layout: Layout, ranges: list[Range], memory: U8, rows: int, at: int, *, once: bool = False) -> list[Read]:
    """Calls that read row ranges of every column, to row ``at`` and on of a block of ``rows``."""
    size = sum(b - a for a, b in ranges)
    return [
        column.dataset.reading(column.field, ranges, memory[first:last], once=once)
        for column, first, last in layout.spans(rows, at, at + size)
    ]


def in_order(
    pool: ThreadPoolExecutor, fn: Callable[[Any], T], items: Iterable[Any], depth: int, waited: Callable[[float], None]
) -> Iterator[T]:
    """``map(fn, items)`` with ``depth`` calls ahead; passes the seconds of each wait to ``waited``."""
    pending: deque[Future[T]] = deque()

    def next_one() -> T:
        started = time.perf_counter()
        result = pending.popleft().result()
        waited(time.perf_counter() - started)
        return result

    try:
        for item in items:
            pending.append(pool.submit(fn, item))
            del item  # so that it can be freed as soon as its call is done
            if len(pending) >= depth:
                yield next_one()
        while pending:
            yield next_one()
    finally:
        for future in pending:
            future.cancel()
