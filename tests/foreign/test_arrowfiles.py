"""Columns of parquet and Arrow: their values by their types, in any order of reading, within the memory of the plan."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actshuffle.building.importers import import_store
from actshuffle.errors import RequestError, SourceError
from actshuffle.foreign.arrowfiles import ArrowFiles, _Arrow, _Parquet
from support.stores import opened

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

N = 90
MB = 1_000_000
STEP = 16  # rows of a group


def write_parquet(path: Path, table: Any, **settings: Any) -> None:
    parquet.write_table(table, path, row_group_size=STEP, **settings)


def write_stream(path: Path, table: Any, opener: Any = pa.ipc.new_stream, **settings: Any) -> None:
    with opener(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**settings)) as out:
        out.write_table(table, max_chunksize=STEP)


def write_file(path: Path, table: Any) -> None:
    write_stream(path, table, pa.ipc.new_file)


def write_packed(path: Path, table: Any) -> None:
    write_stream(path, table, compression="zstd")


WRITERS: list[tuple[str, Callable[[Path, Any], None]]] = [
    ("parquet", write_parquet),
    ("arrow", write_stream),
    ("arrow", write_file),
    ("arrow", write_packed),
]


def lists(data: np.ndarray, fixed: bool = False) -> Any:
    if data.ndim == 1:
        return pa.array(data)
    inner = lists(data.reshape(-1, *data.shape[2:]), fixed)
    if fixed:
        return pa.FixedSizeListArray.from_arrays(inner, data.shape[1])
    return pa.ListArray.from_arrays(np.arange(len(data) + 1, dtype="i4") * data.shape[1], inner)


def tensors(data: np.ndarray, axes: tuple[int, ...] | None) -> Any:
    """A column of tensors whose storage is ``data``."""
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(data.dtype), data.shape[1:], permutation=axes)
    return pa.ExtensionArray.from_storage(kind, lists(data.reshape(len(data), -1), fixed=True))


def imported(path: Path, **options: Any) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    done = import_store(path, path.parent / "x.zarr", fsync=False, overwrite=True, **options)
    return {name: found[:] for name, found in opened(path.parent / "x.zarr")[1].items()}, done.left_out


# --- Types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "write"), WRITERS)
@pytest.mark.parametrize("axes", [None, (0, 1, 2), (0, 2, 1), (2, 1, 0), (1, 0, 2)])
def test_tensors_have_their_shape_and_the_order_of_their_axes(
    tmp_path: Path, kind: str, write: Any, axes: tuple[int, ...] | None
) -> None:
    data = np.arange(N * 24, dtype="<f4").reshape(N, 2, 3, 4)
    write(tmp_path / f"x.{kind}", pa.table({"x": tensors(data, axes)}))
    # By the format: axis i of an item is axis axes[i] of its storage.
    expected = data.transpose(0, *(axis + 1 for axis in axes or (0, 1, 2)))
    np.testing.assert_array_equal(imported(tmp_path / f"x.{kind}")[0]["x"], expected)


def test_tensors_that_pyarrow_makes_of_turned_arrays(tmp_path: Path) -> None:
    data = np.arange(N * 6, dtype="<f8").reshape(N, 3, 2).transpose(0, 2, 1)
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(data)
    assert column.type.permutation == [1, 0]
    write_parquet(tmp_path / "x.parquet", pa.table({"x": column}))
    np.testing.assert_array_equal(imported(tmp_path / "x.parquet")[0]["x"], data)


def test_permutations_that_are_written_in_two_ways_are_refused(tmp_path: Path) -> None:
    data = np.zeros((N, 2, 3, 4), "<f4")
    for axes in ((1, 2, 0), (2, 0, 1)):
        write_parquet(tmp_path / "x.parquet", pa.table({"x": tensors(data, axes), "y": np.arange(N)}))
        found, left_out = imported(tmp_path / "x.parquet")
        assert set(found) == {"y"}
        assert left_out[0].startswith(f"x (tensors with the permutation {list(axes)}")
        with pytest.raises(RequestError, match="column 'x' holds tensors with the permutation"):
            import_store(tmp_path / "x.parquet", tmp_path / "y.zarr", columns=["x"])


class Scaled(pa.ExtensionType):
    """Numbers that stand for others."""

    def __init__(self) -> None:
        super().__init__(pa.int64(), "somebody.scaled")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"0.5"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: Any, serialized: bytes) -> Scaled:
        return cls()


@pytest.mark.parametrize(("kind", "write"), WRITERS)
def test_unknown_extension_types_are_left_out(tmp_path: Path, kind: str, write: Any) -> None:
    scaled = pa.ExtensionArray.from_storage(Scaled(), pa.array(range(N)))
    inner = pa.ListArray.from_arrays(np.arange(N + 1, dtype="i4"), scaled)
    write(tmp_path / f"x.{kind}", pa.table({"s": scaled, "l": inner, "y": np.arange(N)}))
    found, left_out = imported(tmp_path / f"x.{kind}")
    assert set(found) == {"y"}
    assert len(left_out) == 2
    assert all("extension type somebody.scaled, whose values are not known here" in told for told in left_out)
    pa.register_extension_type(Scaled())
    try:
        assert imported(tmp_path / f"x.{kind}")[1] == left_out
    finally:
        pa.unregister_extension_type("somebody.scaled")


@pytest.mark.skipif(not hasattr(pa, "bool8"), reason="pyarrow 18 brings bool8")
def test_a_byte_that_is_a_truth_value(tmp_path: Path) -> None:
    bits = pa.ExtensionArray.from_storage(pa.bool8(), pa.array([0, 1, 2, -1] * 4, pa.int8()))
    write_parquet(tmp_path / "x.parquet", pa.table({"x": bits}))
    found = imported(tmp_path / "x.parquet")[0]["x"]
    assert found.dtype == np.bool_
    np.testing.assert_array_equal(found, [False, True, True, True] * 4)


# --- Reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "write"), WRITERS)
def test_items_in_any_order_of_reading(tmp_path: Path, kind: str, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actshuffle.foreign.arrowfiles._VALUES", 10)
    wide, narrow = np.arange(N * 6, dtype="<f4").reshape(N, 2, 3), np.arange(N, dtype="<i2")
    for fixed in (False, True):
        path = tmp_path / f"{fixed}.{kind}"
        write(path, pa.table({"text": ["x"] * N, "a.b": lists(wide, fixed), "a": narrow, "s": [{"a.b": 1}] * N}))
        table = ArrowFiles(kind, {})
        columns = {column.name: column for column in table.columns([path])}
        assert {name: column.shape for name, column in columns.items()} == {"a.b": (2, 3), "a": ()}
        dice = np.random.default_rng(0)
        ranges = [(0, 5), (5, 30), (50, 90), (20, 21), (0, 90), *(sorted(dice.integers(0, N, 2)) for _ in range(60))]
        for (start, stop), name in itertools.product(ranges, columns):
            data = {"a.b": wide, "a": narrow}[name]
            out = np.empty((stop - start, columns[name].item_bytes), np.uint8)
            table.read(columns[name].parts[0], int(start), out)
            np.testing.assert_array_equal(
                out, data[start:stop].reshape(stop - start, -1).view(np.uint8).reshape(out.shape)
            )


@pytest.mark.parametrize(("kind", "write"), WRITERS)
def test_sequences_that_blocks_cut(tmp_path: Path, kind: str, write: Any) -> None:
    data = np.arange(N * 20, dtype="<f4").reshape(N, 5, 4)
    write(tmp_path / f"x.{kind}", pa.table({"x": lists(data), "label": np.arange(N)}))
    found = imported(tmp_path / f"x.{kind}", flatten=True, block_bytes=7 * 36, chunk_rows=7)[0]
    np.testing.assert_array_equal(found["x"], data.reshape(-1, 4))
    np.testing.assert_array_equal(found["label"], np.repeat(np.arange(N), 5))


def test_nothing_is_decoded_to_learn_the_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "x.parquet", pa.table({"x": lists(np.zeros((N, 3))), "f": lists(np.zeros((N, 2)), True)}))
    monkeypatch.setattr(_Parquet, "batches", None)
    (f, x) = sorted(ArrowFiles("parquet", {}).columns([tmp_path / "x.parquet"]), key=lambda column: column.name)
    assert (f.shape, x.shape) == ((2,), (3,))


def test_damaged_files(tmp_path: Path) -> None:
    table = pa.table({"x": lists(np.zeros((N, 30)), True)})
    for kind, write in WRITERS[:2]:
        write(tmp_path / f"x.{kind}", table)
        data = (tmp_path / f"x.{kind}").read_bytes()
        for cut in (0, 3, len(data) // 2, len(data) - 30):
            (tmp_path / f"cut.{kind}").write_bytes(data[:cut])
            with pytest.raises(SourceError, match=rf"(cut\.{kind}|no rows|no columns)"):
                import_store(tmp_path / f"cut.{kind}", tmp_path / "y.zarr", fsync=False, overwrite=True)


def test_compressed_batches_are_known_by_their_headers(tmp_path: Path) -> None:
    table = pa.table({"x": lists(np.random.default_rng(0).standard_normal((N, 30)), True)})
    for write, packed in ((write_stream, False), (write_file, False), (write_packed, True)):
        write(tmp_path / "x.arrow", table)
        found = _Arrow(str(tmp_path / "x.arrow"))
        assert (found._packed, found.ends) == (packed, [16, 32, 48, 64, 80, 90])


# --- Memory ---------------------------------------------------------------------------------------

PAGES = {"small": {}, "large": {"data_page_size": 24 << 20, "write_batch_size": 1 << 20}}


def make_wide(path: Path, **settings: Any) -> Path:
    """A row group of 150 MB, random so that no codec helps."""
    data = np.random.default_rng(0).standard_normal((50_000, 768), np.float32)
    columns = {"x": pa.FixedSizeListArray.from_arrays(pa.array(data.reshape(-1)), 768), "n": np.arange(50_000)}
    parquet.write_table(pa.table(columns), path, row_group_size=50_000, use_dictionary=False, **settings)
    return path


def status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def probe(src: str, dst: str, small: str, **settings: Any) -> dict[str, Any]:
    """An import in this process, and its peak beyond what was there after a first, small one."""
    import_store(small, f"{dst}.small", fsync=False, overwrite=True)
    idle = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    try:
        done = import_store(src, dst, fsync=False, overwrite=True, **settings)
        told = f"{done.rows} rows"
    except ValueError as err:
        told = str(err)
    return {"peak": status("VmHWM") - idle, "told": told}


def measured(folder: Path, src: Path, **settings: Any) -> dict[str, Any]:
    """`probe` in a process of its own."""
    parquet.write_table(pa.table({"x": lists(np.zeros((9, 3), "<f4"), True)}), folder / "small.parquet")
    command = [sys.executable, __file__, str(src), str(folder / "x.zarr"), str(folder / "small.parquet")]
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [*command, json.dumps(settings)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_large_row_group_keeps_to_its_memory(tmp_path: Path) -> None:
    found = measured(tmp_path, make_wide(tmp_path / "x.parquet"), memory=64 * MB)
    assert found["told"] == "50000 rows", found
    assert found["peak"] <= 64 * MB, found


def test_large_pages_are_refused_before_they_are_decoded_and_the_advice_is_enough(tmp_path: Path) -> None:
    source = make_wide(tmp_path / "x.parquet", **PAGES["large"])
    found = measured(tmp_path, source, memory=64 * MB)
    assert "give at least memory=" in found["told"], found
    assert found["peak"] <= 16 * MB, found
    advice = int(found["told"].split('memory="')[1].split("MB")[0])
    found = measured(tmp_path, source, memory=advice * MB)
    assert found["told"] == "50000 rows", found
    assert found["peak"] <= advice * MB, found


if __name__ == "__main__":
    print(json.dumps(probe(*sys.argv[1:4], **json.loads(sys.argv[4]))))
