"""Our own copier: the floor that a shuffle is measured against.

It has as many processes as the shuffle has workers and the same path between file and memory
(`actshuffle.storage.files.LocalObjects`: O_DIRECT writes and fsync where the shuffle has them).  It moves chunk
files in any order through aligned buffers, which are touched beforehand and reused, and never looks at the
bytes.  With two buffers a process writes one chunk while it reads the next, as tasks of the shuffle do; with
one it takes turns.  A copy is the faster of the two.  A plain copy writes as any program would, through the page cache,
into files for which no space was set aside.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from actshuffle.arraytypes import U8
from actshuffle.storage.buffers import arena, behind, padded
from actshuffle.storage.directio import Extent
from actshuffle.storage.files import LocalObjects

MEMCPY_REPEATS = 8


@dataclass(frozen=True)
class Work:
    """The operation on every chunk file: "read", "write", "copy", "plain copy" or "memcpy" (no files)."""

    what: str
    source: Path
    target: Path
    keys: tuple[str, ...]
    chunk_bytes: int
    fsync: bool
    buffers: int = 1


class Copier:
    """Processes that are started once and keep their buffers."""

    def __init__(self, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes = processes
        self._ticket = context.Value("q", 0)
        self._gate = context.Barrier(processes)
        self._pool = ProcessPoolExecutor(
            processes, mp_context=context, initializer=_start, initargs=(self._ticket, self._gate)
        )

    def seconds(self, work: Work) -> float:
        """Wall time from the start of the first process to the end of the last."""
        self._ticket.value = 0
        spans = list(self._pool.map(_run, itertools.repeat(work, self.processes)))
        return max(stop for _, stop in spans) - min(start for start, _ in spans)

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown()


_shared: tuple[Any, Any] | None = None


def _start(ticket: Any, gate: Any) -> None:
    global _shared
    _shared = ticket, gate


def _run(work: Work) -> tuple[float, float]:
    """Do one process's part: take chunk numbers until there are no more.  Returns start and stop."""
    assert _shared is not None
    ticket, gate = _shared
    room = padded(work.chunk_bytes)
    memory = arena().reset(2 * room)
    buffers = [memory.take((work.chunk_bytes,)), memory.take((work.chunk_bytes,))]
    for buffer in buffers:
        buffer[::4096] = 1  # touch pages now, before the clock runs
    gate.wait()  # every process has one part
    started = time.monotonic()
    if work.what == "memcpy":
        for _ in range(MEMCPY_REPEATS):
            np.copyto(buffers[1], buffers[0])
    else:
        _move(work, buffers, _tickets(ticket, len(work.keys)))
    return started, time.monotonic()


def _tickets(ticket: Any, count: int) -> Iterable[int]:
    while True:
        with ticket.get_lock():
            number, ticket.value = ticket.value, ticket.value + 1
        if number >= count:
            return
        yield number


def _move(work: Work, buffers: Sequence[U8], numbers: Iterable[int]) -> None:
    source, target = LocalObjects(work.source), LocalObjects(work.target, work.fsync)
    put = partial(_put_plainly, work) if work.what == "plain copy" else target.put
    if work.buffers == 1:
        view = buffers[0].data
        for number in numbers:
            key = work.keys[number]
            if work.what != "write":
                source.read([Extent(key, 0, [view], once=True)])
            if work.what != "read":
                put(key, view)
        return
    with behind() as writing:
        for number in numbers:
            key, view = work.keys[number], buffers[writing.turn].data
            source.read([Extent(key, 0, [view], once=True)])
            writing.submit(put, key, view)


def _put_plainly(work: Work, key: str, view: memoryview) -> None:
    work.target.mkdir(parents=True, exist_ok=True)
    with (work.target / key).open("wb", buffering=0) as file:
        while len(view):
            view = view[file.write(view) :]
        if work.fsync:
            os.fsync(file.fileno())
