"""Space that is set aside before the first byte: where, how much, and what happens when there is none."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from actshuffle.errors import StorageError, StorageFullError
from actshuffle.storage import files, syscalls
from actshuffle.storage.directio import is_in_memory
from actshuffle.storage.files import LocalObjects

MB = 1 << 20


class Refusing:
    """A C library whose fallocate fails."""

    def __init__(self, code: int) -> None:
        self.code = code

    def fallocate(self, *_: Any) -> int:
        ctypes.set_errno(self.code)
        return -1


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder on a disk whose file system sets space aside."""
    if is_in_memory(tmp_path.stat().st_dev):
        pytest.skip("temporary files lie in memory")
    fd = os.open(tmp_path / "tried", os.O_RDWR | os.O_CREAT)
    try:
        syscalls.allocate(fd, MB)
        if os.fstat(fd).st_size != MB:
            pytest.skip("the file system sets no space aside")
    finally:
        os.close(fd)
        (tmp_path / "tried").unlink()
    return tmp_path


def test_a_file_has_its_space_before_it_is_written(disk: Path) -> None:
    objects = LocalObjects(disk, fsync=False)
    with objects.writer("k", 3 * MB) as out:
        (partial,) = disk.iterdir()
        assert partial.stat().st_blocks * 512 >= 3 * MB
        out.write(memoryview(b"1" * MB))
    assert (disk / "k").read_bytes() == b"1" * MB + bytes(2 * MB)


@pytest.mark.parametrize(("size", "fsync"), [(MB - 1, False), (3 * MB, True)])
def test_small_files_and_those_that_bypass_the_cache_need_no_space_in_advance(
    disk: Path, size: int, fsync: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "create", lambda path, direct: (os.open(path, os.O_WRONLY | os.O_CREAT), direct))
    with LocalObjects(disk, fsync=fsync).writer("k", size):
        (partial,) = disk.iterdir()
        assert partial.stat().st_blocks == 0


def test_a_full_disk_refuses_before_the_first_byte(disk: Path) -> None:
    size = 2 * shutil.disk_usage(disk).total
    with (
        pytest.raises(StorageFullError, match="no space left while writing"),
        LocalObjects(disk, fsync=False).writer("k", size),
    ):
        pytest.fail("there was space for twice the disk")
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EINTR])
def test_where_space_cannot_be_set_aside_files_are_written_without(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syscalls, "_libc", lambda: Refusing(code))
    LocalObjects(tmp_path, fsync=False).put("k", b"1" * 2 * MB)
    assert (tmp_path / "k").read_bytes() == b"1" * 2 * MB


def test_without_such_a_call_files_are_written_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "_libc", object)
    LocalObjects(tmp_path, fsync=False).put("k", b"1" * 2 * MB)
    assert (tmp_path / "k").read_bytes() == b"1" * 2 * MB


@pytest.mark.parametrize(
    ("code", "error"), [(errno.ENOSPC, StorageFullError), (errno.EDQUOT, StorageFullError), (errno.EIO, StorageError)]
)
def test_a_disk_that_fails_is_no_disk_that_cannot(
    disk: Path, code: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syscalls, "_libc", lambda: Refusing(code))
    with pytest.raises(error, match=f"{disk}/k"):
        LocalObjects(disk, fsync=False).put("k", b"1" * 2 * MB)
    assert list(disk.iterdir()) == []
