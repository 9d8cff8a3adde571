"""Counts and receipts that are too many for one task: the same bytes, whoever dies, and damage is found."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path

import numpy as np
import pytest

import actshuffle
from actshuffle.engine import totals
from actshuffle.errors import ConservationError, FormatError
from actshuffle.executors import Serial
from actshuffle.jobs import sums
from actshuffle.jobs.sums import Sums
from actshuffle.ordering import bounds
from actshuffle.planning import tree
from actshuffle.planning.planner import make_plan
from actshuffle.storage.place import as_place
from actshuffle.testing import Faults, Killed, leftovers, matching, simulate
from actshuffle.testing import run as serial_run
from actshuffle.testing.stories import new_process, prepared
from support.executors import Twice
from support.processes import FEW, PLAN, SEED, as_a_large_run, assert_exact, dask_cluster, drive, ended, source, start

# One operation of each kind of task that only a large run has.
PHASES = {
    "query": "put counts/0/query",
    "count": "put counts/0/0/7",
    "sum": "put counts/0/1/2",
    "total": "put counts/0/3/0",
    "counts removed": "delete_prefix counts/0/0",
    "collect": "get counts/16/query",
    "boundaries": "put bounds/c.*",
    "pack": "put level1/packs/2.bin",
    "pack receipt": "put level1/packs/1.json",
    "tables of packs": "put level1/runs/c.1.*",
    "index receipt": "put level1/index/1.json",
    "second pack": "put level2/packs/1.bin",
    "leaf pack": "put _actshuffle/packs/2.bin",
    "leaf pack receipt": "put _actshuffle/packs/1.json",
    "publish": "put _actshuffle/digests/doc/c.*",
    "clearing": "delete_prefix _actshuffle/packs",
}


GATHER = {"gather": True, "chunk_rows": 7, "block_bytes": 560}


@pytest.fixture(scope="session")
def src(tmp_path_factory):
    return source(tmp_path_factory.mktemp("source") / "src.zarr")


@pytest.fixture
def dst(tmp_path):
    return tmp_path / "dst.zarr"


@pytest.fixture
def large(monkeypatch):
    """This process adds up a few counts and receipts at a time."""
    names = ((sums, "FAN"), (tree, "PACK"), (tree, "TABLE_BYTES"), (bounds, "COUNT_ROWS"))
    for (module, name), few in zip(names, FEW, strict=True):
        monkeypatch.setattr(module, name, few)
    monkeypatch.setattr(bounds, "_COLLECT", 20)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def scratch(dst: Path) -> Path:
    (found,) = dst.parent.glob("dst.zarr.scratch-*")
    return found


def stop_at(src, dst, what, kind="kill", **plan):
    """A run that dies at its first operation of some kind, as far as this process can tell."""
    new_process()
    with Faults(matching(what, kind)), pytest.raises(Killed):
        serial_run(src, dst, SEED, **(PLAN | plan))
    new_process()


# --- The same bytes -----------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [PLAN, GATHER, {**PLAN, "levels": 2, "block_bytes": 800}])
def test_every_file_is_that_of_a_small_run(plan, src, tmp_path, request):
    one, other = tmp_path / "one" / "dst.zarr", tmp_path / "other" / "dst.zarr"
    serial_run(src, one, SEED, **plan)
    request.getfixturevalue("large")
    new_process()
    seen = set[str]()
    with Faults(lambda operation: seen.add(f"{operation.name} {operation.key}")):
        serial_run(src, other, SEED, **plan)
    assert files(one) == files(other)
    assert leftovers(other) == []
    assert "put _actshuffle/packs/1.bin" in seen
    assert ("put level1/packs/1.bin" in seen) == ("put counts/0/3/0" in seen) == (plan.get("gather") is None)


@pytest.mark.parametrize("how", ["receipt", "rewrite", "late"])
def test_tasks_done_twice_write_the_same(how, src, dst, large):
    twice = Twice(Serial(), how, share=1)
    actshuffle.shuffle(src, dst, seed=SEED, fsync=False, executor=twice, **PLAN)
    assert twice.repeats > 0
    assert_exact(src, dst)


@pytest.mark.parametrize("seed", range(12))
def test_every_story_ends_well(seed, tmp_path, large):
    simulate(seed, tmp_path, rate=[0.01, 0.05, 0.1][seed % 3])


@pytest.mark.parametrize("seed", range(1000, 1004))
def test_a_store_that_lies_is_caught(seed, tmp_path, large):
    simulate(seed, tmp_path, kinds=("silent", "kill"), rate=0.03)


# --- Kills --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "kind"), [*zip(PHASES, itertools.cycle(["kill", "power", "torn"]))])
def test_stopped_during(phase, kind, src, dst, large):
    what = PHASES[phase]
    if kind == "torn" and not what.startswith("put"):
        kind = "late"
    stop_at(src, dst, what, kind)
    try:
        serial_run(src, dst, SEED, **PLAN)
    except FormatError as err:
        assert "run again" in str(err)
        new_process()
        serial_run(src, dst, SEED, **PLAN)
    assert_exact(src, dst)


@pytest.mark.parametrize("phase", ["count", "pack", "leaf pack", "clearing"])
def test_killed_driver_during(phase, src, dst, tmp_path):
    told = tmp_path / "told.json"
    killed = start(drive, told, src, dst, {}, (PHASES[phase], "kill"), as_a_large_run)
    assert ended(killed) == -signal.SIGKILL
    assert ended(start(drive, told, src, dst, {}, None, as_a_large_run)) == 0
    assert_exact(src, dst)


@pytest.mark.parametrize("what", ["put counts/0/0/*", "put level1/packs/*", "put _actshuffle/packs/*"])
def test_killed_worker_during(what, src, dst, tmp_path):
    with dask_cluster(tmp_path / "dask", 2, fault=(what, "kill"), broken=as_a_large_run) as cluster:
        told = tmp_path / "told.json"
        driver = start(drive, told, src, dst, {"scheduler": cluster.address}, None, as_a_large_run)
        assert ended(driver) == 0
        assert sorted(w.exitcode or 0 for w in cluster.workers) == [-signal.SIGKILL, 0]
    assert_exact(src, dst)


def test_counts_that_are_there_are_not_counted_again(src, dst, large, monkeypatch):
    """A run that resumes goes on with the pass in which it stopped."""
    stop_at(src, dst, "put counts/0/0/7")
    asked, inner = [], bounds.answer

    def watched(keys, start, stop, query):
        asked.append(query.bits)
        return inner(keys, start, stop, query)

    monkeypatch.setattr(bounds, "answer", watched)
    serial_run(src, dst, SEED, **PLAN)
    assert_exact(src, dst)
    assert asked.count(0) == 4  # of 11 ranges, 7 were counted before
    assert max(asked) >= 16


# --- Damage -------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("at", [3, -20])
@pytest.mark.parametrize(
    ("stop", "damaged"),
    [
        ("put level1/runs/c.0.*", "level1/packs/1.bin"),
        ("put level2/runs/c.1.*", "level2/packs/2.bin"),
        ("put _actshuffle/digests/*", "_actshuffle/packs/1.bin"),
    ],
)
def test_damaged_pack(stop, damaged, at, src, dst, large):
    stop_at(src, dst, stop)
    home = dst if damaged.startswith("_") else scratch(dst)
    flip(home / damaged, at)
    with pytest.raises(FormatError, match=r"damaged.*run again"):
        serial_run(src, dst, SEED, **PLAN)
    assert not (home / damaged).exists()
    new_process()
    serial_run(src, dst, SEED, **PLAN)
    assert_exact(src, dst)


def test_control_checksums_that_are_not_compared(src, dst, tmp_path, large, monkeypatch):
    serial_run(src, tmp_path / "whole.zarr", SEED, **PLAN)
    stop_at(src, dst, "put _actshuffle/digests/*")
    flip(dst / "_actshuffle/packs/1.bin", 20)
    monkeypatch.setattr(totals, "unmarked", lambda name, data: data[:-16])
    serial_run(src, dst, SEED, **PLAN)
    assert files(dst / "_actshuffle/digests") != files(tmp_path / "whole.zarr/_actshuffle/digests")


def test_damaged_spill_is_redone_with_the_packs_made_of_it(src, dst, large):
    """Rows that changed in level 1's spill are noticed in level 2; whatever was made of them goes."""
    stop_at(src, dst, "put level2/blocks/c.0.0")
    flip(scratch(dst) / "level1/blocks/c.1.0", 40)
    raised = 0
    while True:
        new_process()
        try:
            serial_run(src, dst, SEED, **PLAN)
        except ConservationError as err:
            raised += 1
            assert "run again" in str(err)
            continue
        break
    assert 1 <= raised <= 4
    assert_exact(src, dst)


