"""Statistics equal numpy's, to the stated tolerance, for every cut of the rows and every executor."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actshuffle.bfloat16 import BFloat16
from actshuffle.checking import moments
from actshuffle.checking.statspass import read_stats, stats
from actshuffle.checking.statsreport import Stats
from actshuffle.checking.statstypes import QUANTILES, FloatStats, IntStats
from actshuffle.errors import FormatError, IncompleteStoreError, RequestError, SourceError, StorageError
from actshuffle.executors import Dask, Serial, Threads
from actshuffle.loading.dataset import open_dataset, write_view
from benchmarks.cache import cached_share
from support.finished import N, collection, finish, shuffled
from support.stores import array, evict


def one(path: Path, data: np.ndarray, **settings: Any) -> FloatStats:
    """Statistics of a store of one array."""
    shutil.rmtree(path, ignore_errors=True)
    array(path, data, **settings)
    found = stats(path)["data"]
    assert isinstance(found, FloatStats)
    return found


def activations(n: int, width: int, dtype: str, offset: float = 0.0) -> np.ndarray:
    """Rows of uneven size, dimensions of uneven scale, one of them far from zero."""
    rng = np.random.default_rng(n + width)
    data = rng.standard_normal((n, width)) * np.exp(rng.standard_normal(width))
    data *= np.exp(0.5 * rng.standard_normal((n, 1)))
    data[:, 0] += offset
    return data.astype(dtype)


def assert_close(found: FloatStats, data: np.ndarray, tolerance: float) -> None:
    flat = data.reshape(len(data), -1).astype(np.float64)
    mean, variance = flat.mean(axis=0), flat.var(axis=0)
    size = np.abs(flat).mean(axis=0)
    assert found.mean.shape == found.variance.shape == data.shape[1:]
    assert np.abs(found.mean.reshape(-1) - mean).max() <= tolerance / 10 * size.max()
    np.testing.assert_allclose(found.variance.reshape(-1), variance, rtol=tolerance, atol=1e-300)
    squares = (flat**2).sum(axis=1)
    assert found.mean_squared_norm == pytest.approx(squares.mean(), rel=tolerance)
    assert found.norm_min == pytest.approx(math.sqrt(squares.min()), rel=tolerance)
    assert found.norm_max == pytest.approx(math.sqrt(squares.max()), rel=tolerance)
    for q in QUANTILES:
        exact = np.quantile(np.sqrt(squares), q, method="lower")
        assert found.norm_quantile(q) == pytest.approx(exact, rel=2e-3)
    assert (found.count, found.left_out, found.nans, found.infs) == (len(data), 0, 0, 0)


@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [("<f2", 1e-5), ("<f4", 1e-9), ("<f8", 1e-9), (">f4", 1e-9)])
@pytest.mark.parametrize(("n", "width"), [(1, 3), (2, 1), (3001, 7), (700, 384)])
def test_stats_are_numpys(tmp_path: Path, n: int, width: int, dtype: str, tolerance: float, offset: float) -> None:
    data = activations(n, width, dtype, offset)
    settings = {"serializer": moments_big_endian()} if dtype[0] == ">" else {}
    assert_close(one(tmp_path / "s", data, chunks=(97, width), **settings), data, tolerance)


def moments_big_endian() -> Any:
    from zarr.codecs import BytesCodec

    return BytesCodec(endian="big")


def test_bfloat16_is_summed_by_its_values(tmp_path: Path) -> None:
    data = activations(900, 12, "<f4", 10)
    bits = (data.view(np.uint32) >> 16).astype(np.uint16)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    found = one(tmp_path / "s", bits, dtype=BFloat16())
    assert found.dtype == "bfloat16"
    assert_close(found, values, 1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_bfloat16_outside_the_squares_of_float32(tmp_path: Path, scale: float) -> None:
    data = (activations(900, 12, "<f4") * np.float32(scale)).astype("<f4")
    data[:, 3] = 0
    bits = (data.view(np.uint32) >> 16).astype(np.uint16)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    assert_close(one(tmp_path / "s", bits, dtype=BFloat16()), values, 1e-5)


def uneven(dtype: str, n: int = 1500, width: int = 1100) -> tuple[np.ndarray, np.ndarray]:
    """The stored array and its values: dimensions near zero, far from it, and some that drift."""
    data = activations(n, width, "<f8")
    for j, away in enumerate([0.0, 1.5, 1.9, 2.1, 3.0, 30.0, -300.0]):  # standard deviations
        data[:, j] = (away + np.random.default_rng(j).standard_normal(n)) * 0.1
    data[700:, 7] += 500
    data[: n - 1, 8] = 100
    data[:1000, 9] = 0
    data[:, 10:13] = 0, 3, 0.1
    data[3, 13] = 6e4
    if dtype != "bfloat16":
        return data.astype(dtype), data.astype(dtype)
    bits = (data.astype("<f4").view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("dtype", ["<f2", "bfloat16"])
@pytest.mark.parametrize("width", [64, 515, 1100])
def test_wide_rows_of_16_bits(tmp_path: Path, dtype: str, width: int) -> None:
    data, values = uneven(dtype, width=width)
    found = one(tmp_path / "s", data, **({} if dtype == "<f2" else {"dtype": BFloat16()}))
    moving = np.delete(np.arange(width), [10, 11, 12])
    check_columns(found, values, moving, 1e-5)
    assert found.variance[10:13].tolist() == [0, 0, 0]
    assert found.mean[10:13].tolist() == values[0, 10:13].tolist()


def check_columns(found: FloatStats, values: np.ndarray, columns: np.ndarray, tolerance: float) -> None:
    exact = values[:, columns].astype(np.float64)
    np.testing.assert_allclose(found.variance[columns], exact.var(axis=0), rtol=tolerance)
    size = np.abs(exact).mean(axis=0)
    assert (np.abs(found.mean[columns] - exact.mean(axis=0)) <= tolerance / 10 * size).all()


def test_a_centre_that_stays_at_zero_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_FAR", np.inf)
    data, values = uneven("<f2")
    with pytest.raises(AssertionError):
        check_columns(one(tmp_path / "s", data), values, np.array([6]), 1e-5)


@pytest.mark.parametrize("dtype", ["<f2", "bfloat16"])
def test_a_slice_with_a_nan_changes_no_other_sum(tmp_path: Path, dtype: str) -> None:
    data, values = uneven(dtype)
    bits = data.view(np.uint16)
    bits[[40, 1300], [1099, 5]] = 0x7FFF, 0x7C00 if dtype == "<f2" else 0x7F80
    found = one(tmp_path / "s", data, **({} if dtype == "<f2" else {"dtype": BFloat16()}))
    assert (found.first_nan, found.first_inf) == ((40, 1099), (1300, 5))
    assert (found.nans, found.infs, found.left_out) == (1, 1, 2)
    rest = np.delete(values, [40, 1300], axis=0)
    check_columns(found, rest, np.delete(np.arange(1100), [10, 11, 12]), 1e-5)


def test_all_values_of_float16(tmp_path: Path) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view("<f2").reshape(-1, 1)
    finite = every[np.isfinite(every[:, 0])]
    found = one(tmp_path / "s", finite, chunks=(1 << 16, 1))
    assert_close(found, finite, 1e-5)
    found = one(tmp_path / "s", every, chunks=(1 << 16, 1))
    assert (found.nans, found.infs, found.count) == (2046, 2, len(finite))
    np.testing.assert_allclose(found.variance, finite.astype("f8").var(axis=0), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
def test_rows_with_nan_or_inf_are_counted_and_left_out(tmp_path: Path, dtype: str) -> None:
    data = activations(5000, 20, dtype)
    data[1234, 7] = np.nan
    data[4321, [2, 3]] = np.nan
    data[999, 5] = -np.inf
    data[4321, 9] = np.inf
    found = one(tmp_path / "s", data, chunks=(500, 20))
    assert (found.nans, found.first_nan, found.infs, found.first_inf) == (3, (1234, 7), 2, (999, 5))
    assert (found.left_out, found.count) == (3, 4997)
    good = data[np.isfinite(data).all(axis=1)].astype("f8")
    np.testing.assert_allclose(found.mean, good.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found.variance, good.var(axis=0), rtol=1e-5)


def test_nothing_finite_and_nothing_at_all(tmp_path: Path) -> None:
    found = one(tmp_path / "s", np.full((30, 3), np.nan, "<f4"))
    assert (found.count, found.nans, found.left_out) == (0, 90, 30)
    assert np.isnan(found.mean).all()
    assert math.isnan(found.norm_quantile(0.5))
    assert (found.outliers, found.constant) == ({}, 0)
    json.dumps(found.as_dict(), allow_nan=False)
    view = write_view(tmp_path / "v", shuffled(tmp_path / "t"), 5, 5)
    empty = stats(view)
    assert [f.count for f in empty.fields.values()] == [0] * 4
    assert str(read_stats(view)) == str(empty)


def test_outliers_and_dimensions_without_variance_are_named(tmp_path: Path) -> None:
    data = np.random.default_rng(0).standard_normal((500, 64)).astype("<f2")
    data[:, 5] *= 20
    data[:, 40] += 50
    data[:, 9] = 3
    data[:, 11] = 0
    found = one(tmp_path / "s", data)
    assert list(found.outliers) == [40, 5]
    assert found.outliers[40] == pytest.approx(50, rel=0.1)
    assert found.constant == 2


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
def test_rows_that_rule_the_norm_are_named(tmp_path: Path, dtype: str) -> None:
    """One row in 64 has 100 times the norm of the others, like tokens that are attention sinks."""
    data = activations(4096, 32, "<f4")
    data[::64] *= 100
    data = data.astype(dtype)
    found = one(tmp_path / "s", data)
    squares = np.square(data.astype("f8")).sum(axis=1)
    heavy = squares > 100 * np.median(squares)
    assert found.heavy == (heavy.sum(), pytest.approx(squares[heavy].sum() / squares.sum(), rel=0.01))
    assert f"64 of 4,096 rows (1.56%) have over 10 times the median norm and hold {found.heavy[1]:.1%}" in str(
        stats(tmp_path / "s")
    )
    assert json.loads(json.dumps(found.as_dict()))["heavy"]["rows"] == 64


def test_rows_of_like_norms_are_not_named(tmp_path: Path) -> None:
    assert one(tmp_path / "s", activations(4096, 32, "<f4")).heavy == (0, 0.0)
    assert "median norm" not in str(stats(tmp_path / "s"))
    few = np.random.default_rng(1).standard_normal((8192, 32), "<f4")
    few[7] *= 14  # one heavy row holds too little to rule
    assert one(tmp_path / "t", few).heavy[0] == 1
    assert "median norm" not in str(stats(tmp_path / "t"))


def test_scalars_and_deep_rows(tmp_path: Path) -> None:
    assert_close(one(tmp_path / "s", activations(300, 1, "<f4")[:, 0]), activations(300, 1, "<f4")[:, 0], 1e-9)
    deep = activations(300, 24, "<f2").reshape(300, 2, 1, 3, 4)
    assert_close(one(tmp_path / "s", deep), deep, 1e-5)


@pytest.mark.parametrize("dtype", ["i1", "<u2", "<i8", "<u8", "?"])
def test_integers(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(1)
    low, high = (0, 2) if dtype == "?" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    data = rng.integers(low, high, 3000, dtype="u1" if dtype == "?" else dtype).astype(dtype)
    array(tmp_path / "s", data, chunks=(500,))
    found = stats(tmp_path / "s")["data"]
    assert isinstance(found, IntStats)
    assert (found.min, found.max, found.count) == (int(data.min()), int(data.max()), 3000)
    count = len(np.unique(data))
    assert found.exact == (count < moments.SKETCH)
    assert found.distinct == pytest.approx(count, rel=0 if found.exact else 0.15)


def test_distinct_is_right_on_average() -> None:
    errors = []
    for seed in range(40):
        values = np.arange(50_000, dtype=np.int64) * 7 + seed * 1_000_003
        info = open_info("<i8")
        summed = moments.IntSums(info)
        for part in np.array_split(np.repeat(values, 2), 7):
            summed.add(part, 0)
        errors.append(moments.distinct(summed.part())[0] / 50_000 - 1)
    assert abs(np.mean(errors)) < 4 * 0.031 / math.sqrt(40)
    assert 0.02 < np.std(errors) < 0.045


def open_info(dtype: str) -> Any:
    from actshuffle.loading.fieldinfo import FieldInfo

    return FieldInfo("x", np.dtype(dtype), (), 8, 1, False, True, 1)


def test_what_is_no_number_is_skipped_and_said(sources: Callable[[str, int], Path]) -> None:
    found = stats(sources("mixed_group", N))
    assert set(found.skipped) >= {"f7", "f8", "f9", "f11", "f14"}
    assert {"bf16", "f4", "f0", "f3"} <= set(found.fields)
    assert "no numbers" in str(found)


# --- However it is done -------------------------------------------------------------------------


def assert_same(a: Stats, b: Stats) -> None:
    assert a.fields.keys() == b.fields.keys()
    for name, of in a.fields.items():
        other = b.fields[name]
        assert of.as_dict() == other.as_dict()
        if isinstance(of, FloatStats):
            assert isinstance(other, FloatStats)
            for kind in ("mean", "variance", "norms"):
                np.testing.assert_array_equal(getattr(of, kind), getattr(other, kind))


def test_cuts_change_only_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = activations(4000, 30, "<f2", 20)
    whole = one(tmp_path / "s", data, chunks=(100, 30))
    for task, read, values in [(1, 1, 1), (1 << 16, 999, 300), (1 << 14, 1 << 30, 1 << 20)]:
        monkeypatch.setattr("actshuffle.checking.statspass.TASK_BYTES", task)
        monkeypatch.setattr("actshuffle.checking.statspass.READ_BYTES", read)
        monkeypatch.setattr("actshuffle.checking.moments.SLICE_VALUES", values)
        cut = one(tmp_path / "s", data, chunks=(100, 30))
        np.testing.assert_allclose(cut.mean, whole.mean, atol=1e-5)
        np.testing.assert_allclose(cut.variance, whole.variance, rtol=2e-5)
        np.testing.assert_array_equal(cut.norms[:, 1].sum(), whole.norms[:, 1].sum())


def test_workers_change_nothing(tmp_path: Path, cluster: Callable[[int], Dask]) -> None:
    store = shuffled(tmp_path / "s", 1000, chunk_rows=50)
    # Tasks are cut for the number of workers; for equal cuts the result is equal to the last bit.
    threads = stats(store, executor=Threads(2))
    assert_same(stats(store, executor=cluster(2)), threads)
    serial = stats(store, executor=Serial())
    assert isinstance(serial["data"], FloatStats)
    np.testing.assert_allclose(serial["data"].variance, threads["data"].variance, rtol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("distinct", [500, 50_000])
def test_slices_of_integers_change_nothing(distinct: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extremes lie in other slices than the first, and the last slice is short."""
    rows = np.random.default_rng(1).integers(0, distinct, 3 * moments.HASHED_VALUES + 7)
    rows[-1], rows[moments.HASHED_VALUES + 5] = -9, distinct + 9
    parts = []
    for size in (moments.HASHED_VALUES, len(rows)):
        monkeypatch.setattr(moments, "HASHED_VALUES", size)
        summed = moments.IntSums(open_info("<i8"))
        summed.add(rows, 0)
        parts.append(summed.part())
    sliced, whole = parts
    assert (sliced.count, sliced.least, sliced.most) == (len(rows), -9, distinct + 9)
    assert (whole.count, whole.least, whole.most) == (sliced.count, sliced.least, sliced.most)
    np.testing.assert_array_equal(sliced.hashes, whole.hashes)


