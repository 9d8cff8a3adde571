"""Spill that stays in memory: the same output, fewer bytes to disk, and every block checked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import actshuffle
from actshuffle import shuffle
from actshuffle.engine import preview, tasks
from actshuffle.engine import scratch as tier
from actshuffle.engine.job import Job
from actshuffle.engine.scratch import scratch_place
from actshuffle.errors import InfeasibleError, RequestError, StorageError
from actshuffle.executors import Dask, local_cluster
from actshuffle.planning.tree import Plan
from actshuffle.storage.objects import Objects, open_objects, wrapped
from actshuffle.storage.place import Place, as_place
from support.axes import halved
from support.executors import Elsewhere, Stops, Watched
from support.oracle import assert_is_oracle
from support.stores import array, values

ROWS, ROW = 3000, 48
SHAPE: dict[str, Any] = {"seed": 3, "chunk_rows": 50, "block_bytes": 100 * ROW, "run_bytes": 1}

pytestmark = pytest.mark.skipif(not tier.MEMORY_FOLDER.is_dir(), reason="no file system in memory")


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tier") / "src.zarr"
    array(path, values(ROWS, (12,)), chunks=(70, 12))
    return path


def folder_of(dst: Path) -> Path:
    return Path(tier.memory_beside(scratch_place(as_place(dst), None)).url)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Other tests may use that file system at the same time."""
    yield
    folder = folder_of(tmp_path / "d.zarr")
    left = list(folder.rglob("*")) if folder.exists() else None
    shutil.rmtree(folder, ignore_errors=True)
    assert left is None, left


def held(src: Path, dst: Path, **settings: Any) -> tuple[Plan, int, int]:
    """The plan, and bytes of spill blocks on disk and in memory when the last level begins."""
    jobs: list[Job] = []
    found: list[tuple[int, int]] = []

    def look(fn: Any, call: Any) -> None:
        if not found and fn is tasks.run_task and call[1].kind == "leaf":
            places = Path(jobs[0].scratch.url), Path(tier.memory_place(jobs[0]).url)
            a, b = (sum(f.stat().st_size for f in p.glob("level*/blocks/c.*")) for p in places)
            found.append((a, b))

    shuffle(src, dst, executor=Watched(look), planned=jobs.append, fsync=False, **SHAPE, **settings)
    return (jobs[0].plan, *found[0])


@pytest.mark.parametrize(("levels", "share"), halved([2, 3, 4], [0, 0.02, 0.5, 1, 5]))
def test_the_output_is_the_same_and_disk_is_spared(src: Path, tmp_path: Path, levels: int, share: float) -> None:
    budget = int(share * ROWS * (ROW + 16))
    plan, disk, memory = held(src, tmp_path / "d.zarr", levels=levels, spill_memory=budget)
    assert_is_oracle(src, tmp_path / "d.zarr", 3)
    assert memory <= budget
    assert memory == plan.kept(levels - 1) * plan.block_rows[-1] * (ROW + 16)
    assert memory <= plan.kept_bytes + plan.block_rows[-1] * (ROW + 16)  # the last has a hole
    last = levels - 1
    kept = [plan.is_kept(last, block) for block in range(plan.blocks(last))]
    assert (sum(kept), disk > 0) == (plan.kept(last), not all(kept))
    assert disk == (len(kept) - sum(kept)) * plan.block_rows[-1] * (ROW + 16)
    assert disk <= plan.scratch_bytes + plan.block_rows[-1] * (ROW + 16)
    assert (share == 5) == all(kept)
    if share == 0.5 and levels == 2:
        assert 0.4 < sum(kept) / len(kept) <= 0.5
        runs = "".join("01"[k] for k in kept)  # spread evenly
        assert "000" not in runs
        assert "11" not in runs


class Counted:
    """Passes everything on to a place, and counts bytes read and written there."""

    def __init__(self, inner: Objects, tally: dict[str, int]) -> None:
        self._inner, self._tally = inner, tally

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read(self, extents: Any) -> None:
        self._tally["read"] += sum(len(v) for e in extents for v in e.views)
        self._inner.read(extents)

    def put(self, key: str, data: Any) -> None:
        self._tally["written"] += len(data)
        self._inner.put(key, data)

    def writer(self, key: str, size: int) -> Any:
        self._tally["written"] += size
        return self._inner.writer(key, size)


