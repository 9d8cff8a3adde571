"""Bad input: a clear typed error before the first byte, and nothing written anywhere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

import actshuffle
from actshuffle.engine import prepare
from actshuffle.errors import DestinationExistsError, InfeasibleError, MissingChunkError, RequestError, SourceError
from actshuffle.storage.files import LocalObjects
from support.processes import SEED, source
from support.stores import array, values


@pytest.fixture
def src(tmp_path):
    (tmp_path / "in").mkdir()
    return source(tmp_path / "in" / "src.zarr", 60)


@pytest.fixture
def dst(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "dst.zarr"


def tree(folder):
    """Everything under a folder, to the byte."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        link = path.is_symlink()
        found[name] = str(path.readlink()) if link else path.read_bytes() if path.is_file() else None
    return found


def assert_refused(error, src, dst, tmp_path, *, says=(), **settings):
    """Check the error, its message, and that nothing at all was written."""
    before = tree(tmp_path)
    with pytest.raises(error) as raised:
        actshuffle.shuffle(src, dst, **({"seed": SEED} | settings))
    assert type(raised.value) is error
    assert tree(tmp_path) == before
    message = str(raised.value)
    for part in [says] if isinstance(says, str) else says:
        assert part in message, message
    assert len(message) < 1500
    assert raised.value.exit_code == 2
    return message


# --- No source, or none that is one -------------------------------------------------------------


def test_no_such_source(dst, tmp_path):
    assert_refused(SourceError, tmp_path / "nowhere", dst, tmp_path, says=("no such source", "nowhere"))