def test_rows_are_read_past_the_page_cache(tmp_path: Path) -> None:
    """The half in the page cache stays; the other half is counted, and not in the cache afterwards either."""
    data = activations(3000, 384, "<f4")
    array(tmp_path / "s", data, chunks=(1500, 384))
    files = sorted(p for p in (tmp_path / "s").rglob("*") if p.is_file() and p.name != "zarr.json")
    assert len(files) == 2
    dataset = open_dataset(tmp_path / "s", incomplete=True)
    (name,) = dataset.fields
    first, second = (file.parent for file in files)
    for file in files:
        evict(file)
    if cached_share([first]) > 0:
        pytest.skip("a file system that is in memory itself")
    files[1].read_bytes()
    found = stats(dataset, executor=Serial())[name]  # tasks of a whole file
    assert isinstance(found, FloatStats)
    assert_close(found, data, 1e-9)
    assert cached_share([second]) == 1
    assert cached_share([first]) < 0.1  # a look leaves some pages
    dataset.read(name, 0, 1500)  # as whoever wants them again does
    assert cached_share([first]) == 1


def test_a_damaged_order_of_results_changes_nothing(tmp_path: Path) -> None:
    class Backwards(Serial):
        def map(self, fn: Any, calls: Any) -> Any:
            return iter([fn(*call) for call in list(calls)][::-1])

    store = shuffled(tmp_path / "s", 1000, chunk_rows=50)
    assert_same(stats(store, executor=Backwards()), stats(store, executor=Serial()))


