"""The loader: every row once, in a known order, wherever it stops and on however many ranks it resumes."""

from __future__ import annotations

import copy
import gc
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actshuffle import shuffle
from actshuffle.errors import IncompleteStoreError, MissingChunkError, RequestError, SourceError
from actshuffle.loading import prefetch
from actshuffle.loading.dataset import Dataset, open_dataset, write_view
from actshuffle.loading.epochs import Order, unit_rows
from actshuffle.loading.loader import Loader
from benchmarks.cache import cached_share
from support.finished import N, collection, finish, shuffled
from support.processes import until
from support.runs import run
from support.stores import SOURCES, evict, group, values

Batch = dict[str, Any]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,003 rows in chunks that no batch size fits."""
    return shuffled(tmp_path_factory.mktemp("loader") / "s", 1003, chunk_rows=61)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store in the order in which it was made."""
    return collection(tmp_path_factory.mktemp("loader") / "c", 1003)


def whole(batches: list[Batch]) -> Batch:
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


def merged(loaders: list[Loader]) -> Iterator[Batch]:
    """The global batches of all ranks, which must make the same number of steps."""
    for parts in zip(*loaders, strict=True):
        yield whole(list(parts))


# --- What is in a batch -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
def test_epoch_0_is_the_stored_order(kind: str, sources: Callable[[str, int], Path]) -> None:
    dataset = open_dataset(sources(kind, N), incomplete=True)
    for size in (1, 40, N, 1000):
        batches = list(Loader(dataset, size, buffer_rows=0, threads=3))
        assert [len(b[next(iter(b))]) for b in batches] == [size] * (N // size) + [N % size] * (N % size > 0)
        for name, rows in whole(batches).items():
            assert rows.tobytes() == dataset.read(name, 0, N).tobytes()
            assert rows.dtype == dataset.fields[name].dtype


@pytest.mark.parametrize("kind", ["bare", "zstd", "sharded_cut_zstd", "cut_rows", "mixed_group"])
@pytest.mark.parametrize("buffer_rows", [0, 37])
def test_later_epochs_are_as_the_order_says(kind: str, buffer_rows: int, sources: Callable[[str, int], Path]) -> None:
    dataset = open_dataset(sources(kind, N), incomplete=True)
    loader = Loader(dataset, 16, buffer_rows=buffer_rows, epochs=3, seed=9)
    batches = list(loader)
    for epoch in range(3):
        part = whole(batches[epoch * 10 : (epoch + 1) * 10])
        rows = loader.order.rows_at(epoch, 0, N)
        assert sorted(rows) == list(range(N))
        for name, found in part.items():
            assert found.tobytes() == dataset.read(name, 0, N)[rows].tobytes()


@pytest.mark.parametrize("buffer_rows", [None, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 3, 64, 250, 1003, 2000])
def test_every_row_is_seen_once_per_epoch_by_one_rank(
    store: Path, batch_size: int, world_size: int, buffer_rows: int | None
) -> None:
    if batch_size == 1 and buffer_rows:
        pytest.skip("as with 3")
    dataset = open_dataset(store)
    alone = Loader(dataset, batch_size, fields=["source_row"], epochs=2, buffer_rows=buffer_rows)
    ranks = [
        Loader(
            dataset,
            batch_size,
            fields=["source_row"],
            epochs=2,
            buffer_rows=buffer_rows,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    steps = 0
    seen: list[np.ndarray] = []
    for ours, theirs in zip(alone, merged(ranks), strict=True):
        assert same(ours, theirs)
        seen.append(ours["source_row"])
        steps += 1
    rows = np.concatenate(seen)
    for epoch in (rows[:1003], rows[1003:]):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(1003))
    assert steps == len(alone) == 2 * -(-1003 // batch_size)
    assert [sum(r.rows_seen for r in ranks), alone.rows_seen] == [2006, 2006]
    most = max(r.rows_seen for r in ranks) - min(r.rows_seen for r in ranks)
    assert most <= steps


def test_drop_last_leaves_out_the_short_batch(store: Path) -> None:
    loader = Loader(store, 100, fields="token", drop_last=True, epochs=2)
    assert [len(b["token"]) for b in loader] == [100] * 20
    assert len(loader) == 20
    assert list(Loader(store, 2000, fields="token", drop_last=True)) == []


def test_one_epoch_after_the_other(store: Path) -> None:
    once = list(Loader(store, 300, fields=["source_row"], epochs=3))
    loader = Loader(store, 300, fields=["source_row"])
    again = [batch for _ in range(3) for batch in loader]
    assert all(same(a, b) for a, b in zip(once, again, strict=True))
    endless = Loader(store, 300, fields=["source_row"], epochs=None)
    for expected, batch in zip(once, endless, strict=False):
        assert same(expected, batch)
    with pytest.raises(TypeError, match="no length"):
        len(endless)


def test_epochs_differ_and_depend_on_the_seed_alone(store: Path) -> None:
    def epochs(seed: int) -> list[bytes]:
        loader = Loader(store, 1003, fields=["source_row"], epochs=4, seed=seed)
        return [b["source_row"].tobytes() for b in loader]

    one, two = epochs(1), epochs(2)
    assert one == epochs(1)
    assert one[0] == two[0]
    assert len({*one, *two}) == 7


def test_units_are_small_where_windows_mix_them_and_larger_where_each_is_a_read() -> None:
    assert unit_rows(10**6, 50_000, 1, buffered=False) == 15_625
    assert unit_rows(10**6, 50_000, 1, buffered=True) == 3_907
    assert unit_rows(10**6, 1_000, 1, buffered=False) == 1_000  # never more than an object
    assert unit_rows(10**6, 50_000, 20_000, buffered=True) == 20_000  # what is decoded together


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_block_reads_each_unit_once(store: Path, monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    reads: list[list[Any]] = []
    real = Dataset.reading

    def noted(self: Dataset, name: str, ranges: Any, out: Any, **how: Any) -> Any:
        reads.append(list(ranges))
        return real(self, name, ranges, out, **how)

    monkeypatch.setattr(Dataset, "reading", noted)
    loader = Loader(store, 10, fields=["data"])  # 101 steps, all in one block
    loader.seek(epoch)
    assert sum(len(b["data"]) for b in loader) == 1003
    units = -(-1003 // loader.order.unit)
    assert len(reads) == 1
    assert len(reads[0]) <= (units + 1 if epoch else 1)


def test_units_stay_together_in_later_epochs_as_we_say() -> None:
    """Neither more nor less mixed than the docstring promises: neighbours part only at unit edges."""
    order = Order(rows=1000, unit=64, seed=3)
    for epoch in (1, 2, 7):
        breaks = np.count_nonzero(np.diff(order.rows_at(epoch, 0, 1000)) != 1)
        assert 10 <= breaks <= 16 + 1
        parts = [order.rows_at(epoch, a, min(a + 37, 1000)) for a in range(0, 1000, 37)]
        np.testing.assert_array_equal(np.concatenate(parts), order.rows_at(epoch, 0, 1000))


def test_single_later_epochs_are_uniform_over_the_shuffles_seed() -> None:
    """For a uniform stored order and a fixed later epoch, each row is anywhere with the same chance."""
    n, tries = 6, 3000
    order = Order(rows=n, unit=2, seed=1)
    rows = order.rows_at(1, 0, n)
    rng = np.random.default_rng(0)
    counts = np.zeros((n, n))
    for _ in range(tries):
        counts[np.arange(n), rng.permutation(n)[rows]] += 1
    chi = ((counts - tries / n) ** 2 / (tries / n)).sum()
    assert 8 < chi < 52  # 25 degrees of freedom, about 1e-3 on either side


# --- Stopping and going on ----------------------------------------------------------------------


@pytest.mark.parametrize("buffer_rows", [None, 170])
def test_resumes_bitwise_at_100_random_stops_on_changing_ranks(store: Path, buffer_rows: int | None) -> None:
    dice, dataset = random.Random(5), open_dataset(store)
    settings: dict[str, Any] = {"epochs": 3, "seed": 4, "buffer_rows": buffer_rows, "threads": 2}
    reference = list(Loader(dataset, 53, **settings))
    per_epoch = -(-1003 // 53)
    steps = 3 * per_epoch
    stops = dice.sample(range(steps + 1), 50) + [dice.randrange(steps) for _ in range(50)]
    worlds = [dice.randint(1, 4) for _ in stops]
    for stop, before in zip(stops, worlds, strict=True):
        after = dice.choice([w for w in (1, 2, 3, 4) if w != before])
        ranks = [Loader(dataset, 53, rank=r, world_size=before, **settings) for r in range(before)]
        # Not from the start each time: a state says it all.
        start = max(0, stop - 4)
        for rank in ranks:
            rank.seek(start // per_epoch, start % per_epoch * 53)
        passes = [iter(rank) for rank in ranks]
        for number in range(start, stop):
            assert same(whole([next(p) for p in passes]), reference[number])
        states = [rank.state_dict() for rank in ranks]
        assert all(state == states[0] for state in states)
        for p in passes:
            p.close()  # type: ignore[attr-defined]
        resumed = [Loader(dataset, 53, rank=r, world_size=after, **settings) for r in range(after)]
        for rank in resumed:
            rank.load_state_dict(copy.deepcopy(states[0]))
        found = merged(resumed)
        for expected in reference[stop : stop + 4]:
            assert same(next(found), expected)
    assert sum(stop < steps for stop in stops) > 90


def test_a_cursor_one_row_off_is_noticed(store: Path) -> None:
    """Negative control of the test above."""
    loader, other = Loader(store, 53), Loader(store, 53)
    batches = iter(loader)
    next(batches)
    expected, state = next(batches), loader.state_dict()
    other.load_state_dict(state | {"row": 53})
    assert same(next(iter(other)), expected)
    other.load_state_dict(state | {"row": 54})
    assert not same(next(iter(other)), expected)


def test_resumes_to_the_end(store: Path) -> None:
    reference = list(Loader(store, 64, epochs=2))
    for stop in (0, 5, 15, 16, 17, 31):
        loader = Loader(store, 64, epochs=2)
        for _, _batch in zip(range(stop), loader, strict=False):
            pass
        other = Loader(store, 64, epochs=2)
        other.load_state_dict(loader.state_dict())
        rest = list(other)
        assert len(rest) == 32 - stop
        assert all(same(a, b) for a, b in zip(rest, reference[stop:], strict=True))


def test_a_state_fits_another_batch_size_and_other_fields(store: Path) -> None:
    loader = Loader(store, 100)
    for _, _batch in zip(range(3), loader, strict=False):
        pass
    other = Loader(store, 33, fields=["source_row"])
    other.load_state_dict(loader.state_dict())
    np.testing.assert_array_equal(whole(list(other))["source_row"], open_dataset(store).read("source_row", 300, 1003))


def test_iterating_again_goes_on_and_ends_the_pass_before(store: Path) -> None:
    loader = Loader(store, 100, fields=["source_row"])
    first = iter(loader)
    a, b = next(first), next(first)
    second = iter(loader)
    c = next(second)
    rows = open_dataset(store).read("source_row", 0, 300)
    np.testing.assert_array_equal(whole([a, b, c])["source_row"], rows)
    with pytest.raises(RequestError, match="another pass"):
        next(first)
    loader.seek(0)
    with pytest.raises(RequestError, match="moved"):
        next(second)
    np.testing.assert_array_equal(next(iter(loader))["source_row"], rows[:100])


@pytest.mark.parametrize("state", [{}, {"format": 1}, None, [], {"format": 99}, "state"])
def test_what_is_no_state_of_a_loader_is_refused(state: Any, store: Path) -> None:
    loader = Loader(store, 100)
    before = loader.state_dict()
    with pytest.raises(RequestError, match=r"no state of a loader|loader state of format 99"):
        loader.load_state_dict(state)
    assert loader.state_dict() == before


def test_a_state_of_another_loader_is_refused(store: Path, plain: Path) -> None:
    state = Loader(store, 100).state_dict()
    for other, message in [
        (Loader(store, 100, seed=1), "seed was 0, now 1"),
        (Loader(store, 100, buffer_rows=50), "buffer_rows was 0, now 50"),
        (Loader(plain, 100, buffer_rows=0), "unit|stores"),
    ]:
        with pytest.raises(RequestError, match=message):
            other.load_state_dict(state)
    loader = Loader(store, 100)
    for bad in (
        {},
        {**state, "format": 2},
        {**state, "row": -1},
        {**state, "row": 2000},
        {**state, "epoch": "x"},
        {**state, "epoch": -1},
    ):
        with pytest.raises(RequestError):
            loader.load_state_dict(bad)
    assert loader.state_dict() == state


# --- Memory and threads -------------------------------------------------------------------------


def test_a_batch_stays_as_it_is_for_as_long_as_it_is_held(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actshuffle.loading.loader.CACHED_BLOCK_BYTES", 2000)
    loader = Loader(store, 20, epochs=6, prefetch_bytes=1, threads=4)
    expected = list(map(copy.deepcopy, Loader(store, 20, epochs=6)))
    dice = random.Random(1)
    held: dict[int, Any] = {}
    for number, batch in enumerate(loader):
        assert same(batch, expected[number])
        if dice.random() < 0.3:
            held[number] = batch if dice.random() < 0.5 else {"data": batch["data"][3:][::2]}
        for old in dice.sample(sorted(held), min(len(held), dice.random() < 0.2)):
            rows = held.pop(old)
            like = expected[old]["data"][3:][::2] if len(rows) == 1 else expected[old]["data"]
            np.testing.assert_array_equal(rows["data"], like)
    assert len(held) > 10
    for number, rows in held.items():
        like = expected[number]["data"][3:][::2] if len(rows) == 1 else expected[number]["data"]
        np.testing.assert_array_equal(rows["data"], like)


@pytest.mark.parametrize(("kind", "cached", "batches"), [("bare", True, 2), ("bare", False, 8), ("zstd", True, 8)])
def test_blocks_are_small_where_all_comes_from_the_page_cache(
    kind: str, cached: bool, batches: int, sources: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not views if the rows come from a disk or must be decoded."""
    dataset = open_dataset(path := sources(kind, N), incomplete=True)
    size = 10 * dataset.row_bytes
    monkeypatch.setattr("actshuffle.loading.loader.CACHED_BLOCK_BYTES", 2 * size)
    monkeypatch.setattr("actshuffle.loading.loader.BLOCK_BYTES", 8 * size)
    filled = []
    fill = prefetch.Reading.fill
    monkeypatch.setattr(prefetch.Reading, "fill", lambda self, p: (filled.append(p[0].rows), fill(self, p))[1])
    for file in (p for p in path.rglob("*") if p.is_file()):
        file.read_bytes() if cached else evict(file)
    if dataset.is_cached(next(iter(dataset.fields)), 0) and not cached:
        pytest.skip("a file system that is in memory itself")
    rows = sum(len(next(iter(batch.values()))) for batch in Loader(dataset, 10, buffer_rows=0))
    assert rows == N == sum(filled)
    assert max(filled) == 10 * batches


@pytest.mark.parametrize(("memory", "share"), [(1 << 40, 1.0), (1 << 20, 0.0)])
def test_a_store_larger_than_memory_is_read_past_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, share: float
) -> None:
    data = np.random.default_rng(0).integers(0, 99, (4096, 1024), dtype="<i4")
    group(tmp_path / "s", {"data": data}, chunks=(1024, 1024))
    files = [p for p in (tmp_path / "s" / "data").rglob("*") if p.is_file()]
    for file in files:
        evict(file)
    if cached_share([tmp_path / "s" / "data"]) > 0.01:
        pytest.skip("a file system that is in memory itself")
    monkeypatch.setattr("actshuffle.loading.loader.machine_memory", lambda: memory)
    loader = Loader(tmp_path / "s", 1024, buffer_rows=0, incomplete=True)
    np.testing.assert_array_equal(np.concatenate([batch["data"] for batch in loader]), data)
    assert cached_share([tmp_path / "s" / "data"]) == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize("buffer_rows", [None, 100])
def test_memory_is_used_again_when_nobody_holds_it(
    store: Path, monkeypatch: pytest.MonkeyPatch, buffer_rows: int | None
) -> None:
    allocated = []
    inner = prefetch.pages
    monkeypatch.setattr(prefetch, "pages", lambda n: (allocated.append(n), inner(n))[1])
    monkeypatch.setattr("actshuffle.loading.loader.CACHED_BLOCK_BYTES", 2000)
    loader = Loader(store, 20, epochs=10, prefetch_bytes=1, threads=2, buffer_rows=buffer_rows)
    assert sum(1 for _ in loader) == 510
    assert len(allocated) <= 8 + 3 * bool(buffer_rows)
    allocated.clear()
    kept = list(Loader(store, 20, epochs=2, prefetch_bytes=1, threads=2, buffer_rows=buffer_rows))
    assert len(kept) == 102
    assert len(allocated) > 20


def test_batches_of_one_block_are_views_of_it(store: Path) -> None:
    batches = list(Loader(store, 50, fields=["data"]))
    starts = [b["data"].__array_interface__["data"][0] for b in batches]
    assert np.diff(starts[:10]).tolist() == [50 * 12] * 9
    assert all(b["data"].flags.writeable for b in batches)


def _loading_threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("actshuffle-")}


@pytest.mark.parametrize("buffer_rows", [None, 100])
def test_threads_end_with_the_pass(store: Path, buffer_rows: int | None) -> None:
    before = _loading_threads()  # those of earlier passes may still be ending
    loader = Loader(store, 20, epochs=None, buffer_rows=buffer_rows)
    ran = iter(loader)
    next(ran)
    ours = _loading_threads() - before
    assert ours
    del ran
    gc.collect()
    until(lambda: not ours & _loading_threads())


def test_an_error_comes_in_its_place_and_ends_the_pass(tmp_path: Path) -> None:
    store = collection(tmp_path / "c")
    (store / "data" / "c" / "10" / "0").unlink()
    loader = Loader(store, 7, fields=["data"], buffer_rows=0, threads=2)
    seen: list[Batch] = []
    with pytest.raises(MissingChunkError):
        seen.extend(loader)
    assert len(seen) <= 10
    assert loader.state_dict()["row"] == len(seen) * 7
    buffered = Loader(store, 7, fields=["data"], buffer_rows=30)
    with pytest.raises(MissingChunkError):
        list(buffered)


def test_waiting_is_measured(store: Path) -> None:
    loader = Loader(store, 100)
    list(loader)
    assert 0 < loader.wait_seconds < 60


# --- Several stores, views, other kinds ---------------------------------------------------------


def test_layers_side_by_side(tmp_path: Path) -> None:
    for name, seed in (("layer3", 5), ("layer5", 5), ("layer7", 6)):
        src = tmp_path / f"{name}.src"
        group(src, {"data": values(N, (len(name) + seed,), "<f4")})
        run(src, tmp_path / f"{name}.zarr", seed=seed)
    stores: list[str | Path] = [tmp_path / "layer3.zarr", str(tmp_path / "layer5.zarr")]
    batches = list(Loader(stores, 64))  # type: ignore[arg-type]
    assert set(batches[0]) == {"layer3/data", "layer3/source_row", "layer5/data", "layer5/source_row"}
    found = whole(batches)
    np.testing.assert_array_equal(found["layer3/source_row"], found["layer5/source_row"])
    assert found["layer5/data"].tobytes() == open_dataset(stores[1]).read("data", 0, N).tobytes()
    assert set(Loader(stores, 64, fields=["data"]).fields) == {"layer3/data", "layer5/data"}  # type: ignore[arg-type]
    both = {"a": stores[0], "b": stores[0]}
    assert set(Loader(both, 64, fields=["b/data", "a/source_row"]).fields) == {"b/data", "a/source_row"}
    with pytest.raises(RequestError, match=r"seed 5.*seed 6"):
        Loader([stores[0], tmp_path / "layer7.zarr"], 64)
    with pytest.raises(RequestError, match="two stores are called 'layer3'"):
        Loader([stores[0], stores[0]], 64)
    with pytest.raises(RequestError, match=r"as they were made.*seed 5"):
        Loader([tmp_path / "layer3.src", stores[0]], 64, incomplete=True)
    with pytest.raises(RequestError, match="no store"):
        Loader([], 64)


def test_a_view_is_loaded_like_a_store(store: Path, tmp_path: Path) -> None:
    view = write_view(tmp_path / "v", store, 100, 900)
    dataset = open_dataset(store)
    found = whole(list(Loader(view, 64, epochs=2)))
    np.testing.assert_array_equal(found["data"][:800], dataset.read("data", 100, 900))
    np.testing.assert_array_equal(np.sort(found["source_row"][800:]), np.sort(dataset.read("source_row", 100, 900)))
    assert list(Loader(write_view(tmp_path / "none", store, 7, 7), 64)) == []


def test_a_store_that_is_not_shuffled_needs_a_word(plain: Path, store: Path) -> None:
    with pytest.raises(RequestError, match=r"not shuffled \(collection\).*buffer_rows="):
        Loader(plain, 64)
    with pytest.raises(IncompleteStoreError):
        Loader(store.with_suffix(".src"), 64, buffer_rows=100)
    with pytest.raises(RequestError, match=r"not shuffled \(plain\)"):
        Loader(store.with_suffix(".src"), 64, incomplete=True)
    assert len(list(Loader(store.with_suffix(".src"), 64, incomplete=True, buffer_rows=100))) == 16


def test_the_buffers_mixing_is_measured(tmp_path: Path) -> None:
    n = 40_000
    src = tmp_path / "c"
    group(src, {"data": np.arange(n, dtype="<i4")}, chunks=(100,))
    finish(src, n, ["data"])
    run(src, tmp_path / "s")
    straight = Loader(src, 256, buffer_rows=0).mixing()
    small = Loader(src, 256, buffer_rows=2000).mixing()
    full = Loader(src, 256, buffer_rows=n).mixing()
    assert not straight.passed
    assert not small.passed
    assert full.passed, full.table()
    assert Loader(tmp_path / "s", 256).mixing().passed
    assert Loader(tmp_path / "s", 256).mixing(epoch=3).passed
    view = write_view(tmp_path / "v", tmp_path / "s", 5000, 35_000)
    assert Loader(view, 256).mixing().passed

    def neighbours(report: Any) -> float:
        return next(t.statistic for t in report.tests if t.name == "neighbours")

    assert neighbours(straight) > 10 * neighbours(small) > 10 * neighbours(full)


# --- Refusals -----------------------------------------------------------------------------------


def test_bad_arguments_are_refused(store: Path) -> None:
    for settings, message in [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"world_size": 0}, "world_size"),
        ({"rank": -1}, "rank"),
        ({"epochs": 0}, "epochs"),
        ({"seed": -1}, "seed"),
        ({"threads": 0}, "threads"),
        ({"buffer_rows": -1}, "buffer_rows"),
        ({"pin": True}, "as_torch"),
        ({"fields": ["nothing"]}, "no array named 'nothing'"),
        ({"fields": []}, "no fields"),
        ({"prefetch_bytes": "lots"}, "lots"),
    ]:
        with pytest.raises(RequestError, match=message):
            Loader(store, **{"batch_size": 10, **settings})  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="no such"):
        Loader(store / "nowhere", 10)
    assert "1,003 rows" in repr(Loader(store, 10, rank=1, world_size=2, buffer_rows=500))


# --- torch --------------------------------------------------------------------------------------


def test_importing_actshuffle_does_not_import_torch(store: Path) -> None:
    code = (
        "import sys, actshuffle, actshuffle.loading.loader as l\n"
        f"list(l.Loader({str(store)!r}, 100))\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_tensors_are_the_same_memory(sources: Callable[[str, int], Path], store: Path) -> None:
    torch = pytest.importorskip("torch")
    for ours, theirs in zip(Loader(store, 70, epochs=2), Loader(store, 70, epochs=2, as_torch=True), strict=True):
        assert theirs["data"].dtype == torch.float16
        assert same(ours, {k: v.numpy() for k, v in theirs.items()})
    kind = sources("bfloat16", N)
    bits = open_dataset(kind, incomplete=True).read("data", 0, N)
    rows = torch.cat([b["data"] for b in Loader(kind, 40, as_torch=True, incomplete=True, buffer_rows=0)])
    assert rows.dtype == torch.bfloat16
    assert rows.view(torch.int16).numpy().tobytes() == bits.tobytes()


def test_tensors_hold_their_memory(store: Path) -> None:
    pytest.importorskip("torch")
    expected = list(Loader(store, 20, epochs=3))
    kept = [b["data"][2:7] for b in Loader(store, 20, epochs=3, as_torch=True, prefetch_bytes=1, threads=4, pin=True)]
    for a, b in zip(expected, kept, strict=True):
        assert a["data"][2:7].tobytes() == b.numpy().tobytes()


def test_fields_that_torch_cannot_hold_are_refused(sources: Callable[[str, int], Path]) -> None:
    pytest.importorskip("torch")
    settings: dict[str, Any] = {"incomplete": True, "buffer_rows": 0}
    with pytest.raises(RequestError, match="torch has no type for 'f9'"):
        Loader(sources("mixed_group", N), 40, fields=["f3", "f9"], as_torch=True, **settings)
    with pytest.raises(RequestError, match="torch has no type"):
        Loader(sources("mixed_group", N), 40, **settings).torch()


def test_a_loader_itself_in_a_data_loader_says_what_to_give(store: Path) -> None:
    data = pytest.importorskip("torch.utils.data")
    with pytest.raises(RequestError, match=r"DataLoader `loader.torch\(\)` with batch_size=None"):
        next(iter(data.DataLoader(Loader(store, 90))))


@pytest.mark.parametrize("buffer_rows", [None, 150])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_data_loader_yields_the_loaders_batches(store: Path, workers: int, buffer_rows: int | None) -> None:
    data = pytest.importorskip("torch.utils.data")
    loader = Loader(store, 90, epochs=2, rank=1, world_size=2, buffer_rows=buffer_rows)
    dataset = loader.torch()
    batches = list(data.DataLoader(dataset, batch_size=None, num_workers=workers))
    for ours, theirs in zip(loader, batches, strict=True):
        assert same(ours, {k: v.numpy() for k, v in theirs.items()})
    dataset.set_epoch(2)
    again = list(data.DataLoader(dataset, batch_size=None, num_workers=workers))
    for ours, theirs in zip(loader, again, strict=True):
        assert same(ours, {k: v.numpy() for k, v in theirs.items()})


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_data_loader_goes_on_from_a_loaders_state(store: Path) -> None:
    data = pytest.importorskip("torch.utils.data")
    reference = list(Loader(store, 90, epochs=2))
    loader = Loader(store, 90, epochs=2)
    for _, _batch in zip(range(5), loader, strict=False):
        pass
    for workers in (0, 3):
        dataset = Loader(store, 90, epochs=2).torch()
        dataset.load_state_dict(loader.state_dict())
        found = list(data.DataLoader(dataset, batch_size=None, num_workers=workers))
        for ours, theirs in zip(reference[5:], found, strict=True):
            assert same(ours, {k: v.numpy() for k, v in theirs.items()})


@pytest.mark.parametrize("workers", [0, 2])
def test_the_protocol_of_stateful_data_loaders(store: Path, workers: int) -> None:
    """The loader under torchdata: one state per worker, saved after any batch, restored to as many workers."""
    pytest.importorskip("torch")
    reference = list(Loader(store, 90, epochs=2))
    for stop in (0, 1, 5, 12, 13, 24):
        crew = [Loader(store, 90, epochs=2).torch() for _ in range(max(1, workers))]
        for number, dataset in enumerate(crew):
            if workers:
                dataset.loader.share_steps(number, workers)
        passes = [iter(dataset.loader) for dataset in crew]
        for number in range(stop):
            batch = next(passes[number % len(crew)])
            assert batch["data"].numpy().tobytes() == reference[number]["data"].tobytes()
        states = [dataset.state_dict() for dataset in crew]
        crew = [Loader(store, 90, epochs=2).torch() for _ in range(max(1, workers))]
        for number, (dataset, state) in enumerate(zip(crew, states, strict=True)):
            dataset.load_state_dict(state)
            if workers:
                dataset.loader.share_steps(number, workers)
        passes = [iter(dataset.loader) for dataset in crew]
        for number in range(stop, len(reference)):
            batch = next(passes[number % len(crew)])
            assert batch["data"].numpy().tobytes() == reference[number]["data"].tobytes()
        assert stop == 24 or all(next(p, None) is None for p in passes)
    if workers:
        with pytest.raises(RequestError, match="one of 2 workers, now 3"):
            crew[0].loader.share_steps(0, 3)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore")
def test_a_stateful_data_loader_resumes(store: Path, workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    reference = list(Loader(store, 90, epochs=2))

    def made() -> Any:
        return stateful(Loader(store, 90, epochs=2).torch(), batch_size=None, num_workers=workers)

    for stop in (1, 12, 17):
        first = made()
        ran = iter(first)
        for number in range(stop):
            assert next(ran)["data"].numpy().tobytes() == reference[number]["data"].tobytes()
        second = made()
        second.load_state_dict(first.state_dict())
        rest = list(second)
        assert len(rest) == len(reference) - stop
        for ours, theirs in zip(reference[stop:], rest, strict=True):
            assert same(ours, {k: v.numpy() for k, v in theirs.items()})


EPOCHS = 4


def epochs_of(store: Path, **settings: Any) -> list[list[bytes]]:
    """The bytes of each batch of each epoch."""
    loader = Loader(store, 90, **settings)
    return [[batch["data"].tobytes() for batch in loader] for _ in range(EPOCHS)]


def passed(loader: Any) -> list[bytes]:
    return [batch["data"].numpy().tobytes() for batch in loader]


@pytest.fixture(params=[(0, False), (2, False), (2, True), (3, True)], ids=["here", "2", "2 living", "3 living"])
def torch_loader(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    data = pytest.importorskip("torch.utils.data")
    workers, living = request.param
    return lambda dataset: data.DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=living)


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (3, 0), (1, 2)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_data_loader_that_would_collate_whole_batches_is_refused(size: int, workers: int, store: Path) -> None:
    data = pytest.importorskip("torch.utils.data")
    dataset = Loader(store, 90).torch()
    with pytest.raises(RequestError, match=r"another axis before it: give DataLoader\(dataset, batch_size=None\)"):
        next(iter(data.DataLoader(dataset, batch_size=size, num_workers=workers)))
    assert next(iter(data.DataLoader(dataset, batch_size=None, num_workers=workers)))["source_row"].shape[0] == 90


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_that_live_on_see_the_epoch(store: Path, torch_loader: Callable[[Any], Any]) -> None:
    expected = epochs_of(store)
    dataset = Loader(store, 90).torch()
    loader = torch_loader(dataset)
    for epoch in (0, 1, 3, 1, 1, 0):
        dataset.set_epoch(epoch)
        assert passed(loader) == expected[epoch]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_finished_pass_moves_the_start_on(store: Path, torch_loader: Callable[[Any], Any]) -> None:
    expected = epochs_of(store)
    dataset = Loader(store, 90).torch()
    loader = torch_loader(dataset)
    assert [passed(loader) for _ in range(3)] == expected[:3]
    next(iter(loader))  # broken off: the next one begins where it began
    assert passed(loader) == expected[3]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_resumed_epoch_is_followed_by_the_next(store: Path, torch_loader: Callable[[Any], Any]) -> None:
    expected, reader = epochs_of(store), Loader(store, 90)
    for _ in zip(range(5), reader, strict=False):
        pass
    dataset = Loader(store, 90).torch()
    dataset.load_state_dict(reader.state_dict())
    loader = torch_loader(dataset)
    assert passed(loader) == expected[0][5:]
    assert passed(loader) == expected[1]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_set_epoch_keeps_the_place_that_was_loaded_in_it(store: Path, torch_loader: Callable[[Any], Any]) -> None:
    expected, reader = epochs_of(store), Loader(store, 90)
    for _ in zip(range(5), reader, strict=False):
        pass
    dataset = Loader(store, 90).torch()
    loader = torch_loader(dataset)
    dataset.load_state_dict(reader.state_dict())
    found = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        found.append(passed(loader))
    assert found == [expected[0][5:], expected[1]]
    dataset.set_epoch(0)  # the state was used up
    assert passed(loader) == expected[0]
    dataset.load_state_dict(reader.state_dict())
    dataset.set_epoch(2)  # another epoch: that one, whole
    assert passed(loader) == expected[2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("living", [False, True])
def test_a_stateful_data_loader_gives_each_row_once(store: Path, living: bool) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    expected = epochs_of(store)

    def made() -> Any:
        dataset = Loader(store, 90).torch()
        return stateful(dataset, batch_size=None, num_workers=2, persistent_workers=living)

    for stop in (1, 4, 7):
        first, second = made(), made()
        assert passed(first) == expected[0]
        ran = iter(first)
        found = [next(ran)["data"].numpy().tobytes() for _ in range(stop)]
        assert found == expected[1][:stop]
        second.load_state_dict(first.state_dict())
        assert passed(second) == expected[1][stop:]
        assert passed(second) == expected[2]


def test_a_store_that_is_not_on_disk(tmp_path: Path, store: Path) -> None:
    url = f"memory://{tmp_path.name}/s"
    shuffle(store.with_suffix(".src"), url, seed=5, chunk_rows=61)
    for settings in ({}, {"buffer_rows": 300}, {"rank": 1, "world_size": 3}):
        ours = Loader(store, 64, epochs=2, **settings)  # type: ignore[arg-type]
        theirs = Loader(url, 64, epochs=2, **settings)  # type: ignore[arg-type]
        assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))