def test_not_zarr(dst, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("hello")
    assert_refused(SourceError, tmp_path / "in", dst, tmp_path, says="not a Zarr array or group")


def test_source_is_a_file(dst, tmp_path):
    (tmp_path / "file.npy").write_bytes(b"\x93NUMPY")
    assert_refused(SourceError, tmp_path / "file.npy", dst, tmp_path)


def test_source_is_a_dangling_link(dst, tmp_path):
    (tmp_path / "link.zarr").symlink_to(tmp_path / "gone")
    assert_refused(SourceError, tmp_path / "link.zarr", dst, tmp_path)


def test_source_links_to_itself(dst, tmp_path):
    (tmp_path / "link.zarr").symlink_to("link.zarr")
    assert_refused(RequestError, tmp_path / "link.zarr", dst, tmp_path, says="link.zarr")


def test_group_without_arrays(dst, tmp_path):
    zarr.create_group(tmp_path / "in.zarr")
    assert_refused(SourceError, tmp_path / "in.zarr", dst, tmp_path, says="no arrays")


def test_group_with_groups(src, dst, tmp_path):
    zarr.create_group(src, path="deeper")
    assert_refused(SourceError, src, dst, tmp_path, says=("deeper", " fields"))


def test_arrays_of_unequal_length(src, dst, tmp_path):
    array(src, values(59), "short")
    assert_refused(SourceError, src, dst, tmp_path, says=("unequal length", "short: 59", "x: 60"))


def test_scalar(src, dst, tmp_path):
    zarr.create_array(src, name="scalar", shape=(), dtype="f4")
    assert_refused(SourceError, src, dst, tmp_path, says="scalar")


def test_rows_that_are_empty(src, dst, tmp_path):
    zarr.create_array(src, name="thin", shape=(60, 0), dtype="f4")
    assert_refused(SourceError, src, dst, tmp_path, says="rows are empty")


def test_object_dtype(dst, tmp_path):
    folder = tmp_path / "in.zarr"
    folder.mkdir()
    (folder / ".zarray").write_text(
        json.dumps(
            {
                "zarr_format": 2,
                "shape": [60],
                "chunks": [60],
                "dtype": "|O",
                "fill_value": None,
                "order": "C",
                "compressor": None,
                "filters": [{"id": "pickle", "protocol": 5}],
            }
        )
    )
    assert_refused(SourceError, folder, dst, tmp_path)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_strings_of_any_length(zarr_format, dst, tmp_path):
    made = zarr.create_array(tmp_path / "in.zarr", shape=(3,), dtype=str, zarr_format=zarr_format)
    made[...] = np.array(["a", "bcd", ""])
    assert_refused(SourceError, tmp_path / "in.zarr", dst, tmp_path, says="no fixed width")


def test_array_with_our_name(src, dst, tmp_path):
    array(src, values(60), "_actshuffle")
    assert_refused(SourceError, src, dst, tmp_path, says="_actshuffle")


def test_array_named_source_row(src, dst, tmp_path):
    array(src, values(60), "source_row")
    assert_refused(RequestError, src, dst, tmp_path, says=("source_row", "source_row=False"))


# --- Requests that cannot be met ----------------------------------------------------------------


def test_unknown_field(src, dst, tmp_path):
    assert_refused(RequestError, src, dst, tmp_path, fields=["x", "y"], says=("'y'", "doc", "x"))


@pytest.mark.parametrize("seed", [-1, 1.5, "7", True, None])
def test_seed_that_is_none(seed, src, dst, tmp_path):
    if seed is not None:
        assert_refused(RequestError, src, dst, tmp_path, seed=seed, says="seed")


@pytest.mark.parametrize("levels", [0, -1, 17])
def test_levels_out_of_range(levels, src, dst, tmp_path):
    assert_refused(RequestError, src, dst, tmp_path, levels=levels, block_bytes=500, says="levels")


def test_levels_too_few(src, dst, tmp_path):
    message = assert_refused(InfeasibleError, src, dst, tmp_path, levels=1, block_bytes=300, run_bytes=1, chunk_rows=4)
    assert "M x (M/P)^0 = " in message
    assert "use levels=" in message


def test_memory_too_small_for_its_rows(dst, tmp_path):
    array(tmp_path / "in.zarr", values(8, (1 << 20,)), chunks=(1, 1 << 20))
    message = assert_refused(InfeasibleError, tmp_path / "in.zarr", dst, tmp_path, memory="17MB", fsync=False)
    assert "give at least memory=" in message


def test_memory_advice_is_enough(dst, tmp_path):
    array(tmp_path / "in.zarr", values(1, (1 << 20,)), chunks=(1, 1 << 20))
    with pytest.raises(InfeasibleError) as raised:
        actshuffle.shuffle(tmp_path / "in.zarr", dst, seed=1, memory="17MB")
    advice = str(raised.value).split('memory="')[1].split('"')[0]
    actshuffle.shuffle(tmp_path / "in.zarr", dst, seed=1, memory=advice, run_bytes=1, fsync=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"memory": "lots"},
        {"memory": 0},
        {"memory": "-1GB"},
        {"block_bytes": 0},
        {"run_bytes": 0},
        {"chunk_rows": 0},
        {"chunk_rows": -3},
        {"chunks_per_shard": 0},
        {"codec": "brotli"},
        {"missing_chunks": "ignore"},
        {"workers": -1},
        {"storage_options": {"key": object}},
    ],
    ids=str,
)
def test_arguments_that_mean_nothing(settings, src, dst, tmp_path):
    assert_refused(RequestError, src, dst, tmp_path, **settings)


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "s3://user:hunter2@bucket/x", "https://h/x?sig=hunter2"])
def test_urls_that_cannot_be_used(url, src, dst, tmp_path):
    assert "hunter2" not in assert_refused(RequestError, url, dst, tmp_path)
    assert "hunter2" not in assert_refused(RequestError, src, url, tmp_path)
    assert "hunter2" not in assert_refused(RequestError, src, dst, tmp_path, scratch=url)


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_paths_that_are_none(name, src, dst, tmp_path):
    assert_refused(RequestError, name, dst, tmp_path)
    assert_refused(RequestError, src, name, tmp_path)


def test_path_that_is_too_long(src, dst, tmp_path):
    with pytest.raises(actshuffle.errors.ActshuffleError, match="too long"):
        actshuffle.shuffle(src, dst.with_name("x" * 300), seed=1)
    with pytest.raises(actshuffle.errors.ActshuffleError, match="too long"):
        actshuffle.shuffle(src.with_name("x" * 300), dst, seed=1)
    assert not list(dst.parent.iterdir())


# --- Places -------------------------------------------------------------------------------------


def test_destination_exists(src, dst, tmp_path):
    shutil.copytree(src, dst)
    assert_refused(DestinationExistsError, src, dst, tmp_path, says="overwrite=True")


def test_destination_is_a_folder_with_something_else(src, dst, tmp_path):
    dst.mkdir()
    (dst / "thesis.tex").write_text("years of work")
    assert_refused(DestinationExistsError, src, dst, tmp_path)
    assert_refused(DestinationExistsError, src, dst, tmp_path, overwrite=True, says="by hand")


