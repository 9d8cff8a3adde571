"""Which files of a folder count: those of its index, wherever it lies, all of them, and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actshuffle.building.importers import import_store
from actshuffle.errors import ActshuffleError, RequestError, SourceError
from actshuffle.foreign.finding import find_files, text_files
from support.stores import array, opened, values

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def names(*paths: Path, **options: Any) -> list[str]:
    """The files that are found, without their folder."""
    return [file.name for file in find_files(paths, options.get("format"), options.get("split"))[1]]


def saved(folder: Path, shards: int, rows: int = 6, **state: Any) -> Path:
    """As ``Dataset.save_to_disk`` writes it, over whatever is there; a shard has ``rows`` of its number."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number in range(shards):
        listed.append({"filename": f"data-{number:05d}-of-{shards:05d}.arrow"})
        table = pa.table({"x": np.full(rows, 10 * shards + number), "text": [f"{shards} {number}"] * rows})
        with pa.ipc.new_stream(str(folder / listed[-1]["filename"]), table.schema) as out:
            out.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": listed, "_split": None, **state}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def refused(action: Callable[[], Any], words: str, error: type[ActshuffleError] = SourceError) -> None:
    with pytest.raises(error, match=words):
        action()


# --- datasets -------------------------------------------------------------------------------------


def test_a_dataset_saved_again_with_fewer_shards(tmp_path: Path) -> None:
    saved(tmp_path / "all" / "inner" / "d", 3)
    saved(tmp_path / "all" / "inner" / "d", 2)
    for folder in (tmp_path / "all", tmp_path / "all" / "inner", tmp_path / "all" / "inner" / "d"):
        words = r"data-00000-of-00003\.arrow is not in the index of .*d: it is left from an earlier save"
        refused(lambda folder=folder: import_store(folder, tmp_path / "x.zarr"), words)
        refused(lambda folder=folder: text_files([folder]), words)
    everything = sorted((tmp_path / "all/inner/d").glob("*.arrow"))
    refused(lambda: import_store(everything, tmp_path / "x.zarr"), "is not in the index")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all"]
    for file in (tmp_path / "all" / "inner" / "d").glob("*-of-00003.arrow"):
        file.unlink()
    import_store(tmp_path / "all", tmp_path / "x.zarr", fsync=False)
    assert opened(tmp_path / "x.zarr")[1]["x"][:].tolist() == [20] * 6 + [21] * 6


def test_indexes_count_at_any_depth_and_in_their_order(tmp_path: Path) -> None:
    saved(tmp_path / "a" / "d2", 2)
    saved(tmp_path / "a" / "d10", 1)
    state = json.loads((tmp_path / "a/d2/state.json").read_text())
    state["_data_files"].reverse()
    (tmp_path / "a/d2/state.json").write_text(json.dumps(state))
    (tmp_path / "a/d2/cache-0123.arrow").write_bytes(b"a result that datasets keeps")
    (tmp_path / "a/d2/notes.txt").write_text("notes")
    _, files, others = find_files([tmp_path / "a"], None, None)
    told = [file.relative_to(tmp_path).as_posix() for file in files]
    assert told[:2] == ["a/d2/data-00001-of-00002.arrow", "a/d2/data-00000-of-00002.arrow"]
    assert told[2:] == ["a/d10/data-00000-of-00001.arrow"]
    assert {file.name for file in others} == {"cache-0123.arrow", "notes.txt", "dataset_info.json", "state.json"}
    assert text_files([tmp_path / "a"]) == files  # and neither state.json nor notes become documents
    (tmp_path / "a/d10/data-00000-of-00001.arrow").unlink()
    refused(lambda: names(tmp_path / "a"), r"state\.json names data-00000-of-00001\.arrow, which is not there")


def test_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        saved(tmp_path / "all" / "d" / split, 1 + (split == "train"))
    saved(tmp_path / "all" / "d" / "old", 4)  # of an earlier save
    (tmp_path / "all/d/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for folder in (tmp_path / "all", tmp_path / "all" / "d"):
        refused(lambda folder=folder: names(folder), r"has the splits \['train', 'test'\]: choose", RequestError)
        refused(
            lambda folder=folder: names(folder, split="valid"),
            r"has no split 'valid'; there are 'train', 'test'",
            RequestError,
        )
        assert names(folder, split="test") == ["data-00000-of-00001.arrow"]
        assert len(names(folder, split="train")) == 2
        refused(lambda folder=folder: text_files([folder]), "choose one", RequestError)
    assert len(text_files([tmp_path / "all/d/train"])) == 2
    np.save(tmp_path / "x.npy", values(3))
    for path in (tmp_path / "all/d/train", tmp_path / "x.npy"):
        refused(lambda path=path: names(path, split="train"), "no splits", RequestError)


def test_a_cache_of_datasets_with_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"corpus-{split}.arrow").write_bytes(b"")
    (tmp_path / "dataset_info.json").write_text('{"splits": {"train": {}, "test": {}}}')
    refused(lambda: names(tmp_path), "cache of datasets with the splits train, test", RequestError)
    (tmp_path / "dataset_info.json").write_text('{"splits": {"train": {}}}')
    assert len(names(tmp_path)) == 2


