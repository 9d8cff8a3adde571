"""Reading files: every way returns the bytes of the file, and the right way is chosen."""

from __future__ import annotations

import errno
import os
import random
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actshuffle.limits import PAGE
from actshuffle.storage import directio as reading
from actshuffle.storage.buffers import Arena
from actshuffle.storage.directio import Extent, ahead, pieces, read_full, two_readers
from benchmarks.cache import cached_share
from support.stores import evict

SIZE = 3 * reading.PIECE + 12_345


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reading") / "f"
    path.write_bytes(random.Random(0).randbytes(SIZE))
    return path


class Calls:
    """A stand-in for os.preadv: records the place of each read, and answers in its stead where set to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **refused: int) -> None:
        self.seen: list[str] = []
        self.refused = refused
        self.real = os.preadv
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, fd: int, views: Any, offset: int, flags: int = 0) -> int:
        import fcntl

        direct = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        way = "cached" if flags & os.RWF_NOWAIT else "direct" if direct else "plain"
        self.seen.append(way)
        if way in self.refused:
            raise OSError(self.refused[way], "refused")
        if direct and self.refused.get("short"):
            views, self.refused["short"] = [views[0][:PAGE]], 0
        return self.real(fd, views, offset, flags)


def read(path: Path, offset: int, lengths: list[int], *, once: bool = True, skew: int = 0) -> bytes:
    """Read into memory that starts ``skew`` bytes after a page, in views of some lengths."""
    total = sum(lengths)
    memory = Arena().reset(total + skew + PAGE).take((total + skew,))
    views, at = [], skew
    for length in lengths:
        views.append(memory[at : at + length].data)
        at += length
    fd = os.open(path, os.O_RDONLY)
    try:
        read_full(fd, Extent("f", offset, views, once))
    finally:
        os.close(fd)
    return memory[skew:].tobytes()


def lengths_of(rng: random.Random, total: int) -> list[int]:
    cuts = sorted(rng.choices(range(total + 1), k=rng.randrange(4)))
    return np.diff([0, *cuts, total]).tolist()


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("warm", ["cold", "half", "warm"])
def test_any_range_into_any_memory(file: Path, seed: int, warm: str) -> None:
    rng = random.Random(seed)
    whole = file.read_bytes()
    if warm != "warm":
        evict(file)
    if warm == "half":
        read(file, 0, [SIZE // 2], once=False)
    step = rng.choice([1, 8, 512, PAGE])
    start = rng.randrange(SIZE // 2) // step * step
    total = min(SIZE - start, rng.choice([1, 1000, reading.DIRECT_BYTES, 2 * reading.PIECE, SIZE]))
    skew = rng.choice([0, 0, 8, 100])
    assert read(file, start, lengths_of(rng, total), skew=skew) == whole[start : start + total]


def test_what_is_cached_comes_from_the_cache(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = file.read_bytes()
    calls = Calls(monkeypatch)
    assert read(file, 5, [SIZE - 5]) == whole[5:]
    assert set(calls.seen) == {"cached"}


@pytest.mark.parametrize("offset", [0, PAGE, 16])
def test_what_is_not_cached_bypasses_it(file: Path, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    whole = file.read_bytes()
    evict(file)
    calls = Calls(monkeypatch, cached=errno.EAGAIN)
    assert read(file, offset, [SIZE - offset]) == whole[offset:]
    assert set(calls.seen) == {"cached", "direct"}
    whole_pages_in_one_go = 3 if offset % PAGE == 0 else 5
    assert len(calls.seen) <= whole_pages_in_one_go


def test_the_system_does_not_read_ahead_beside_us(tmp_path: Path) -> None:
    """A request to the cache for the whole makes it read up to 8 MiB: twice the bytes from the disk."""
    path = tmp_path / "f"
    path.write_bytes(whole := random.Random(0).randbytes(4 * reading.PIECE))
    evict(path)
    if cached_share([tmp_path]) > 0:
        pytest.skip("a file system that is in memory itself")
    for at in range(0, len(whole), reading.PIECE):
        assert read(path, at, [reading.PIECE]) == whole[at : at + reading.PIECE]
    assert cached_share([tmp_path]) < 0.2  # a look has a few pages read


def test_one_cached_page_does_not_make_the_system_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the disk brings the page that is asked for before the system looks whether it is there."""
    path = tmp_path / "f"
    path.write_bytes(whole := random.Random(0).randbytes(reading.PIECE))
    evict(path)
    if cached_share([tmp_path]) > 0:
        pytest.skip("a file system that is in memory itself")
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 1, there := reading.PIECE // 2)
    assert 0 < cached_share([tmp_path]) < 0.1
    places = iter([there, reading.PIECE // 4])
    monkeypatch.setattr(reading, "randrange", lambda size: next(places))
    assert read(path, 0, [reading.PIECE]) == whole
    assert cached_share([tmp_path]) < 0.2


def test_small_reads_and_those_that_will_be_wanted_again_are_plain(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    read(file, 0, [reading.DIRECT_BYTES - 1])
    read(file, 0, [SIZE], once=False)
    assert set(calls.seen) == {"plain"}


@pytest.mark.parametrize("refused", [errno.EINVAL, errno.EOPNOTSUPP, errno.EAGAIN])
def test_file_systems_without_these_calls(file: Path, monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    whole = file.read_bytes()
    calls = Calls(monkeypatch, cached=refused, direct=errno.EINVAL)
    assert read(file, 3, [1000, SIZE - 1003]) == whole[3:]
    assert calls.seen[-1] == "plain"


def test_a_flag_that_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = file.read_bytes()
    calls = Calls(monkeypatch, cached=errno.EAGAIN)
    monkeypatch.setattr(reading, "set_direct", lambda fd, on: False)
    assert read(file, 0, [SIZE]) == whole
    assert set(calls.seen) == {"cached", "plain"}


@pytest.mark.parametrize("offset", [0, 24])
def test_short_answers_are_completed(file: Path, monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    whole = file.read_bytes()
    Calls(monkeypatch, cached=errno.EAGAIN, short=1)
    assert read(file, offset, [70_000, SIZE - 70_000 - offset]) == whole[offset:]


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("cached", [0, errno.EAGAIN])
def test_a_file_that_ends_too_early_is_an_error(
    file: Path, monkeypatch: pytest.MonkeyPatch, once: bool, cached: int
) -> None:
    if cached:
        Calls(monkeypatch, cached=cached)
    for offset in (PAGE, 24):
        with pytest.raises(OSError, match=f"ends at byte {SIZE}, more was expected"):
            read(file, offset, [SIZE], once=once)


def test_other_errors_are_not_swallowed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Calls(monkeypatch, cached=errno.EIO)
    with pytest.raises(OSError, match="refused"):
        read(file, 0, [SIZE])
    Calls(monkeypatch, cached=errno.EAGAIN, direct=errno.EIO)
    with pytest.raises(OSError, match="refused"):
        read(file, 0, [SIZE])


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("nbytes", [10, reading.TWO_FROM])
def test_two_threads_read_what_is_much(count: int, nbytes: int) -> None:
    seen: dict[str, int] = {}

    def read(extents: Sequence[Extent]) -> None:
        for extent in extents:
            assert extent.key not in seen
            seen[extent.key] = threading.get_ident()

    with two_readers(read, nbytes) as both:
        both([Extent(str(i), 0, [memoryview(bytes(1))]) for i in range(count)])
    assert set(seen) == {str(i) for i in range(count)}
    much = count > 1 and nbytes == reading.TWO_FROM
    assert len(set(seen.values())) == (2 if much else min(count, 1))


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_of_either_thread_is_told(bad: int) -> None:
    def read(extents: Sequence[Extent]) -> None:
        if any(e.key == str(bad) for e in extents):
            raise OSError(errno.EIO, "broken")

    extents = [Extent(str(i), 0, [memoryview(bytes(1))]) for i in range(2)]
    with pytest.raises(OSError, match="broken"), two_readers(read, reading.TWO_FROM) as both:
        both(extents)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory")
def test_files_in_memory_count_as_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the system does not tell: it refuses to read them only if they are cached."""

    def refuse(*_: Any) -> int:
        raise OSError(errno.EOPNOTSUPP, "")

    monkeypatch.setattr(os, "preadv", refuse)
    with tempfile.TemporaryFile(dir="/dev/shm") as found, Path("/proc/self/maps").open("rb") as other:
        assert reading.has_cached(found.fileno(), 0)
        assert not reading.has_cached(other.fileno(), 0)
        assert not reading.is_in_memory(os.fstat(other.fileno()).st_dev)


def test_the_next_batch_is_on_its_way_while_one_is_looked_at():
    batches = [[Extent(str(n), 0, [])] for n in range(4)]
    begun = [threading.Event() for _ in batches]

    def read(extents: Sequence[Extent]) -> None:
        begun[int(extents[0].key)].set()

    seen = []
    for batch in ahead(read, batches):
        seen.append(int(batch[0].key))
        assert all(event.wait(120) for event in begun[: seen[-1] + 2])
        assert not any(event.is_set() for event in begun[seen[-1] + 2 :])
    assert seen == [0, 1, 2, 3]


def test_a_batch_that_fails_is_not_handed_on():
    def read(extents: Sequence[Extent]) -> None:
        if extents[0].key == "1":
            raise OSError(errno.EIO, "broken")

    found = ahead(read, [[Extent(str(n), 0, [])] for n in range(4)])
    assert next(found)[0].key == "0"
    with pytest.raises(OSError, match="broken"):
        next(found)


def test_pieces_are_the_bytes_of_their_extent():
    data = random.Random(0).randbytes(1000)
    out = [bytearray(n) for n in (1, 400, 3, 596)]
    parts = list(pieces(Extent("x", 7, [memoryview(one) for one in out]), 64))
    assert [part.offset for part in parts] == list(range(7, 1007, 64))
    for part in parts:
        at = part.offset - 7
        for view in part.views:
            view[:] = data[at : at + len(view)]
            at += len(view)
    assert b"".join(out) == data
