"""Rows of a source in pieces: the same bytes, whatever the size of the pieces and wherever the data is."""

from __future__ import annotations

import time

import numpy as np
import pytest

from actshuffle.arrays import source as module
from actshuffle.arrays.metadata import source_arrays, source_field
from actshuffle.arrays.source import Source
from actshuffle.errors import StorageError
from actshuffle.storage.files import LocalObjects
from actshuffle.storage.place import as_place
from support.stores import array, values

ROWS = 200


@pytest.fixture(params=["plain", "zstd"])
def store(request, tmp_path):
    codecs = {} if request.param == "plain" else {"compressors": "auto"}
    array(tmp_path / "a.zarr", values(ROWS, (6,), "<f4"), chunks=(30, 6), **codecs)
    return tmp_path / "a.zarr"


def opened(path):
    place = as_place(path)
    ((name, node),) = source_arrays(place).items()
    return Source(place), source_field(name, node)


def joined(source, field, start, stop):
    """All pieces of a range, and the number of them."""
    out, count = np.zeros((stop - start, field.row_bytes), np.uint8), 0
    for first, rows in source.tiles(field, start, stop):
        out[first : first + len(rows)] = rows
        rows[:] = 255  # the memory is the caller's until it asks for the next piece
        count += 1
    return out, count


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("tile", [1, 24, 7 * 24, 1 << 20])
def test_pieces_hold_the_rows(tile, cached, store, monkeypatch):
    for name in ("TILE_BYTES", "AHEAD_BYTES"):
        monkeypatch.setattr(module, name, tile)
    monkeypatch.setattr(LocalObjects, "is_cached", lambda *_: cached)
    source, field = opened(store)
    for start, stop in ((0, ROWS), (29, 31), (60, 61), (7, 150)):
        whole = np.empty((stop - start, field.row_bytes), np.uint8)
        source.read(field, start, whole)
        found, count = joined(source, field, start, stop)
        np.testing.assert_array_equal(found, whole)
        assert count == (-(-(stop - start) // max(1, tile // field.row_bytes)) if field.source_key else 1)


@pytest.mark.parametrize("width", [6, 1024, 1536])
def test_pieces_of_a_disk_begin_on_whole_pages(width, tmp_path, monkeypatch):
    """Rows of 6 KiB are whole pages by twos, and rows of 24 bytes would be only in larger pieces."""
    array(tmp_path / "a.zarr", values(40, (width,), "<f4"), chunks=(20, width))
    source, field = opened(tmp_path / "a.zarr")
    monkeypatch.setattr(LocalObjects, "is_cached", lambda *_: False)
    monkeypatch.setattr(module, "TILE_BYTES", 1)
    monkeypatch.setattr(module, "AHEAD_BYTES", 5 * field.row_bytes)
    starts = [first for first, _ in source.tiles(field, 0, 40)]
    assert starts == {6: [*range(0, 40, 5)], 1024: [*range(0, 40, 5)], 1536: [*range(0, 40, 4)]}[width]


def test_the_next_piece_of_a_disk_is_read_while_one_is_looked_at(store, monkeypatch):
    source, field = opened(store)
    if not field.source_key:
        pytest.skip("zarr decodes it")
    asked, read = [], LocalObjects.read

    def noted(self, extents):
        asked.append(extents[0].offset)
        read(self, extents)

    monkeypatch.setattr(LocalObjects, "read", noted)
    monkeypatch.setattr(LocalObjects, "is_cached", lambda *_: False)
    monkeypatch.setattr(module, "TILE_BYTES", 24)
    monkeypatch.setattr(module, "AHEAD_BYTES", 10 * 24)
    for seen, _ in enumerate(source.tiles(field, 0, ROWS), 1):
        ahead = min(seen + 1, ROWS // 10)
        for _ in range(200):
            if len(asked) >= ahead:
                break
            time.sleep(0.05)
        time.sleep(0.01)
        assert len(asked) == ahead, "nothing is read, or more than there is memory for"


def test_a_file_that_is_too_short_is_an_error(store, monkeypatch):
    source, field = opened(store)
    if not field.source_key:
        pytest.skip("zarr decodes it")
    monkeypatch.setattr(module, "TILE_BYTES", 48)
    monkeypatch.setattr(LocalObjects, "is_cached", lambda *_: True)
    path = store / field.source_key.format(2)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StorageError, match="file ends at byte"):
        joined(source, field, 0, ROWS)
