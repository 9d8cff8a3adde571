"""One pass from the page cache: the same output without spill, and a refusal where that is impossible."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import ZstdCodec

from actshuffle import concat, plan, shuffle, verify
from actshuffle.arrays import virtual
from actshuffle.arrays.metadata import source_arrays, source_field
from actshuffle.arrays.source import Source
from actshuffle.engine import gather, prepare, scratch, tasks
from actshuffle.engine.job import Job
from actshuffle.engine.scratch import memory_beside, memory_place, scratch_place
from actshuffle.errors import (
    ConservationError,
    FormatError,
    InfeasibleError,
    RequestError,
    ResumeMismatchError,
    StorageError,
)
from actshuffle.executors import Executor, Serial, Threads, local_cluster
from actshuffle.ordering import lookup
from actshuffle.ordering.keys import Keys
from actshuffle.storage import mapping
from actshuffle.storage.buffers import kept
from actshuffle.storage.objects import open_objects
from actshuffle.storage.place import as_place
from actshuffle.testing import Faults, matching
from support.executors import Elsewhere, Stops, Watched
from support.oracle import assert_is_oracle
from support.runs import resumed_until_done
from support.stores import SOURCES, array, evict, group, values

ROWS = 3001
SHAPE: dict[str, Any] = {"seed": 3, "chunk_rows": 64, "fsync": False}
WIDTHS = {"wide": (100, (600,)), "narrow": (1000, ()), "middle": (333, (5, 2))}


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Rows of 2,400, 4 and 40 bytes, in chunks of different sizes."""
    path = tmp_path / "src.zarr"
    group(path, {})
    for number, (name, (rows, shape)) in enumerate(WIDTHS.items()):
        data = np.random.default_rng(number).integers(0, 2**31, (ROWS, *shape), np.int32)
        array(path, data, name, chunks=(rows, *shape))
    return path


