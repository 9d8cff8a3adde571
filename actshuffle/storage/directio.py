"""Read and write files: take what the page cache holds, and bypass it (O_DIRECT) for data that is used only once.

A page of the cache costs its allocation, its copy and, on virtual machines, the host's first touch: up to 1.6 s of
processor time per gigabyte, against 0.1 s with O_DIRECT.  That is wasted on spill, which is read once and deleted,
and on a source larger than memory.  Data that the cache holds already is read faster from there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from random import randrange
from typing import NamedTuple

import numpy as np

from actshuffle.limits import PAGE
from actshuffle.storage.buffers import pages

DIRECT_BYTES = 1 << 20  # least size of a read or write with O_DIRECT
PIECE = 2 << 20  # bytes of one O_DIRECT read where rows are not aligned to pages, and are copied from it
TWO_FROM = 128 << 20  # least bytes of a task that reads with two threads


class Extent(NamedTuple):
    """A read of ``sum(len(v) for v in views)`` bytes at ``offset`` of object ``key``, scattered into views.

    ``once``: nobody will read them again soon, so caching them is of no use.
    """

    key: str
    offset: int
    views: Sequence[memoryview]
    once: bool = False


Read = Callable[[Sequence[Extent]], None]
ReadRows = Callable[[int, int, Sequence[int], memoryview, Sequence[int]], None]


class OpenFile:
    """The descriptor of a file, closed at the latest when nothing refers to it.

    ``direct``: reads bypass the cache or, where the file system refuses that, bring in no more than they ask for.
    """

    def __init__(self, fd: int, *, direct: bool = False) -> None:
        self.fd = fd
        if direct and not set_direct(fd, on=True):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = close


def read_full(fd: int, extent: Extent) -> None:
    """Read all of an extent, or raise OSError."""
    views, offset = [v for v in extent.views if len(v)], extent.offset
    size = sum(map(len, views))
    if extent.once and size >= DIRECT_BYTES:
        # Ask for a byte first, since a request for all makes the system read ahead up to 8 MiB into the cache; at
        # random places, since a request leaves some pages there; at two, since the disk may have brought the first
        # page before the system looks whether it is there.
        if all(_peek(fd, offset + randrange(size)) for _ in range(2)):
            offset = _cached(fd, views, offset)
        if views and set_direct(fd, on=True):
            try:
                offset = _past_cache(fd, views, offset)
            finally:
                set_direct(fd, on=False)
    while views:
        offset += _advance(views, _some(os.preadv(fd, views[:1024], offset), offset))


def row_reader(*, direct: bool) -> ReadRows:
    """The function that reads rows of a file through the page cache, or directly from the disk."""
    return read_rows_direct if direct else read_rows


def read_rows(fd: int, width: int, offsets: Sequence[int], out: memoryview, goals: Sequence[int]) -> None:
    """Read ``width`` bytes at each offset to the goals in ``out``, with a microsecond of overhead each.

    It creates no object that Python's garbage collector counts: with an `Extent` for every row, collections
    took a fifth of all processor time.
    """
    preadv = os.preadv
    for offset, goal in zip(offsets, goals, strict=True):
        view = out[goal : goal + width]
        if preadv(fd, (view,), offset) != width:
            read_full(fd, Extent("", offset, [view]))


def read_rows_direct(fd: int, width: int, offsets: Sequence[int], out: memoryview, goals: Sequence[int]) -> None:
    """`read_rows` from a file opened as direct: whole pages are read, of which a row may be a part."""
    whole, preadv = not (width % PAGE or _address(out) % PAGE), os.preadv
    for offset, goal in zip(offsets, goals, strict=True):
        view = out[goal : goal + width]
        if whole and not (offset % PAGE or goal % PAGE):
            try:
                if preadv(fd, (view,), offset) == width:
                    continue
            except OSError as err:
                if err.errno != errno.EINVAL:
                    raise
        views = [view]
        offset = _past_cache(fd, views, offset)
        if views:  # the file system accepts the flag and refuses the read
            set_direct(fd, on=False)
            read_full(fd, Extent("", offset, views))


def pieces(extent: Extent, size: int) -> Iterator[Extent]:
    """Split an extent into extents of at most ``size`` bytes, each over as many views as it spans."""
    offset, views, held = extent.offset, [], 0
    for view in extent.views:
        while len(view):
            part = view[: size - held]
            views.append(part)
            held, view = held + len(part), view[len(part) :]
            if held == size:
                yield Extent(extent.key, offset, views)
                offset, views, held = offset + held, [], 0
    if held:
        yield Extent(extent.key, offset, views)


def ahead(read: Read, batches: Iterable[Sequence[Extent]]) -> Iterator[Sequence[Extent]]:
    """Read batch after batch, and hand each on while the next is on its way, so that a server never waits."""
    with ThreadPoolExecutor(2, thread_name_prefix="actshuffle-read") as pool:
        running: list[tuple[Future[None], Sequence[Extent]]] = []
        for batch in batches:
            running.append((pool.submit(read, batch), batch))
            if len(running) > 1:
                yield _finished(*running.pop(0))
        for one in running:
            yield _finished(*one)


def _finished(call: Future[None], batch: Sequence[Extent]) -> Sequence[Extent]:
    call.result()
    return batch


@contextmanager
def two_readers(read: Read, nbytes: int) -> Iterator[Read]:
    """`read`, by two threads if ``nbytes`` in all are many: a disk does more with two requests at a time.

    The other thread has its own piece of memory, which is small beside the bytes it reads.
    """
    if nbytes < TWO_FROM:
        yield read
        return
    with ThreadPoolExecutor(1, thread_name_prefix="actshuffle-read") as beside:
        yield partial(_by_two, read, beside)


def _by_two(read: Read, beside: Executor, extents: Sequence[Extent]) -> None:
    half = len(extents) // 2
    other = beside.submit(read, extents[half:])
    read(extents[:half])
    other.result()


def set_direct(fd: int, *, on: bool) -> bool:
    """Make reads and writes of a file bypass the cache, or not; False where the file system refuses."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
        return False
    return True