# --- Kept in the store --------------------------------------------------------------------------


def test_they_are_kept_beside_the_rows(tmp_path: Path) -> None:
    import zarr

    store = shuffled(tmp_path / "s")
    with pytest.raises(RequestError, match="no statistics yet"):
        read_stats(store)
    found = stats(store)
    assert found.written
    assert_same(read_stats(store), found)
    assert str(read_stats(store)) == str(found)
    group = zarr.open_group(store, mode="r")
    mean = group["_actshuffle/stats/data/mean"]
    np.testing.assert_array_equal(mean[:], found["data"].mean)  # type: ignore[index,union-attr]
    before = {p: p.read_bytes() for p in (store / "_actshuffle" / "stats").rglob("*") if p.is_file()}
    stats(store, executor=Serial())
    timeless = [p for p in before if p.name != "stats.json" and "data" not in p.parts]
    assert all(p.read_bytes() == before[p] for p in timeless)
    assert open_dataset(store).rows == N


def test_where_they_cannot_be_kept_they_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = shuffled(tmp_path / "s")

    def refuse(*_: object) -> None:
        raise StorageError("Permission denied: s/_actshuffle/stats/zarr.json")

    monkeypatch.setattr("actshuffle.checking.statspass._write", refuse)
    found = stats(store)
    assert not found.written
    assert found["data"].count == N  # type: ignore[union-attr]
    assert "kept in the store" not in str(found)
    assert "not kept in the store: Permission denied" in caplog.text