@pytest.fixture(params=["mapped", "read"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way to the rows of the source; where the system maps no files, rows are read."""
    if request.param == "read":
        monkeypatch.setattr(mapping, "_most_mappings", lambda: 0)
    return str(request.param)


@pytest.mark.parametrize("block_rows", [64, 500, 5000])
def test_the_output_is_that_of_any_other_run(src: Path, tmp_path: Path, block_rows: int, way: str) -> None:
    kinds, jobs = list[str](), list[Job]()

    def look(fn: Any, call: Any) -> None:
        kinds.append(call[1].kind if fn is tasks.run_task else fn.__name__)

    result = shuffle(
        src,
        tmp_path / "d.zarr",
        gather=True,
        block_bytes=block_rows * 2444,
        executor=Watched(look),
        planned=jobs.append,
        **SHAPE,
    )
    assert_is_oracle(src, tmp_path / "d.zarr", 3)
    assert verify(src, tmp_path / "d.zarr").ok
    made = result.plan
    assert (made.levels, made.scratch_bytes, made.level_bytes(1)[0]) == (1, 0, ROWS * 2444)
    assert kinds.count("leaf") == made.leaves == -(-ROWS // made.leaf_rows)
    assert "split" not in kinds
    assert kinds.count("look") <= made.leaves, "all leaves share the looks at the keys"
    assert [found is not None for found in gather.map_fields(jobs[0])] == [way == "mapped"] * 3
    picker = gather.Gather(jobs[0])
    whole = {jobs[0].fields[n].name for n in picker._narrow()}
    assert whole == ({"middle", "narrow", *["wide"] * (block_rows == 5000)} if way == "read" else set())
    kept.cache_clear()
    assert not Path(jobs[0].scratch.url).exists()


def test_threads_take_rows_side_by_side(src: Path, tmp_path: Path, way: str) -> None:
    """As the command does where no number of workers is given; a thread's error stops the run, and it resumes."""
    dst, settings = tmp_path / "d.zarr", {"gather": True, "block_bytes": 64 * 2444, **SHAPE}
    with Faults(matching("put _actshuffle/receipts/9.json", "error")), pytest.raises(StorageError):
        shuffle(src, dst, executor=Threads(3), **settings)
    assert not list(dst.glob("zarr.json"))
    again = shuffle(src, dst, executor=Threads(3), **settings)
    assert again.resumed >= 1
    assert_is_oracle(src, dst, 3)
    assert not list(tmp_path.glob("d.zarr.scratch-*"))


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_of_every_kind_are_gathered(kind: str, sources: Any, tmp_path: Path) -> None:
    """From their files, or from memory into which they were decoded."""
    path, called = sources(kind, 200), Counter[str]()
    crew = Watched(lambda fn, call: called.update([fn.__name__]))
    settings: dict[str, Any] = {"seed": 5, "block_bytes": "10KB", "chunk_rows": 8, "fsync": False}
    result = shuffle(path, tmp_path / "d.zarr", gather=True, executor=crew, **settings)
    assert_is_oracle(path, tmp_path / "d.zarr", 5)
    plain = [f.row_bytes for f in fields_of(path) if f.source_key]
    assert result.plan.staged == 200 * (result.plan.row_bytes - sum(plain))
    assert (called["warm"] > 0, called["stage"] > 0) == (bool(plain), result.plan.staged > 0)
    assert called["warm"] + called["stage"] > 0
    assert in_memory(tmp_path) == []


def test_both_ways_were_taken_of_those_sources(sources: Any) -> None:
    plain = [all(f.source_key for f in fields_of(sources(kind, 200))) for kind in SOURCES]
    assert any(plain)
    assert not all(plain)


def fields_of(path: Path) -> list[Any]:
    return [source_field(name, found) for name, found in source_arrays(as_place(path)).items()]


def in_memory(folder: Path) -> list[Path]:
    """What the run to ``folder / d.zarr`` has in the machine's memory."""
    found = Path(memory_beside(scratch_place(as_place(folder / "d.zarr"), None)).url)
    return sorted(found.rglob("*"))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Compressed rows of 400 bytes beside plain ones of 4."""
    path = tmp_path / "packed.zarr"
    group(path, {})
    rng = np.random.default_rng(0)
    array(path, rng.integers(0, 9, (ROWS, 100), np.int32), "act", chunks=(100, 100), compressors=ZstdCodec())
    array(path, rng.integers(0, 2**31, ROWS, np.int32), "token", chunks=(256,))
    return path


@pytest.mark.parametrize("died", ["run", "machine"])
@pytest.mark.parametrize("after", [0, 3])
def test_a_stopped_run_decodes_again_only_what_is_gone(packed: Path, tmp_path: Path, died: str, after: int) -> None:
    dst, settings, jobs = tmp_path / "d.zarr", {**SHAPE, "block_bytes": 500 * 404}, list[Job]()
    decoded = list[int]()
    real = Source.read

    def read(self: Any, field: Any, start: int, out: Any) -> None:
        decoded.append(start)
        real(self, field, start, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "read", read)
        with pytest.raises(KeyboardInterrupt):
            shuffle(packed, dst, gather=True, executor=Stops(after), planned=jobs.append, **settings)
        first = len(decoded)
        assert first in (0, -(-ROWS // 400)), "pieces of whole chunks within a leaf"
        assert (first > 0) == (after > 0)
        if died == "machine":
            shutil.rmtree(memory_place(jobs[0]).url)
            Path(memory_place(jobs[0]).url).mkdir(mode=0o700)
        result = shuffle(packed, dst, **settings)
        assert len(decoded) - first == (0 if died == "run" and first else -(-ROWS // 400))
    assert result.resumed == after
    assert_is_oracle(packed, dst, 3)
    assert in_memory(tmp_path) == []


def test_control_decoded_rows_that_change_in_memory_end_the_run(packed: Path, tmp_path: Path) -> None:
    jobs = list[Job]()

    def hurt(fn: Any, call: Any) -> None:
        if fn is tasks.run_task and call[1].number == 1:
            with (Path(memory_place(jobs[0]).url) / "rows/0.2").open("r+b") as file:
                file.write(b"\xff" * 400)

    settings = {**SHAPE, "block_bytes": 500 * 404}
    with pytest.raises(ConservationError, match="rows of act are not those that were decoded"):
        shuffle(packed, tmp_path / "d.zarr", gather=True, executor=Watched(hurt), planned=jobs.append, **settings)
    assert not (tmp_path / "d.zarr/zarr.json").exists()
    shuffle(packed, tmp_path / "d.zarr", gather=True, overwrite=True, **settings)
    assert_is_oracle(packed, tmp_path / "d.zarr", 3)
    assert in_memory(tmp_path) == []


def test_workers_decode_and_gather_together(packed: Path, tmp_path: Path) -> None:
    with local_cluster(2) as crew:
        shuffle(packed, tmp_path / "d.zarr", gather=True, memory="64MB", executor=crew, **SHAPE)
        folder = memory_beside(scratch_place(as_place(tmp_path / "d.zarr"), None)).url
        assert not any(folder in text for text in crew.map(_mappings, [(n,) for n in range(8)])), (
            "a worker that lives on holds nothing"
        )
    assert_is_oracle(packed, tmp_path / "d.zarr", 3)


def _mappings(_: int) -> str:
    """The mapped files of the process that runs this."""
    return Path("/proc/self/maps").read_text()


def test_a_source_in_a_store_is_fetched_once(tmp_path: Path) -> None:
    url, data = f"memory://gather-{tmp_path.name}/s.zarr", values(500, (12,))
    array(url, data)
    result = shuffle(url, tmp_path / "d.zarr", gather=True, memory="400MB", seed=3, chunk_rows=64, fsync=False)
    assert result.plan.staged == data.nbytes
    found = zarr.open_group(tmp_path / "d.zarr", mode="r")["data"][:]
    np.testing.assert_array_equal(found.view("u4"), data[Keys(3).order(500)].view("u4"))


def test_chunks_that_are_absent_are_filled_once(tmp_path: Path) -> None:
    hole = tmp_path / "hole.zarr"
    array(hole, values(50, (12,)))
    (hole / "c/3/0").unlink()
    shuffle(hole, tmp_path / "d.zarr", gather=True, missing_chunks="fill", **SHAPE)
    assert_is_oracle(hole, tmp_path / "d.zarr", 3)


def test_more_rows_than_the_memory_holds_are_not_decoded_into_it(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = scratch.shutil.disk_usage(scratch.MEMORY_FOLDER)
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda path: full._replace(free=1_100_000))
    with pytest.raises(InfeasibleError, match=r"1.2 MB of rows are to stay .* has 1.1 MB free: leave gather out"):
        shuffle(packed, tmp_path / "d.zarr", gather=True, **SHAPE)
    assert not (tmp_path / "d.zarr").exists()


@pytest.mark.parametrize("rows", [0, 1, 2, 65])
@pytest.mark.parametrize(
    "output", [{}, {"codec": "zstd"}, {"codec": "crc32c", "source_row": False}, {"chunks_per_shard": 2}]
)
def test_few_rows_and_coded_outputs(tmp_path: Path, rows: int, output: dict[str, Any]) -> None:
    array(tmp_path / "s.zarr", values(rows, (12,)))
    shuffle(
        tmp_path / "s.zarr",
        tmp_path / "d.zarr",
        gather=True,
        seed=5,
        memory="64MB",
        chunk_rows=8,
        block_bytes=40 * 48,
        fsync=False,
        **output,
    )
    assert_is_oracle(tmp_path / "s.zarr", tmp_path / "d.zarr", 5, source_row=output.get("source_row", True))


def test_some_of_the_fields_into_an_object_store(src: Path) -> None:
    url = f"memory://gather-{src.parent.name}/d.zarr"
    shuffle(src, url, gather=True, memory="400MB", fields=["middle", "wide"], seed=3)
    order = Keys(3).order(ROWS)
    found, source = zarr.open_group(url, mode="r"), zarr.open_group(src, mode="r")
    assert set(found.array_keys()) == {"middle", "wide", "source_row"}
    for name in ("middle", "wide"):
        np.testing.assert_array_equal(found[name][:], source[name][:][order])


def test_workers_of_a_cluster_share_the_leaves(src: Path, tmp_path: Path) -> None:
    with local_cluster(2) as crew:
        result = shuffle(src, tmp_path / "d.zarr", gather=True, memory="64MB", executor=crew, **SHAPE)
    assert_is_oracle(src, tmp_path / "d.zarr", 3)
    assert result.plan.leaves >= 4, "some for each of them, though one could hold all rows"


def test_a_stopped_run_resumes(src: Path, tmp_path: Path) -> None:
    dst, settings = tmp_path / "d.zarr", {**SHAPE, "block_bytes": 200 * 2444}
    with pytest.raises(KeyboardInterrupt):
        shuffle(src, dst, gather=True, executor=Stops(5), **settings)
    with pytest.raises(RequestError, match="resume it without a scheduler"):
        shuffle(src, dst, executor=Elsewhere(), **settings)
    again = Stops()
    result = shuffle(src, dst, executor=again, **settings)  # it is remembered that it gathers
    assert (result.resumed, again.seen.count(False)) == (5, 5)
    assert_is_oracle(src, dst, 3)


@pytest.mark.parametrize(
    ("name", "row_bytes", "stories"),
    [
        ("src", 2444, 10),
        ("packed", 404, 12),
        pytest.param("src", 2444, 100, marks=pytest.mark.soak),
        pytest.param("packed", 404, 100, marks=pytest.mark.soak),
    ],
)
def test_deaths_and_errors_at_random_change_no_byte(
    name: str, row_bytes: int, stories: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Neither with rows from files nor with decoded rows, of which nothing stays in memory."""
    source = request.getfixturevalue(name)
    settings, ends = {**SHAPE, "block_bytes": 500 * row_bytes}, Counter[str]()
    for seed in range(stories):
        dst = tmp_path / f"{seed}.zarr"
        resumed_until_done(source, dst, seed, 0.01, ends, falls=0.6, gather=True, **settings)
        assert_is_oracle(source, dst, 3)
        assert not Path(memory_beside(scratch_place(as_place(dst), None)).url).exists()
    assert ends["Killed"] > 10
    assert ends["StorageError"] + ends["StorageFullError"] > 3


def test_the_source_comes_into_the_page_cache_first(src: Path, tmp_path: Path) -> None:
    files = [p for p in src.rglob("c*") if p.is_file()]
    for file in files:
        evict(file)
    seen: list[bool] = []

    def look(fn: Any, call: Any) -> None:
        if fn is tasks.run_task and not seen:
            seen.extend(map(cached, files))

    before = list(map(cached, files))
    if any(before):
        pytest.skip("a file system that is in memory itself")
    shuffle(src, tmp_path / "d.zarr", gather=True, executor=Watched(look), block_bytes="1MB", **SHAPE)
    assert all(seen)
    assert len(seen) == len(files)


def cached(path: Path) -> bool:
    """True if the last byte of a file is in the page cache."""
    with path.open("rb", buffering=0) as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], path.stat().st_size - 1, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False


@pytest.mark.parametrize("bits", [(64, 64), (7, 64), (3, 2), (0, 0)])
@pytest.mark.parametrize("step", [1000, 333, 77])
def test_rows_of_leaves_are_the_order_cut_into_pieces(bits: tuple[int, int], step: int) -> None:
    """The same holds where keys are equal across a cut."""
    keys, n, size = Keys(4, *bits), 1000, 130
    every = np.arange(n, dtype=np.uint64)
    order = np.lexsort((every, keys.lo_at(every), keys.hi(0, n)))
    ranks = np.minimum(np.arange(0, n + size, size), n)
    looks = [lookup.binned(keys.hi(a, min(a + step, n)), a, lookup.bin_bits(len(ranks) - 1)) for a in range(0, n, step)]
    table = lookup.runs(np.array([cuts for _, cuts in looks]), ranks)
    read = 0
    for leaf, (first, stop) in enumerate(pairwise(ranks.tolist())):
        begins, ends = table[leaf, 1:].reshape(2, -1)
        words = np.concatenate([w[:, a:b] for (w, _), a, b in zip(looks, begins, ends, strict=True)], axis=1)
        read += words.shape[1]
        hi, rows = lookup.picked(keys, words, first - table[leaf, 0], stop - first)
        np.testing.assert_array_equal(rows, order[first:stop])
        np.testing.assert_array_equal(hi, keys.hi(0, n)[rows])
    if bits[0] == 64:
        assert read < 1.1 * n, "a leaf reads few rows but its own"


@pytest.mark.parametrize("harm", ["runs", "rows", "gone"])
def test_damaged_keys_are_noticed_and_made_again(src: Path, tmp_path: Path, harm: str) -> None:
    jobs, settings = list[Job](), {**SHAPE, "block_bytes": 500 * 2444}

    def hurt(fn: Any, call: Any) -> None:
        if fn is tasks.run_task and call[1].number == 2:
            path = Path(jobs[0].scratch.url) / "keys" / ("runs" if harm == "runs" else "1")
            if harm == "gone":
                path.unlink()
            else:
                path.write_bytes(b"\xff" * path.stat().st_size)

    with pytest.raises((FormatError, StorageError), match="keys"):
        shuffle(src, tmp_path / "d.zarr", gather=True, executor=Watched(hurt), planned=jobs.append, **settings)
    shuffle(src, tmp_path / "d.zarr", gather=True, **settings)
    assert_is_oracle(src, tmp_path / "d.zarr", 3)


def test_control_keys_that_changed_in_scratch_end_the_run(src: Path, tmp_path: Path) -> None:
    """A wrong number of a row that exists is seen at the end, by the digest of all keys."""
    jobs = list[Job]()

    def hurt(fn: Any, call: Any) -> None:
        if fn is tasks.run_task and call[1].number == 0:
            path = Path(jobs[0].scratch.url) / "keys/1"
            words = np.fromfile(path, "<u8")
            words[len(words) // 2 :] = words[len(words) // 2]
            words.tofile(path)

    settings = {**SHAPE, "block_bytes": 500 * 2444}
    with pytest.raises(ConservationError, match="every row exactly once"):
        shuffle(src, tmp_path / "d.zarr", gather=True, executor=Watched(hurt), planned=jobs.append, **settings)


def test_control_rows_that_are_taken_twice_end_the_run(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many other rows are never taken."""
    find = gather.find_rows

    def again(job: Job, leaf: int) -> Any:
        return find(job, 0 if leaf == 1 else leaf)

    monkeypatch.setattr(gather, "find_rows", again)
    with pytest.raises(ConservationError, match="every row exactly once"):
        shuffle(src, tmp_path / "d.zarr", gather=True, block_bytes=500 * 2444, **SHAPE)
    assert not (tmp_path / "d.zarr/zarr.json").exists()


def test_control_rows_that_are_read_wrong_are_seen_by_verify(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """While they move, there is nothing to compare them with."""
    read = gather.Gather.read

    def wrong(self: Any, number: int, start: int, stop: int, out: Any) -> None:
        read(self, number, start, stop, out)
        if start == 0:
            out[0] ^= 1

    monkeypatch.setattr(gather.Gather, "read", wrong)
    shuffle(src, tmp_path / "d.zarr", gather=True, block_bytes="1MB", **SHAPE)
    assert not verify(src, tmp_path / "d.zarr").ok


def test_refusals_come_before_anything_is_written(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dst = tmp_path / "d.zarr"
    with pytest.raises(RequestError, match="leave it out with a scheduler"):
        shuffle(src, dst, gather=True, executor=Elsewhere(), **SHAPE)
    monkeypatch.setattr(prepare, "take_inventory", lambda *_, **__: pytest.fail("too late"))
    for source, settings, message in [
        (src, {"levels": 2}, "is one level without spill"),
        (src, {"spill_memory": "1MB"}, "is one level without spill"),
        (_virtual(tmp_path, kind="copy"), {}, "are some of another store's"),
    ]:
        with pytest.raises(RequestError, match=message):
            shuffle(source, dst, gather=True, **SHAPE, **settings)
    monkeypatch.undo()
    assert not dst.exists()
    with pytest.raises(RequestError, match="rows are gathered from a store"):
        plan(rows=10, row_bytes=8, gather=True)


def test_source_and_all_workers_must_have_room(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(Serial):
        workers = 2

    dst = tmp_path / "d.zarr"
    monkeypatch.setattr("actshuffle.engine.preview.machine_memory", lambda: 87_000_000)
    with pytest.raises(InfeasibleError, match=r"7.33 MB .* 2 workers with 40 MB each, .* 87 MB"):
        shuffle(src, dst, gather=True, memory="40MB", executor=Two(), **SHAPE)
    with pytest.raises(InfeasibleError, match="2 workers"):
        plan(src, gather=True, memory="40MB", workers=2)
    assert not dst.exists()
    shuffle(src, dst, gather=True, memory="40MB", **SHAPE)
    assert_is_oracle(src, dst, 3)


@pytest.mark.parametrize("first", [True, False])
def test_a_half_done_run_goes_on_as_it_began(src: Path, tmp_path: Path, first: bool) -> None:
    dst, settings = tmp_path / "d.zarr", {**SHAPE, "block_bytes": 200 * 2444, "run_bytes": 1}
    with pytest.raises(KeyboardInterrupt):
        shuffle(src, dst, gather=first, executor=Stops(3), **settings)
    with pytest.raises(ResumeMismatchError, match="gather was"):
        shuffle(src, dst, gather=not first, **settings)
    shuffle(src, dst, gather=first, **settings)
    assert_is_oracle(src, dst, 3)


@pytest.mark.parametrize("leaf", [0, 1])
def test_a_file_that_ends_early_is_told(src: Path, tmp_path: Path, way: str, leaf: int) -> None:
    """Before the first leaf, or between two."""

    def cut(fn: Any, call: Any) -> None:
        if fn is tasks.run_task and call[1].number == leaf:
            os.truncate(src / "wide/c/4/0", 1000)

    with pytest.raises(StorageError, match="wide/c/4/0"):
        shuffle(src, tmp_path / "d.zarr", gather=True, block_bytes=1000 * 2444, executor=Watched(cut), **SHAPE)


def test_a_file_that_ends_early_under_a_worker_is_told(src: Path, tmp_path: Path) -> None:
    """The system ends the worker at once; the next one that takes its task looks at the sizes first."""
    with local_cluster(1) as crew, pytest.raises(StorageError, match="wide/c/4/0"):
        shuffle(src, tmp_path / "d.zarr", gather=True, memory="64MB", executor=_Cutting(crew, src), **SHAPE)


class _Cutting(Executor):
    """Cuts a file of the source off when a worker has looked at its size, and is about to take rows from it."""

    one_machine = True

    def __init__(self, inner: Executor, src: Path) -> None:
        self.inner, self.src = inner, src

    def task_memory(self) -> int:
        return self.inner.task_memory()

    def map(self, fn: Any, calls: Any) -> Any:
        if fn is not tasks.run_task:
            yield from self.inner.map(fn, calls)
            return
        yield from self.inner.map(_cut_and_run, ((self.src, *call) for call in calls))


def _cut_and_run(src: Path, job: Job, task: Any) -> Any:
    find = gather.Gather.find

    def cut(self: Any, *args: Any) -> Any:
        os.truncate(src / "wide/c/4/0", 0)
        return find(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather.Gather, "find", cut)
        return tasks.run_task(job, task)


def test_control_a_mapping_is_given_back_when_the_run_ends(src: Path, tmp_path: Path) -> None:
    def mapped() -> bool:
        return str(src) in Path("/proc/self/maps").read_text()

    seen = list[bool]()

    def look(fn: Any, call: Any) -> None:
        if fn is tasks.run_task:
            seen.append(mapped())

    shuffle(src, tmp_path / "d.zarr", gather=True, executor=Watched(look), block_bytes=500 * 2444, **SHAPE)
    assert seen[1:] == [True] * (len(seen) - 1)
    assert len(seen) > 2
    assert not mapped()


def test_rows_from_an_object_store_are_a_request_each() -> None:
    """`gather` refuses object stores, but the interface of places supports such reads."""
    data = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    objects = open_objects(as_place("memory://rows"))
    objects.put("k", data.data)
    out = bytearray(30)
    objects.read_rows("k", 10, [500, 0, 990], memoryview(out), [20, 0, 10])
    assert bytes(out) == b"".join(data[a : a + 10].tobytes() for a in (0, 990, 500))


def _virtual(folder: Path, **facts: Any) -> Path:
    array(folder / "bare.zarr", values(50, (12,)))
    array(folder / "bare2.zarr", values(50, (12,))[::-1])
    concat([folder / "bare.zarr", folder / "bare2.zarr"], folder / "both.zarr")
    text = json.loads((described := folder / "both.zarr/_actshuffle/virtual.json").read_text())
    described.write_text(json.dumps(text | facts))
    return folder / "both.zarr"


@pytest.mark.parametrize("settings", [{"gather": True}, {"levels": 2, "gather": False}])
def test_rows_of_several_stores_are_brought_into_memory(settings: Any, tmp_path: Path) -> None:
    src, jobs = _virtual(tmp_path), list[Job]()
    small = {"seed": 3, "fsync": False, "chunk_rows": 4, "block_bytes": "1KB", "run_bytes": 1}
    run = small | {"planned": jobs.append} | settings
    with pytest.raises(KeyboardInterrupt):
        shuffle(src, tmp_path / "d.zarr", executor=Stops(1), **run)
    shuffle(src, tmp_path / "d.zarr", **run)
    assert [job.plan.staged for job in jobs] == [4800 if settings.get("gather") else 0] * 2
    (found,) = (np.asarray(a[:]) for name, a in zarr.open_group(tmp_path / "d.zarr").arrays() if name != "source_row")
    whole = np.concatenate([np.asarray(zarr.open_array(tmp_path / name)[:]) for name in ("bare.zarr", "bare2.zarr")])
    assert found.tobytes() == whole[Keys(3).order(100)].tobytes()
    assert verify(src, tmp_path / "d.zarr").ok


@pytest.mark.parametrize("facts", [{"kind": "copy"}, {"kind": "merge"}, {"key_rows": [0, 100]}])
def test_virtual_rows_of_other_kinds_are_not_gathered(facts: Any, tmp_path: Path) -> None:
    src = as_place(_virtual(tmp_path, **facts))
    assert not virtual.is_whole(src, 100)
    assert virtual.is_whole(as_place(_virtual(tmp_path / "plain")), 100)
