"""Objects are complete or absent, stay under their root, and fail with errors that say what to do."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import actshuffle
from actshuffle.engine.preview import requests_of
from actshuffle.errors import RequestError, SourceError, StorageError, StorageFullError
from actshuffle.storage import files
from actshuffle.storage.buffers import arena
from actshuffle.storage.directio import Extent
from actshuffle.storage.files import LocalObjects
from actshuffle.storage.fsspecstore import FsspecObjects
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import as_place, local_path
from support.oracle import assert_is_oracle
from support.stores import array, values


@pytest.fixture(params=["local", "memory"])
def objects(request, tmp_path):
    url = str(tmp_path / "root") if request.param == "local" else f"memory://{tmp_path.name}"
    return open_objects(as_place(url))


def contents(folder: Path):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# --- Everywhere ---------------------------------------------------------------------------------


def test_open_chooses_by_url(tmp_path):
    assert isinstance(open_objects(as_place(tmp_path)), LocalObjects)
    assert isinstance(open_objects(as_place(f"file://{tmp_path}")), LocalObjects)
    assert isinstance(open_objects(as_place("memory://x")), FsspecObjects)
    assert local_path(as_place("memory://x")) is None


def test_file_urls_are_unescaped(tmp_path):
    folder = tmp_path / "my data #1 50%"
    place = as_place(folder.as_uri())
    assert "my%20data%20%231%2050%25" in place.url
    assert local_path(place) == local_path(as_place(f"file://localhost{folder.as_uri()[7:]}")) == folder
    open_objects(place).put("a", b"1")
    assert (folder / "a").read_bytes() == b"1"
    assert local_path(place.child("b")) == folder / "b"


def test_a_listing_has_every_file_below_and_no_linked_folder(tmp_path):
    root = tmp_path / "in"
    for key, size in (("a/b/c", 3), ("a/d", 4), ("e", 0)):
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(bytes(size))
    (root / "a/half.actshuffle-partial").write_bytes(b"1")
    (root / "a/again").symlink_to("d")
    (root / "a/gone").symlink_to("nothing")
    (root / "b").symlink_to("a")
    (root / "loop").symlink_to(".")
    (root / "below").symlink_to("e/child")
    objects = LocalObjects(root)
    for prefix in ("", "a", "a/"):
        walked = sorted(
            (Path(folder) / name).relative_to(root).as_posix()
            for folder, _, names in os.walk(root / prefix)
            for name in names
            if not name.endswith("partial")
        )
        assert sorted(objects.list(prefix)) == walked
        sizes = {key: objects.size(key) for key in walked}
        assert dict(objects.sizes(prefix)) == {key: size for key, size in sizes.items() if size is not None}
    assert dict(objects.sizes("")) == {"a/b/c": 3, "a/d": 4, "a/again": 4, "e": 0}
    (root / "itself").symlink_to("itself")
    assert {"itself", "below", "a/gone"} < set(objects.list("")), "a folder that holds nothing else is not empty"
    assert [*objects.list("nothing")] == [*objects.sizes("e")] == []
    assert sorted(objects.list("./a/")) == sorted(objects.list("a"))
    for outside in ("/", "..", "a/../.."):
        with pytest.raises(StorageError, match="leaves"):
            next(iter(objects.list(outside)), None)
    with pytest.raises(StorageError, match=r"levels of symbolic links.*in/itself"):
        dict(objects.sizes(""))
    (root / "itself").unlink()
    (root / "out").symlink_to("/etc/hostname")
    with pytest.raises(SourceError, match="link out of"):
        dict(objects.sizes(""))


@pytest.mark.parametrize("link", ["a", "a/b", "a/b/c"])
def test_a_link_out_of_the_root_is_refused_again_and_again(tmp_path, link):
    """Also where folders below the link are none themselves, and were looked at before the link was."""
    (tmp_path / "in/a/b/c").mkdir(parents=True)
    (tmp_path / "in/a/b/c/key").write_bytes(b"secret")
    (tmp_path / "in" / link).rename(tmp_path / "moved")
    (tmp_path / "in" / link).symlink_to(tmp_path / "moved")
    objects = open_objects(as_place(tmp_path / "in"))
    for _ in range(3):
        with pytest.raises(SourceError, match="link out of"):
            objects.get("a/b/c/key")
        assert not objects.is_cached("a/b/c/key", 0)


@pytest.mark.parametrize("url", ["file://", "file://relative/path", "file:///a?b", "file:///a#b", "file://[/x"])
def test_file_urls_that_say_something_else_are_refused(url):
    with pytest.raises(RequestError, match="file:///absolute/path"):
        as_place(url)


def test_capabilities(tmp_path):
    local, remote = open_objects(as_place(tmp_path)), open_objects(as_place("memory://capabilities"))
    for objects in (local, remote):
        objects.put("a", b"1234")
        objects.read([Extent("a", 0, [memoryview(bytearray(4))])])
    assert (local.is_local, remote.is_local) == (True, False)
    assert not remote.is_cached("a", 0)
    assert not local.is_cached("absent", 0)


def test_open_refuses_an_unknown_protocol():
    with pytest.raises(RequestError, match="nosuch"):
        open_objects(as_place("nosuch://bucket/x"))


def test_storage_options_must_be_plain():
    with pytest.raises(RequestError, match="JSON"):
        as_place("memory://x", {"key": object()})


def test_put_and_get(objects):
    assert objects.get("a/b") is None
    assert objects.size("a/b") is None
    objects.put("a/b", b"hello")
    objects.put("a/c", memoryview(np.arange(3, dtype="<u4")).cast("B"))
    objects.put("d", b"")
    assert objects.get("a/b") == b"hello"
    assert [objects.size(k) for k in ("a/b", "a/c", "d")] == [5, 12, 0]
    objects.put("a/b", b"bye")
    assert objects.get("a/b") == b"bye"


def test_list_and_delete(objects):
    for key in ("a/x", "a/deep/y", "ab/z"):
        objects.put(key, b"1")
    assert sorted(objects.list("a")) == ["a/deep/y", "a/x"]
    assert sorted(objects.list("")) == ["a/deep/y", "a/x", "ab/z"]
    objects.delete("a/x")
    objects.delete("a/x")  # gone already
    assert sorted(objects.list("a")) == ["a/deep/y"]
    objects.delete_prefix("a")
    assert sorted(objects.list("")) == ["ab/z"]
    objects.delete_prefix("nothing")
    assert list(objects.list("nothing")) == []


def test_writer_takes_parts_whose_memory_is_used_again(objects):
    buffer = np.zeros(4, np.uint8)
    with objects.writer("k", 10) as out:
        for value in (1, 2):
            buffer[:] = value
            out.write(memoryview(buffer))
    assert objects.get("k") == bytes([1] * 4 + [2] * 4 + [0] * 2)


def test_writer_that_fails_leaves_what_was_there(objects):
    objects.put("k", b"old")

    def fail():
        with objects.writer("k", 100) as out:
            out.write(memoryview(b"new"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert objects.get("k") == b"old"
    assert list(objects.list("")) == ["k"]


def test_reading_is_a_read_for_later(objects):
    for key in "abcdefg":
        objects.put(key, key.encode() * 4)
    into = bytearray(14)
    at = memoryview(into)
    call = objects.reading([Extent(k, 1, [at[2 * i : 2 * i + 2]]) for i, k in enumerate("abcdefg")])
    assert into == bytes(14)
    call()
    assert into == b"aabbccddeeffgg"


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_what_is_read_later_is_open_already_and_is_closed_in_any_case(tmp_path):
    objects, before = LocalObjects(tmp_path), _open_files()
    for key in ("a", "b"):
        objects.put(key, b"1234")
    into = bytearray(8)
    at = memoryview(into)
    call = objects.reading([Extent("a", 0, [at[:4]]), Extent("b", 0, [at[4:]])])
    forgotten = objects.reading([Extent("a", 0, [at[:4]])])
    assert _open_files() == before + 3
    objects.delete("a")  # too late: it is open
    call()
    assert into == b"12341234"
    del call, forgotten
    assert _open_files() == before


@pytest.mark.parametrize(
    ("most", "limit", "stay"), [(9, 1024, 4), (3, 1024, 3), (9, 5, 2), (9, resource.RLIM_INFINITY, 4)]
)
def test_files_that_rows_come_from_stay_open_as_far_as_a_process_may(tmp_path, monkeypatch, most, limit, stay):
    monkeypatch.setattr(files, "KEPT", most)
    monkeypatch.setattr(files.resource, "getrlimit", lambda what: (limit, limit))
    objects, before = LocalObjects(tmp_path), _open_files()
    for key in "abcd":
        objects.put(key, key.encode() * 4 + b"-" * 4)
    into = bytearray(6)
    for _ in range(2):
        for number, key in enumerate("abca"):
            objects.read_rows(key, 2, [2], memoryview(into), [number])
        objects.read_rows("d", 2, [4, 0], memoryview(into), [4, 2])
        assert into == b"abdd--"
        assert _open_files() == before + stay
    del objects
    assert _open_files() == before


def test_what_is_missing_is_told_when_it_is_read(objects):
    objects.put("a", b"1234")
    into = memoryview(bytearray(8))
    call = objects.reading([Extent("a", 0, [into[:4]]), Extent("nothing", 0, [into[4:]])])
    with pytest.raises((StorageError, FileNotFoundError)):
        call()


def test_read_scatters_ranges_into_views(objects):
    data = np.arange(200, dtype=np.uint8)
    objects.put("a", data.tobytes())
    objects.put("b", data[::-1].tobytes())
    one, two, three, none = (
        np.zeros(10, np.uint8),
        np.zeros(5, np.uint8),
        np.zeros(7, np.uint8),
        np.zeros(0, np.uint8),
    )
    objects.read(
        [Extent("a", 20, [memoryview(one), memoryview(none), memoryview(two)]), Extent("b", 3, [memoryview(three)])]
    )
    np.testing.assert_array_equal(np.concatenate([one, two]), data[20:35])
    np.testing.assert_array_equal(three, data[::-1][3:10])
    objects.read([])


def test_read_into_more_views_than_one_call_takes(objects):
    data = np.random.default_rng(0).integers(0, 256, 6000, np.uint8)
    objects.put("a", data.tobytes())
    out = np.zeros(6000, np.uint8)
    objects.read([Extent("a", 0, [memoryview(out[i : i + 2]) for i in range(0, 6000, 2)])])
    np.testing.assert_array_equal(out, data)


@pytest.mark.parametrize("key", ["short", "absent"])
def test_read_of_what_is_not_there_is_typed(objects, key):
    objects.put("short", b"12345")
    with pytest.raises(StorageError, match=key):
        objects.read([Extent(key, 3, [memoryview(bytearray(3))])])


@pytest.mark.parametrize(("levels", "block"), [(2, 1 << 14), (3, 1 << 13), (1, 1 << 17)])
def test_requests_are_about_as_many_as_planned(tmp_path, levels, block):
    src, dst = f"memory://{tmp_path.name}/src", f"memory://{tmp_path.name}/dst"
    array(src, values(2000, (8,)), chunks=(100, 8))
    asked = {"levels": levels, "block_bytes": block, "run_bytes": 1, "chunk_rows": 100}
    made = actshuffle.plan(src, dst, **asked)
    result = actshuffle.shuffle(src, dst, seed=5, **asked)
    assert result.plan == made
    expected = requests_of(made, src, dst)
    for kind in ("get", "put"):
        assert 0.6 < result.requests[kind] / expected[kind] < 1.5
    assert requests_of(made, tmp_path / "src", tmp_path / "dst") == {}
    local = requests_of(made, src, tmp_path / "dst")
    assert (local["put"], 0 < local["get"] < expected["get"]) == (0, True)


# --- Local disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["/etc/x", "../x", "a/../../x", ".."])
def test_keys_that_leave_the_root_are_refused(tmp_path, key):
    objects = LocalObjects(tmp_path / "root")
    calls = [
        objects.get,
        objects.size,
        objects.delete,
        objects.delete_prefix,
        lambda k: objects.put(k, b"1"),
        lambda k: list(objects.list(k)),
        lambda k: objects.read([Extent(k, 0, [])]),
    ]
    for call in calls:
        with pytest.raises(StorageError, match="leaves"):
            call(key)
    assert contents(tmp_path) == []
    objects.put("..a/b..", b"1")  # dots alone are no way out
    assert objects.get("..a/b..") == b"1"


def test_nothing_shows_before_it_is_whole(tmp_path):
    objects = LocalObjects(tmp_path)
    with objects.writer("k", 4) as out:
        out.write(memoryview(b"1234"))
        assert objects.get("k") is None
        assert list(objects.list("")) == []
        assert len(contents(tmp_path)) == 1
    assert contents(tmp_path) == ["k"]


@pytest.mark.parametrize("fsync", [True, False])
def test_every_folder_is_made_durable(tmp_path, monkeypatch, fsync):
    objects, flushed = LocalObjects(tmp_path, fsync=fsync), []
    keys = [f"{number % 7}/c/{number}/0" for number in range(30)]
    for key in keys:
        objects.put(key, b"data")
    monkeypatch.setattr(files.os, "fsync", lambda fd: flushed.append(Path(f"/proc/self/fd/{fd}").readlink()))
    objects.settle([""])
    due = [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]
    assert sorted(flushed) == (sorted(due) if fsync else [])


def test_partial_files_of_killed_writers_are_swept(tmp_path):
    objects = LocalObjects(tmp_path)
    objects.put("a/whole", b"1")
    code = (
        "import os, sys; from actshuffle.storage.objects import LocalObjects; from pathlib import Path\n"
        "with LocalObjects(Path(sys.argv[1])).writer('a/k', 9) as out:\n"
        "    out.write(memoryview(b'123')); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == 9
    assert len(contents(tmp_path)) == 2
    objects.settle([""])
    assert contents(tmp_path) == ["a/whole"]
    assert objects.get("a/k") is None


def test_writers_of_one_object_at_a_time_do_not_meet(tmp_path, monkeypatch):
    # Twins in two containers have the same process id, and threads share it anyway.
    monkeypatch.setattr(os, "getpid", lambda: 1)
    objects, inside, data = LocalObjects(tmp_path), threading.Barrier(4), b"x" * 100_000
    failures = []

    def write():
        try:
            with objects.writer("k", len(data)) as out:
                inside.wait(120)
                out.write(memoryview(data))
        except BaseException as err:
            failures.append(err)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert contents(tmp_path) == ["k"]
    assert objects.get("k") == data


def test_every_object_is_durable_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda a, b: (calls.append("rename"), rename(a, b))[1])
    LocalObjects(tmp_path).put("k", b"1")
    assert calls == ["fsync", "rename"]
    LocalObjects(tmp_path, fsync=False).put("k", b"1")
    assert calls == ["fsync", "rename", "rename"]


@pytest.mark.parametrize(
    "size", [1, 4095, 4096, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (3 << 20) + 4096, (5 << 20) + 77]
)
@pytest.mark.parametrize("shift", [0, 1, 64])
@pytest.mark.parametrize("fsync", [True, False])
def test_objects_of_any_size_from_memory_of_any_alignment(tmp_path, size, shift, fsync):
    # Large durable writes bypass the page cache, which requires whole pages of aligned memory.
    memory = arena().reset(size + 8192)
    data = memory.take((size + 4096,))[shift : shift + size]
    data[:] = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    objects = LocalObjects(tmp_path, fsync)
    objects.put("whole", memoryview(data))
    step = 1 << 20 if shift == 0 else 777_777
    with objects.writer("parts", size) as out:
        for at in range(0, size, step):
            out.write(memoryview(data[at : at + step]))
    for key in ("whole", "parts"):
        assert objects.get(key) == data.tobytes()


def test_file_systems_without_direct_writes(tmp_path, monkeypatch):
    open_, calls = os.open, []

    def refuse(path, flags, *mode):
        calls.append(bool(flags & os.O_DIRECT))
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return open_(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    data = np.arange(3 << 20, dtype=np.uint8)
    LocalObjects(tmp_path).put("k", memoryview(data))
    assert calls[:2] == [True, False]
    assert (tmp_path / "k").read_bytes() == data.tobytes()
    assert contents(tmp_path) == ["k"]


def test_short_writes_go_on_where_they_stopped(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, part: write(fd, part[:3]))
    LocalObjects(tmp_path).put("k", bytes(range(10)))
    assert LocalObjects(tmp_path).get("k") == bytes(range(10))


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, StorageFullError), (errno.EDQUOT, StorageFullError), (errno.EIO, StorageError)],
)
def test_disk_errors_are_typed_and_leave_nothing(tmp_path, monkeypatch, call, number, expected):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StorageError) as caught:
        LocalObjects(tmp_path).put("some/key", b"1" * 2000)
    assert type(caught.value) is expected
    assert "some/key" in str(caught.value)
    if expected is StorageFullError:
        assert "2 KB" in str(caught.value)
        assert "run again to resume" in str(caught.value)
    assert contents(tmp_path) == []


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MB, if this process may mount one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, check=False, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_typed(tiny_disk):
    objects = LocalObjects(tiny_disk)
    objects.put("fits", bytes(500_000))
    with pytest.raises(StorageFullError, match=r"600 KB.*big"):
        objects.put("big", bytes(600_000))
    assert contents(tiny_disk) == ["fits"]


def test_run_on_a_disk_that_fills_resumes_when_there_is_room(tiny_disk, tmp_path):
    src, dst, ballast = tmp_path / "src.zarr", tiny_disk / "dst.zarr", tiny_disk / "ballast"
    array(src, values(3000, (16,)), chunks=(100, 16))
    settings = {"seed": 5, "levels": 2, "block_bytes": 20_000, "run_bytes": 1, "chunk_rows": 50}

    class FillsUp:
        """Another program fills the disk once the run is in its first level."""

        def begin(self, stage, tasks, nbytes):
            if stage.startswith("level 1"):
                ballast.write_bytes(bytes(930_000))

        def advance(self, nbytes, fresh): ...
        def end(self): ...

    with pytest.raises(StorageFullError, match="no space left"):
        actshuffle.shuffle(src, dst, progress=FillsUp(), **settings)
    ballast.unlink()
    result = actshuffle.shuffle(src, dst, **settings)
    assert result.resumed > 0
    assert_is_oracle(src, dst)
    assert contents(tiny_disk) == [f"dst.zarr/{name}" for name in contents(dst)]


def test_a_folder_is_deleted_by_lots_of_paths(tmp_path, monkeypatch):
    """By threads, of which each has few paths, however many files there are."""
    for number in range(50):
        LocalObjects(tmp_path).put(f"spill/{number % 3}/{number}", b"x")
    lots, unlink = [], files._unlink
    monkeypatch.setattr(files, "LISTED", 16)
    monkeypatch.setattr(files, "_unlink", lambda paths: (lots.append(len(paths)), unlink(paths)))
    LocalObjects(tmp_path).delete_prefix("spill")
    assert not (tmp_path / "spill").exists()
    assert (sum(lots), max(lots)) == (50, 2)