def test_files_that_only_have_the_name_of_an_index(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", values(3))
    (tmp_path / "state.json").write_text('{"step": 3}')
    (tmp_path / "dataset_dict.json").write_text("[]")
    assert names(tmp_path) == ["x.npy"]
    (tmp_path / "state.json").write_text("{")
    refused(lambda: names(tmp_path), r"state\.json is damaged")


# --- Other indexes --------------------------------------------------------------------------------


def test_an_index_of_safetensors(tmp_path: Path) -> None:
    folder = tmp_path / "all" / "acts"
    folder.mkdir(parents=True)
    for name in ("b", "a", "left"):
        (folder / f"{name}.safetensors").write_bytes(b"")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}
    (folder / "acts.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: names(tmp_path / "all"), r"left\.safetensors is not in the index")
    refused(lambda: names(folder / "left.safetensors"), r"left\.safetensors is not in the index")
    (folder / "left.safetensors").unlink()
    assert names(tmp_path / "all") == ["a.safetensors", "b.safetensors"]


def test_the_common_metadata_of_parquet(tmp_path: Path) -> None:
    folder, collected = tmp_path / "all" / "acts", []
    (folder / "k=1").mkdir(parents=True)
    for name in ("part.10.parquet", "part.9.parquet", "k=1/part.0.parquet"):
        parquet.write_table(pa.table({"x": [1, 2]}), folder / name, metadata_collector=collected)
        collected[-1].set_file_path(name)
    parquet.write_metadata(pa.table({"x": [1]}).schema, folder / "_metadata", metadata_collector=collected)
    assert names(tmp_path / "all") == ["part.10.parquet", "part.9.parquet", "part.0.parquet"]  # the order of the rows
    (folder / "k=1" / "left.parquet").write_bytes(b"")
    refused(lambda: names(tmp_path / "all"), r"left\.parquet is not in the index")
    (folder / "_metadata").write_bytes(b"PAR1")
    refused(lambda: names(tmp_path / "all"), "cannot read .*_metadata")


@pytest.mark.parametrize(
    ("inside", "kind"),
    [("_delta_log/0.json", "Delta"), (".hoodie/x", "Hudi"), ("metadata/v1.metadata.json", "Iceberg")],
)
def test_tables_whose_log_decides(tmp_path: Path, inside: str, kind: str) -> None:
    (tmp_path / "all" / "t" / inside).parent.mkdir(parents=True)
    (tmp_path / "all" / "t" / inside).write_text("{}")
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "all/t/x.parquet")
    words = f"t is a table of {kind}, whose log says which files count"
    refused(lambda: names(tmp_path / "all"), words)
    refused(lambda: names(tmp_path / "all/t/x.parquet"), words)
    refused(lambda: text_files([tmp_path / "all"]), words)


# --- Names that count -----------------------------------------------------------------------------


def test_names_that_count_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "acts"
    folder.mkdir()
    for name in ("a-00000-of-00002", "a-00001-of-00002", "b-1-of-2", "b-2-of-2", "c_0003"):
        np.save(folder / f"{name}.npy", values(3))
    assert len(names(folder)) == 5
    np.save(folder / "a-00000-of-00001.npy", values(3))
    refused(lambda: names(folder), r"a\.\.\.\.npy are said to be 1 file and 2 files: some are left")
    refused(lambda: names(*sorted(folder.glob("a-*"))), "some are left")
    for file in folder.glob("a-*-of-00002.npy"):
        file.unlink()
    assert len(names(folder)) == 4
    (folder / "b-1-of-2.npy").unlink()
    refused(lambda: names(folder), r"b\.\.\.\.npy are said to be 2 files, and 1 of them are here")
    assert names(folder / "b-2-of-2.npy") == ["b-2-of-2.npy"]  # by its name it may stand alone


def test_splits_by_their_names_are_not_mixed(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        parquet.write_table(pa.table({"x": [1, 2]}), tmp_path / f"{name}.parquet")
    refused(
        lambda: import_store(tmp_path, tmp_path / "x.zarr"), "'x' has rows of several sets of files, test and train"
    )
    import_store(sorted(tmp_path.glob("train-*")), tmp_path / "x.zarr", fsync=False)
    assert opened(tmp_path / "x.zarr")[1]["x"].shape == (4,)


# --- What is left out -----------------------------------------------------------------------------


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "acts"
    (folder / ".cache").mkdir(parents=True)
    for name in ("x.npy", ".hidden.npy", ".cache/old.npy"):
        np.save(folder / name, values(3))
    np.savez(folder / "more.npz", y=values(3))
    (folder / "notes.txt").write_text("notes")
    array(folder / "store.zarr", values(3))
    done = import_store(folder, tmp_path / "x.zarr", fsync=False)
    assert [m.column for m in done.mapping] == ["x"]
    assert done.left_out == (
        f"{folder}/more.npz (a file of no known format)",
        f"{folder}/notes.txt (a file of no known format)",
        f"{folder}/store.zarr (a Zarr store)",
    )
    for number in range(20):
        (folder / f"n{number:02d}.txt").write_text("notes")
    done = import_store(folder, tmp_path / "y.zarr", fsync=False)
    assert len(done.left_out) == 11
    assert done.left_out[-1] == "13 more files"
    refused(lambda: names(folder / "store.zarr"), r"store\.zarr is a Zarr store, which run")


def test_raw_files_of_a_folder_are_told_by_their_endings(tmp_path: Path) -> None:
    for name in ("x.bin", "notes.md", "y.f4"):
        (tmp_path / name).write_bytes(bytes(8))
    assert names(tmp_path, format="raw") == ["x.bin"]
    assert names(tmp_path / "y.f4", tmp_path / "x.bin", format="raw") == ["y.f4", "x.bin"]
