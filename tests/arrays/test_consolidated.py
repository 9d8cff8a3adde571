"""Consolidated metadata is a copy that nobody updates: every array speaks for itself."""

import shutil

import pytest
import zarr

import actshuffle
from actshuffle.errors import SourceError
from actshuffle.testing.oracle import differences
from support.finished import collection, shuffled
from support.stores import array, group, values

pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata")

OLD, NEW = 600, 1000


@pytest.fixture(params=[2, 3])
def stale(request, tmp_path):
    """A group of 1,000 rows whose consolidated metadata still says 600."""
    path = tmp_path / "stale.zarr"
    zarr.create_group(path, zarr_format=request.param)
    array(path, values(OLD, (4,)), "x", chunks=(64, 4), zarr_format=request.param)
    zarr.consolidate_metadata(path, zarr_format=request.param)
    node = zarr.open_array(path, path="x", mode="r+")
    node.append(values(NEW - OLD, (4,), seed=8))
    assert zarr.open_group(path, mode="r")["x"].shape[0] == OLD, "zarr itself believes the copy"
    return path


def test_every_reader_of_a_source_sees_all_rows(stale, tmp_path):
    dst = tmp_path / "dst.zarr"
    assert actshuffle.plan(stale, memory="200MB").rows == NEW
    assert actshuffle.info(stale)["rows"] == NEW
    assert actshuffle.open_dataset(stale, incomplete=True).rows == NEW
    assert actshuffle.stats(stale).rows == NEW
    loader = actshuffle.Loader(stale, 100, fields=["x"], buffer_rows=0, incomplete=True)
    assert sum(len(batch["x"]) for batch in loader) == NEW
    actshuffle.shuffle(stale, dst, seed=1, memory="200MB")
    assert differences(stale, dst, 1) == []
    assert actshuffle.verify(stale, dst).ok
    actshuffle.sample(stale, NEW, tmp_path / "some.zarr", seed=2)
    assert actshuffle.open_dataset(tmp_path / "some.zarr").rows == NEW
    assert actshuffle.concat([stale, stale], tmp_path / "both.zarr").rows == 2 * NEW
    actshuffle.append(dst, stale, tmp_path / "grown.zarr", memory="200MB", again=True)
    assert actshuffle.open_dataset(tmp_path / "grown.zarr").rows == 2 * NEW


def test_training_sees_all_rows(stale):
    pytest.importorskip("torch")
    from saetrain.config import Config
    from saetrain.data import Store

    store = Store(stale, Config(field="x", incomplete=True))
    assert store.rows == NEW
    assert store.read("x", OLD, NEW).shape == (NEW - OLD, 4)


def test_verify_sees_rows_that_a_run_left_out(stale, tmp_path):
    """A store of the first 600 rows is no shuffle of the 1,000."""
    part = tmp_path / "part.zarr"
    group(part, {"x": values(OLD, (4,))}, chunks=(64, 4))
    actshuffle.shuffle(part, tmp_path / "dst.zarr", seed=1, memory="200MB")
    assert not actshuffle.verify(stale, tmp_path / "dst.zarr").ok


def test_finished_stores_speak_for_themselves(tmp_path):
    """A store of ours that somebody consolidated, and whose array then changed, does not fit its marker."""
    for make in (shuffled, collection):
        path = make(tmp_path / f"{make.__name__}.zarr")
        zarr.consolidate_metadata(path)
        rows = actshuffle.open_dataset(path).rows
        loader = actshuffle.Loader(path, 10, buffer_rows=0)
        assert sum(len(next(iter(batch.values()))) for batch in loader) == rows
        name = next(iter(actshuffle.open_dataset(path).fields))
        node = zarr.open_array(path, path=name, mode="r+")
        node.resize((rows - 1, *node.shape[1:]))
        with pytest.raises(actshuffle.errors.ActshuffleError, match=r"rows|length"):
            actshuffle.open_dataset(path)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_an_array_that_only_the_copy_knows_is_refused(zarr_format, tmp_path):
    path = tmp_path / "in.zarr"
    zarr.create_group(path, zarr_format=zarr_format)
    array(path, values(30, (4,)), "x", zarr_format=zarr_format)
    array(path, values(30), "y", zarr_format=zarr_format)
    zarr.consolidate_metadata(path, zarr_format=zarr_format)
    shutil.rmtree(path / "y")
    with pytest.raises(SourceError, match="lists array 'y'"):
        actshuffle.plan(path, memory="200MB")
    assert actshuffle.plan(path, memory="200MB", fields=["x"]).rows == 30
    with pytest.raises(SourceError, match="lists array 'y'"):
        actshuffle.shuffle(path, tmp_path / "dst.zarr", seed=1, memory="200MB")
    assert not (tmp_path / "dst.zarr").exists()


def test_control_without_the_guard_rows_are_lost(stale, tmp_path, monkeypatch):
    from actshuffle.arrays import guard

    monkeypatch.setattr(guard, "without_copies", lambda key, data: data)
    assert actshuffle.plan(stale, memory="200MB").rows == OLD
