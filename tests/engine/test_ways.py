"""The way that a run takes by itself: the same bytes whichever it is, and the same way when it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zarr.codecs import ZstdCodec

from actshuffle import plan, shuffle, status
from actshuffle.engine import preview, tasks
from actshuffle.engine.job import Job, Kind
from actshuffle.errors import ResumeMismatchError
from actshuffle.executors import Serial, local_cluster
from actshuffle.planning import strategy
from support.executors import Elsewhere, Stops, Watched
from support.oracle import assert_is_oracle
from support.stores import array, group, values

ROWS, ROW = 40_000, 104
SHAPE: dict[str, Any] = {"seed": 3, "chunk_rows": 512, "fsync": False}
PLENTY = 1 << 34


class Two(Serial):
    """Two workers, as far as the planner knows."""

    workers = 2


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return _store(tmp_path / "plain.zarr")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return _store(tmp_path / "packed.zarr", compressors=ZstdCodec())


def _store(path: Path, **settings: Any) -> Path:
    group(path, {})
    array(path, values(ROWS, (25,)), "act", chunks=(1000, 25), **settings)
    array(path, np.arange(ROWS, dtype="<u4"), "token", chunks=(4096,))
    return path


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the planner sees: free memory, free tmpfs, a source in the page cache, and tasks that cost nothing by
    themselves."""

    def set_to(free: int = PLENTY, shared: int = PLENTY, resident: bool = False) -> None:
        monkeypatch.setattr(preview, "is_in_memory", lambda device: resident)
        monkeypatch.setattr(preview, "free_memory", lambda: free)
        monkeypatch.setattr(preview, "free_shared", lambda: shared)
        monkeypatch.setattr(preview, "_cached", lambda src, rows, fields: 1.0)
        monkeypatch.setattr(strategy, "OVERHEAD", 0.0)

    set_to()
    return set_to