def has_cached(fd: int, offset: int) -> bool:
    """True if the page cache holds a byte of a file; False also where the system does not tell.

    If it does not, the system may begin to read that page.
    """
    with suppress(OSError):  # the read itself will report it
        return is_in_memory(os.fstat(fd).st_dev) or _peek(fd, offset)
    return False


def is_in_memory(device: int) -> bool:
    """True if a device is a file system in memory, whose files no cache holds but which are there."""
    return file_system(device) in ("tmpfs", "ramfs")


@lru_cache(maxsize=64)
def file_system(device: int) -> str:
    """The kind of file system of a device, as "ext4"; empty where the system does not tell."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            mount, _, kind = line.partition(" - ")
            if mount.split()[2] == number:
                return kind.split()[0]
    return ""


def _peek(fd: int, offset: int) -> bool:
    return _cached(fd, [memoryview(bytearray(1))], offset) > offset


def _cached(fd: int, views: list[memoryview], offset: int) -> int:
    """Read from the cache up to its first gap; returns the offset of the gap."""
    while views:
        try:
            got = os.preadv(fd, views[:1024], offset, os.RWF_NOWAIT)
        except OSError as err:
            if err.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            break
        if got == 0:
            break
        offset += _advance(views, got)
    return offset


def _past_cache(fd: int, views: list[memoryview], offset: int) -> int:
    """Read on with O_DIRECT: straight into views that lie on whole pages, else through an aligned piece.

    Returns the offset at which it stopped: the end, or where the file system refused.
    """
    while views:
        first = views[0]
        pages = len(first) // PAGE * PAGE
        try:
            if pages and offset % PAGE == 0 and _address(first) % PAGE == 0:
                offset += _advance(views, _some(os.preadv(fd, [first[:pages]], offset), offset))
                continue
            before = offset % PAGE
            wanted = -(-(before + sum(map(len, views))) // PAGE) * PAGE
            piece = _piece()[:wanted]
            got = _some(os.preadv(fd, [piece], offset - before) - before, offset)
        except OSError as err:
            if err.errno != errno.EINVAL:
                raise
            break
        at, end = before, before + got
        while views and at < end:
            count = min(len(views[0]), end - at)
            views[0][:count] = piece[at : at + count]
            at += _advance(views, count)
        offset += at - before
    return offset


def _some(got: int, offset: int) -> int:
    if got <= 0:
        raise OSError(errno.EIO, f"file ends at byte {offset}, more was expected")
    return got


def _advance(views: list[memoryview], got: int) -> int:
    """Drop the first ``got`` bytes of some views."""
    left = got
    while views and left >= len(views[0]):
        left -= len(views.pop(0))
    if left:
        views[0] = views[0][left:]
    return got


def _address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


_local = threading.local()


def _piece() -> memoryview:
    """The aligned piece of this thread."""
    if not hasattr(_local, "piece"):
        _local.piece = pages(PIECE).data
    held: memoryview = _local.piece
    return held


# --- Writing


def create(path: Path, *, direct: bool) -> tuple[int, bool]:
    """Create a file for writing, with O_DIRECT if ``direct`` is set and the file system allows it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    if direct:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o644), True
        except OSError as err:
            if err.errno != errno.EINVAL:
                raise
            path.unlink(missing_ok=True)  # some file systems refuse after they have created it
    return os.open(path, flags, 0o644), False


class FileWriter:
    """Appends to a file: with O_DIRECT as long as parts are whole pages, through the cache afterwards."""

    def __init__(self, fd: int, direct: bool) -> None:
        self._fd, self._direct = fd, direct
        self.written = 0

    def write(self, part: memoryview) -> None:
        part = part.cast("B") if part.format != "B" or part.ndim != 1 else part
        if self._direct:
            pages = len(part) // PAGE * PAGE
            address = np.frombuffer(part, np.uint8).ctypes.data if len(part) else 0
            if address % PAGE == 0:
                self._append(part[:pages])
                part = part[pages:]
            if len(part):
                self._buffered()
        self._append(part)

    def _append(self, part: memoryview) -> None:
        while len(part):
            try:
                done = os.write(self._fd, part)
            except OSError as err:
                if err.errno != errno.EINVAL or not self._direct:
                    raise
                self._buffered()  # this file system accepts the flag and refuses the write
                continue
            self.written += done
            part = part[done:]

    def _buffered(self) -> None:
        self._direct = False
        set_direct(self._fd, on=False)