def test_data_of_one_and_a_half_times_the_memory_moves_less_than_that_many_copies(tmp_path: Path) -> None:
    src, rows, width = tmp_path / "src.zarr", 4096, 4096
    array(src, values(rows, (width,), "u1"), chunks=(64, width))

    def moved(budget: int) -> tuple[float, float]:
        tally = {"read": 0, "written": 0}

        def counting(objects: Objects, place: Place) -> Any:
            kept = place.url.startswith(str(folder_of(tmp_path / "d.zarr")))
            return objects if kept else Counted(objects, tally)

        plans: list[Job] = []
        with wrapped(counting):
            shuffle(
                src,
                tmp_path / "d.zarr",
                seed=1,
                levels=2,
                block_bytes="1MiB",
                run_bytes="16KiB",
                overwrite=True,
                spill_memory=budget,
                planned=plans.append,
            )
        copy = 2 * rows * width
        return sum(tally.values()) / copy, plans[0].plan.disk_io_bytes / copy

    measured, planned = moved(int(rows * width / 1.5))
    assert measured <= 1.5
    assert planned == pytest.approx(measured, rel=0.02)
    measured, planned = moved(0)
    assert measured >= 2
    assert planned == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("levels", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_workers_of_one_machine_share_it(src: Path, tmp_path: Path, levels: int) -> None:
    with local_cluster(2) as crew:
        shuffle(src, tmp_path / "d.zarr", executor=crew, levels=levels, spill_memory="100KB", fsync=False, **SHAPE)
    assert_is_oracle(src, tmp_path / "d.zarr", 3)


@pytest.mark.parametrize(("after", "died"), halved([5, 33, 40, 62, 75], ["worker", "machine"]))
def test_a_run_that_stopped_resumes(src: Path, tmp_path: Path, after: int, died: str) -> None:
    dst, settings = (tmp_path / "d.zarr", SHAPE | {"levels": 3, "spill_memory": 90_000, "fsync": False})
    jobs: list[Job] = []
    with pytest.raises(KeyboardInterrupt):
        shuffle(src, dst, executor=Stops(after), planned=jobs.append, **settings)
    folder = Path(tier.memory_place(jobs[0]).url)
    assert any(folder.glob("level*/blocks/c.*"))
    if died == "machine":
        shutil.rmtree(folder)
    crew = Stops()
    shuffle(src, dst, executor=crew, **settings)
    assert_is_oracle(src, dst, 3)
    if died == "worker":
        plan = jobs[0].plan
        moved = sum(plan.task_count(level) for level in (1, 2, 3))
        assert sum(crew.seen) == moved + plan.buckets(0) + plan.buckets(1) - after
    else:
        assert any(crew.seen)


def test_a_damaged_block_in_memory_is_noticed_and_made_again(src: Path, tmp_path: Path) -> None:
    dst, settings = (tmp_path / "d.zarr", SHAPE | {"levels": 2, "spill_memory": 90_000, "fsync": False})
    jobs: list[Job] = []
    with pytest.raises(KeyboardInterrupt):
        shuffle(src, dst, executor=Stops(34), planned=jobs.append, **settings)
    block = sorted(Path(tier.memory_place(jobs[0]).url).glob("level1/blocks/c.*"))[0]
    whole = block.read_bytes()
    block.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Exception, match=f"damaged in scratch: level1/blocks/{block.name}"):
        shuffle(src, dst, **settings)
    shuffle(src, dst, **settings)
    assert_is_oracle(src, dst, 3)


@pytest.mark.parametrize("memory", [50_000, None])
def test_overwrite_clears_it(src: Path, tmp_path: Path, memory: int | None) -> None:
    dst = tmp_path / "d.zarr"
    with pytest.raises(KeyboardInterrupt):
        shuffle(src, dst, executor=Stops(20), levels=2, spill_memory=90_000, fsync=False, **SHAPE)
    shuffle(src, dst, levels=2, spill_memory=memory, overwrite=True, fsync=False, **SHAPE)
    assert_is_oracle(src, dst, 3)


