"""A store that changes under a reader: the loader says so at the end of the epoch."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from actshuffle import Loader, shuffle
from actshuffle.errors import ActshuffleError, SourceError
from support.finished import collection, shuffled


def negate(path: Path) -> None:
    name = next(name for name, array in zarr.open_group(path, mode="r").arrays() if array.dtype.kind == "f")
    array = zarr.open_array(path, path=name, mode="r+")
    array[...] = -np.asarray(array)


def replace(path: Path) -> None:
    shuffle(path.with_suffix(".src"), path, seed=99, overwrite=True)


def lose(path: Path) -> None:
    shutil.rmtree(path)


def grow(path: Path) -> None:
    array = next(iter(zarr.open_group(path, mode="r+").arrays()))[1]
    array.resize((array.shape[0] + 5, *array.shape[1:]))


@pytest.mark.parametrize("change", [negate, replace, lose, grow])
@pytest.mark.parametrize("settings", [{}, {"world_size": 2, "rank": 1}, {"buffer_rows": 40}], ids=str)
def test_a_store_that_changes_under_a_loader_is_told(change, settings, tmp_path):
    path = shuffled(tmp_path / "s.zarr")
    loader = Loader(path, 50, epochs=2, **settings)
    passed = iter(loader)
    next(passed)
    change(path)
    with pytest.raises(ActshuffleError):
        for _ in passed:
            pass


def test_the_message_names_the_file(tmp_path):
    path = shuffled(tmp_path / "s.zarr")
    loader = Loader(path, 50)
    passed = iter(loader)
    next(passed)
    negate(path)
    with pytest.raises(SourceError, match=r"changed while it was read: .*was written .* files"):
        for _ in passed:
            pass
    assert sum(1 for _ in Loader(path, 50)) == loader.batches_per_epoch, "opened again, it is read as it is"


def test_control_a_store_that_stays_is_read_for_ever(tmp_path):
    path = collection(tmp_path / "c.zarr")
    loader = Loader(path, 50, epochs=3, buffer_rows=0)
    assert sum(1 for _ in loader) == 3 * loader.batches_per_epoch


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_of_a_data_loader_tell_it_too(tmp_path):
    data = pytest.importorskip("torch.utils.data")
    path = shuffled(tmp_path / "s.zarr")
    loader = data.DataLoader(Loader(path, 50).torch(), batch_size=None, num_workers=2, persistent_workers=True)
    assert len(list(loader)) > 2
    negate(path)
    with pytest.raises((SourceError, RuntimeError), match="changed while it was read"):
        list(loader)