def test_a_views_are_its_own(tmp_path: Path) -> None:
    store = shuffled(tmp_path / "s")
    view = write_view(tmp_path / "v", store, 10, 60)
    found = stats(view)
    assert (found.rows, found.written) == (50, True)
    assert not (store / "_actshuffle" / "stats").exists()
    rows = open_dataset(store).read("data", 10, 60).astype("f8")
    np.testing.assert_allclose(found["data"].mean, rows.mean(axis=0), atol=1e-6)  # type: ignore[union-attr]
    assert_same(read_stats(tmp_path / "v"), found)


def test_what_is_not_ours_is_not_written_to(tmp_path: Path) -> None:
    store = shuffled(tmp_path / "s")
    source = tmp_path / "s.src"
    files = sorted(source.rglob("*"))
    found = stats(source)
    assert not found.written
    assert sorted(source.rglob("*")) == files
    assert not stats(store, write=False).written
    assert not stats(store, fields=["data"]).written
    assert not (store / "_actshuffle" / "stats").exists()


def test_damaged_or_stale_statistics_are_refused(tmp_path: Path) -> None:
    store = shuffled(tmp_path / "s")
    stats(store)
    folder = store / "_actshuffle" / "stats"
    whole = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    json_file = folder / "stats.json"

    def assert_refused(message: str) -> None:
        with pytest.raises(FormatError, match=message):
            read_stats(store)
        for path, data in whole.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        read_stats(store)

    json_file.write_text("{")
    assert_refused("damaged")
    json_file.write_text("[1]")
    assert_refused("damaged")
    json_file.write_bytes(whole[json_file].replace(b'"format": 1', b'"format": 2'))
    assert_refused("format 2")
    chunk = next(p for p in folder.glob("data/mean/c*"))
    chunk.write_bytes(chunk.read_bytes()[:-8] + b"12345678")
    assert_refused("mean of data")
    chunk.unlink()
    assert_refused("damaged")
    shutil.rmtree(folder / "data")
    assert_refused("mean of data")
    body = json.loads(whole[json_file])
    del body["fields"]["data"]["arrays"]
    json_file.write_text(json.dumps(body))
    assert_refused("damaged")
    other = shuffled(tmp_path / "t", seed=77)
    shutil.copytree(folder, other / "_actshuffle" / "stats")
    with pytest.raises(FormatError, match="not of what is stored"):
        read_stats(other)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    store = shuffled(tmp_path / "s")
    with pytest.raises(RequestError, match="no array named 'x'"):
        stats(store, fields=["x"])
    with pytest.raises(SourceError, match="no such"):
        stats(tmp_path / "nowhere")
    (store / "_actshuffle" / "zarr.json").unlink()
    with pytest.raises(IncompleteStoreError):
        stats(store)
    assert stats(store, incomplete=True).rows == N


