"""Files side by side in one array: their bytes, their sizes, and the limits of the system."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from actshuffle.arrays.field import Field
from actshuffle.errors import SourceError, StorageError
from actshuffle.limits import HUGE, PAGE
from actshuffle.storage import mapping
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import as_place


def stored(folder: Path, count: int, nbytes: int) -> list[bytes]:
    """The content of ``count`` files f.0, f.1, ... of random bytes."""
    found = [np.random.default_rng(n).bytes(nbytes) for n in range(count)]
    for number, data in enumerate(found):
        (folder / f"f.{number}").write_bytes(data)
    return found


def keys(count: int) -> list[str]:
    return [f"f.{n}" for n in range(count)]


@pytest.mark.parametrize("width", [1, 3, 4, 100, 512, 1024, 1028, 4100, 2304 * 2, 8192])
@pytest.mark.parametrize("chunk_rows", [1, 7, 64])
def test_rows_of_all_files_lie_in_one_array(tmp_path: Path, width: int, chunk_rows: int) -> None:
    """Whether or not a file is a whole number of pages."""
    field = Field("x", "", width, (width,), chunk_rows, "f.{}")
    data = b"".join(stored(tmp_path, 5, chunk_rows * width))
    found = open_objects(as_place(tmp_path)).mapped(keys(5), chunk_rows * width, field.slot_bytes)
    assert found is not None
    rows = np.random.default_rng(0).permutation(5 * chunk_rows).astype(np.uint64)
    taken = np.empty((len(rows), width), np.uint8)
    found.take(field.mapped_at(rows), taken)
    np.testing.assert_array_equal(taken, np.frombuffer(data, np.uint8).reshape(-1, width)[rows.astype(int)])
    assert field.slot_bytes % PAGE == 0
    assert field.slot_bytes % width == 0
    found.check()


@pytest.mark.parametrize(
    ("width", "chunk_rows", "unit"),
    [
        (8192, 512, HUGE),
        (8192, 255, PAGE),  # less than a huge page
        (3072, 16384, 3 * HUGE),
        (3072, 4096, 3 * PAGE),  # a quarter of the addresses and more would be left unused
        (511, 8208, 511 * PAGE),
        (4684, 4096, 4684 * PAGE // 4),  # rows and huge pages begin together only every 2.5 GB
    ],
)
def test_large_files_begin_on_huge_pages(width: int, chunk_rows: int, unit: int) -> None:
    field = Field("x", "", width, (width,), chunk_rows, "f.{}")
    assert field.slot_bytes % unit == 0
    assert 0 <= field.slot_bytes - chunk_rows * width < unit


def test_addresses_begin_on_a_huge_page(tmp_path: Path) -> None:
    stored(tmp_path, 2, 4 * PAGE)
    held = []
    for _ in range(5):
        found = open_objects(as_place(tmp_path)).mapped(keys(2), 4 * PAGE, 4 * PAGE)
        assert found is not None
        held.append(found)
        assert found.rows(1).ctypes.data % HUGE == 0


def test_an_array_outlives_what_made_it_and_nothing_stays_behind(tmp_path: Path) -> None:
    def is_mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    (data,) = stored(tmp_path, 1, PAGE)
    found = open_objects(as_place(tmp_path)).mapped(keys(1), PAGE, PAGE)
    assert found is not None
    rows = found.rows(16)
    del found
    gc.collect()
    assert is_mapped()
    assert rows.tobytes() == data
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 0
    del rows
    gc.collect()
    assert not is_mapped()


def test_files_that_are_too_short_absent_or_links_out_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    stored(tmp_path / "in", 3, 100)
    objects = open_objects(as_place(tmp_path / "in"))
    os.truncate(tmp_path / "in/f.1", 99)
    with pytest.raises(StorageError, match=r"ends at byte 99, 100 were expected: .*f\.1"):
        objects.mapped(keys(3), 100, PAGE)
    with pytest.raises(StorageError, match=r"No such file or directory: .*f\.7"):
        objects.mapped(["f.0", "f.7"], 100, PAGE)
    (tmp_path / "in/f.1").unlink()
    (tmp_path / "in/f.1").symlink_to("/etc/hostname")
    with pytest.raises(SourceError, match="link out of"):
        objects.mapped(keys(3), 1, PAGE)


def test_files_that_shrink_or_vanish_later_are_found_by_a_check(tmp_path: Path) -> None:
    stored(tmp_path, 3, 5000)
    found = open_objects(as_place(tmp_path)).mapped(keys(3), 5000, 2 * PAGE)
    assert found is not None
    found.check()
    os.truncate(tmp_path / "f.2", 4999)
    with pytest.raises(StorageError, match=r"ends at byte 4999.*f\.2"):
        found.check()
    (tmp_path / "f.2").unlink()
    with pytest.raises(StorageError, match=r"No such file or directory: .*f\.2"):
        found.check()


def test_more_files_than_a_process_may_map_are_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path, 3, 100)
    monkeypatch.setattr(mapping, "_most_mappings", lambda: 24)
    objects = open_objects(as_place(tmp_path))
    assert objects.mapped(keys(3), 100, PAGE) is not None
    monkeypatch.setattr(mapping, "_most_mappings", lambda: 23)
    assert objects.mapped(keys(3), 100, PAGE) is None


def test_addresses_that_the_system_refuses_are_not_mapped(tmp_path: Path) -> None:
    stored(tmp_path, 1, 100)
    code = (
        "import resource, sys; from actshuffle.storage.objects import open_objects\n"
        "from actshuffle.storage.place import as_place\n"
        "objects = open_objects(as_place(sys.argv[1]))\n"
        "assert objects.mapped(['f.0'], 100, 1 << 40) is not None\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (1 << 39, {resource.RLIM_INFINITY}))\n"
        "assert objects.mapped(['f.0'], 100, 1 << 40) is None\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


def test_nothing_elsewhere_is_mapped() -> None:
    objects = open_objects(as_place("memory://mapping"))
    objects.put("f.0", b"x" * 10)
    assert objects.mapped(["f.0"], 10, PAGE) is None
