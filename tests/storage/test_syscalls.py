"""Space that is set aside before the first byte: where, how much, and what happens when there is none."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from actshuffle.errors import StorageError, StorageFullError
from actshuffle.storage import files, syscalls
from actshuffle.storage.directio import file_system
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
    """A folder on ext4."""
    if file_system(tmp_path.stat().st_dev) != "ext4":
        pytest.skip("temporary files lie on another file system")
    return tmp_path


@pytest.fixture
def as_ext4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is taken for one on ext4."""
    monkeypatch.setattr(files, "file_system", lambda _: "ext4")
    return tmp_path


def test_a_file_has_its_space_before_it_is_written(disk: Path) -> None:
    objects = LocalObjects(disk, fsync=False)
    with objects.writer("k", 3 * MB) as out:
        (partial,) = disk.iterdir()
        assert partial.stat().st_blocks * 512 >= 3 * MB
        assert partial.stat().st_size == 0, "an object that is not whole is too short"
        out.write(memoryview(b"1" * MB))
        assert partial.stat().st_size == MB
    assert (disk / "k").read_bytes() == b"1" * MB + bytes(2 * MB)


@pytest.mark.parametrize(("size", "fsync"), [(MB - 1, False), (3 * MB, True)])
def test_small_files_and_those_that_bypass_the_cache_need_no_space_in_advance(
    disk: Path, size: int, fsync: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "create", lambda path, direct: (os.open(path, os.O_WRONLY | os.O_CREAT), direct))
    with LocalObjects(disk, fsync=fsync).writer("k", size):
        (partial,) = disk.iterdir()
        assert partial.stat().st_blocks == 0


def test_on_other_file_systems_no_space_is_set_aside(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "file_system", lambda _: "btrfs")
    with LocalObjects(disk, fsync=False).writer("k", 3 * MB):
        (partial,) = disk.iterdir()
        assert partial.stat().st_blocks == 0


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EINTR])
def test_where_space_cannot_be_set_aside_files_are_written_without(
    as_ext4: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syscalls, "_libc", lambda: Refusing(code))
    LocalObjects(as_ext4, fsync=False).put("k", b"1" * 2 * MB)
    assert (as_ext4 / "k").read_bytes() == b"1" * 2 * MB


def test_without_such_a_call_files_are_written_too(as_ext4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "_libc", object)
    LocalObjects(as_ext4, fsync=False).put("k", b"1" * 2 * MB)
    assert (as_ext4 / "k").read_bytes() == b"1" * 2 * MB


@pytest.mark.parametrize(
    ("code", "error"), [(errno.ENOSPC, StorageFullError), (errno.EDQUOT, StorageFullError), (errno.EIO, StorageError)]
)
def test_a_disk_that_fails_is_no_disk_that_cannot(
    as_ext4: Path, code: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syscalls, "_libc", lambda: Refusing(code))
    with pytest.raises(error, match=f"{as_ext4}/k"):
        LocalObjects(as_ext4, fsync=False).put("k", b"1" * 2 * MB)
    assert list(as_ext4.iterdir()) == []