def way(job: Job) -> str:
    if job.kind is Kind.GATHER:
        return "memory" if job.plan.staged else "gather"
    return "spill" if job.plan.spill_memory else f"levels {job.plan.levels}"


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "fits the page cache": ("plain", {}, {}, "gather"),
    "must be decoded": ("packed", {}, {"memory": "50MB"}, "memory"),
    "must be decoded, in one task": ("packed", {}, {}, "levels 1"),
    "fits no memory": ("plain", {"free": 28_000_000}, {"memory": "22MB"}, "spill"),
    "lies in memory": ("plain", {"free": 50_000_000, "resident": True}, {"memory": "40MB"}, "gather"),
    "fits no memory, and no tmpfs": ("plain", {"free": 20_000_000}, {"memory": "24MB"}, "levels 2"),
    "tmpfs is small": ("packed", {"shared": 100_000}, {"memory": "50MB"}, "levels 2"),
    "levels are given": ("plain", {}, {"levels": 2}, "levels 2"),
    "one level is given": ("plain", {}, {"levels": 1}, "levels 1"),
    "no gather": ("plain", {"shared": 0}, {"gather": False}, "levels 1"),
    "M is given": ("plain", {}, {"block_bytes": 10_000 * ROW, "run_bytes": 1}, "levels 2"),
    "spill memory is given": ("plain", {}, {"levels": 2, "spill_memory": "1MB"}, "spill"),
    "no spill memory is given": ("plain", {}, {"memory": "24MB", "spill_memory": 0}, "levels 2"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_way_gives_the_same_bytes(case: str, tmp_path: Path, see: Any, request: pytest.FixtureRequest) -> None:
    name, sight, settings, expected = CASES[case]
    src, jobs = request.getfixturevalue(name), list[Job]()
    see(**sight)
    settings = {"memory": "100MB", **settings}
    shuffle(src, tmp_path / "d.zarr", planned=jobs.append, **SHAPE, **settings)
    assert way(jobs[0]) == expected
    assert_is_oracle(src, tmp_path / "d.zarr", 3)
    assert not list(tmp_path.glob("d.zarr.scratch-*"))
    assert plan(src, chunk_rows=512, **settings).levels == jobs[0].plan.levels


@pytest.mark.parametrize("first", ["gather", "spill", "levels"])
def test_a_run_resumes_the_way_it_began(first: str, plain: Path, tmp_path: Path, see: Any) -> None:
    """Even if memory is free now that was not, or the other way round; and memory need not be named again."""
    rich: dict[str, int] = {}
    poor = {"free": 20_000_000}
    before, after = {"gather": (rich, poor), "spill": ({"free": 28_000_000}, rich), "levels": (poor, rich)}[first]
    dst, jobs = tmp_path / "d.zarr", list[Job]()
    see(**before)
    with pytest.raises(KeyboardInterrupt):
        shuffle(plain, dst, memory="22MB", executor=Stops(2), planned=jobs.append, **SHAPE)
    see(**after)
    with pytest.raises(ResumeMismatchError, match=r"(levels|gather) was"):
        shuffle(plain, dst, memory="22MB", **SHAPE, **({"levels": 3} if first == "gather" else {"gather": True}))
    assert status(dst)["state"] == "half done"
    again = shuffle(plain, dst, planned=jobs.append, **({} if first == "spill" else {"levels": "auto"}), **SHAPE)
    assert [way(job).split()[0] for job in jobs] == [first, first]
    assert again.resumed == 2
    assert_is_oracle(plain, dst, 3)
    see(**before)
    assert shuffle(plain, dst, memory="22MB", **SHAPE).already_finished
    see(**after)
    assert shuffle(plain, dst, memory="22MB", **SHAPE).already_finished, "it is finished, whichever way is cheapest now"


@pytest.mark.parametrize("settings", [{}, {"levels": 1}])
@pytest.mark.parametrize("name", ["plain", "packed"])
def test_data_that_fits_one_task_is_work_for_all_workers(
    name: str, settings: dict[str, Any], tmp_path: Path, see: Any, request: pytest.FixtureRequest
) -> None:
    src, leaves = request.getfixturevalue(name), list[int]()

    class Seen(Watched, Two):
        workers = 2

    crew = Seen(lambda fn, call: leaves.append(call[1].number) if fn is tasks.run_task else None)
    result = shuffle(src, tmp_path / "d.zarr", memory="100MB", executor=crew, **SHAPE, **settings)
    assert result.plan.levels == 1
    assert sorted(leaves) == [*range(result.plan.leaves)]
    assert len(leaves) >= 4
    assert_is_oracle(src, tmp_path / "d.zarr", 3)


def test_workers_of_a_cluster_share_what_fits_one_task(plain: Path, tmp_path: Path, see: Any) -> None:
    with local_cluster(2) as crew:
        result = shuffle(plain, tmp_path / "d.zarr", memory="100MB", executor=crew, **SHAPE)
    assert (result.plan.levels, result.plan.leaves >= 4) == (1, True)
    assert_is_oracle(plain, tmp_path / "d.zarr", 3)


def test_workers_elsewhere_share_it_by_levels(plain: Path, tmp_path: Path, see: Any) -> None:
    class Eight(Elsewhere):
        workers = 8

    result = shuffle(plain, tmp_path / "d.zarr", memory="100MB", executor=Eight(), **SHAPE)
    assert result.plan.levels == 2
    assert result.plan.blocks(1) >= 8
    assert_is_oracle(plain, tmp_path / "d.zarr", 3)


def test_a_source_that_holds_nothing(tmp_path: Path, see: Any) -> None:
    array(tmp_path / "s.zarr", values(0, (12,)))
    shuffle(tmp_path / "s.zarr", tmp_path / "d.zarr", executor=Two(), seed=3)
    assert_is_oracle(tmp_path / "s.zarr", tmp_path / "d.zarr", 3)
