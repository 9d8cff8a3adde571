"""One pass from a disk that serves single rows fast: the same output, past the page cache, chosen by a trial."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from actshuffle import plan, shuffle, verify
from actshuffle.arrays.metadata import source_arrays, source_field
from actshuffle.engine import gather, preview
from actshuffle.engine.job import Job
from actshuffle.errors import ActshuffleError, InfeasibleError, RequestError, StorageError
from actshuffle.executors import Threads, local_cluster
from actshuffle.storage import directio, rows
from actshuffle.storage.directio import has_cached, is_in_memory
from actshuffle.storage.files import LocalObjects
from actshuffle.storage.place import as_place
from support.executors import Elsewhere, Stops, Watched
from support.oracle import assert_is_oracle
from support.runs import resumed_until_done
from support.stores import array, evict, group

ROWS = 401
SHAPE: dict[str, Any] = {"seed": 3, "chunk_rows": 16, "fsync": False, "block_bytes": 64 * 13_000}
# Rows on whole pages, rows that begin in the middle of one, and rows of a few bytes.
WIDTHS = {"even": (32, (1024,)), "odd": (50, (1171,)), "narrow": (100, ())}


def make(path: Path) -> Path:
    group(path, {})
    for number, (name, (step, shape)) in enumerate(WIDTHS.items()):
        data = np.random.default_rng(number).integers(0, 2**31, (ROWS, *shape), np.int32)
        array(path, data, name, chunks=(step, *shape))
    return path


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Rows of 4,096, 4,684 and 4 bytes, in chunks of different sizes."""
    return make(tmp_path / "src.zarr")


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """A folder on a disk, where tests are usually run in memory."""
    for parent in (None, Path(__file__).parent):
        with tempfile.TemporaryDirectory(prefix=".rows-", dir=parent) as name:
            if not is_in_memory(Path(name).stat().st_dev):
                yield Path(name)
                return
    pytest.skip("there is no disk here, only memory")