def test_a_folder_of_others_is_left_to_those_who_keep_nothing_there(src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "d.zarr"
    folder = folder_of(dst)
    folder.mkdir(mode=0o755)
    try:
        shuffle(src, dst, levels=2, fsync=False, **SHAPE)
        assert_is_oracle(src, dst, 3)
        assert folder.is_dir()
    finally:
        folder.rmdir()


def test_a_half_done_run_is_not_resumed_where_its_memory_is_not(src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "d.zarr"
    with pytest.raises(KeyboardInterrupt):
        shuffle(src, dst, executor=Stops(20), levels=2, spill_memory=90_000, fsync=False, **SHAPE)
    with pytest.raises(RequestError, match="resume it without a scheduler"):
        shuffle(src, dst, executor=Elsewhere(), **SHAPE)
    shuffle(src, dst, fsync=False, **SHAPE)
    assert_is_oracle(src, dst, 3)


@pytest.mark.parametrize("made", ["link", "open", "file"])
def test_a_folder_that_is_not_ours_alone_is_refused(src: Path, tmp_path: Path, made: str) -> None:
    job = Job.__new__(Job)
    object.__setattr__(job, "scratch", scratch_place(as_place(tmp_path / "d.zarr"), None))
    folder = Path(tier.memory_place(job).url)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    if made == "link":
        folder.symlink_to(tmp_path / "elsewhere")
    elif made == "file":
        folder.touch(mode=0o600)
    else:
        folder.mkdir()
        folder.chmod(0o777)
    try:
        with pytest.raises(StorageError, match="not a folder of this user alone"):
            shuffle(src, tmp_path / "d.zarr", levels=2, spill_memory=90_000, fsync=False, **SHAPE)
        assert list((tmp_path / "elsewhere").iterdir()) == []
    finally:
        folder.rmdir() if made == "open" else folder.unlink()


def test_refusals_come_before_anything_is_written(src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "d.zarr"
    with pytest.raises(RequestError, match="leave it out with a scheduler"):
        shuffle(src, dst, executor=Elsewhere(), spill_memory="1MB", **SHAPE)
    with pytest.raises(RequestError, match="cannot read -1 as a size"):
        shuffle(src, dst, spill_memory=-1, **SHAPE)
    full = tier.shutil.disk_usage(tier.MEMORY_FOLDER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tier.shutil, "disk_usage", lambda path: full._replace(free=1000))
        with pytest.raises(InfeasibleError, match=r"are to stay in memory, but .* has 1 KB free"):
            shuffle(src, dst, spill_memory="1MB", **SHAPE)
    assert not dst.exists()


def test_spill_that_does_not_fit_beside_the_workers_is_refused(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system in memory may have more room than the container that the run is in."""
    dst, settings, jobs = tmp_path / "d.zarr", SHAPE | {"levels": 2, "spill_memory": "1MB", "fsync": False}, list[Job]()
    shuffle(src, dst, planned=jobs.append, **settings)
    need = jobs[0].plan.kept_bytes + jobs[0].plan.memory
    assert jobs[0].plan.kept_bytes
    monkeypatch.setattr(preview, "machine_memory", lambda: need - 1)
    with pytest.raises(InfeasibleError, match="of spill are to stay in memory beside 1 worker with"):
        shuffle(src, tmp_path / "e.zarr", **settings)
    assert not (tmp_path / "e.zarr").exists()
    with pytest.raises(InfeasibleError, match="of spill are to stay"):
        actshuffle.plan(src, **{k: v for k, v in settings.items() if k not in ("seed", "fsync")})
    monkeypatch.setattr(preview, "machine_memory", lambda: need)
    shuffle(src, tmp_path / "e.zarr", **settings)


def test_a_given_cluster_is_not_known_to_be_one_machine() -> None:
    assert Dask.__init__.__kwdefaults__["one_machine"] is False


def test_open_objects_of_no_tier(src: Path, tmp_path: Path) -> None:
    jobs: list[Job] = []
    shuffle(src, tmp_path / "d.zarr", levels=2, planned=jobs.append, fsync=False, **SHAPE)
    assert tier.memory_objects(jobs[0]) is None
    assert open_objects(tier.memory_place(jobs[0])).size("") is None