def test_destination_is_an_empty_folder(src, dst):
    dst.mkdir()
    actshuffle.shuffle(src, dst, seed=1, fsync=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_destination_is_a_file(overwrite, src, dst, tmp_path):
    dst.write_text("years of work")
    assert_refused(DestinationExistsError, src, dst, tmp_path, overwrite=overwrite, says="is a file")


def test_destination_inside_source(src, tmp_path):
    assert_refused(RequestError, src, src / "dst.zarr", tmp_path, says="inside each other")
    assert_refused(RequestError, src, src / "x" / "deep" / "dst.zarr", tmp_path, says="inside each other")
    assert_refused(RequestError, src, src, tmp_path, says="inside each other")


def test_source_inside_destination(src, tmp_path):
    assert_refused(RequestError, src, src.parent, tmp_path, says="inside each other")
    assert_refused(RequestError, src, src.parent, tmp_path, overwrite=True, says="inside each other")


def test_destination_inside_source_by_way_of_a_link(src, tmp_path):
    (tmp_path / "link").symlink_to(src)
    assert_refused(RequestError, src, tmp_path / "link" / "dst.zarr", tmp_path, says="inside each other")
    assert_refused(RequestError, tmp_path / "link", src / "dst.zarr", tmp_path, says="inside each other")
    assert_refused(RequestError, src, src / ".." / "src.zarr" / "y", tmp_path, says="inside each other")


def test_remote_destination_inside_source(tmp_path):
    for src, dst in [("a", "a"), ("a", "a/"), ("a", "a/b"), ("a/b", "a")]:
        with pytest.raises(RequestError, match="inside each other"):
            actshuffle.shuffle(f"memory://{src}", f"memory://{dst}", seed=1)


def test_scratch_inside_source_or_destination(src, dst, tmp_path):
    assert_refused(RequestError, src, dst, tmp_path, scratch=src / "scratch", says="scratch")
    assert_refused(RequestError, src, dst, tmp_path, scratch=dst, says="scratch")
    assert_refused(RequestError, src, dst, tmp_path, scratch=dst / "scratch", says="scratch")


@pytest.mark.parametrize("where", ["scratch", "destination"])
def test_no_room(where, src, dst, tmp_path, monkeypatch):
    full = tmp_path / "elsewhere"
    full.mkdir()

    def free(objects):
        on_full = str(objects.root).startswith(str(full))
        return 1000 if on_full == (where == "scratch") else 1 << 40

    monkeypatch.setattr(LocalObjects, "free_bytes", free)
    monkeypatch.setattr(prepare, "_device", lambda path: str(path).startswith(str(full)))
    message = assert_refused(
        InfeasibleError, src, dst, tmp_path, scratch=full, levels=2, block_bytes=400, run_bytes=1, chunk_rows=4
    )
    assert "1 KB free" in message
    assert "give scratch" in message


def test_no_room_for_both_on_one_disk(src, dst, tmp_path, monkeypatch):
    need = 60 * (20 + 8) + 60 * 36
    monkeypatch.setattr(LocalObjects, "free_bytes", lambda objects: need - 1)
    settings = {"levels": 2, "block_bytes": 400, "run_bytes": 1, "chunk_rows": 4}
    assert_refused(InfeasibleError, src, dst, tmp_path, **settings)
    monkeypatch.setattr(LocalObjects, "free_bytes", lambda objects: need)
    actshuffle.shuffle(src, dst, seed=1, fsync=False, **settings)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_destination_that_may_not_be_written(src, dst):
    dst.parent.chmod(0o500)
    with pytest.raises(actshuffle.errors.StorageError, match="Permission denied"):
        actshuffle.shuffle(src, dst, seed=1)


# --- Chunks -------------------------------------------------------------------------------------


def kinds(path, kind):
    """The path of a source, one object of whose field ``x`` is about to be damaged."""
    settings = {
        "raw": {},
        "v2": {"zarr_format": 2},
        "zstd": {"compressors": "auto"},
        "cut_rows": {"chunks": (7, 2)},
        "crc32c": {"compressors": [zarr.codecs.Crc32cCodec()]},
        "sharded": {"chunks": (4, 4), "shards": (12, 4)},
        "sharded_zstd": {"chunks": (4, 4), "shards": (12, 4), "compressors": "auto"},
    }[kind]
    fmt = {"zarr_format": 2} if kind == "v2" else {}
    zarr.create_group(path, **fmt)
    array(path, values(60, (), "<i4"), "doc", **fmt)
    array(path, values(60, (4,)), "x", **settings)
    return path / ("x/2.0" if kind == "v2" else "x/c/2/0")


KINDS = ["raw", "v2", "zstd", "cut_rows", "crc32c", "sharded", "sharded_zstd"]


@pytest.mark.parametrize("kind", KINDS)
def test_missing_chunk(kind, dst, tmp_path):
    path = kinds(tmp_path / "in.zarr", kind)
    path.unlink()
    key = str(path.relative_to(tmp_path / "in.zarr"))
    says = (key, "missing", 'missing_chunks="fill"')
    assert_refused(MissingChunkError, tmp_path / "in.zarr", dst, tmp_path, says=says)


@pytest.mark.parametrize("kind", ["sharded", "sharded_zstd"])
def test_missing_inner_chunk(kind, dst, tmp_path):
    path = kinds(tmp_path / "in.zarr", kind)
    data = bytearray(path.read_bytes())
    data[-4 - 16 * 2 : -4 - 16] = b"\xff" * 16  # the second of three
    path.write_bytes(data)
    assert_refused(MissingChunkError, tmp_path / "in.zarr", dst, tmp_path, says=("x/c/2/0", "lacks inner chunk (1, 0)"))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "zstd"])
