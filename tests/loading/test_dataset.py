"""Datasets: reads return the stored rows, from every kind of store; views; refusals."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from actshuffle import shuffle
from actshuffle.building.joining import concat
from actshuffle.errors import (
    DestinationExistsError,
    FormatError,
    IncompleteStoreError,
    MissingChunkError,
    RequestError,
    SourceError,
    StorageError,
)
from actshuffle.loading.dataset import Dataset, open_dataset, open_finished_or_plain, write_view
from support.finished import N, collection, shuffled
from support.stores import SOURCES, array, evict, opened


@pytest.mark.parametrize("kind", SOURCES)
def test_reads_are_what_zarr_reads(kind: str, sources: Callable[[str, int], Path]) -> None:
    dataset = open_dataset(sources(kind, N), incomplete=True)
    _, arrays = opened(sources(kind, N))
    assert set(dataset.fields) == set(arrays)
    assert dataset.kind == "plain"
    for name, stored in arrays.items():
        info, whole = dataset.fields[name], stored[:]
        whole = whole.astype(whole.dtype.newbyteorder("<"))
        assert info.dtype == whole.dtype
        assert info.row_bytes * N == whole.nbytes
        for a, b in [(0, N), (3, 77), (N - 1, N), (5, 5), (N, N)]:
            found = dataset.read(name, a, b)
            assert found.dtype == whole.dtype
            assert found.shape == (b - a, *info.row_shape)
            assert found.tobytes() == whole[a:b].tobytes()
        rows = [N - 1, 0, 3, 3, 4, 77]
        assert dataset.take(name, rows).tobytes() == whole[rows].tobytes()
        out = np.zeros((11, info.row_bytes), np.uint8)
        dataset.read_ranges(name, [(3, 9), (100, 100), (145, 150)], out)
        assert out.tobytes() == whole[[*range(3, 9), *range(145, 150)]].tobytes()


def test_reads_go_into_the_callers_memory(tmp_path: Path) -> None:
    dataset = open_dataset(shuffled(tmp_path / "s"))
    for out in (np.empty((20, 6), "<f2"), np.empty((20, 12), np.uint8), np.empty(240, np.uint8)):
        found = dataset.read("data", 10, 30, out)
        assert np.shares_memory(found, out)
        np.testing.assert_array_equal(found, dataset.read("data", 0, N)[10:30])


def test_bfloat16_is_its_bits_and_says_so(sources: Callable[[str, int], Path]) -> None:
    info = open_dataset(sources("bfloat16", N), incomplete=True).fields["data"]
    assert (info.dtype, info.bfloat16, info.dtype_name) == (np.dtype("<u2"), True, "bfloat16")


def test_many_threads_read_at_once(sources: Callable[[str, int], Path]) -> None:
    for kind in ("bare", "sharded_cut_zstd", "zstd"):
        dataset = open_dataset(sources(kind, N), incomplete=True)
        whole = dataset.read("data", 0, N)
        with ThreadPoolExecutor(8) as pool:
            starts = list(range(0, N - 10, 3)) * 4
            parts = pool.map(partial(dataset.read, "data"), starts, [a + 10 for a in starts])
            for a, part in zip(starts, parts, strict=True):
                assert part.tobytes() == whole[a : a + 10].tobytes()


def test_a_dataset_can_be_sent_to_another_process(tmp_path: Path) -> None:
    dataset = open_dataset(shuffled(tmp_path / "s"))
    before = dataset.read("data", 0, 9)
    other: Dataset = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(other.read("data", 0, 9), before)
    assert other.identity == dataset.identity


def test_it_shows_itself(tmp_path: Path) -> None:
    dataset = open_dataset(shuffled(tmp_path / "a<b>"))
    assert "150 rows" in str(dataset)
    assert "(150, 6) float16" in repr(dataset)
    assert "a&lt;b&gt;" in dataset._repr_html_()
    assert len(dataset) == N


# --- Views --------------------------------------------------------------------------------------


def test_a_view_is_a_range_of_its_parent(tmp_path: Path) -> None:
    parent = open_dataset(shuffled(tmp_path / "s", codec="zstd"))
    view = write_view(tmp_path / "v", parent, 40, 110)
    inner = write_view(tmp_path / "cuts" / "w", tmp_path / "v", 10, 30)
    assert (view.kind, view.rows, inner.rows, inner.start) == ("view", 70, 20, 50)
    assert view.shuffled
    assert view.attributes == parent.attributes
    for name in parent.fields:
        whole = parent.read(name, 0, N)
        np.testing.assert_array_equal(view.read(name, 0, 70), whole[40:110])
        np.testing.assert_array_equal(inner.read(name, 5, 20), whole[55:70])
        np.testing.assert_array_equal(inner.take(name, [19, 0]), whole[[69, 50]])
    assert len({d.order for d in (parent, view, inner)}) == 3
    assert not [p for p in (tmp_path / "v").rglob("*") if p.is_file() and p.name != "zarr.json"]


def test_a_view_may_be_empty_or_whole(tmp_path: Path) -> None:
    parent = shuffled(tmp_path / "s")
    assert write_view(tmp_path / "none", parent, 5, 5).read("data", 0, 0).shape == (0, 6)
    assert write_view(tmp_path / "all", parent, 0, N).rows == N


def test_a_folder_of_a_store_and_its_views_can_be_moved(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    parent = shuffled(tmp_path / "a" / "s")
    write_view(tmp_path / "a" / "v", parent, 1, 9)
    write_view(tmp_path / "a" / "deep" / "w", parent, 1, 9)
    before = open_dataset(parent).read("data", 1, 9)
    (tmp_path / "a").rename(tmp_path / "b")
    for name in ("v", "deep/w"):
        np.testing.assert_array_equal(open_dataset(tmp_path / "b" / name).read("data", 0, 8), before)


def test_a_view_elsewhere_names_its_store_in_full(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    parent = shuffled(tmp_path / "x" / "y" / "s")
    view = write_view(tmp_path / "z" / "v", parent, 0, 5)
    assert view.marker is not None
    assert view.marker["of"] == str(parent)
    (tmp_path / "z").rename(tmp_path / "z2")
    assert open_dataset(tmp_path / "z2" / "v").rows == 5


def _forge(path: Path, **changes: object) -> Path:
    file = path / "_actshuffle" / "zarr.json"
    document = json.loads(file.read_text())
    document["attributes"]["actshuffle"].update(changes)
    file.write_text(json.dumps(document))
    return path


def test_a_view_of_something_else_than_it_was_is_refused(tmp_path: Path) -> None:
    parent = shuffled(tmp_path / "s")
    view = tmp_path / "v"
    write_view(view, parent, 0, 5)
    shutil.rmtree(parent)
    with pytest.raises(SourceError, match="no such"):
        open_dataset(view)
    shuffled(tmp_path / "other", seed=6)
    (tmp_path / "other").rename(parent)
    with pytest.raises(FormatError, match="not the store it was"):
        open_dataset(view)


def test_views_do_not_lead_in_circles_or_out_of_range_or_outside(tmp_path: Path) -> None:
    parent = shuffled(tmp_path / "s")
    view = tmp_path / "v"
    write_view(view, parent, 0, 5)
    for changes, message in [
        ({"of": "../v"}, "circle"),
        ({"of": "."}, "circle"),
        ({"stop": N + 1}, "which has"),
        ({"start": -1}, "which has"),
        ({"rows": 4}, "which has"),
        ({"of": 7}, "damaged"),
        ({"fields": {"nothing": {}}}, "no array 'nothing'"),
        ({"start": "0"}, "damaged"),
        ({"kind": "other"}, "of kind 'other'"),
        ({"kind": []}, "damaged"),
        ({"format": 9}, "format 9"),
    ]:
        forged = tmp_path / "forged"
        shutil.rmtree(forged, ignore_errors=True)
        shutil.copytree(view, forged)
        if changes.get("of") == "../v":
            changes = {"of": "../forged"}
        with pytest.raises(FormatError, match=message):
            open_dataset(_forge(forged, **changes))


def test_two_views_of_each_other_are_refused(tmp_path: Path) -> None:
    parent = shuffled(tmp_path / "s")
    for name, other in (("v", "w"), ("w", "v")):
        write_view(tmp_path / name, parent, 0, 5)
        _forge(tmp_path / name, of=f"../{other}")
    with pytest.raises(FormatError, match="circle"):
        open_dataset(tmp_path / "v")


def test_a_remote_view_does_not_lead_to_local_files() -> None:
    from actshuffle.loading.views import followed, reference
    from actshuffle.storage.place import Place

    view = Place("s3://bucket/cuts/v")
    assert reference(view, Place("s3://bucket/cuts/s")) == "../s"
    assert followed(view, "../s").url == "s3://bucket/cuts/s"
    for of in ("/etc", "file:///etc", "s3://other/s", "https://bucket/s"):
        with pytest.raises(FormatError, match="leads"):
            followed(view, of)
    assert reference(Place("/tmp/v"), Place("s3://me:secret@bucket/s?key=1")) == "s3://bucket/s"


def test_views_are_of_finished_stores_and_never_overwrite(tmp_path: Path) -> None:
    parent = shuffled(tmp_path / "s")
    with pytest.raises(RequestError, match="rows 5 to 200 of 150"):
        write_view(tmp_path / "v", parent, 5, 200)
    with pytest.raises(RequestError, match="rows 9 to 5"):
        write_view(tmp_path / "v", parent, 9, 5)
    with pytest.raises(IncompleteStoreError):
        write_view(tmp_path / "v", tmp_path / "s.src", 0, 5)
    with pytest.raises(DestinationExistsError):
        write_view(parent, parent, 0, 5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(DestinationExistsError):
        write_view(tmp_path / "mine", parent, 0, 5)
    assert not (tmp_path / "v").exists()


# --- Refusals -----------------------------------------------------------------------------------


def test_a_store_without_its_marker_is_refused(tmp_path: Path) -> None:
    store = shuffled(tmp_path / "s")
    with pytest.raises(IncompleteStoreError, match="no completion marker: it was not made by"):
        open_dataset(tmp_path / "s.src")
    assert open_finished_or_plain(tmp_path / "s.src").rows == N
    (store / "_actshuffle" / "zarr.json").unlink()
    with pytest.raises(IncompleteStoreError, match="may be half written"):
        open_finished_or_plain(store)
    with pytest.raises(IncompleteStoreError, match="no completion marker, so it may be"):
        open_dataset(store)
    assert open_dataset(store, incomplete=True).rows == N
    (store / "_actshuffle" / "run.json").write_text("{}")
    (store / "zarr.json").unlink()
    with pytest.raises(IncompleteStoreError, match="has not finished"):
        open_dataset(store)
    with pytest.raises(SourceError, match="half done, or damaged"):
        open_dataset(store, incomplete=True)


def test_a_concatenation_needs_no_marker(tmp_path: Path) -> None:
    shuffled(tmp_path / "s")
    concat([tmp_path / "s.src", tmp_path / "s.src"], tmp_path / "both")
    assert open_finished_or_plain(tmp_path / "both").rows == 2 * N


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="not a Zarr"):
        open_dataset(tmp_path / "empty")


def test_a_marker_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    store = shuffled(tmp_path / "s")
    shutil.rmtree(store / "token")
    with pytest.raises(FormatError, match="token"):
        open_dataset(store)
    with pytest.raises(FormatError, match="151"):
        open_dataset(_forge(collection(tmp_path / "c"), rows=151))


def test_a_collection_is_finished_but_not_shuffled(tmp_path: Path) -> None:
    dataset = open_dataset(collection(tmp_path / "c"))
    assert (dataset.kind, dataset.shuffled, dataset.order) == ("collection", False, ("stored", N))


def test_a_lost_or_cut_chunk_is_an_error_and_never_zeros(tmp_path: Path) -> None:
    for kind in ("bare", "zstd"):
        SOURCES[kind](tmp_path / kind, N)
        dataset = open_dataset(tmp_path / kind, incomplete=True)
        chunk = next(p for p in (tmp_path / kind / "c" / "3").rglob("*") if p.is_file())
        chunk.write_bytes(chunk.read_bytes()[:-1])
        with pytest.raises((StorageError, SourceError)):
            dataset.read("data", 21, 28)
        chunk.unlink()
        with pytest.raises(MissingChunkError, match="missing"):
            dataset.read("data", 0, N)
        dataset.read("data", 0, 21)


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    array(tmp_path / "s", np.arange(20, dtype="<i4"))
    dataset = open_dataset(tmp_path / "s", incomplete=True)
    for call, message in [
        (lambda: dataset.read("x", 0, 1), "no array named 'x'"),
        (lambda: dataset.read("data", 0, 21), "rows 0 to 21 of 20"),
        (lambda: dataset.read("data", -1, 3), "rows -1 to 3"),
        (lambda: dataset.read("data", 4, 3), "rows 4 to 3"),
        (lambda: dataset.take("data", [20]), "row 20 of 20"),
        (lambda: dataset.take("data", [-1]), "row -1 of 20"),
        (lambda: dataset.read("data", 0, 3, np.empty(4, "<i4")), "16 bytes"),
        (lambda: dataset.read("data", 0, 3, np.empty(3, "<f4")), "float32"),
        (lambda: dataset.read("data", 0, 3, np.empty(6, "<i4")[::2]), "contiguous"),
        (lambda: dataset.read("data", 0, 3, np.frombuffer(b"x" * 12, "<i4")), "writeable"),
        (lambda: dataset.read_ranges("data", [(0, 2), (19, 21)], np.empty(16, np.uint8)), "rows 19 to 21"),
    ]:
        with pytest.raises(RequestError, match=message):
            call()


def test_a_store_that_is_not_on_disk(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    shuffled(tmp_path / "s")
    shuffle(tmp_path / "s.src", f"{url}/s", seed=5)
    here, there = open_dataset(tmp_path / "s"), open_dataset(f"{url}/s")
    write_view(f"{url}/v", f"{url}/s", 20, 100)
    view = open_dataset(f"{url}/v")
    assert view.marker is not None
    assert view.marker["of"] == "../s"
    for name in here.fields:
        np.testing.assert_array_equal(there.read(name, 3, 77), here.read(name, 3, 77))
        np.testing.assert_array_equal(view.take(name, [79, 0]), here.take(name, [99, 20]))
    with pytest.raises(SourceError):
        open_dataset(f"{url}/nothing")


def test_is_cached_looks_at_the_row_that_is_asked_for(tmp_path: Path) -> None:
    """The damage is to a view, in the store that holds it."""
    parent = collection(tmp_path / "p", 200)
    view = write_view(tmp_path / "v", parent, 100, 200)
    name = next(iter(view.fields))
    files = [p for p in (parent / name).rglob("*") if p.is_file()]
    for file in files:
        evict(file)
    if open_dataset(parent).is_cached(name, 0):
        pytest.skip("a file system that is in memory itself")
    chunk = str(100 // view.fields[name].object_rows)
    for file in files:
        if file.relative_to(parent / name).parts[:2] == ("c", chunk):
            file.read_bytes()
    assert view.is_cached(name, 0)
    assert not view.is_cached(name, 99)
    assert not open_dataset(parent).is_cached(name, 50)