@pytest.mark.parametrize("block_rows", [16, 64, 1000])
@pytest.mark.parametrize("direct", [True, False])
def test_the_output_is_that_of_any_other_run(
    src: Path, tmp_path: Path, block_rows: int, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one leaf, few and many, and on file systems that cannot bypass their cache."""
    if not direct:
        monkeypatch.setattr(directio, "set_direct", lambda *_, **__: False)
    called, jobs = Counter[str](), list[Job]()
    crew = Watched(lambda fn, _: called.update([fn.__name__]))
    settings = {**SHAPE, "block_bytes": block_rows * 13_000}
    result = shuffle(src, tmp_path / "d.zarr", random_reads=True, executor=crew, planned=jobs.append, **settings)
    assert_is_oracle(src, tmp_path / "d.zarr", 3)
    assert verify(src, tmp_path / "d.zarr").ok
    assert (result.plan.levels, result.plan.scratch_bytes, result.plan.apart) == (1, 0, True)
    assert called["warm"] == called["stage"] == called["split"] == 0
    assert gather.Gather(jobs[0])._mapped == [None] * 3


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_plain_array_of_either_format(tmp_path: Path, zarr_format: int) -> None:
    data = np.random.default_rng(0).random((ROWS, 600))
    array(tmp_path / "s.zarr", data, chunks=(30, 600), zarr_format=zarr_format)
    shuffle(tmp_path / "s.zarr", tmp_path / "d.zarr", random_reads=True, **SHAPE)
    assert_is_oracle(tmp_path / "s.zarr", tmp_path / "d.zarr", 3)


def test_workers_and_threads_read_side_by_side(src: Path, tmp_path: Path) -> None:
    shuffle(src, tmp_path / "threads.zarr", random_reads=True, executor=Threads(3), **SHAPE)
    assert_is_oracle(src, tmp_path / "threads.zarr", 3)
    with local_cluster(2) as crew:
        shuffle(src, tmp_path / "workers.zarr", random_reads=True, executor=crew, **SHAPE)
    assert_is_oracle(src, tmp_path / "workers.zarr", 3)


def test_rows_bypass_the_page_cache(on_disk: Path) -> None:
    """Unlike those of a gather, which brings in the whole source."""
    src, found = make(on_disk / "s.zarr"), dict[str, int]()
    files = sorted(path for name in ("even", "odd") for path in (src / name / "c").rglob("*") if path.is_file())
    evict(files[0])
    if _is_cached(files[0]):
        pytest.skip("this system evicts no files")
    for name in ("random_reads", "gather"):
        for path in files:
            evict(path)
        way: dict[str, Any] = {name: True}
        shuffle(src, on_disk / f"{name}.zarr", **way, **SHAPE)
        found[name] = sum(map(_is_cached, files))
        assert_is_oracle(src, on_disk / f"{name}.zarr", 3)
    assert found == {"random_reads": 0, "gather": len(files)}


def _is_cached(path: Path) -> bool:
    """True if the first page is cached; this look may bring it in."""
    with path.open("rb") as file:
        return has_cached(file.fileno(), 0)


def test_many_rows_are_asked_for_at_the_same_time(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No reader gets further before all are there."""
    gate, real = threading.Barrier(rows.READERS), LocalObjects.read_rows
    met = threading.local()

    def read_rows(*args: Any) -> None:
        if not hasattr(met, "once"):
            met.once = gate.wait(120)
        real(*args)

    monkeypatch.setattr(LocalObjects, "read_rows", read_rows)
    lots = [("even/c/0/0", [4096 * n], [4096 * n]) for n in range(rows.READERS)]
    out = memoryview(bytearray(32 * 4096))
    rows.read_apart(LocalObjects(src, direct=True), 4096, lots, out)
    assert bytes(out) == (src / "even/c/0/0").read_bytes()[: len(out)]


def test_deaths_and_errors_at_random_change_no_byte(src: Path, tmp_path: Path) -> None:
    ends = Counter[str]()
    for seed in range(8):
        dst = tmp_path / f"{seed}.zarr"
        resumed_until_done(src, dst, seed, 0.02, ends, falls=0.5, random_reads=True, **SHAPE)
        assert_is_oracle(src, dst, 3)
    assert ends["Killed"] > 3
    assert ends["StorageError"] > 1


def test_a_half_done_run_goes_on_as_it_began(src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "d.zarr"
    with pytest.raises(KeyboardInterrupt):
        shuffle(src, dst, random_reads=True, executor=Stops(4), **SHAPE)
    with pytest.raises(ActshuffleError, match="random_reads"):
        shuffle(src, dst, random_reads=False, **SHAPE)
    assert shuffle(src, dst, **SHAPE).resumed
    assert_is_oracle(src, dst, 3)


def test_a_plain_gather_is_recorded_as_before(src: Path, tmp_path: Path) -> None:
    """So that one that an earlier version began resumes."""
    for name, known in [("gather", False), ("random_reads", True)]:
        dst, way = tmp_path / f"{known}.zarr", dict[str, Any]({name: True})
        with pytest.raises(KeyboardInterrupt):
            shuffle(src, dst, executor=Stops(4), **way, **SHAPE)
        body = json.loads((dst / "_actshuffle/run.json").read_text())["body"]
        assert ("apart" in body["plan"]["plan"]) == known


def test_a_file_that_ends_early_is_told(src: Path, tmp_path: Path) -> None:
    def cut(fn: Any, call: Any) -> None:
        if fn.__name__ == "run_task":
            os.truncate(src / "even/c/4/0", 5000)

    with pytest.raises(StorageError, match="even/c/4/0"):
        shuffle(src, tmp_path / "d.zarr", random_reads=True, executor=Watched(cut), **SHAPE)
    assert not (tmp_path / "d.zarr/zarr.json").exists()


def test_refusals_come_before_anything_is_written(src: Path, tmp_path: Path) -> None:
    packed, dst = tmp_path / "packed.zarr", tmp_path / "d.zarr"
    zarr.create_array(str(packed), data=np.ones((50, 2000), np.float32), chunks=(7, 2000))
    with pytest.raises(RequestError, match="must be decoded or fetched"):
        shuffle(packed, dst, random_reads=True, **SHAPE)
    with pytest.raises(RequestError, match="must be decoded or fetched"):
        plan(packed, random_reads=True)
    with pytest.raises(RequestError, match="is a way to gather rows: leave gather out"):
        shuffle(src, dst, random_reads=True, gather=False, **SHAPE)
    with pytest.raises(RequestError, match="is one level without spill"):
        shuffle(src, dst, random_reads=True, levels=2, **SHAPE)
    with pytest.raises(RequestError, match="memory of this machine"):
        shuffle(src, dst, random_reads=True, executor=Elsewhere(), **SHAPE)
    assert not dst.exists()


def test_memory_need_not_hold_the_source(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "machine_memory", lambda: 3_000_000)
    with pytest.raises(InfeasibleError, match="must lie in memory"):
        shuffle(src, tmp_path / "d.zarr", gather=True, **SHAPE)
    shuffle(src, tmp_path / "d.zarr", random_reads=True, **SHAPE)
    assert_is_oracle(src, tmp_path / "d.zarr", 3)


@pytest.mark.parametrize(("rate", "chosen"), [(1e8, True), (100.0, False)])
def test_a_trial_decides(src: Path, tmp_path: Path, rate: float, chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the page cache has no room for the source."""
    monkeypatch.setattr(preview, "is_in_memory", lambda _: False)
    monkeypatch.setattr(preview, "free_memory", lambda: 30_000_000)
    monkeypatch.setattr(preview, "_cached", lambda *_: 0.0)
    monkeypatch.setattr(preview, "rate_apart", lambda *_: rate)
    found = plan(src, memory="30MB")
    assert found.apart == chosen
    assert not plan(src, memory="30MB", random_reads=False).apart
    jobs = list[Job]()
    shuffle(src, tmp_path / "d.zarr", memory="30MB", seed=3, planned=jobs.append)
    assert jobs[0].plan.apart == chosen
    assert_is_oracle(src, tmp_path / "d.zarr", 3)


def test_a_trial_of_wide_rows_reads_few_of_them() -> None:
    asked = list[int]()
    rows.rows_per_second(lambda some: asked.append(len(some)), 10**6, 16 << 20, 0.0)
    assert sum(asked) == 2 * rows.READERS


@pytest.mark.parametrize("fsync", [True, False])
def test_as_many_rows_as_there_are_readers_are_asked_for(
    tmp_path: Path, fsync: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where output goes through the page cache, and is otherwise written in pieces."""
    rng, asked, read = np.random.default_rng(0), list[int](), gather.read_rows
    array(tmp_path / "src.zarr", rng.integers(0, 255, (64, 1 << 18)).astype("<u4"), chunks=(8, 1 << 18))

    def noted(objects: Any, field: Any, some: Any, out: Any, **how: Any) -> None:
        asked.append(len(some))
        read(objects, field, some, out, **how)

    monkeypatch.setattr(gather, "read_rows", noted)
    settings = {"seed": 3, "chunk_rows": 32, "random_reads": True, "source_row": False, "fsync": fsync}
    shuffle(tmp_path / "src.zarr", tmp_path / "d.zarr", memory="200MB", **settings)
    assert asked == [32, 32]


def test_a_trial_reads_real_rows(src: Path) -> None:
    field = source_field("odd", source_arrays(as_place(src))["odd"])
    assert gather.rate_apart(LocalObjects(src, direct=True), field, ROWS, 0.2) > 100
    shutil.rmtree(src / "odd/c/3")
    with pytest.raises(StorageError, match="odd/c/3"):
        gather.rate_apart(LocalObjects(src, direct=True), field, ROWS, 0.2)


@pytest.mark.parametrize("wanted", [2_000, 50_000])
def test_the_rate_is_that_of_the_reads(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("actshuffle.storage.rows.time.monotonic", lambda: now[0])

    def read(some: Any) -> None:
        now[0] += len(some) / wanted

    for seconds in (0.0, 0.05, 1.0):
        now[0] = 0.0
        assert rows.rows_per_second(read, 10**6, 8192, seconds) == pytest.approx(wanted, rel=1e-9)
        first = 2 * rows.READERS / wanted
        assert seconds <= now[0] <= 2 * seconds + 2 * first  # the last lot may take as long as all before it