@pytest.mark.parametrize("left", [0, 1, -1])
def test_truncated_chunk(kind, left, dst, tmp_path):
    path = kinds(tmp_path / "in.zarr", kind)
    path.write_bytes(path.read_bytes()[:left])
    assert_refused(MissingChunkError, tmp_path / "in.zarr", dst, tmp_path, says="x/")


def test_truncated_shard_with_its_index(dst, tmp_path):
    """The index is intact, but the data that it points to is missing."""
    path = kinds(tmp_path / "in.zarr", "sharded")
    data = path.read_bytes()
    path.write_bytes(data[-52:])
    assert_refused(MissingChunkError, tmp_path / "in.zarr", dst, tmp_path, says=("x/c/2/0", "past its end"))


@pytest.mark.parametrize("kind", ["zstd", "crc32c", "sharded_zstd"])
def test_damaged_chunk_is_a_source_error(kind, dst, tmp_path):
    """Its size does not show the damage; the run stops and names the rows, and resumes once the object is whole."""
    path = kinds(tmp_path / "in.zarr", kind)
    whole = path.read_bytes()
    path.write_bytes(bytes(b ^ 0x5A for b in whole[:60]) + whole[60:])
    with pytest.raises(SourceError, match="cannot decode rows"):
        actshuffle.shuffle(tmp_path / "in.zarr", dst, seed=1, fsync=False)
    path.write_bytes(whole)
    actshuffle.shuffle(tmp_path / "in.zarr", dst, seed=1, fsync=False)
    assert actshuffle.verify(tmp_path / "in.zarr", dst).ok


def test_chunk_that_is_a_folder(dst, tmp_path):
    path = kinds(tmp_path / "in.zarr", "raw")
    path.unlink()
    path.mkdir()
    assert_refused(MissingChunkError, tmp_path / "in.zarr", dst, tmp_path, says="x/c/2/0")


def test_source_that_vanishes_during_the_run(dst, tmp_path, src):
    from actshuffle.testing import Faults, Killed, matching
    from actshuffle.testing.stories import new_process

    with Faults(matching("put level1/blocks/c.1.0", "kill")), pytest.raises(Killed):
        from actshuffle.testing import run

        run(src, dst, SEED, levels=2, block_bytes=400, run_bytes=1, chunk_rows=4)
    new_process()
    shutil.rmtree(src)
    with pytest.raises(SourceError, match="no such source"):
        actshuffle.shuffle(src, dst, fsync=False)


# --- Zarr readers of ours take no store without its marker --------------------------------------


@pytest.mark.parametrize("what", ["verify", "info", "status"])
def test_readers_of_a_half_done_store(what, src, dst):
    from actshuffle.testing import Faults, Killed, matching, run

    with Faults(matching("put x/c.1.0", "kill")), pytest.raises(Killed):
        run(src, dst, SEED, levels=2, block_bytes=400, run_bytes=1, chunk_rows=4)
    if what == "status":
        assert actshuffle.status(dst)["state"] == "half done"
        return
    with pytest.raises(actshuffle.errors.IncompleteStoreError):
        actshuffle.verify(src, dst) if what == "verify" else actshuffle.info(dst)


def test_every_error_is_clear(src):
    """Base class, code and exit status of each error are as the table says."""
    from actshuffle import errors

    tree = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.ActshuffleError)]
    assert len({e.code for e in tree}) == len(tree)
    assert all(e.code in errors.__doc__ for e in tree if e is not errors.ActshuffleError)
    assert Path(errors.__file__).read_text().count("class ") == len(tree)
    for e in tree:
        assert isinstance(__import__("pickle").loads(__import__("pickle").dumps(e("x"))), e)