def test_query_that_is_gone(src, dst, large):
    job = prepared(src, dst, SEED, **PLAN)
    with pytest.raises(FormatError, match="counts/16/query"):
        from actshuffle.engine import tasks

        tasks.count(job, 16, 0, 11)


# --- Arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 10, 100])
def test_sums_of_any_number(count, tmp_path, monkeypatch):
    monkeypatch.setattr(sums, "FAN", 3)
    arrays = np.random.default_rng(count).integers(0, 1 << 60, (count, 5))
    found = Sums(as_place(tmp_path), "some", "owner", count)
    for number, array in enumerate(arrays):
        found.write(f"0/{number}", array)
    assert found.total() is None
    np.testing.assert_array_equal(found.add_up(Serial()), arrays.sum(axis=0))
    np.testing.assert_array_equal(found.total(), arrays.sum(axis=0))
    assert Sums(as_place(tmp_path), "some", "another", count).total() is None


def test_an_array_that_is_missing_is_not_zero(tmp_path):
    found = Sums(as_place(tmp_path), "some", "owner", 2)
    found.write("0/0", np.ones(3, np.int64))
    with pytest.raises(FormatError, match="some/0/1"):
        found.add_up(Serial())


@pytest.mark.parametrize("pack", [1, 2, 5, 1024])
@pytest.mark.parametrize("table_bytes", [1, 100, 1 << 20])
def test_packs_and_index_tasks_cover_everything_once(pack, table_bytes, monkeypatch):
    monkeypatch.setattr(tree, "PACK", pack)
    monkeypatch.setattr(tree, "TABLE_BYTES", table_bytes)
    plan = make_plan(997, 8, levels=3, block_bytes=1200, run_bytes=1, chunk_rows=7)
    for level in range(1, plan.levels + 1):
        parents = plan.buckets(level - 1) if level < plan.levels else 1
        packed = [task for p in range(parents) for n in plan.packs_of(level, p) for task in plan.packed(level, n)]
        most = plan.blocks_per_parent(level) if level < plan.levels else plan.leaves
        assert packed == (list(range(plan.task_count(level))) if most > pack else [])
        if level < plan.levels:
            tasks = [plan.indexed(level, n) for p in range(parents) for n in plan.index_tasks(level, p)]
            assert [child for _, children in tasks for child in children] == list(range(plan.buckets(level)))
            assert all(child in plan.children(level - 1, p) for p, children in tasks for child in children)
            if most <= pack:
                assert len(tasks) == parents
