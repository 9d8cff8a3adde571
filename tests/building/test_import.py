"""Every format survives a round trip, and damaged or deceptive files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from actshuffle import shuffle
from actshuffle.building.importers import Imported, import_store
from actshuffle.errors import (
    DestinationExistsError,
    IncompleteStoreError,
    RequestError,
    ResumeMismatchError,
    SourceError,
)
from actshuffle.executors import Dask
from actshuffle.foreign.finding import find_files
from actshuffle.foreign.formats import FORMATS, Format
from actshuffle.foreign.table import FileColumn, FilePart, Table
from actshuffle.loading.dataset import open_dataset
from actshuffle.ordering.keys import Keys
from support.executors import Stops
from support.stores import array, files, opened, rows_of, values

N = 90
ACT, TOKEN = values(N, (6,), "<f2"), values(N, (), "<i4", seed=2)


def taken(paths: Any, dst: Path, **options: Any) -> tuple[Imported, dict[str, np.ndarray]]:
    """Import in small pieces; returns the result and the rows."""
    done = import_store(paths, dst, fsync=False, **{"block_bytes": 900, "chunk_rows": 8, **options})
    assert not dst.with_name(f"{dst.name}.import").exists()
    data = open_dataset(dst)
    assert (data.kind, data.rows, data.shuffled) == ("collection", done.rows, False)
    assert {m.array for m in done.mapping} == set(data.fields)
    return done, {name: found[:] for name, found in opened(dst)[1].items()}


def assert_same(found: np.ndarray, data: np.ndarray) -> None:
    assert found.shape == data.shape
    assert found.dtype == data.dtype.newbyteorder("<")
    np.testing.assert_array_equal(rows_of(found), rows_of(data))


# --- Bytes: .npy, memmaps, safetensors ------------------------------------------------------------


def test_one_npy_file(tmp_path: Path) -> None:
    np.save(tmp_path / "layer_3.npy", ACT)
    done, found = taken(tmp_path / "layer_3.npy", tmp_path / "x.zarr")
    assert_same(found["layer_3"], ACT)
    assert "layer_3: 6 float16 from 'layer_3', 1 file: one row per item" in str(done)


@pytest.mark.parametrize("dtype", ["?", "i1", "<u2", "<i8", "<f2", "<f4", "<f8", "<c8", ">f4", ">i8"])
def test_types_of_npy(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "x.npy", values(N, (3,), dtype))
    assert_same(taken(tmp_path / "x.npy", tmp_path / "x.zarr")[1]["x"], values(N, (3,), dtype))


def test_numbered_parts_are_one_array_and_layers_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "npy"
    folder.mkdir()
    for number, (a, b) in enumerate([(0, 10), (10, 10), (10, 70), (70, N)]):
        np.save(folder / f"acts_{number:04d}.npy", ACT[a:b])
        np.save(folder / f"tok-{number}-of-4.npy", TOKEN[a:b])
    np.save(folder / "layer_3.npy", ACT[:, :2])
    np.save(folder / "layer_11.npy", ACT[:, 2:])
    _, found = taken(folder, tmp_path / "x.zarr")
    assert set(found) == {"acts", "tok", "layer_3", "layer_11"}
    assert_same(found["acts"], ACT)
    assert_same(found["tok"], TOKEN)
    assert_same(found["layer_11"], ACT[:, 2:])
    _, found = taken([folder / "layer_3.npy", folder / "layer_11.npy"], tmp_path / "y.zarr", together=False)
    assert set(found) == {"layer_3", "layer_11"}


def test_numbers_sort_as_numbers(tmp_path: Path) -> None:
    (tmp_path / "acts").mkdir()
    for number in range(12):
        np.save(tmp_path / f"acts/{number}.npy", ACT[number * 7 : number * 7 + 7])
    _, found = taken(tmp_path / "acts", tmp_path / "x.zarr", together=True)
    assert_same(found["acts"], ACT[:84])


def test_memmaps_without_a_header(tmp_path: Path) -> None:
    for number in range(3):
        memmap = np.memmap(tmp_path / f"part_{number}.bin", "<f2", "w+", shape=(30, 6))
        memmap[:] = ACT[30 * number : 30 * number + 30]
        memmap.flush()
    found = taken(tmp_path, tmp_path / "x.zarr", dtype="float16", row_shape=(6,))[1]
    assert_same(next(iter(found.values())), ACT)
    bits = taken(tmp_path / "part_0.bin", tmp_path / "y.zarr", dtype="bfloat16", row_shape=(2, 3))[1]
    assert_same(bits["part_0"], ACT[:30].view("<u2").reshape(30, 2, 3))
    with pytest.raises(RequestError, match="give dtype"):
        import_store(tmp_path / "part_0.bin", tmp_path / "z.zarr")
    with pytest.raises(SourceError, match="no whole number of rows"):
        import_store(tmp_path / "part_0.bin", tmp_path / "z.zarr", dtype="float32", row_shape=[7])


def safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> Path:
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, value) in tensors.items():
        start, data = len(data), data + value.tobytes()
        header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": [start, len(data)]}  # type: ignore[dict-item]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_safetensors(tmp_path: Path) -> None:
    paths = [
        safetensors(
            tmp_path / f"{i}.safetensors",
            {"acts": ("BF16", ACT[30 * i : 30 * i + 30].view("<u2")), "tokens": ("I32", TOKEN[30 * i : 30 * i + 30])},
        )
        for i in range(3)
    ]
    _, found = taken(paths, tmp_path / "x.zarr")
    assert_same(found["acts"], ACT.view("<u2"))
    assert_same(found["tokens"], TOKEN)
    assert zarr.open_group(tmp_path / "x.zarr")["acts"].metadata.to_dict()["data_type"] == "bfloat16"


def test_files_of_the_safetensors_library(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    library.save_file({"acts": ACT, "flags": TOKEN > 0, "n": np.array(3)}, tmp_path / "x.safetensors")
    _, found = taken(tmp_path / "x.safetensors", tmp_path / "x.zarr")
    assert set(found) == {"acts", "flags"}
    assert_same(found["acts"], ACT)
    assert_same(found["flags"], TOKEN > 0)


# --- Torch ----------------------------------------------------------------------------------------


def test_torch_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    acts = torch.from_numpy(values(N, (6,), "<f4").copy()).to(torch.bfloat16)
    for i in range(3):
        rows = slice(30 * i, 30 * i + 30)
        tensors = {"acts": acts[rows].clone(), "token": torch.from_numpy(TOKEN[rows].copy())}
        torch.save(tensors, tmp_path / f"{i}.pt")
    _, found = taken([tmp_path / f"{i}.pt" for i in range(3)], tmp_path / "x.zarr")
    assert_same(found["acts"], acts.view(torch.int16).numpy().view("<u2"))
    assert_same(found["token"], TOKEN)
    torch.save(acts.T.contiguous().T, tmp_path / "alone.pth")
    alone = taken(tmp_path / "alone.pth", tmp_path / "y.zarr")[1]["alone"]
    assert_same(alone, acts.view(torch.int16).numpy().view("<u2"))


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("sprung"),))


def test_no_code_in_a_torch_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.save({"acts": torch.zeros(3), "trap": Trap()}, tmp_path / "x.pt")
    with pytest.raises(SourceError, match="more than tensors"):
        import_store(tmp_path / "x.pt", tmp_path / "x.zarr")
    assert not (tmp_path / "sprung").exists()
    torch.save({"acts": [1, 2]}, tmp_path / "y.pt")
    with pytest.raises(SourceError, match="neither a tensor nor a dict"):
        import_store(tmp_path / "y.pt", tmp_path / "x.zarr")


# --- Columns: parquet, datasets -------------------------------------------------------------------


def lists(data: np.ndarray, fixed: bool = False) -> Any:
    import pyarrow as pa

    if data.ndim == 1:
        return pa.array(data)
    inner = lists(data.reshape(-1, *data.shape[2:]), fixed)
    if fixed:
        return pa.FixedSizeListArray.from_arrays(inner, data.shape[1])
    return pa.ListArray.from_arrays(np.arange(len(data) + 1, dtype="i4") * data.shape[1], inner)


@pytest.mark.parametrize("fixed", [False, True])
def test_parquet(tmp_path: Path, fixed: bool) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    acts = ACT.astype("<f4")
    for i in range(3):
        rows = slice(30 * i, 30 * i + 30)
        table = pa.table({"acts": lists(acts[rows], fixed), "token": TOKEN[rows], "text": ["x"] * 30})
        parquet.write_table(table, tmp_path / f"{i}.parquet", row_group_size=13)
    done, found = taken(tmp_path, tmp_path / "x.zarr")
    assert_same(found["acts"], acts)
    assert_same(found["token"], TOKEN)
    assert done.left_out == ("text (string)",)


def saved_dataset(folder: Path, columns: dict[str, Any], batch: int, **state: Any) -> Path:
    """A folder laid out as ``Dataset.save_to_disk`` does it."""
    import pyarrow as pa

    folder.mkdir()
    table = pa.table(columns)
    names = []
    for number, start in enumerate(range(0, len(table), 40)):
        names.append({"filename": f"data-{number:05d}-of-00003.arrow"})
        with pa.ipc.new_stream(str(folder / names[-1]["filename"]), table.schema) as out:
            out.write_table(table.slice(start, 40), max_chunksize=batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": names, **state}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_saelens_cached_activations(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    sequences, length, width = 90, 8, 5
    acts = values(sequences, (length, width), "<f4")
    tokens = values(sequences, (length,), "<i4", seed=4)
    label = values(sequences, (), "<i8", seed=5)
    hook = "blocks.0.hook_mlp_out"
    folder = saved_dataset(tmp_path / "cache", {hook: lists(acts), "token_ids": lists(tokens), "label": label}, batch=7)
    done, found = taken(folder, tmp_path / "x.zarr", names={"token_ids": "token"}, chunk_rows=11)
    assert_same(found[hook], acts.reshape(-1, width))
    assert_same(found["token"], tokens.reshape(-1))
    assert_same(found["label"], np.repeat(label, length))
    np.testing.assert_array_equal(found["document"], np.repeat(np.arange(sequences), length))
    np.testing.assert_array_equal(found["position"], np.tile(np.arange(length), sequences))
    assert "one row per token" in str(done)
    kept = taken(folder, tmp_path / "y.zarr", flatten=False, chunk_rows=3)[1]
    assert_same(kept[hook], acts)
    assert_same(kept["token_ids"], tokens)


def test_folders_of_the_datasets_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    acts = values(20, (4, 3), "<f4")
    features = datasets.Features(
        {
            "hook": datasets.Array2D((4, 3), "float32"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=4),
            "text": datasets.Value("string"),
        }
    )
    tokens = values(20, (4,), "<i4")
    made = datasets.Dataset.from_dict({"hook": acts, "token_ids": tokens, "text": ["a"] * 20}, features=features)
    made.save_to_disk(tmp_path / "d", num_shards=3)
    found = taken(tmp_path / "d", tmp_path / "x.zarr")[1]
    assert_same(found["hook"], acts.reshape(-1, 3))
    assert_same(found["token_ids"], tokens.reshape(-1))
    datasets.DatasetDict({"train": made, "test": made.select(range(5))}).save_to_disk(tmp_path / "dict")
    with pytest.raises(RequestError, match="split"):
        import_store(tmp_path / "dict", tmp_path / "y.zarr")
    assert_same(taken(tmp_path / "dict", tmp_path / "y.zarr", split="test")[1]["hook"], acts[:5].reshape(-1, 3))
    made.shuffle(seed=1).save_to_disk(tmp_path / "shuffled")
    found = taken(tmp_path / "shuffled", tmp_path / "z.zarr")[1]
    assert sorted(map(bytes, found["hook"])) == sorted(map(bytes, acts.reshape(-1, 3)))


def test_an_index_beside_the_data_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    folder = saved_dataset(tmp_path / "d", {"x": TOKEN}, 9, _indices_files=[{"filename": "indices.arrow"}])
    with pytest.raises(SourceError, match="flatten_indices"):
        import_store(folder, tmp_path / "x.zarr")
    outside = saved_dataset(tmp_path / "e", {"x": TOKEN}, 9, _data_files=[{"filename": "../x.arrow"}])
    with pytest.raises(SourceError, match="outside its folder"):
        import_store(outside, tmp_path / "x.zarr")


# --- What is wanted, and what is not --------------------------------------------------------------


def refused(paths: Any, words: str, error: type[Exception] = SourceError, **options: Any) -> None:
    """The import is refused before anything is written."""
    listed = [paths] if isinstance(paths, Path) else paths
    with pytest.raises(error, match=words):
        import_store(paths, listed[0].parent / "refused.zarr", **options)
    assert not list(listed[0].parent.glob("refused.zarr*"))


def test_only_columns_that_are_wanted_are_judged(tmp_path: Path) -> None:
    path = safetensors(
        tmp_path / "x.safetensors",
        {
            "acts": ("F16", ACT),
            "scaled": ("F8_E4M3", np.zeros((N, 3), "u1")),
            "short": ("I32", TOKEN[:9]),
            "step": ("I32", np.array(3, "<i4")),
        },
    )
    refused(path, r"tensor 'scaled' has the type F8_E4M3, of no use here; leave it out with columns acts, short")
    refused(path, "tensor 'scaled' has the type", columns=["acts", "scaled"])
    done, found = taken(path, tmp_path / "x.zarr", columns=["acts"])
    assert_same(found["acts"], ACT)
    assert done.left_out == ("step (a single number)",)
    refused(path, "column 'step' holds a single number, no numbers", RequestError, columns=["step"])
    refused(path, "'short' is renamed, and columns leaves it out", RequestError, columns=["acts"], names={"short": "s"})
    refused(path, "no columns are chosen; there are 'acts'", RequestError, columns=[])


def test_files_that_are_not_wanted_are_not_judged(tmp_path: Path) -> None:
    folder = tmp_path / "npy"
    folder.mkdir()
    np.save(folder / "acts.npy", ACT)
    np.save(folder / "names.npy", np.array(["x", "y"]))
    np.save(folder / "rows_000.npy", ACT)
    np.save(folder / "rows_001.npy", ACT[:, :2])
    (folder / "noise.npy").write_bytes(b"noise")
    (folder / "cut.npy").write_bytes((folder / "acts.npy").read_bytes()[:-3])
    _, found = taken(folder, tmp_path / "x.zarr", columns=["acts"])
    assert_same(found["acts"], ACT)
    for column, words in [("names", "type <U1"), ("rows", "mixed widths"), ("noise", "no .npy"), ("cut", "truncated")]:
        refused(folder, words, columns=["acts", column])


def test_tensors_of_torch_that_are_not_wanted(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    acts = torch.from_numpy(ACT.copy())
    body = {"acts": acts, "layer": 3, "n": torch.tensor(1), "fp8": torch.zeros(N, dtype=torch.float8_e4m3fn)}
    body["sparse"] = torch.eye(N).to_sparse()
    torch.save(body, tmp_path / "x.pt")
    done, found = taken(tmp_path / "x.pt", tmp_path / "x.zarr", columns=["acts"])
    assert_same(found["acts"], ACT)
    assert set(done.left_out) == {"layer (int)", "n (a single number)"}
    refused(tmp_path / "x.pt", "'fp8' has the type float8_e4m3fn.*leave it out with columns acts$")
    refused(tmp_path / "x.pt", r"'sparse' is torch\.sparse_coo", columns=["sparse"])


def test_bits_of_torch_that_stand_for_other_values(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pairs = torch.complex(torch.arange(12.0).reshape(4, 3), torch.ones(4, 3))
    expected = {"conj": pairs.numpy().conj(), "neg": -np.ones((4, 3), "<f4"), "turned": pairs.numpy().T}
    for name, tensor in {"conj": pairs.conj(), "neg": pairs.conj().imag, "turned": pairs.T}.items():
        torch.save(tensor, tmp_path / f"{name}.pt")
        found = taken(tmp_path / f"{name}.pt", tmp_path / f"{name}.zarr")[1]
        np.testing.assert_array_equal(found[name], expected[name])


def test_bfloat16_that_numpy_saved(tmp_path: Path) -> None:
    bits = ACT.view("<u2")
    np.save(tmp_path / "x.npy", bits.view("V2"))
    refused(tmp_path / "x.npy", r"type \|V2, as numpy saves types .*give dtype=.bfloat16")
    found = taken(tmp_path / "x.npy", tmp_path / "x.zarr", dtype="bfloat16")[1]
    assert_same(found["x"], bits)
    assert zarr.open_group(tmp_path / "x.zarr")["x"].metadata.to_dict()["data_type"] == "bfloat16"
    np.save(tmp_path / "fp8.npy", np.zeros(9, "V1"))
    refused(tmp_path / "fp8.npy", "save it as another type", dtype="bfloat16")


def test_options_that_files_contradict(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ACT)
    safetensors(tmp_path / "x.safetensors", {"x": ("I32", TOKEN)})
    refused(tmp_path / "x.npy", "says that its items are float16, and dtype says float32", dtype="float32")
    headed = "row_shape is for files without a header, and files of npy have one"
    refused(tmp_path / "x.npy", headed, RequestError, row_shape=[6])
    refused(tmp_path / "x.safetensors", "dtype is for files without a header", RequestError, dtype="int32")
    assert_same(taken(tmp_path / "x.npy", tmp_path / "x.zarr", dtype="float16")[1]["x"], ACT)


@pytest.mark.parametrize("dtype", [">f4", ">i2", ">c8", "<c16"])
def test_raw_numbers_of_either_byte_order(tmp_path: Path, dtype: str) -> None:
    data = values(N, (3,), dtype)
    data.tofile(tmp_path / "x.bin")
    np.save(tmp_path / "y.npy", data)
    assert_same(taken(tmp_path / "x.bin", tmp_path / "x.zarr", dtype=dtype, row_shape=[3])[1]["x"], data)
    assert_same(taken(tmp_path / "y.npy", tmp_path / "y.zarr")[1]["y"], data)


def test_raw_files_that_are_something_else(tmp_path: Path) -> None:
    for name, data in {"zip": b"PK\x03\x04", "npy": b"\x93NUMPY", "parquet": b"PAR1", "gzip": b"\x1f\x8b"}.items():
        (tmp_path / f"{name}.bin").write_bytes(data.ljust(16, b"\0"))
        refused(tmp_path / f"{name}.bin", f"has a header: it is an? .*{name}", dtype="float32", row_shape=[2])
    (tmp_path / "x.bin").write_bytes(bytes(16))
    for dtype in ("object", "S5", "datetime64[s]", "longdouble", "noise"):
        refused(tmp_path / "x.bin", "is no type", RequestError, dtype=dtype, row_shape=[2])
    refused(tmp_path / "x.bin", "make no sense", RequestError, dtype="float32", row_shape=[0])


def test_a_zipped_store_is_named_as_one(tmp_path: Path) -> None:
    with zarr.storage.ZipStore(tmp_path / "x.zarr.zip", mode="w") as store:
        zarr.create_array(store, shape=(4, 2), chunks=(2, 2), dtype="f4")[:] = 1
    with pytest.raises(SourceError, match=r"a Zarr store is a folder, and .*zip is a zip file: unpack it first"):
        shuffle(tmp_path / "x.zarr.zip", tmp_path / "y.zarr", seed=1)
    for given in (tmp_path / "x.zarr.zip", tmp_path):
        with pytest.raises(SourceError, match=r"nothing to import .*; \S+/x.zarr.zip is a zip file: unpack it first"):
            import_store(given, tmp_path / "y.zarr")
    np.save(tmp_path / "x.npy", ACT)
    with pytest.raises(SourceError, match="is a file: import reads"):
        shuffle(tmp_path / "x.npy", tmp_path / "y.zarr", seed=1)
    assert not (tmp_path / "y.zarr").exists()


# --- The run --------------------------------------------------------------------------------------


def test_an_import_resumes_and_until_then_is_no_store(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ACT)
    options: dict[str, Any] = {"block_bytes": 200, "chunk_rows": 4, "fsync": False}
    with pytest.raises(KeyboardInterrupt):
        import_store(tmp_path / "x.npy", tmp_path / "x.zarr", executor=Stops(3), **options)
    with pytest.raises(IncompleteStoreError):
        open_dataset(tmp_path / "x.zarr")
    with pytest.raises(ResumeMismatchError):
        import_store(tmp_path / "x.npy", tmp_path / "x.zarr", codec="zstd", **options)
    again = Stops()
    import_store(tmp_path / "x.npy", tmp_path / "x.zarr", executor=again, **options)
    assert sum(again.seen) == -(-N // 16) - 3
    assert_same(opened(tmp_path / "x.zarr")[1]["x"][:], ACT)
    before = files(tmp_path)
    import_store(tmp_path / "x.npy", tmp_path / "x.zarr", **options)  # already finished
    assert files(tmp_path) == before
    with pytest.raises(DestinationExistsError, match="codec"):
        import_store(tmp_path / "x.npy", tmp_path / "x.zarr", codec="zstd", **options)
    import_store(tmp_path / "x.npy", tmp_path / "x.zarr", overwrite=True, **options)


def test_files_that_change_meanwhile(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", ACT)
    options: dict[str, Any] = {"block_bytes": 200, "chunk_rows": 4, "fsync": False}
    with pytest.raises(KeyboardInterrupt):
        import_store(tmp_path / "x.npy", tmp_path / "x.zarr", executor=Stops(3), **options)
    np.save(tmp_path / "x.npy", ACT[::-1])
    with pytest.raises(ResumeMismatchError, match="SRC has other rows"):
        import_store(tmp_path / "x.npy", tmp_path / "x.zarr", **options)


def test_on_a_cluster_and_then_shuffled(tmp_path: Path, cluster: Callable[[int], Dask]) -> None:
    np.save(tmp_path / "act.npy", ACT)
    np.save(tmp_path / "token.npy", TOKEN)
    paths = [tmp_path / "act.npy", tmp_path / "token.npy"]
    taken(paths, tmp_path / "x.zarr", executor=cluster(2), attributes={"model": "tiny"}, codec="zstd")
    shuffle(tmp_path / "x.zarr", tmp_path / "y.zarr", seed=3, fsync=False)
    attributes, found = opened(tmp_path / "y.zarr")
    assert_same(found["act"][:], ACT[Keys(3).order(N)])
    assert attributes["model"] == "tiny"
    assert attributes["imported"]["mapping"] == {"act": "act", "token": "token"}


# --- Refusals -------------------------------------------------------------------------------------


def test_bad_files(tmp_path: Path) -> None:
    def assert_refused(words: str, *names: str, error: Any = SourceError, **options: Any) -> None:
        with pytest.raises(error, match=words):
            import_store([tmp_path / n for n in names], tmp_path / "out.zarr", **options)
        assert not any(p.name.startswith("out.zarr") for p in tmp_path.iterdir())

    np.save(tmp_path / "a_000.npy", ACT)
    np.save(tmp_path / "a_001.npy", ACT[:, :5])
    np.save(tmp_path / "short.npy", TOKEN[:9])
    np.save(tmp_path / "text.npy", np.array(["x", "y"]))
    np.save(tmp_path / "object.npy", np.array([None]), allow_pickle=True)
    np.save(tmp_path / "number.npy", np.array(1.0))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(ACT))
    np.save(tmp_path / "empty.npy", ACT[:0])
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a_000.npy").read_bytes()[:-3])
    (tmp_path / "noise.npy").write_bytes(b"noise")
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    array(tmp_path / "store.zarr", ACT)
    assert_refused("mixed widths", "a_000.npy", "a_001.npy")
    assert_refused("unequal length", "a_000.npy", "short.npy")
    assert_refused("type <U1", "text.npy")
    assert_refused("type object", "object.npy")
    assert_refused("single number", "number.npy")
    assert_refused("Fortran", "fortran.npy")
    assert_refused("no rows", "empty.npy")
    assert_refused("truncated", "cut.npy")
    assert_refused("no .npy file", "noise.npy")
    assert_refused("no safetensors file", "cut.safetensors")
    assert_refused("no such file", "absent.npy")
    assert_refused("nothing to import", "store.zarr")
    assert_refused("several formats", "short.npy", "cut.safetensors")
    assert_refused("no column 'y'", "short.npy", error=RequestError, columns=["y"])
    assert_refused("no name for an array", "short.npy", error=RequestError, names={"short": "../x"})
    assert_refused("unknown format", "short.npy", error=RequestError, format="csv")


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    safetensors(tmp_path / "x.safetensors", {"a": ("I32", TOKEN), "b": ("I32", TOKEN)})
    with pytest.raises(RequestError, match="two columns would become the array 'b'"):
        import_store(tmp_path / "x.safetensors", tmp_path / "x.zarr", names={"a": "b"})


def test_lists_of_mixed_lengths_and_missing_values(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, column, words in [
        ("ragged", [[1.0, 2.0], [3.0]], "mixed widths: lists"),
        ("later", [[1.0, 2.0]] * 5 + [[1.0, 2.0, 3.0]] * 5, "mixed widths"),
        ("null", [1.0, None], "missing values"),
        ("words", ["a", "b"], "no columns of numbers"),
    ]:
        parquet.write_table(pa.table({"x": column}), tmp_path / f"{name}.parquet", row_group_size=5)
        with pytest.raises(SourceError, match=words):
            import_store(tmp_path / f"{name}.parquet", tmp_path / "x.zarr", overwrite=True, fsync=False)
    (tmp_path / "noise.parquet").write_bytes(b"PAR1 noise PAR1")
    with pytest.raises(SourceError, match="cannot read"):
        import_store(tmp_path / "noise.parquet", tmp_path / "y.zarr")


def test_packages_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"")
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(RequestError, match=r"pip install .\.\[import\]"):
        import_store(tmp_path / "x.parquet", tmp_path / "x.zarr")
    assert find_files([tmp_path], None, None)[0] == "parquet"


def test_a_new_format_is_a_reader_and_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lines(Table):
        """One number on each line of a text file."""

        def columns(self, files: Sequence[Path]) -> Iterator[FileColumn]:
            for file in files:
                yield FileColumn("", "<i8", (), (FilePart(str(file), 0, len(file.read_text().splitlines())),))

        def read(self, part: FilePart, start: int, out: np.ndarray) -> None:
            lines = Path(part.file).read_text().splitlines()[start : start + len(out)]
            out[:] = np.array(lines, "<i8")[:, None].view(np.uint8)

    monkeypatch.setitem(FORMATS, "lines", Format(Lines, (".txt",)))
    (tmp_path / "numbers.txt").write_text("\n".join(map(str, range(40, 0, -1))))
    _, found = taken(tmp_path / "numbers.txt", tmp_path / "x.zarr", format="lines")
    assert_same(found["numbers"], np.arange(40, 0, -1))


def test_a_datasets_folder_without_its_parts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(SourceError, match=r"no dataset in .*train"):
        find_files([tmp_path], None, None)