# --- Shown --------------------------------------------------------------------------------------


def test_it_shows_itself(tmp_path: Path) -> None:
    store = collection(tmp_path / "a<b", 300)
    found = stats(store)
    assert "300 rows" in str(found)
    assert "float16" in str(found)
    assert "document" in str(found)
    assert "a&lt;b" in found._repr_html_()
    assert "<Stats of" in repr(found)
    json.dumps(found.as_dict(), allow_nan=False)
    assert pickle.loads(pickle.dumps(found)).rows == 300


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = stats(shuffled(tmp_path / "s"))
    data = found.png(tmp_path / "s.png")
    assert data.startswith(b"\x89PNG")
    assert (tmp_path / "s.png").read_bytes() == data
    array(tmp_path / "one", np.full((20, 4), 2.5, "<f4"))
    assert stats(tmp_path / "one").png().startswith(b"\x89PNG")
    array(tmp_path / "ints", np.arange(9))
    with pytest.raises(RequestError, match="no floating fields"):
        stats(tmp_path / "ints").png()


def test_without_matplotlib_a_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actshuffle.checking.statsreport.find_spec", lambda name: None)
    found = stats(shuffled(tmp_path / "s"))
    with pytest.raises(RequestError, match="needs matplotlib"):
        found.png()
    assert "<img" not in found._repr_html_()


def test_finish_is_what_makes_a_collection(tmp_path: Path) -> None:
    array(tmp_path / "s", np.arange(9))
    finish(tmp_path / "s", 9, ["data"])
    assert stats(tmp_path / "s").rows == 9
